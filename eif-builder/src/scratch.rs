//! Temporary files and folders that go away with the program, also when it is interrupted.
//!
//! A signal ends a program without unwinding, so what has to be removed is on a list, and [`sweep`] removes it.

use std::collections::BTreeSet;
use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tempfile::NamedTempFile;
#[cfg(feature = "command")]
use tempfile::TempDir;

use crate::error::{Error, IoContext};

static OPEN: Mutex<List> = Mutex::new(List { paths: BTreeSet::new(), is_closed: false });

struct List {
    paths: BTreeSet<PathBuf>,
    is_closed: bool,
}

impl List {
    /// The list, unless the program is ending.
    fn lock() -> io::Result<MutexGuard<'static, Self>> {
        let open = Self::lock_always();
        if open.is_closed { Err(io::ErrorKind::Interrupted.into()) } else { Ok(open) }
    }

    fn lock_always() -> MutexGuard<'static, Self> {
        // Nothing in here can be half done.
        OPEN.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Something temporary on disk: removed when dropped, and by [`sweep`].
#[derive(Debug)]
pub(crate) struct Scratch<T> {
    // In this order: first it goes, then its place on the list.
    inner: T,
    listed: Listed,
}

/// A place on the list.
#[derive(Debug)]
struct Listed(PathBuf);

impl Drop for Listed {
    fn drop(&mut self) {
        List::lock_always().paths.remove(&self.0);
    }
}

impl<T> Scratch<T> {
    /// Makes it while the list is locked, so that a sweep either comes first or sees it.
    fn make(make: impl FnOnce() -> io::Result<T>, path: impl FnOnce(&T) -> &Path) -> io::Result<Self> {
        let mut open = List::lock()?;
        let inner = make()?;
        let path = path(&inner).to_owned();
        open.paths.insert(path.clone());
        Ok(Self { inner, listed: Listed(path) })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.listed.0
    }
}

#[cfg(feature = "command")]
impl Scratch<TempDir> {
    /// A folder in the temporary directory.
    pub(crate) fn folder() -> Result<Self, Error> {
        Self::make(tempfile::tempdir, TempDir::path).context("create", "a temporary folder")
    }
}

impl Scratch<NamedTempFile> {
    /// A file in the temporary directory.
    pub(crate) fn file() -> Result<Self, Error> {
        Self::make(NamedTempFile::new, NamedTempFile::path).context("create", "a temporary file")
    }

    /// A file on its way to become `output`: in the same folder, so that it can be renamed.
    pub(crate) fn beside(output: &Path) -> Result<Self, Error> {
        let folder = match output.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let make = || tempfile::Builder::new().prefix(".eif-").tempfile_in(folder);
        Self::make(make, NamedTempFile::path).context("create a file in", folder)
    }

    /// The open file.
    pub(crate) fn as_file(&self) -> &File {
        self.inner.as_file()
    }

    /// Gives the finished file its name, readable for everyone: a temporary file is private, an image is not.
    pub(crate) fn publish(self, output: &Path) -> Result<(), Error> {
        let Self { inner, listed: _listed } = self;
        let _unswept = List::lock().context("write", output)?;
        inner.as_file().set_permissions(Permissions::from_mode(0o644)).context("write", output)?;
        inner.persist(output).map(drop).map_err(|error| error.error).context("write", output)
    }
}

/// Removes everything that is still there. Nothing can be made or published after it.
#[cfg(feature = "command")]
pub(crate) fn sweep() {
    let mut open = List::lock_always();
    open.is_closed = true;
    for path in std::mem::take(&mut open.paths) {
        // The program ends now, whether or not this works.
        let _gone = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
    }
}
