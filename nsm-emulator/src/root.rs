//! [`LocalRoot`]: a root that outlives the modules under it.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

use crate::Error;
use crate::pki::Root;

/// The certificate's file.
const CERTIFICATE: &str = "root.pem";
/// The key's file, mode 0600.
const KEY: &str = "root-key.pem";

/// A root that is kept in a directory, so that a verifier can be given it once for all modules that come.
///
/// Whoever reads the directory can make documents that such a verifier accepts: it is for one machine, for trying
/// things out, and no verifier takes such a root unless it is told to.
pub struct LocalRoot(pub(crate) Arc<Root>);

impl LocalRoot {
    /// The root in `directory`, which is made when there is none.
    ///
    /// # Errors
    /// [`Error::RootFile`] when a file cannot be read or written, [`Error::Pki`] when it holds something else.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        let (certificate, key) = (directory.join(CERTIFICATE), directory.join(KEY));
        let read = |path: &Path| fs::read_to_string(path).map_err(failed(path));
        match certificate.try_exists().map_err(failed(&certificate))? {
            true => Ok(Self(Arc::new(Root::from_pem(&read(&certificate)?, &read(&key)?)?))),
            false => {
                let root = Root::generate()?;
                fs::create_dir_all(directory).map_err(failed(directory))?;
                // The certificate last: where it is, the key is.
                write(&key, 0o600, &root.key_pem()).map_err(failed(&key))?;
                write(&certificate, 0o644, &root.pem()).map_err(failed(&certificate))?;
                Ok(Self(Arc::new(root)))
            }
        }
    }

    /// The certificate, as PEM.
    #[must_use]
    pub fn pem(&self) -> String {
        self.0.pem()
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::RootFile { path, source }
}

fn write(path: &Path, mode: u32, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::{Config, Emulator};

    #[test]
    fn the_root_is_made_once_and_serves_later_modules() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("nsm");
        let made = LocalRoot::open(&path).unwrap();
        let found = LocalRoot::open(&path).unwrap();
        assert_eq!(made.pem(), found.pem());
        let mode = fs::metadata(path.join(KEY)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        let module = Emulator::with_root(&found, Config::default()).unwrap();
        assert_eq!(module.root_pem(), made.pem());
    }

    #[test]
    fn a_damaged_root_is_not_replaced() {
        let directory = tempfile::tempdir().unwrap();
        LocalRoot::open(directory.path()).unwrap();
        fs::write(directory.path().join(CERTIFICATE), "no certificate").unwrap();
        assert!(LocalRoot::open(directory.path()).is_err());
        fs::remove_file(directory.path().join(CERTIFICATE)).unwrap();
        assert!(
            matches!(LocalRoot::open(directory.path()), Err(Error::RootFile { .. })),
            "the key is still there"
        );
    }
}
