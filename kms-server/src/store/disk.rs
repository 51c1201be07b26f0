//! Durable file operations in one directory. Each either happened or did not, also across a power cut.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

/// Longest file read from the directory. Only bootstrap-info.json, which holds evidence, comes near.
const MAX_FILE: u64 = 16 << 20;

/// Who may read a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// 0600.
    Secret,
    /// 0644.
    Public,
}

impl Mode {
    fn bits(self) -> u32 {
        match self {
            Self::Secret => 0o600,
            Self::Public => 0o644,
        }
    }
}

/// A directory.
pub(super) struct Disk {
    root: PathBuf,
    /// Tests stop here after so many changes, as a crash would.
    #[cfg(test)]
    pub(super) changes_left: std::sync::Mutex<Option<usize>>,
}

impl Disk {
    /// The directory `root`, made with mode 0700 when it is not there.
    pub(super) fn open(root: &Path) -> io::Result<Self> {
        if !root.is_dir() {
            DirBuilder::new().recursive(true).mode(0o700).create(root)?;
        }
        Ok(Self {
            root: root.to_owned(),
            #[cfg(test)]
            changes_left: std::sync::Mutex::new(None),
        })
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Counts a change, and refuses it when a test's crash point has come.
    #[cfg_attr(not(test), expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "tests use both"))]
    fn change(&self) -> io::Result<()> {
        #[cfg(test)]
        if let Some(left) = self.changes_left.lock().map_err(|_| io::Error::other("a test failed"))?.as_mut()
        {
            *left = left.checked_sub(1).ok_or_else(|| io::Error::other("crash"))?;
        }
        Ok(())
    }

    pub(super) fn exists(&self, name: &str) -> io::Result<bool> {
        self.path(name).try_exists()
    }

    /// The file's bytes; `None` when it is not there.
    pub(super) fn read(&self, name: &str) -> io::Result<Option<Zeroizing<Vec<u8>>>> {
        let file = match File::open(self.path(name)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let length = file.metadata()?.len();
        if length > MAX_FILE {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("longer than {MAX_FILE} bytes")));
        }
        // Room for everything at once: a vector that grows leaves copies of keys behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(length).unwrap_or(0) + 1));
        file.take(MAX_FILE).read_to_end(&mut bytes)?;
        Ok(Some(bytes))
    }

    /// Makes a file that is not there yet; its bytes are on the disk afterwards, its name after [`sync`](Self::sync).
    pub(super) fn create(&self, name: &str, mode: Mode, bytes: &[u8]) -> io::Result<()> {
        self.change()?;
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(mode.bits()).open(self.path(name))?;
        self.change()?;
        file.write_all(bytes)?;
        file.sync_all()
    }

    /// Puts `bytes` in the place of a file that may be there. Readers see the old bytes or the new ones.
    pub(super) fn replace(&self, name: &str, mode: Mode, bytes: &[u8]) -> io::Result<()> {
        let temporary = format!(".{name}.tmp");
        self.remove(&temporary)?;
        self.create(&temporary, mode, bytes)?;
        self.rename(&temporary, name)?;
        self.sync("")
    }

    pub(super) fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.change()?;
        fs::rename(self.path(from), self.path(to))
    }

    /// Gives a file a second name. Fails with `AlreadyExists` rather than replace anything.
    pub(super) fn link(&self, from: &str, to: &str) -> io::Result<()> {
        self.change()?;
        fs::hard_link(self.path(from), self.path(to))
    }

    /// Removes a file; it need not be there.
    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        if !self.exists(name)? {
            return Ok(());
        }
        self.change()?;
        fs::remove_file(self.path(name))
    }

    /// Makes a directory (0700) below this one.
    pub(super) fn create_directory(&self, name: &str) -> io::Result<()> {
        self.change()?;
        DirBuilder::new().mode(0o700).create(self.path(name))
    }

    /// Removes a directory and the files in it.
    pub(super) fn remove_directory(&self, name: &str) -> io::Result<()> {
        for file in self.files(name)? {
            self.remove(&format!("{name}/{file}"))?;
        }
        self.change()?;
        fs::remove_dir(self.path(name))?;
        self.sync("")
    }

    /// The names in a directory, sorted.
    pub(super) fn files(&self, name: &str) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.path(name))? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    /// Makes the names in a directory (`""` for this one) durable.
    pub(super) fn sync(&self, name: &str) -> io::Result<()> {
        File::open(self.path(name))?.sync_all()
    }

    /// The lock file, locked until the handle is dropped; `None` when somebody else holds it.
    pub(super) fn lock(&self, name: &str) -> io::Result<Option<File>> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(Mode::Secret.bits())
            .open(self.path(name))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(fs::TryLockError::WouldBlock) => Ok(None),
            Err(fs::TryLockError::Error(error)) => Err(error),
        }
    }
}
