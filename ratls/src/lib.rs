//! RA-TLS client and server configurations for rustls.
//!
//! RA-TLS puts evidence into a certificate whose key the evidence is bound to (kms-protocol §3.4, §5). This crate
//! issues such certificates ([`issue`]), makes the configurations of both ends ([`client`], [`server`]) and reads the
//! evidence a peer presented ([`evidence`]). Verifying the evidence is the caller's: on the server after the
//! handshake, because upstream answers bad evidence with an HTTP error; on the client inside it, through an
//! [`evidence::EvidencePolicy`].
//!
//! Every configuration names its cryptography provider (aws-lc-rs) itself and never the process's default. No
//! configuration resumes sessions: a resumed session would carry an older handshake's certificate, and with it
//! evidence that was fresh then. Each connection is attested by itself.

#![forbid(unsafe_code)]

mod app_chain;
pub mod client;
mod error;
pub mod evidence;
pub mod issue;
pub mod sealed;
pub mod server;
mod verify;

pub use app_chain::{AppChainError, verify_app_chain};
pub use error::{Error, Refusal};
pub use rustls_pki_types::{CertificateDer, UnixTime};

use std::sync::Arc;

use rustls::crypto::CryptoProvider;

/// The cryptography of every configuration of this crate.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}
