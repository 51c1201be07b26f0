//! The keys as a file for the app.

use std::path::{Path, PathBuf};

use rustix::fs::{Gid, Uid, statfs};

use super::Error;
use crate::Keys;
use crate::output::{Existing, KeyFile};

/// `TMPFS_MAGIC` and `RAMFS_MAGIC` of linux/magic.h: file systems that hold nothing but memory.
const MEMORY: [u32; 2] = [0x0102_1994, 0x8584_58f6];

/// `app_keys.json` in a directory on a tmpfs, in upstream's layout, mode 0600.
#[derive(Clone, Debug)]
pub struct TmpfsFile {
    file: KeyFile,
    owner: Option<Owner>,
}

/// The user an app runs as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl TmpfsFile {
    /// A file of this name, for this user; without one it stays this process's.
    pub fn new(path: impl Into<PathBuf>, owner: Option<Owner>) -> Self {
        Self { file: KeyFile::new(path, Existing::Replace), owner }
    }

    /// The path.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Refuses a directory that is not memory. Blocks.
    ///
    /// # Errors
    /// [`Error::NotMemory`], [`Error::File`].
    pub fn check(&self) -> Result<(), Error> {
        self.file.check()?;
        let directory = match self.path().parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let kind = statfs(directory).map(|it| it.f_type);
        if kind.is_ok_and(|kind| MEMORY.iter().any(|memory| i64::from(*memory) == kind)) {
            return Ok(());
        }
        Err(Error::NotMemory { directory: directory.display().to_string() })
    }

    /// Writes or replaces the file in one step; it belongs to its user before it has its name. Blocks.
    ///
    /// # Errors
    /// [`Error`]; the old file is then still there.
    pub fn write(&self, keys: &Keys) -> Result<(), Error> {
        self.check()?;
        let json = keys.to_json().map_err(Error::Encode)?;
        let owner = self.owner.map(|Owner { uid, gid }| (Uid::from_raw(uid), Gid::from_raw(gid)));
        Ok(self.file.write_for(&json, owner)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_on_a_disk_is_refused() {
        // proc is no file system for keys either, and every Linux has it.
        let file = TmpfsFile::new("/proc/app_keys.json", None);
        assert!(matches!(file.check(), Err(Error::NotMemory { .. })));
        let missing = TmpfsFile::new("/dev/shm/none/app_keys.json", None);
        assert!(matches!(missing.check(), Err(Error::File(_))));
    }

    #[test]
    fn a_directory_in_memory_is_taken() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        TmpfsFile::new(dir.path().join("app_keys.json"), None).check().unwrap();
    }
}
