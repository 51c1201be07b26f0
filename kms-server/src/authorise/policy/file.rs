//! From a file to a checked [`Policy`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use attestation::{Pcr, PcrIndex};
use kms_protocol::AppId;
use serde::Deserialize;

use super::{AppRule, Image, KmsRule, MAX_FILE, Policy, PolicyError};
use crate::text::one_line;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    images: Option<Vec<ImageEntry>>,
    #[serde(default)]
    gateway_app_id: String,
    tcb_statuses: Option<Vec<String>>,
    #[serde(default)]
    advisory_ids: BTreeSet<String>,
    #[serde(default)]
    apps: BTreeMap<String, AppEntry>,
    kms: Option<KmsEntry>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ImageEntry {
    Hash(String),
    Registers(RegisterEntry),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RegisterEntry {
    pcr0: String,
    pcr1: String,
    pcr2: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AppEntry {
    images: Vec<ImageEntry>,
    compose_hashes: Option<Vec<String>>,
    devices: Option<Vec<String>>,
    pcr3: Option<Vec<String>>,
    pcr4: Option<Vec<String>>,
    pcr8: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KmsEntry {
    images: Vec<ImageEntry>,
    mr_aggregated: Vec<String>,
    devices: Option<Vec<String>>,
    #[serde(default)]
    allow_any_device: bool,
}

impl Policy {
    /// Reads a file: TOML when it is named so, else JSON.
    ///
    /// # Errors
    ///
    /// [`PolicyError`].
    pub fn load(path: &Path) -> Result<Self, PolicyError> {
        Self::parse(path, &read(path)?)
    }

    /// Reads the text of the file at `path`.
    pub(super) fn parse(path: &Path, text: &str) -> Result<Self, PolicyError> {
        if path.extension().is_some_and(|extension| extension == "toml") {
            Self::from_toml(text)
        } else {
            Self::from_json(text)
        }
    }

    /// Reads TOML.
    ///
    /// # Errors
    ///
    /// [`PolicyError::Shape`] and [`PolicyError::Value`].
    pub fn from_toml(text: &str) -> Result<Self, PolicyError> {
        let file = toml::from_str(text).map_err(|error| PolicyError::Shape(one_line(error)))?;
        check(file)
    }

    /// Reads JSON.
    ///
    /// # Errors
    ///
    /// [`PolicyError::Shape`] and [`PolicyError::Value`].
    pub fn from_json(text: &str) -> Result<Self, PolicyError> {
        let file = serde_json::from_str(text).map_err(|error| PolicyError::Shape(one_line(error)))?;
        check(file)
    }
}

/// The text of a policy, which is bounded. Blocks.
pub(super) fn read(path: &Path) -> Result<String, PolicyError> {
    use std::io::Read as _;

    let failed = |source| PolicyError::Read { path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut text = String::new();
    file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_FILE {
        return Err(PolicyError::TooLong { path: path.to_owned() });
    }
    Ok(text)
}

fn check(file: File) -> Result<Policy, PolicyError> {
    let File { images: own, gateway_app_id, tcb_statuses, advisory_ids, apps: entries, kms } = file;
    let mut apps = BTreeMap::new();
    for (name, entry) in entries {
        let key = format!("apps.{name}");
        let app: AppId =
            name.parse().map_err(|error: kms_protocol::ids::IdError| value(&key, error.to_string()))?;
        if apps.insert(app, app_rule(&key, &entry)?).is_some() {
            return Err(value(&key, "the app is there twice".into()));
        }
    }
    let kms = kms.map(|entry| kms_rule(&entry)).transpose()?;
    if apps.is_empty() && kms.is_none() {
        return Err(value("apps", "there is no app, so nobody could get keys".into()));
    }
    let tcb_statuses = match tcb_statuses {
        None => ["UpToDate".to_owned()].into(),
        Some(list) if list.is_empty() => return Err(value("tcb_statuses", EMPTY.into())),
        // Not having one is no status: that is asked of platforms only that have one.
        Some(list) if list.iter().any(String::is_empty) => {
            return Err(value("tcb_statuses", "\"\" is no status".into()));
        }
        Some(list) => list.into_iter().collect(),
    };
    let images = own.map(|list| images("images", &list)).transpose()?;
    Ok(Policy { images, gateway_app_id, tcb_statuses, advisory_ids, apps, kms })
}

fn app_rule(key: &str, entry: &AppEntry) -> Result<AppRule, PolicyError> {
    let AppEntry { images: list, compose_hashes, devices, pcr3, pcr4, pcr8 } = entry;
    let mut registers = Vec::new();
    let required = [
        ("pcr3", PcrIndex::ROLE, pcr3),
        ("pcr4", PcrIndex::INSTANCE, pcr4),
        ("pcr8", PcrIndex::SIGNER, pcr8),
    ];
    for (field, index, values) in required {
        if let Some(values) = values {
            registers.push((index, pcrs(&format!("{key}.{field}"), values)?));
        }
    }
    let optional = |field: &str, list: &Option<Vec<String>>| {
        list.as_ref().map(|list| hashes(&format!("{key}.{field}"), list)).transpose()
    };
    Ok(AppRule {
        images: images(&format!("{key}.images"), list)?,
        compose_hashes: optional("compose_hashes", compose_hashes)?,
        devices: optional("devices", devices)?,
        registers,
    })
}

fn kms_rule(entry: &KmsEntry) -> Result<KmsRule, PolicyError> {
    let KmsEntry { images: list, mr_aggregated, devices, allow_any_device } = entry;
    let devices = match (devices, allow_any_device) {
        (Some(list), false) => Some(hashes("kms.devices", list)?),
        (None, true) => None,
        (None, false) => {
            return Err(value("kms", "name the devices, or say allow_any_device = true".into()));
        }
        (Some(_), true) => {
            return Err(value("kms.devices", "there is no use for it with allow_any_device = true".into()));
        }
    };
    let mr_aggregated = hashes("kms.mr_aggregated", mr_aggregated)?;
    Ok(KmsRule { images: images("kms.images", list)?, mr_aggregated, devices })
}

const EMPTY: &str = "the list is empty; name what is allowed, or leave the key out";

fn value(key: &str, reason: String) -> PolicyError {
    PolicyError::Value { key: key.to_owned(), reason }
}

fn images(key: &str, list: &[ImageEntry]) -> Result<Vec<Image>, PolicyError> {
    if list.is_empty() {
        return Err(value(key, EMPTY.into()));
    }
    list.iter()
        .map(|entry| match entry {
            ImageEntry::Hash(text) => Ok(Image { hash: hash(key, text)?, registers: None }),
            ImageEntry::Registers(RegisterEntry { pcr0, pcr1, pcr2 }) => {
                let registers = [pcr(key, pcr0)?, pcr(key, pcr1)?, pcr(key, pcr2)?];
                let hash = attestation::os_image_hash(&registers[0], &registers[1], &registers[2]);
                Ok(Image { hash: *hash.as_bytes(), registers: Some(registers) })
            }
        })
        .collect()
}

fn hashes(key: &str, list: &[String]) -> Result<BTreeSet<[u8; 32]>, PolicyError> {
    if list.is_empty() {
        return Err(value(key, EMPTY.into()));
    }
    list.iter().map(|text| hash(key, text)).collect()
}

fn hash(key: &str, text: &str) -> Result<[u8; 32], PolicyError> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    let mut hash = [0; 32];
    hex::decode_to_slice(digits, &mut hash)
        .map_err(|_| value(key, format!("{text:?} is not 64 hexadecimal digits")))?;
    Ok(hash)
}

fn pcrs(key: &str, list: &[String]) -> Result<Vec<Pcr>, PolicyError> {
    if list.is_empty() {
        return Err(value(key, EMPTY.into()));
    }
    list.iter().map(|text| pcr(key, text)).collect()
}

fn pcr(key: &str, text: &str) -> Result<Pcr, PolicyError> {
    let pcr: Pcr = text.parse().map_err(|_| value(key, format!("{text:?} is not 96 hexadecimal digits")))?;
    // A register that nobody set reads as zero: it would allow debug enclaves, or every enclave without a role.
    if pcr.is_zero() { Err(value(key, "zero means that it was never set".into())) } else { Ok(pcr) }
}
