//! What the usual docker configuration has for a registry.

use std::fs::File;
use std::io::{BufReader, ErrorKind};
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::time::Duration;

use docker_credential::{CredentialRetrievalError, DockerCredential, get_credential_from_reader};
use zeroize::Zeroizing;

use crate::error::{Error, IoContext};

/// Longest wait for a credential helper, which may ask a person to unlock a key ring.
const HELPER_TIMEOUT: Duration = Duration::from_secs(60);
/// What helpers print when they know nothing about a registry, which is no failure.
const NOT_FOUND: &str = "credentials not found in native keychain";

/// Who we are to a registry.
pub(crate) enum Credentials {
    /// Nobody in particular.
    Anonymous,
    /// User and password.
    Password(String, Zeroizing<String>),
    /// A long-lived token, good only for getting short-lived ones.
    Identity(Zeroizing<String>),
}

impl Credentials {
    /// Looks into `$DOCKER_CONFIG/config.json` or `~/.docker/config.json`, and asks the credential helper named
    /// there.
    ///
    /// # Errors
    /// When there is a configuration that cannot be read or whose helper fails. To go on without would ask the
    /// registry as somebody else.
    pub(crate) fn for_registry(registry: &str) -> Result<Self, Error> {
        let Some(path) = config_path() else { return Ok(Self::Anonymous) };
        let file = match File::open(&path) {
            Ok(file) => BufReader::new(file),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Self::Anonymous),
            Err(error) => return Err(error).context("open", &path),
        };
        // Docker Hub's entry is filed under its first address.
        let server = if registry == "index.docker.io" { "https://index.docker.io/v1/" } else { registry };
        let (answer, answered) = channel();
        let asked = server.to_owned();
        // The helper is a program of the user's; the library waits for it without an end.
        std::thread::spawn(move || answer.send(get_credential_from_reader(file, &asked)));
        let found = answered.recv_timeout(HELPER_TIMEOUT).map_err(|_| Error::Timeout {
            object: format!("the credential helper for {registry}"),
            seconds: HELPER_TIMEOUT.as_secs(),
        })?;
        match found {
            Ok(DockerCredential::UsernamePassword(user, password)) => {
                Ok(Self::Password(user, password.into()))
            }
            Ok(DockerCredential::IdentityToken(token)) => Ok(Self::Identity(token.into())),
            Err(CredentialRetrievalError::NoCredentialConfigured) => Ok(Self::Anonymous),
            Err(CredentialRetrievalError::HelperFailure { stdout, .. }) if stdout.trim() == NOT_FOUND => {
                Ok(Self::Anonymous)
            }
            Err(error) => {
                Err(Error::input(path.display(), format!("no credentials for {registry}: {error}")))
            }
        }
    }
}

fn config_path() -> Option<PathBuf> {
    let folder = std::env::var_os("DOCKER_CONFIG")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".docker")))?;
    Some(folder.join("config.json"))
}
