//! How a host is reached, and what proves that it is this host.

use std::fmt::{self, Display, Formatter};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::durable;

/// Name of the file that keeps a [`Reach`], beside `deployment.json`.
pub const REACH_FILE: &str = "keyferry-host.json";
/// Version of that file; a later one is refused rather than misread.
const VERSION: u32 = 1;
/// Larger than any file this program writes.
const MAX_FILE: u64 = 64 << 10;

/// Key types a host may prove itself with.
const ALGORITHMS: [&str; 4] =
    ["ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521"];

/// Why a host's record cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReachError {
    /// The file could not be read.
    #[error("{}: cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The file is not what this program writes.
    #[error("{}: not the record of a host", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Line, column and reason.
        source: serde_json::Error,
    },
    /// The file could not be written.
    #[error("the record of the host cannot be written")]
    Write(#[source] Box<crate::Error>),
    /// A host key is not one line of OpenSSH's format with a key type that is accepted.
    #[error("host key {shown:?}: {problem}")]
    HostKey {
        /// The beginning of what was given.
        shown: String,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// The public key a host proves itself with, such as `ssh-ed25519 AAAAC3…`: one line of OpenSSH's format without its
/// comment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostKey {
    algorithm: String,
    blob: Vec<u8>,
}

impl HostKey {
    /// The key type, `ssh-ed25519`.
    #[must_use]
    pub fn algorithm(&self) -> &str {
        &self.algorithm
    }

    /// What OpenSSH shows of a key: `SHA256:` and base64 without padding.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        format!("SHA256:{}", STANDARD_NO_PAD.encode(Sha256::digest(&self.blob)))
    }
}

impl FromStr for HostKey {
    type Err = ReachError;

    /// Takes `TYPE BASE64 [COMMENT]`, as it stands in `/etc/ssh/*.pub` and on the console.
    fn from_str(line: &str) -> Result<Self, ReachError> {
        let wrong = |problem| ReachError::HostKey { shown: line.chars().take(40).collect(), problem };
        let mut words = line.split_ascii_whitespace();
        let (Some(algorithm), Some(base64)) = (words.next(), words.next()) else {
            return Err(wrong("expected a key type and base64"));
        };
        if !ALGORITHMS.contains(&algorithm) {
            return Err(wrong("expected an Ed25519 or ECDSA key"));
        }
        let blob = STANDARD.decode(base64).map_err(|_| wrong("not base64"))?;
        // The key repeats its type, behind a length of four bytes (RFC 4253, section 6.6).
        let inner = blob.get(4..4 + algorithm.len());
        let length = u32::try_from(algorithm.len()).map(u32::to_be_bytes).ok();
        if inner != Some(algorithm.as_bytes())
            || blob.get(..4).map(<[u8]>::to_vec) != length.map(|it| it.to_vec())
        {
            return Err(wrong("the key is of another type than it says"));
        }
        Ok(Self { algorithm: algorithm.to_owned(), blob })
    }
}

impl Display for HostKey {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.algorithm, STANDARD.encode(&self.blob))
    }
}

impl TryFrom<String> for HostKey {
    type Error = ReachError;

    fn try_from(line: String) -> Result<Self, ReachError> {
        line.parse()
    }
}

impl From<HostKey> for String {
    fn from(key: HostKey) -> Self {
        key.to_string()
    }
}

/// What of AWS is between this machine and a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Aws {
    /// The host's region.
    pub region: String,
    /// The profile of `~/.aws/config`, where one was named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<String>,
    /// Whether its SSH server is reached through sessions of Systems Manager, instead of at its address.
    pub session_manager: bool,
    /// Whether EC2 Instance Connect lets a new key in for each connection.
    pub instance_connect: bool,
}

/// How a host is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reach {
    /// Its address.
    pub address: IpAddr,
    /// The port of its SSH server.
    pub port: u16,
    /// Who logs in; Amazon Linux has `ec2-user`.
    pub user: String,
    /// File with the private key that logs in. In the file, relative to the file's folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub private_key: Option<PathBuf>,
    /// What the host must prove itself with.
    pub host_key: HostKey,
    /// The instance, where a cloud made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance_id: Option<String>,
    /// What of AWS is on the way to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aws: Option<Aws>,
}

#[derive(Serialize, Deserialize)]
struct Content {
    version: u32,
    #[serde(flatten)]
    reach: serde_json::Value,
}

impl Reach {
    /// Reads the record of a host: `path`, or [`REACH_FILE`] in it when it is a folder.
    ///
    /// # Errors
    ///
    /// When it is not there, cannot be read, or is not what this program writes.
    pub fn load(path: &Path) -> Result<Self, ReachError> {
        let path = if path.is_dir() { path.join(REACH_FILE) } else { path.to_owned() };
        let unreadable = |source| ReachError::Read { path: path.clone(), source };
        let size = std::fs::metadata(&path).map_err(unreadable)?.len();
        if size > MAX_FILE {
            return Err(unreadable(io::Error::other(format!("{size} bytes, expected at most {MAX_FILE}"))));
        }
        let bytes = std::fs::read(&path).map_err(unreadable)?;
        let mut reach = parse(&bytes).map_err(|source| ReachError::Json { path: path.clone(), source })?;
        if let (Some(folder), Some(key)) = (path.parent(), &mut reach.private_key) {
            *key = folder.join(&*key);
        }
        Ok(reach)
    }

