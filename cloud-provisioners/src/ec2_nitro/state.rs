//! What is kept of a host between two runs.

use std::fmt;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::nitro_host::{Aws, HostKey};
use crate::{Error, durable};

/// Version of the file; a later one is refused rather than misread.
const VERSION: u32 = 1;
/// Directory of a host in which this program keeps its state and the ledger.
pub(super) const OWN_DIRECTORY: &str = ".keyferry";

/// A line of Linux kernels that Amazon Linux 2023 is published with. `kernel-default` is not one: it moves from line to
/// line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum KernelLine {
    /// 6.1, the one Amazon Linux 2023 came with.
    #[default]
    #[serde(rename = "6.1")]
    V6_1,
    /// 6.12.
    #[serde(rename = "6.12")]
    V6_12,
    /// 6.18.
    #[serde(rename = "6.18")]
    V6_18,
}

impl KernelLine {
    /// As AWS writes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
            Self::V6_18 => "6.18",
        }
    }
}

/// The machine image a host starts from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageChoice {
    /// The current Amazon Linux 2023, by AWS's own public parameter.
    AmazonLinux2023(KernelLine),
    /// This one.
    Id(String),
}

impl fmt::Display for ImageChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AmazonLinux2023(line) => write!(f, "Amazon Linux 2023, kernel {}", line.name()),
            Self::Id(id) => f.write_str(id),
        }
    }
}

/// Who can reach the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// SSH from these addresses.
    Ssh(IpNet),
    /// No open port at all: sessions of AWS Systems Manager, with this instance profile.
    Ssm {
        /// Name of the instance profile; its role needs `AmazonSSMManagedInstanceCore`.
        instance_profile: String,
    },
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// The AWS region, `us-east-1`.
    pub region: String,
    /// The `Name` tag.
    pub name: String,
    /// The instance type, `c5.xlarge`.
    pub instance_type: String,
    /// The machine image.
    pub image: ImageChoice,
    /// The subnet; one of the default VPC when not given.
    pub subnet: Option<String>,
    /// Who can reach it.
    pub access: Access,
    /// Name of the key pair in EC2; one of the deployment's own when not given.
    pub key_name: Option<String>,
    /// The private key's file; absolute.
    pub key_file: PathBuf,
    /// Size of the root volume in GiB.
    pub volume_gib: i32,
    /// Whether the cheaper capacity is wanted that AWS may take back at any time.
    pub spot: bool,
    /// The user to log in as, where the image does not tell.
    pub user: Option<String>,
    /// The host's own SSH key, where the console does not tell.
    pub host_key: Option<HostKey>,
    /// An existing instance to use instead of a new one.
    pub adopt: Option<String>,
    /// Whether a new key is let in for each connection, by EC2 Instance Connect, instead of one key pair for all.
    #[serde(default)]
    pub instance_connect: bool,
    /// The profile of `~/.aws/config`, where one was named; what reaches the host through AWS takes it too.
    #[serde(default)]
    pub profile: Option<String>,
}

impl Wanted {
    /// What of AWS is to be on the way to the host.
    pub(super) fn aws(&self) -> Option<Aws> {
        let session_manager = matches!(self.access, Access::Ssm { .. });
        let instance_connect = self.instance_connect;
        let (region, profile) = (self.region.clone(), self.profile.clone());
        let aws = Aws { region, profile, session_manager, instance_connect };
        (session_manager || instance_connect).then_some(aws)
    }
}

/// A launch that was begun: asking for it again with the same token gives the same instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    /// The client token.
    pub token: String,
    /// The subnet, which must stay the same under one token.
    pub subnet: String,
    /// Its availability zone.
    pub zone: String,
}

/// Everything that is kept of a host, in `.keyferry/host.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    version: u32,
    /// The AWS account; with another one's credentials nothing of this host can be seen.
    pub account: String,
    /// What was asked for.
    pub wanted: Wanted,
    /// The launch, once it was begun.
    pub launch: Option<Launch>,
}

impl State {
    /// The state before anything was made.
    #[must_use]
    pub fn new(account: String, wanted: Wanted) -> Self {
        Self { version: VERSION, account, wanted, launch: None }
    }

    /// What is kept in `directory`, or `None`.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, or is of a later version.
    pub fn read(directory: &Path) -> Result<Option<Self>, Error> {
        let path = own_file(directory, "host.json");
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::file("read", &path)(error)),
        };
        parse(&bytes).map(Some).map_err(|source| Error::Json { path, source })
    }

    /// Writes it.
    ///
    /// # Errors
    ///
    /// When the file cannot be written; the old one is then still in place.
    pub(super) fn save(&self, directory: &Path) -> Result<(), Error> {
        let path = own_file(directory, "host.json");
        let failed = |source| Error::Json { path: path.clone(), source };
        let mut bytes = serde_json::to_vec_pretty(self).map_err(failed)?;
        bytes.push(b'\n');
        durable::replace(&path, &bytes, 0o600)
    }
}

/// Where the private key of a host goes that was given no other place.
#[must_use]
pub fn default_key_file(directory: &Path) -> PathBuf {
    own_file(directory, "host_key")
}

/// A file of this program beside the host's.
pub(super) fn own_file(directory: &Path, name: &str) -> PathBuf {
    directory.join(OWN_DIRECTORY).join(name)
}

fn parse(bytes: &[u8]) -> Result<State, serde_json::Error> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let Versioned { version } = serde_json::from_slice(bytes)?;
    if version != VERSION {
        let problem = format!("version {version} of the host's state, this program knows {VERSION}");
        return Err(serde::de::Error::custom(problem));
    }
    serde_json::from_slice(bytes)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::ec2_nitro) fn wanted() -> Wanted {
        Wanted {
            region: "us-east-1".into(),
            name: "nitro-enclave-host".into(),
            instance_type: "c5.xlarge".into(),
            image: ImageChoice::AmazonLinux2023(KernelLine::V6_1),
            subnet: None,
            access: Access::Ssh("203.0.113.7/32".parse().unwrap()),
            key_name: None,
            key_file: "/home/me/host/.keyferry/host_key".into(),
            volume_gib: 20,
            spot: false,
            user: None,
            host_key: None,
            adopt: None,
            instance_connect: false,
            profile: None,
        }
    }

    #[test]
    fn what_was_kept_is_there_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join(OWN_DIRECTORY)).unwrap();
        assert_eq!(State::read(directory.path()).unwrap(), None);
        let mut state = State::new("123456789012".into(), wanted());
        state.save(directory.path()).unwrap();
        state.launch =
            Some(Launch { token: "t".into(), subnet: "subnet-1".into(), zone: "us-east-1a".into() });
        state.save(directory.path()).unwrap();
        assert_eq!(State::read(directory.path()).unwrap(), Some(state));
    }

    #[test]
    fn a_later_version_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join(OWN_DIRECTORY)).unwrap();
        std::fs::write(own_file(directory.path(), "host.json"), r#"{"version":2,"more":true}"#).unwrap();
        let error = State::read(directory.path()).unwrap_err();
        let Error::Json { source, .. } = error else { panic!("{error}") };
        assert!(source.to_string().contains("version 2"), "{source}");
    }
}
