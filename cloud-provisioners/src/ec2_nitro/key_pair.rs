//! The key that logs in to the host. It is made here and its private half never travels.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use russh::keys::PrivateKey;
use russh::keys::ssh_key::LineEnding;
use russh::keys::ssh_key::private::{Ed25519Keypair, KeypairData};
use zeroize::Zeroizing;

use super::plan::Refusal;
use crate::Error;
use crate::nitro_host::LoginKey;

/// The public half of the key in `path`, as `ssh-ed25519 AAAA…`, or `None` when there is no such file.
///
/// # Errors
///
/// [`Refusal::KeyFile`] when a private key is readable for others, or the file has no key that logs in.
pub(super) fn public_key(path: &Path) -> Result<Option<String>, Error> {
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::file("read", path)(error)),
    };
    let refuse = |problem: String| Error::Ec2(Refusal::KeyFile { path: path.to_owned(), problem });
    let private = path.extension().is_none_or(|it| it != "pub");
    if private && metadata.permissions().mode() & 0o077 != 0 {
        return Err(refuse("others may read it; it must have mode 0600".into()));
    }
    let key = LoginKey::read(path).map_err(|error| refuse(error.to_string()))?;
    let mut public = key.public().clone();
    public.set_comment("");
    let line = public.to_openssh().map_err(|error| refuse(error.to_string()))?;
    Ok(Some(line.trim_end().to_owned()))
}

/// Makes an Ed25519 key in the new file `path`, mode 0600, and gives its public half.
///
/// # Errors
///
/// When the file is there already or cannot be written.
pub(super) fn make(path: &Path, comment: &str) -> Result<String, Error> {
    let mut seed = Zeroizing::new([0; 32]);
    aws_lc_rs::rand::fill(&mut *seed).map_err(|_| Error::Random)?;
    let pair = KeypairData::from(Ed25519Keypair::from_seed(&seed));
    let refuse = |problem: String| Error::Ec2(Refusal::KeyFile { path: path.to_owned(), problem });
    let key = PrivateKey::new(pair, comment).map_err(|error| refuse(error.to_string()))?;
    let text = key.to_openssh(LineEnding::LF).map_err(|error| refuse(error.to_string()))?;

    // Beside its place first: a run that is cut leaves a whole key or none.
    let directory = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(directory).map_err(Error::file("create", directory))?;
    let unfinished = path.with_extension("unfinished");
    let write = || {
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
        file.set_permissions(std::fs::Permissions::from_mode(0o600))?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        // Fails when the name is taken, unlike a rename.
        std::fs::hard_link(&unfinished, path)?;
        std::fs::remove_file(&unfinished)
    };
    write().map_err(Error::file("write", path))?;
    let public = public_key(path)?;
    public.ok_or_else(|| refuse("vanished while it was written".into()))
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;

    use super::*;

    fn problem(result: Result<Option<String>, Error>) -> String {
        match result {
            Err(Error::Ec2(Refusal::KeyFile { problem, .. })) => problem,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_key_is_made_once_and_for_its_owner_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys/host_key");
        assert_eq!(public_key(&path).unwrap(), None);
        let public = make(&path, "keyferry").unwrap();
        assert!(public.starts_with("ssh-ed25519 AAAA") && public.split(' ').count() == 2, "{public}");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(public_key(&path).unwrap(), Some(public.clone()));
        assert!(matches!(make(&path, "keyferry"), Err(Error::File { .. })), "nothing is overwritten");
        assert_eq!(public_key(&path).unwrap(), Some(public));
    }

    #[test]
    fn a_key_that_cannot_be_used_says_why() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        make(&path, "").unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        assert_eq!(problem(public_key(&path)), "others may read it; it must have mode 0600");
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        std::fs::write(&path, "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\n")
            .unwrap();
        assert!(problem(public_key(&path)).starts_with("is an RSA key that cannot be used: "));
        std::fs::write(&path, "hello").unwrap();
        assert!(problem(public_key(&path)).starts_with("is no private key: "));
    }
}
