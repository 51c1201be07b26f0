//! Where the keys go: a file that is complete or absent, or standard output.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{Gid, Uid, fchown};
use tempfile::Builder;

/// What to do about a file that is already there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// Leave it and fail.
    Keep,
    /// Replace it in one step, once the new content is on disk.
    Replace,
}

/// A file for keys: mode 0600, made under another name in the same directory, synced, then given its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyFile {
    path: PathBuf,
    existing: Existing,
}

/// Why the file was not written. Nothing is left behind under its name.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OutputError {
    /// A file of this name is there, and was not to be replaced.
    #[error("{}: exists already", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The path names no file in a directory.
    #[error("{}: not the name of a file in an existing directory", path.display())]
    NotAFile {
        /// What was given.
        path: PathBuf,
    },
    /// Writing, syncing or naming failed.
    #[error("{}: cannot write", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

impl KeyFile {
    /// A file at `path`.
    pub fn new(path: impl Into<PathBuf>, existing: Existing) -> Self {
        Self { path: path.into(), existing }
    }

    /// The path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Finds out early what would keep the file from being written later, before keys are asked for.
    ///
    /// # Errors
    /// [`OutputError`].
    pub fn check(&self) -> Result<(), OutputError> {
        let not_a_file = || OutputError::NotAFile { path: self.path.clone() };
        if self.path.file_name().is_none() || !self.directory().is_dir() || self.path.is_dir() {
            return Err(not_a_file());
        }
        if self.existing == Existing::Keep && self.path.symlink_metadata().is_ok() {
            return Err(OutputError::Exists { path: self.path.clone() });
        }
        Ok(())
    }

    /// Writes the file. Blocks.
    ///
    /// # Errors
    /// [`OutputError`]; a full disk is [`OutputError::Write`] with [`io::ErrorKind::StorageFull`].
    pub fn write(&self, content: &[u8]) -> Result<(), OutputError> {
        self.write_for(content, None)
    }

    /// Writes the file for another user, to whom it belongs before it has its name. Blocks.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn write_for(&self, content: &[u8], owner: Option<(Uid, Gid)>) -> Result<(), OutputError> {
        self.check()?;
        self.write_with(|file| {
            if let Some((user, group)) = owner {
                fchown(&*file, Some(user), Some(group))?;
            }
            file.write_all(content)
        })
    }

    fn write_with(&self, fill: impl FnOnce(&mut File) -> io::Result<()>) -> Result<(), OutputError> {
        let failed = |source| OutputError::Write { path: self.path.clone(), source };
        // tempfile makes files with mode 0600, and removes them when dropped without a name.
        let mut file = Builder::new().prefix(".keys-").tempfile_in(self.directory()).map_err(failed)?;
        fill(file.as_file_mut()).map_err(failed)?;
        file.as_file().sync_all().map_err(failed)?;
        let named = match self.existing {
            Existing::Keep => file.persist_noclobber(&self.path),
            Existing::Replace => file.persist(&self.path),
        };
        match named {
            Ok(_file) => {}
            Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(OutputError::Exists { path: self.path.clone() });
            }
            Err(error) => return Err(failed(error.error)),
        }
        File::open(self.directory()).and_then(|directory| directory.sync_all()).map_err(failed)
    }

    fn directory(&self) -> &Path {
        match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn names_in(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn the_file_is_new_and_only_its_owners() {
        let dir = tempfile::tempdir().unwrap();
        let file = KeyFile::new(dir.path().join("keys"), Existing::Keep);
        file.write(b"secret").unwrap();
        assert_eq!(fs::read(file.path()).unwrap(), b"secret");
        assert_eq!(fs::metadata(file.path()).unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(names_in(dir.path()), ["keys"]);
    }

    #[test]
    fn an_existing_file_is_replaced_only_on_request() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        fs::write(&path, "old").unwrap();
        let error = KeyFile::new(&path, Existing::Keep).write(b"new").unwrap_err();
        assert!(matches!(error, OutputError::Exists { .. }), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        KeyFile::new(&path, Existing::Replace).write(b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(names_in(dir.path()), ["keys"]);
    }

    #[test]
    fn a_file_that_appears_meanwhile_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        let file = KeyFile::new(&path, Existing::Keep);
        let error = file.write_with(|_| fs::write(&path, "other")).unwrap_err();
        assert!(matches!(error, OutputError::Exists { .. }), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"other");
        assert_eq!(names_in(dir.path()), ["keys"]);
    }

    #[test]
    fn a_dangling_link_counts_as_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        std::os::unix::fs::symlink("/nowhere/else", &path).unwrap();
        let error = KeyFile::new(&path, Existing::Keep).write(b"x").unwrap_err();
        assert!(matches!(error, OutputError::Exists { .. }), "{error}");
    }

    #[test]
    fn a_full_disk_leaves_no_partial_file() {
        let dir = tempfile::tempdir().unwrap();
        for existing in [Existing::Keep, Existing::Replace] {
            let file = KeyFile::new(dir.path().join("keys"), existing);
            let full = |file: &mut File| {
                file.write_all(b"half of the ke")?;
                Err(io::ErrorKind::StorageFull.into())
            };
            let error = file.write_with(full).unwrap_err();
            let OutputError::Write { source, .. } = error else { panic!("{error}") };
            assert_eq!(source.kind(), io::ErrorKind::StorageFull);
            assert!(names_in(dir.path()).is_empty());
        }
    }

    #[test]
    fn a_path_that_cannot_be_a_file_is_found_early() {
        let dir = tempfile::tempdir().unwrap();
        for path in [dir.path().join("none/keys"), dir.path().to_owned(), "/".into(), "".into()] {
            let error = KeyFile::new(&path, Existing::Replace).check().unwrap_err();
            assert!(matches!(error, OutputError::NotAFile { .. }), "{}: {error}", path.display());
        }
    }
}
