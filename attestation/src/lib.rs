//! Evidence of AWS Nitro Enclaves (and, in [`tdx`], of Intel TDX): decode, verify, appraise. No I/O, no clock.
//!
//! ```text
//! bytes ──AttestationDocument::decode──▶ AttestationDocument     well-formed; anybody can write one
//! bytes ──Verifier::verify─────────────▶ VerifiedDocument        fresh, and signed under the pinned root
//!         VerifiedDocument::appraise───▶ AppraisedDocument       and what the policy asks for
//! ```
//!
//! Each step is a type with a private constructor, so a step that is left out does not compile. Signatures are checked
//! over the bytes received. Time and root are arguments. Every refusal is an [`Error`] with a stable [`Error::name`].
//!
//! Costs are bounded whatever is sent: evidence over [`MAX_EVIDENCE_LEN`] is refused unread, nothing is allocated by a
//! claimed length, at most nine signatures are checked.
//!
//! ```
//! use attestation::{Error, Policy, TrustAnchor, UnixMillis, Verifier};
//!
//! # fn main() {
//! # let evidence: &[u8] = &[0x84];
//! # let challenge: &[u8] = &[];
//! # let result = (|| {
//! let verifier = Verifier::new(TrustAnchor::aws_nitro_g1());
//! let policy = Policy::any_image_that_caller_authorises().with_nonce(challenge);
//! let document = verifier.verify(evidence, UnixMillis::from_secs(1_766_668_537))?.appraise(&policy)?;
//! println!("image {}", document.os_image_hash());
//! # Ok::<_, Error>(())
//! # })();
//! # assert_eq!(result.unwrap_err().name(), "cbor-truncated");
//! # }
//! ```

#![forbid(unsafe_code)]

mod anchor;
mod cache;
mod cbor;
mod certificate;
mod chain;
mod cose;
mod document;
mod error;
mod key;
mod pcr;
mod policy;
mod time;
mod verify;

pub mod tdx;

pub use anchor::TrustAnchor;
pub use cbor::CborFault;
pub use certificate::CertificateFault;
pub use cose::MAX_EVIDENCE_LEN;
pub use document::AttestationDocument;
pub use error::{AnchorFault, Binding, CertificatePosition, Error, Part};
pub use pcr::{OsImageHash, PCR_COUNT, ParseError, Pcr, PcrIndex, os_image_hash};
pub use policy::{AppraisedDocument, Policy};
pub use time::UnixMillis;
pub use verify::{Freshness, VerifiedDocument, Verifier};
