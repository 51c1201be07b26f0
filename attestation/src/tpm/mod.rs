//! Quotes of a virtual TPM, as Google's Confidential VMs add them to a TDX quote.
//!
//! The TPM signs its registers and a value that the caller chose (the hash of the TDX quote) with an attestation key,
//! whose certificate Google's CA issued. The event log beside it explains how the registers came to their values.
//!
//! ```text
//! quote, chain ──Verifier::verify──▶ VerifiedTpmQuote       registers, signed under the pinned root
//! ```
//!
//! Chain, revocation lists and time are arguments: nothing is fetched. What the registers should hold is the caller's to
//! judge.

mod attest;
mod error;
mod verify;

pub use error::Error;
pub use verify::{Chain, Event, MAX_TPM_EVENTS, TpmQuote, VerifiedTpmQuote, Verifier};
