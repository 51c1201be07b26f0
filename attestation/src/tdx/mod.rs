//! Intel TDX quotes: what a KMS on a Confidential VM shows about itself.
//!
//! dcap-qvl checks the quote against Intel's collateral (certificates, revocation lists, TCB info), with the signatures
//! computed by aws-lc-rs. Around it: sizes are bounded first, nothing but padding may follow the quote, a TD whose
//! host can look into it is refused without an option to allow it, and the TCB status, which the library only
//! reports, is judged by the [`Policy`].
//!
//! ```text
//! quote, collateral ──Verifier::verify──▶ VerifiedQuote ──appraise──▶ AppraisedQuote
//! ```
//!
//! Collateral and time are arguments: nothing is fetched.

mod collateral;
mod error;
mod policy;
mod quote;
mod verify;

pub use collateral::{Collateral, CollateralKey, MAX_COLLATERAL_LEN, PcsAnswers};
pub use error::Error;
pub use policy::{AppraisedQuote, Policy};
pub use quote::{Measurement, ReportData, TdReport, report_data};
pub use verify::{MAX_QUOTE_LEN, TcbStatus, VerifiedQuote, Verifier};
