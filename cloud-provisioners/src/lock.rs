//! What one process at a time may work on.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::Error;

/// Held by this process until it is dropped, or the process ends in whatever way.
#[derive(Debug)]
pub struct Lock {
    _file: File,
    path: PathBuf,
}

impl Lock {
    /// Takes a directory. Nothing is written for it.
    ///
    /// # Errors
    ///
    /// [`Error::Locked`] when another process has it; when it is not there.
    pub fn directory(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(Error::file("open", path))?;
        lock(&file, path)?;
        Ok(Self { _file: file, path: path.to_owned() })
    }

    /// Takes a file of its own, and makes it.
    pub(crate) fn file(path: &Path) -> Result<Self, Error> {
        loop {
            let file = File::create(path).map_err(Error::file("create", path))?;
            lock(&file, path)?;
            // One whose holder removed it meanwhile keeps nobody out.
            let held = file.metadata().map_err(Error::file("read", path))?;
            match std::fs::metadata(path) {
                Ok(there) if (there.dev(), there.ino()) == (held.dev(), held.ino()) => {
                    return Ok(Self { _file: file, path: path.to_owned() });
                }
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::file("read", path)(error));
                }
                _ => {}
            }
        }
    }

    /// Removes the file, and with that the lock.
    pub(crate) fn remove(self) -> Result<(), Error> {
        std::fs::remove_file(&self.path).map_err(Error::file("remove", &self.path))
    }
}

fn lock(file: &File, path: &Path) -> Result<(), Error> {
    flock(file, FlockOperation::NonBlockingLockExclusive).map_err(|errno| match errno {
        Errno::WOULDBLOCK => Error::Locked { path: path.to_owned() },
        other => Error::file("lock", path)(other.into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_and_nothing_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let first = Lock::file(&path).unwrap();
        assert!(matches!(Lock::file(&path), Err(Error::Locked { .. })));
        first.remove().unwrap();
        drop(Lock::file(&path).unwrap());
        Lock::file(&path).unwrap().remove().unwrap();
        assert!(!path.exists());

        let first = Lock::directory(directory.path()).unwrap();
        assert!(matches!(Lock::directory(directory.path()), Err(Error::Locked { .. })));
        drop(first);
        Lock::directory(directory.path()).unwrap();
    }
}
