//! Rules in a file: which images may have the keys of which app.
//!
//! ```toml
//! # Images that this KMS serves at all; without the list, the apps' own lists decide alone.
//! images = ["7f985dffdbbe255e104a483961a9e2344bf9476bca077727eeb0ad88fbcd3326"]
//! gateway_app_id = ""
//!
//! [apps.1111111111111111111111111111111111111111]
//! images = ["7f985dffdbbe255e104a483961a9e2344bf9476bca077727eeb0ad88fbcd3326"]
//! # Optional: whose enclave it must be. PCR3 names the IAM role, PCR4 the instance, PCR8 the image's signer.
//! pcr3 = ["..."]
//! ```
//!
//! The same as JSON when the file is not named `.toml`. Unknown keys are errors, and so is every empty list: an empty
//! list must not read as "any".

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use attestation::{Pcr, PcrIndex};
use kms_protocol::AppId;
use kms_protocol::wire::webhook::AuthInfo;
use serde::Deserialize;

use super::{Authoriser, Grant, Pending, Purpose, Question, Refusal};
use crate::text::one_line;

/// Longest policy read.
const MAX_FILE: u64 = 4 << 20;

/// A checked policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// `None`: no list of the KMS's own.
    images: Option<BTreeSet<[u8; 32]>>,
    gateway_app_id: String,
    apps: BTreeMap<AppId, Rule>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    images: BTreeSet<[u8; 32]>,
    /// Registers that must hold one of some values.
    registers: Vec<(PcrIndex, Vec<Pcr>)>,
}

