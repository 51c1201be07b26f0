//! Evidence of AWS Nitro Enclaves (and, in [`tdx`] and [`tpm`], of Intel TDX and virtual TPMs): decode, verify, appraise.
//! No I/O, no clock.
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
//! # Where the specifications are silent
//!
//! AWS's rules are `docs/attestation_process.md` of aws-nitro-enclaves-nsm-api. Real documents differ from them, and
//! RFC 8949 and RFC 9052 leave choices:
//!
//! - Accepted, because real documents have it or anybody could change it: null for an absent field, an empty
//!   `public_key`, arrays and maps of indefinite length, CBOR tag 18 or none, any order of fields, fields that are not
//!   known (well-formed and bounded), any well-formed unprotected header without `alg` and `crit`.
//! - Refused, because no NSM writes it: integers and lengths that are not in their shortest form, strings in chunks,
//!   keys twice at any level, more than 8 levels or 64 entries in what is skipped, `crit` with anything but `alg`'s
//!   label 1, PCRs of other lengths than 48 bytes, documents without PCR0 to PCR2, `nitrotpm_pcrs` (AWS's root also
//!   signs for NitroTPMs, whose registers an instance's owner extends).
//! - The cabundle must start with the pinned root, byte for byte. That certificate is compared and never used.
//! - Names are compared byte for byte. A leaf may lack basic constraints; with them it must be no CA. An extended key
//!   usage, where there is one, must list clientAuth, as upstream has it. Revocation lists are not consulted: AWS's text
//!   turns them off, and certificates below the region live days or hours.
//! - A document is of a debug enclave if any of PCR0 to PCR2 is zero.
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
pub mod tpm;

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
