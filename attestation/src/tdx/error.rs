use super::quote::{Measurement, ReportData};
use super::verify::TcbStatus;

/// Why a TDX quote was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The quote is longer than any quote; nothing of it was read.
    #[error("quote has {actual} bytes, expected at most {max}")]
    QuoteTooLarge {
        /// Bytes received.
        actual: usize,
        /// The limit.
        max: usize,
    },
    /// The collateral is longer than any collateral; nothing of it was read.
    #[error("collateral has {actual} bytes, expected at most {max}")]
    CollateralTooLarge {
        /// Bytes received.
        actual: usize,
        /// The limit.
        max: usize,
    },
    /// Not the JSON of DCAP collateral.
    #[error("collateral is not readable: {reason}")]
    Collateral {
        /// What the decoder says.
        reason: String,
    },
    /// Not a quote, or not of a TD.
    #[error("quote is not one of a TDX guest: {reason}")]
    Quote {
        /// What the decoder says.
        reason: String,
    },
    /// Something other than zero padding follows the quote.
    #[error("quote of {len} bytes is followed by bytes that are no padding")]
    TrailingBytes {
        /// Length of the quote proper.
        len: usize,
    },
    /// A debug bit (any of the TUD group of the TD's attributes) is set: the host can read the guest's memory.
    #[error("TD is under debug (attribute bits {bits:#04x}), its host can look into it")]
    Debug {
        /// The TUD byte.
        bits: u8,
    },
    /// Signatures, chains, revocation or TCB matching failed.
    #[error("quote does not verify: {reason}")]
    Unverified {
        /// What the quote library says.
        reason: String,
    },
    /// The platform's TCB has a status that the policy does not allow.
    #[error("TCB status is {actual}, which the policy does not allow")]
    TcbStatus {
        /// The status found.
        actual: TcbStatus,
    },
    /// A measurement differs from the policy.
    #[error("{register} is {actual}, policy expects {expected}")]
    Measurement {
        /// `MRTD`, `RTMR0` …
        register: &'static str,
        /// The reference value.
        expected: Measurement,
        /// The quote's.
        actual: Measurement,
    },
    /// The quote was made for something else.
    #[error("report data is {actual}, expected {expected}")]
    ReportData {
        /// What it had to be.
        expected: Box<ReportData>,
        /// The quote's.
        actual: Box<ReportData>,
    },
}

impl Error {
    /// The stable name of this kind of refusal, in kebab case.
    pub fn name(&self) -> &'static str {
        match self {
            Self::QuoteTooLarge { .. } => "tdx-quote-too-large",
            Self::CollateralTooLarge { .. } => "tdx-collateral-too-large",
            Self::Collateral { .. } => "tdx-collateral-unreadable",
            Self::Quote { .. } => "tdx-quote-malformed",
            Self::TrailingBytes { .. } => "tdx-quote-trailing-bytes",
            Self::Debug { .. } => "tdx-debug",
            Self::Unverified { .. } => "tdx-quote-unverified",
            Self::TcbStatus { .. } => "tdx-tcb-status",
            Self::Measurement { .. } => "tdx-measurement-mismatch",
            Self::ReportData { .. } => "tdx-report-data-mismatch",
        }
    }
}
