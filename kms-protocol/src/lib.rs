//! The dstack KMS wire protocol: messages, attestation encodings, derivations. No I/O.
//!
//! Section numbers in this crate's comments refer to the byte-exact description of the protocol that it was written
//! from (`kms-protocol`); the numbers are kept so that a reader of both finds the rule.

#![forbid(unsafe_code)]

pub mod app_info;
pub mod app_keys;
pub mod attestation_encoding;
pub mod cert;
pub mod csr;
pub mod derive;
pub mod ids;
pub mod kms_file;
pub mod nitro;
pub mod report_data;
pub mod runtime_events;
pub mod sealed;
mod secret;
pub mod tdx;
#[cfg(test)]
mod vectors;
pub mod wire;

pub use ids::{AppId, InstanceId};
