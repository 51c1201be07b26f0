//! Rules in a file: which images may have the keys of which app, and who may be a KMS with the same root keys.
//!
//! ```toml
//! # Images that this KMS serves at all; without the list, the apps' own lists decide alone.
//! images = ["7f985dffdbbe255e104a483961a9e2344bf9476bca077727eeb0ad88fbcd3326"]
//! gateway_app_id = ""
//! # What the TCB of a platform that has one may be, and which of Intel's advisories may apply to it.
//! tcb_statuses = ["UpToDate"]
//! advisory_ids = []
//!
//! [apps.1111111111111111111111111111111111111111]
//! # An image by OS_IMAGE_HASH, or by its registers: then a refusal says which one differs.
//! images = [
//!     "7f985dffdbbe255e104a483961a9e2344bf9476bca077727eeb0ad88fbcd3326",
//!     { pcr0 = "…", pcr1 = "…", pcr2 = "…" },
//! ]
//! # Optional: whose enclave it must be. PCR3 names the IAM role, PCR4 the instance, PCR8 the image's signer.
//! pcr3 = ["…"]
//! # What a virtual machine runs on that image; without the list, only enclaves have this app's keys.
//! compose_hashes = ["…"]
//! devices = ["…"]
//!
//! # Optional: without it nobody else may be a KMS with these root keys.
//! [kms]
//! images = ["…"]
//! mr_aggregated = ["…"]
//! devices = ["…"] # or allow_any_device = true
//! ```
//!
//! The same as JSON when the file is not named `.toml`. Unknown keys are errors, and so is every empty list of what is
//! allowed: an empty list must not read as "any".

mod explain;
mod file;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use attestation::{Pcr, PcrIndex};
use kms_protocol::AppId;

pub use self::explain::{Explanation, Step};
pub use self::watch::PolicyFile;

/// Longest policy read.
const MAX_FILE: u64 = 4 << 20;

/// A checked policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// `None`: no list of the KMS's own.
    images: Option<Vec<Image>>,
    gateway_app_id: String,
    tcb_statuses: BTreeSet<String>,
    advisory_ids: BTreeSet<String>,
    apps: BTreeMap<AppId, AppRule>,
    kms: Option<KmsRule>,
}

/// An image, and its registers where the file has them.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Image {
    hash: [u8; 32],
    registers: Option<[Pcr; 3]>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct AppRule {
    images: Vec<Image>,
    /// `None`: enclaves only, whose image is all there is.
    compose_hashes: Option<BTreeSet<[u8; 32]>>,
    devices: Option<BTreeSet<[u8; 32]>>,
    /// Registers that must hold one of some values.
    registers: Vec<(PcrIndex, Vec<Pcr>)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct KmsRule {
    images: Vec<Image>,
    mr_aggregated: BTreeSet<[u8; 32]>,
    /// `None`: any, which the file has to say.
    devices: Option<BTreeSet<[u8; 32]>>,
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

#[cfg(test)]
mod tests;
