//! How far a bring-up got, on disk after every step. Nothing in it is secret.

use std::path::{Path, PathBuf};

use kms_protocol::wire::webhook::BootInfo;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{Error, durable};

/// Version of the file; a later one is refused rather than misread.
const VERSION: u32 = 1;

/// How the KMS gets its keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "role")]
pub enum Role {
    /// It makes them.
    First,
    /// It takes over those of the KMS at this URL.
    Replica {
        /// Where.
        source: String,
    },
}

/// What a machine measures; hex.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measured {
    /// Kind of TEE.
    pub tee_variant: String,
    /// Image hash.
    pub os_image_hash: String,
    /// Aggregated measurement.
    pub mr_aggregated: String,
    /// Hash of the device id.
    pub device_id: String,
}

impl Measured {
    /// The part of verified evidence that is registered.
    #[must_use]
    pub fn of(info: &BootInfo) -> Self {
        Self {
            tee_variant: info.tee_variant.clone(),
            os_image_hash: hex::encode(&info.os_image_hash),
            mr_aggregated: hex::encode(&info.mr_aggregated),
            device_id: hex::encode(&info.device_id),
        }
    }

    /// What is registered on the KMS contract: the command of `keyferry chain`, and its value.
    #[must_use]
    pub fn registrations(&self) -> Vec<(&'static str, String)> {
        let mut registrations = vec![
            ("add-image", format!("0x{}", self.os_image_hash)),
            ("add-kms", format!("0x{}", self.mr_aggregated)),
        ];
        if self.names_a_device() {
            registrations.push(("add-device", format!("0x{}", self.device_id)));
        }
        registrations
    }

    /// Whether the device id is one: that of a machine which tells none is the hash of nothing, and whoever registered it
    /// would allow every such machine.
    #[must_use]
    pub fn names_a_device(&self) -> bool {
        self.device_id != hex::encode(Sha256::digest(b""))
    }

    /// The commands by which they are registered by hand.
    #[must_use]
    pub fn commands(&self) -> Vec<String> {
        let registrations = self.registrations().into_iter();
        registrations.map(|(name, value)| format!("keyferry chain {name} {value}")).collect()
    }
}

/// Public keys of a KMS; hex.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keys {
    /// SubjectPublicKeyInfo of the root CA, DER.
    pub ca_pubkey: String,
    /// The K256 root, compressed.
    pub k256_pubkey: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Content {
    version: u32,
    #[serde(flatten)]
    state: State,
}

/// What is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    /// Which machine; empty before there is one.
    pub(super) machine: String,
    #[serde(flatten)]
    pub(super) role: Role,
    pub(super) domain: String,
    /// What the machine said it measures, compared with what is expected.
    pub(super) measured: Option<Measured>,
    /// Whether the measurements were registered by us.
    pub(super) registered: bool,
    /// Whether the KMS was asked to get its keys: from then on it may have some.
    pub(super) asked: bool,
    /// The keys whose evidence verified.
    pub(super) keys: Option<Keys>,
    /// Whether it served under the root, and `kms.json` was written.
    pub(super) served: bool,
}

impl State {
    fn new(role: Role, domain: &str) -> Self {
        Self {
            machine: String::new(),
            role,
            domain: domain.to_owned(),
            measured: None,
            registered: false,
            asked: false,
            keys: None,
            served: false,
        }
    }
}

/// The record of one bring-up.
#[derive(Debug)]
pub struct Record {
    path: PathBuf,
    pub(super) state: State,
}

impl Record {
    /// Reads the record at `path`, or begins one.
    ///
    /// # Errors
    ///
    /// When the file cannot be read or is of a later version.
    pub fn open(path: &Path, role: Role, domain: &str) -> Result<Self, Error> {
        let state = match std::fs::read(path) {
            Ok(bytes) => parse(&bytes).map_err(|source| Error::Json { path: path.to_owned(), source })?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => State::new(role, domain),
            Err(error) => return Err(Error::file("read", path)(error)),
        };
        Ok(Self { path: path.to_owned(), state })
    }

    /// Forgets everything: the machine it speaks of is gone.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub(super) fn begin_anew(&mut self, role: Role, domain: &str, machine: &str) -> Result<(), Error> {
        self.state = State { machine: machine.to_owned(), ..State::new(role, domain) };
        self.save()
    }

    /// Changes the record, on disk before this returns.
    ///
    /// # Errors
    ///
    /// When the file cannot be written: then the next step must not be taken.
    pub(super) fn note(&mut self, change: impl FnOnce(&mut State)) -> Result<(), Error> {
        change(&mut self.state);
        self.save()
    }

    fn save(&self) -> Result<(), Error> {
        let failed = |source| Error::Json { path: self.path.clone(), source };
        let content = Content { version: VERSION, state: self.state.clone() };
        let mut bytes = serde_json::to_vec_pretty(&content).map_err(failed)?;
        bytes.push(b'\n');
        durable::replace(&self.path, &bytes, 0o600)
    }
}

fn parse(bytes: &[u8]) -> Result<State, serde_json::Error> {
    let content: Content = serde_json::from_slice(bytes)?;
    if content.version == VERSION {
        return Ok(content.state);
    }
    let found = content.version;
    Err(serde::de::Error::custom(format!("version {found} of the record, this program knows {VERSION}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_is_there_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bring-up.json");
        let role = Role::Replica { source: "https://a:1".into() };
        let mut record = Record::open(&path, role.clone(), "kms.example.com").unwrap();
        record.begin_anew(role, "kms.example.com", "m-1").unwrap();
        record.note(|state| state.asked = true).unwrap();
        let again = Record::open(&path, Role::First, "other").unwrap();
        assert_eq!(again.state, record.state);
        assert!(again.state.asked && again.state.machine == "m-1");
    }

    #[test]
    fn the_hash_of_nothing_is_no_device_to_register() {
        let mut measured = Measured {
            tee_variant: "dstack-gcp-tdx".into(),
            os_image_hash: "01".repeat(32),
            mr_aggregated: "02".repeat(32),
            device_id: "03".repeat(32),
        };
        assert_eq!(measured.commands()[2], format!("keyferry chain add-device 0x{}", "03".repeat(32)));
        // What `dstack-util show` prints on GCP.
        measured.device_id = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855".into();
        assert!(!measured.names_a_device());
        assert_eq!(measured.commands().len(), 2);
    }

    #[test]
    fn a_later_version_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bring-up.json");
        let mut record = Record::open(&path, Role::First, "a").unwrap();
        record.note(|_| {}).unwrap();
        let text = std::fs::read_to_string(&path).unwrap().replace("\"version\": 1", "\"version\": 2");
        std::fs::write(&path, text).unwrap();
        assert!(matches!(Record::open(&path, Role::First, "a"), Err(Error::Json { .. })));
    }
}
