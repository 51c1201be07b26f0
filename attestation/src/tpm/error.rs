/// Why a TPM quote was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A part is longer than any real one.
    #[error("{what} of the TPM quote is {actual}, expected at most {max}")]
    TooLarge {
        /// Which part.
        what: &'static str,
        /// Its size or number.
        actual: usize,
        /// The limit.
        max: usize,
    },
    /// The signed structure is not a `TPMS_ATTEST` of a quote.
    #[error("TPMS_ATTEST is not readable: {reason}")]
    Attest {
        /// What is wrong.
        reason: &'static str,
    },
    /// Registers of another hash than SHA-256.
    #[error("PCR bank {actual:#06x} is not SHA-256 (0x000b)")]
    Bank {
        /// The algorithm's number.
        actual: u16,
    },
    /// Other registers are listed than were signed.
    #[error("the PCRs listed are not the PCRs signed")]
    Selection,
    /// The listed values are not the signed ones.
    #[error("PCR values do not match the signed digest")]
    Digest,
    /// The event log does not lead to the register's value.
    #[error("the event log does not lead to the value of PCR {index}")]
    EventLog {
        /// Which register.
        index: u32,
    },
    /// The signature is malformed or by another key.
    #[error("signature of the TPM quote: {reason}")]
    Signature {
        /// What is wrong.
        reason: &'static str,
    },
    /// The attestation key's certificate does not lead to the root.
    #[error("certificate of the attestation key: {reason}")]
    Chain {
        /// What the verifier says.
        reason: String,
    },
    /// The root to trust is none.
    #[error("the root for TPM quotes is not a certificate: {reason}")]
    Root {
        /// What the decoder says.
        reason: String,
    },
}

impl Error {
    /// The stable name of this kind of refusal, in kebab case.
    pub fn name(&self) -> &'static str {
        match self {
            Self::TooLarge { .. } => "tpm-quote-too-large",
            Self::Attest { .. } => "tpm-attest-malformed",
            Self::Bank { .. } => "tpm-pcr-bank",
            Self::Selection => "tpm-pcr-selection",
            Self::Digest => "tpm-pcr-digest",
            Self::EventLog { .. } => "tpm-event-log",
            Self::Signature { .. } => "tpm-signature",
            Self::Chain { .. } => "tpm-chain",
            Self::Root { .. } => "tpm-root",
        }
    }
}