/// Why there is no policy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// The file cannot be read.
    #[error("cannot read the policy {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is too long.
    #[error("the policy {} is longer than {MAX_FILE} bytes", path.display())]
    TooLong {
        /// Which.
        path: PathBuf,
    },
    /// The text is not TOML or JSON of the expected shape.
    #[error("the policy is not valid: {0}")]
    Shape(String),
    /// A value is not acceptable.
    #[error("the policy's {key} is not acceptable: {reason}")]
    Value {
        /// The key's full name.
        key: String,
        /// Why.
        reason: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    images: Option<Vec<String>>,
    #[serde(default)]
    gateway_app_id: String,
    apps: BTreeMap<String, AppRule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AppRule {
    images: Vec<String>,
    pcr3: Option<Vec<String>>,
    pcr4: Option<Vec<String>>,
    pcr8: Option<Vec<String>>,
}

impl Policy {
    /// Reads a file: TOML when it is named so, else JSON.
    ///
    /// # Errors
    ///
    /// [`PolicyError`].
    pub fn load(path: &Path) -> Result<Self, PolicyError> {
        let read = |source| PolicyError::Read { path: path.to_owned(), source };
        if std::fs::metadata(path).map_err(read)?.len() > MAX_FILE {
            return Err(PolicyError::TooLong { path: path.to_owned() });
        }
        let text = std::fs::read_to_string(path).map_err(read)?;
        if path.extension().is_some_and(|extension| extension == "toml") {
            Self::from_toml(&text)
        } else {
            Self::from_json(&text)
        }
    }

    /// Reads TOML.
    ///
    /// # Errors
    ///
    /// [`PolicyError::Shape`] and [`PolicyError::Value`].
    pub fn from_toml(text: &str) -> Result<Self, PolicyError> {
        let file = toml::from_str(text).map_err(|error| PolicyError::Shape(one_line(error)))?;
        Self::check(file)
    }

    /// Reads JSON.
    ///
    /// # Errors
    ///
    /// [`PolicyError::Shape`] and [`PolicyError::Value`].
    pub fn from_json(text: &str) -> Result<Self, PolicyError> {
        let file = serde_json::from_str(text).map_err(|error| PolicyError::Shape(one_line(error)))?;
        Self::check(file)
    }

    fn check(file: File) -> Result<Self, PolicyError> {
        let mut apps = BTreeMap::new();
        for (name, rule) in file.apps {
            let key = format!("apps.{name}");
            let app: AppId =
                name.parse().map_err(|error: kms_protocol::ids::IdError| value(&key, error.to_string()))?;
            let mut registers = Vec::new();
            let required = [
                ("pcr3", PcrIndex::ROLE, rule.pcr3),
                ("pcr4", PcrIndex::INSTANCE, rule.pcr4),
                ("pcr8", PcrIndex::SIGNER, rule.pcr8),
            ];
            for (field, index, values) in required {
                if let Some(values) = values {
                    registers.push((index, pcrs(&format!("{key}.{field}"), &values)?));
                }
            }
            let rule = Rule { images: images(&format!("{key}.images"), &rule.images)?, registers };
            if apps.insert(app, rule).is_some() {
                return Err(value(&key, "the app is there twice".into()));
            }
        }
        if apps.is_empty() {
            return Err(value("apps", "there is no app, so nobody could get keys".into()));
        }
        let images = file.images.map(|list| images("images", &list)).transpose()?;
        Ok(Self { images, gateway_app_id: file.gateway_app_id, apps })
    }

    fn decide(&self, question: &Question) -> Result<(), Refusal> {
        if question.purpose == Purpose::Kms {
            return Err(Refusal::denied("the policy has no rules for a KMS"));
        }
        let image = question.boot_info.os_image_hash.as_slice();
        let app = AppId::try_from(question.boot_info.app_id.as_slice());
        let rule = app.ok().and_then(|app| self.apps.get(&app));
        let rule = rule.ok_or_else(|| Refusal::denied("app not registered"))?;
        let lists = |images: &BTreeSet<[u8; 32]>| images.iter().any(|listed| listed == image);
        if self.images.as_ref().is_some_and(|images| !lists(images)) {
            return Err(Refusal::denied("OS image is not allowed"));
        }
        if !lists(&rule.images) {
            return Err(Refusal::denied("compose hash not allowed"));
        }
        for (index, allowed) in &rule.registers {
            if !question.pcr(*index).is_some_and(|actual| allowed.contains(actual)) {
                return Err(Refusal::denied(&format!("PCR{} is not allowed", index.get())));
            }
        }
        Ok(())
    }
}

fn value(key: &str, reason: String) -> PolicyError {
    PolicyError::Value { key: key.to_owned(), reason }
}

fn images(key: &str, list: &[String]) -> Result<BTreeSet<[u8; 32]>, PolicyError> {
    if list.is_empty() {
        return Err(value(key, "the list is empty; name the images, or leave the key out".into()));
    }
    list.iter()
        .map(|text| {
            let digits = text.strip_prefix("0x").unwrap_or(text);
            let mut hash = [0; 32];
            hex::decode_to_slice(digits, &mut hash)
                .map_err(|_| value(key, format!("{text:?} is not 64 hexadecimal digits")))?;
            Ok(hash)
        })
        .collect()
}

fn pcrs(key: &str, list: &[String]) -> Result<Vec<Pcr>, PolicyError> {
    if list.is_empty() {
        return Err(value(key, "the list is empty; name the values, or leave the key out".into()));
    }
    list.iter()
        .map(|text| {
            let pcr: Pcr =
                text.parse().map_err(|_| value(key, format!("{text:?} is not 96 hexadecimal digits")))?;
            // A register that nobody set reads as zero, so this would allow every enclave without a role or a signer.
            if pcr.is_zero() { Err(value(key, "zero means that it was never set".into())) } else { Ok(pcr) }
        })
        .collect()
}

impl Authoriser for Policy {
    fn kind(&self) -> &'static str {
        "policy"
    }

    fn authorise<'a>(&'a self, question: &'a Question) -> Pending<'a, Result<Grant, Refusal>> {
        let decision = self.decide(question).map(|()| Grant { gateway_app_id: self.gateway_app_id.clone() });
        Box::pin(std::future::ready(decision))
    }

    fn is_remote(&self) -> bool {
        false
    }

    fn describe(&self) -> Pending<'_, Result<Option<AuthInfo>, Refusal>> {
        Box::pin(std::future::ready(Ok(None)))
    }
}