    /// The words of a command that carries SSH to the host between its standard input and output, where no port is open.
    pub(crate) fn tunnel(&self) -> Option<Vec<String>> {
        let (aws, instance) = self.aws().filter(|(aws, _)| aws.session_manager)?;
        Some(super::tunnel::command(aws, instance, self.port))
    }

    /// What of AWS is on the way to which instance.
    pub(super) fn aws(&self) -> Option<(&Aws, &str)> {
        self.aws.as_ref().zip(self.instance_id.as_deref())
    }

    /// Writes the record, whole or not at all, readable for its owner only. A private key in the same folder is recorded
    /// by its name, so that the folder can be moved.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), ReachError> {
        let folder = path.parent().unwrap_or(Path::new(""));
        let mut recorded = self.clone();
        let inside = |key: &PathBuf| key.strip_prefix(folder).map_or_else(|_| key.clone(), Path::to_owned);
        recorded.private_key = self.private_key.as_ref().map(inside);
        let failed = |source| ReachError::Json { path: path.to_owned(), source };
        let content = Content { version: VERSION, reach: serde_json::to_value(recorded).map_err(failed)? };
        let mut bytes = serde_json::to_vec_pretty(&content).map_err(failed)?;
        bytes.push(b'\n');
        durable::replace(path, &bytes, 0o600).map_err(|error| ReachError::Write(Box::new(error)))
    }
}

fn parse(bytes: &[u8]) -> Result<Reach, serde_json::Error> {
    let content: Content = serde_json::from_slice(bytes)?;
    if content.version != VERSION {
        let found = content.version;
        return Err(serde::de::Error::custom(format!(
            "version {found} of the record, this program knows {VERSION}"
        )));
    }
    serde_json::from_value(content.reach)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ED25519: &str =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE0LPFeB9S10wKXfhVjxDmEqVvCSrBEZrwAUpbB7ixSu root@host";

    fn reach(folder: &Path) -> Reach {
        Reach {
            address: [203, 0, 113, 7].into(),
            port: 22,
            user: "ec2-user".into(),
            private_key: Some(folder.join("id_ed25519")),
            aws: None,
            host_key: ED25519.parse().unwrap(),
            instance_id: Some("i-0123456789abcdef0".into()),
        }
    }

    #[test]
    fn a_host_key_is_taken_with_or_without_its_comment() {
        let key: HostKey = ED25519.parse().unwrap();
        assert_eq!(key.to_string(), ED25519.trim_end_matches(" root@host"));
        assert_eq!(key.to_string().parse::<HostKey>().unwrap(), key);
        assert_eq!(key.fingerprint(), "SHA256:E0CdEGNX/P59E5j0tmy5Mfjkh/i8CWvExiqrEyoyIek");
    }

    #[test]
    fn a_host_key_says_what_is_wrong_with_it() {
        let blob = ED25519.split(' ').nth(1).unwrap();
        for (line, problem) in [
            ("", "expected a key type and base64"),
            ("ssh-ed25519", "expected a key type and base64"),
            ("ssh-rsa AAAAB3NzaC1yc2E=", "expected an Ed25519 or ECDSA key"),
            ("ssh-ed25519 ****", "not base64"),
            (&format!("ecdsa-sha2-nistp256 {blob}"), "the key is of another type than it says"),
            ("ssh-ed25519 AAAA", "the key is of another type than it says"),
        ] {
            let error = line.parse::<HostKey>().unwrap_err().to_string();
            assert!(error.ends_with(problem), "{line}: {error}");
        }
    }

    #[test]
    fn a_record_can_be_moved_with_its_key() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let (before, after) = (directory.path().join("a"), directory.path().join("b"));
        std::fs::create_dir(&before).unwrap();
        let path = before.join(REACH_FILE);
        reach(&before).save(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(Reach::load(&path).unwrap(), reach(&before));
        std::fs::rename(&before, &after).unwrap();
        assert_eq!(Reach::load(&after).unwrap(), reach(&after));
    }

    #[test]
    fn a_record_of_a_later_version_or_with_unknown_fields_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(REACH_FILE);
        reach(directory.path()).save(&path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        for wrong in [text.replace("\"version\": 1", "\"version\": 2"), text.replace("\"port\"", "\"prot\"")]
        {
            std::fs::write(&path, wrong).unwrap();
            assert!(matches!(Reach::load(&path), Err(ReachError::Json { .. })));
        }
        assert!(matches!(Reach::load(&directory.path().join("none")), Err(ReachError::Read { .. })));
    }
}