#[cfg(test)]
mod tests {
    use kms_protocol::wire::webhook::BootInfo;

    use super::*;

    const APP: &str = "1111111111111111111111111111111111111111";

    fn hash(byte: u8) -> String {
        hex::encode([byte; 32])
    }

    fn pcr(byte: u8) -> Pcr {
        Pcr::new([byte; 48])
    }

    fn decide(policy: &str, image: u8, role: Option<Pcr>) -> Result<(), Refusal> {
        let boot_info = BootInfo {
            app_id: hex::decode(APP).unwrap(),
            os_image_hash: vec![image; 32],
            compose_hash: vec![image; 32],
            ..BootInfo::default()
        };
        let registers = role.into_iter().map(|role| (PcrIndex::ROLE, role)).collect();
        let question = Question { purpose: Purpose::App, boot_info, registers };
        Policy::from_toml(policy).unwrap().decide(&question)
    }

    #[test]
    fn only_listed_images_of_listed_apps_are_allowed() {
        let policy = format!("[apps.{APP}]\nimages = [\"{}\", \"0x{}\"]", hash(1), hash(2));
        assert_eq!(decide(&policy, 1, None), Ok(()));
        assert_eq!(decide(&policy, 2, None), Ok(()));
        assert_eq!(decide(&policy, 3, None), Err(Refusal::denied("compose hash not allowed")));
        let other = policy.replace(APP, &"2".repeat(40));
        assert_eq!(decide(&other, 1, None), Err(Refusal::denied("app not registered")));
    }

    #[test]
    fn the_kms_own_list_counts_too() {
        let policy = format!("images = [\"{}\"]\n[apps.{APP}]\nimages = [\"{}\"]", hash(9), hash(1));
        assert_eq!(decide(&policy, 1, None), Err(Refusal::denied("OS image is not allowed")));
    }

    #[test]
    fn registers_that_name_the_owner_are_required() {
        let policy = format!("[apps.{APP}]\nimages = [\"{}\"]\npcr3 = [\"{}\"]", hash(1), pcr(3));
        assert_eq!(decide(&policy, 1, Some(pcr(3))), Ok(()));
        for role in [Some(pcr(4)), Some(Pcr::ZERO), None] {
            assert_eq!(decide(&policy, 1, role), Err(Refusal::denied("PCR3 is not allowed")));
        }
    }

    #[test]
    fn json_says_the_same() {
        let json = format!(r#"{{"apps": {{"0x{APP}": {{"images": ["{}"]}}}}}}"#, hash(1));
        let toml = format!("[apps.0x{APP}]\nimages = [\"{}\"]", hash(1));
        assert_eq!(Policy::from_json(&json).unwrap(), Policy::from_toml(&toml).unwrap());
    }

    #[test]
    fn empty_never_means_any_and_nothing_is_ignored() {
        let app = |rest: &str| format!("[apps.{APP}]\nimages = [\"{}\"]\n{rest}", hash(1));
        for (name, text) in [
            ("nothing", String::new()),
            ("no app", "[apps]".into()),
            ("no images", format!("[apps.{APP}]")),
            ("an empty list of images", format!("[apps.{APP}]\nimages = []")),
            ("an empty list for the KMS", format!("images = []\n{}", app(""))),
            ("an empty list of roles", app("pcr3 = []")),
            ("a role that was never set", app(&format!("pcr3 = [\"{}\"]", Pcr::ZERO))),
            ("a register nobody asks for", app(&format!("pcr5 = [\"{}\"]", pcr(1)))),
            ("a misspelt key", app("image = []")),
            ("a misspelt table", format!("{}\n[app]", app(""))),
            ("a short hash", format!("[apps.{APP}]\nimages = [\"00\"]")),
            ("a short app id", format!("[apps.11]\nimages = [\"{}\"]", hash(1))),
            ("an app twice", format!("{}\n[apps.0x{APP}]\nimages = [\"{}\"]", app(""), hash(2))),
        ] {
            assert!(Policy::from_toml(&text).is_err(), "{name}");
        }
    }
}
