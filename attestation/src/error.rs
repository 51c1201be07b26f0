//! Why evidence was refused.

use std::fmt;
use std::time::Duration;

use crate::cbor::CborFault;
use crate::certificate::CertificateFault;
use crate::pcr::{Pcr, PcrIndex};

/// Why evidence was refused. [`Error::name`] is stable and made for logs, metrics and scripts.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    // ---- decoding ----
    /// The evidence is longer than any document can be; nothing of it was read.
    #[error("evidence has {actual} bytes, expected at most {max}")]
    TooLarge {
        /// Bytes received.
        actual: usize,
        /// The limit, [`crate::MAX_EVIDENCE_LEN`].
        max: usize,
    },
    /// Not the CBOR that belongs there.
    #[error("{part} {fault}")]
    Cbor {
        /// Where.
        part: Part,
        /// What is wrong.
        fault: CborFault,
    },
    /// A CBOR tag other than 18 (COSE_Sign1) around the evidence.
    #[error("evidence has CBOR tag {tag}, expected 18 (COSE_Sign1) or none")]
    Tag {
        /// The tag.
        tag: u64,
    },
    /// COSE_Sign1 is an array of four.
    #[error("evidence is an array of {}, expected the 4 items of COSE_Sign1", AtLeast(*.actual, 5))]
    CoseLength {
        /// Items found; 5 stands for 5 or more.
        actual: usize,
    },
    /// No algorithm in the protected header.
    #[error("protected header names no algorithm")]
    AlgorithmMissing,
    /// Another algorithm than ES384 (-35).
    #[error("protected header names another algorithm than ES384 (-35)")]
    Algorithm,
    /// The unprotected header, which anybody can write, has a parameter that must be protected.
    #[error("unprotected header has parameter {label}, which must be protected")]
    Unprotected {
        /// 1 (alg) or 2 (crit).
        label: u64,
    },
    /// A critical header parameter that is not understood, or a `crit` that RFC 9052 §3.1 forbids.
    #[error("protected header marks as critical what is not understood here")]
    Critical,
    /// A string has a forbidden length.
    #[error("{part} has {actual} bytes, expected {}", Between(*.min, *.max))]
    Length {
        /// Which.
        part: Part,
        /// Its length in bytes.
        actual: usize,
        /// The least allowed.
        min: usize,
        /// The most allowed.
        max: usize,
    },
    /// A list has a forbidden number of entries.
    #[error("{part} has {actual} entries, expected at least {min}")]
    Count {
        /// Which.
        part: Part,
        /// Entries found.
        actual: usize,
        /// The least allowed.
        min: usize,
    },
    /// r or s of the signature is zero, or not below the order of P-384.
    #[error("{component} of the signature is not between 1 and the order of P-384")]
    SignatureRange {
        /// `'r'` or `'s'`.
        component: char,
    },
    /// A field that every document has is absent.
    #[error("{part} is absent")]
    Missing {
        /// Which.
        part: Part,
    },
    /// The registers are not of SHA-384.
    #[error("digest is not SHA384")]
    Digest,
    /// Time zero, which no NSM writes.
    #[error("timestamp is zero")]
    ZeroTimestamp,
    /// No such register.
    #[error("pcrs has index {index}, expected 0 to 31")]
    PcrIndex {
        /// The index.
        index: u64,
    },
    /// PCR0, PCR1 or PCR2 is absent, without which the document names no image.
    #[error("{index} is absent")]
    PcrMissing {
        /// Which.
        index: PcrIndex,
    },
    /// A document of an instance's NitroTPM, whose registers the instance itself can extend, not of an enclave.
    #[error("document is of a NitroTPM, expected one of an enclave's NSM")]
    NitroTpm,

    // ---- verifying ----
    /// The trust anchor that was given cannot be one.
    #[error("trust anchor {reason}")]
    TrustAnchor {
        /// Why not.
        reason: AnchorFault,
    },
    /// The document was made longer ago than the window allows.
    #[error("document is {} old, expected at most {}", Seconds(*.age), Seconds(*.max))]
    Stale {
        /// Time since its timestamp.
        age: Duration,
        /// The window.
        max: Duration,
    },
    /// The document is dated further ahead than clocks may differ.
    #[error("document is dated {} ahead, expected at most {}", Seconds(*.ahead), Seconds(*.max))]
    FromFuture {
        /// Time until its timestamp.
        ahead: Duration,
        /// The window.
        max: Duration,
    },
    /// The cabundle does not start with the pinned root.
    #[error("cabundle starts with another root than the pinned one")]
    UntrustedRoot,
    /// A certificate of the chain is unfit.
    #[error("{position} {fault}")]
    Certificate {
        /// Which.
        position: CertificatePosition,
        /// What is wrong with it.
        fault: CertificateFault,
    },
    /// The leaf's key did not make the signature.
    #[error("signature of the document does not verify with the leaf's key")]
    Signature,

    // ---- appraising ----
    /// A register of the image is zero, as in a debug enclave, whose memory and console its parent can read.
    #[error("{index} is zero: a debug enclave")]
    Debug {
        /// The first of PCR0 to PCR2 that is zero.
        index: PcrIndex,
    },
    /// A register that the policy names is absent.
    #[error("{index} is absent, policy expects {expected}")]
    PcrAbsent {
        /// Which.
        index: PcrIndex,
        /// The reference value.
        expected: Pcr,
    },
    /// A register differs from the policy.
    #[error("{index} is {actual}, policy expects {expected}")]
    PcrMismatch {
        /// Which.
        index: PcrIndex,
        /// The reference value.
        expected: Pcr,
        /// The document's.
        actual: Pcr,
    },
    /// The document does not carry what it was asked to be bound to.
    #[error("{binding} {}", if *.absent { "is absent" } else { "differs from the one expected" })]
    Binding {
        /// Which field.
        binding: Binding,
        /// Whether the field is absent or null, which an empty string is not.
        absent: bool,
    },
}

impl Error {
    /// The stable name of this kind of refusal, in kebab case. One name never changes its meaning.
    pub fn name(&self) -> &'static str {
        match self {
            Self::TooLarge { .. } => "evidence-too-large",
            Self::Cbor { fault, .. } => fault.name(),
            Self::Tag { .. } => "cose-tag",
            Self::CoseLength { .. } => "cose-length",
            Self::AlgorithmMissing => "cose-algorithm-missing",
            Self::Algorithm => "cose-algorithm",
            Self::Unprotected { .. } => "cose-unprotected-parameter",
            Self::Critical => "cose-critical-parameter",
            Self::Length { part, .. } => part.length_name(),
            Self::Count { part: Part::Pcrs, .. } => "pcrs-empty",
            Self::Count { .. } => "cabundle-empty",
            Self::SignatureRange { .. } => "signature-out-of-range",
            Self::Missing { .. } => "field-missing",
            Self::Digest => "digest-not-sha384",
            Self::ZeroTimestamp => "timestamp-zero",
            Self::PcrIndex { .. } => "pcr-index",
            Self::PcrMissing { .. } => "image-pcr-missing",
            Self::NitroTpm => "nitrotpm-document",
            Self::TrustAnchor { .. } => "trust-anchor",
            Self::Stale { .. } => "stale",
            Self::FromFuture { .. } => "from-the-future",
            Self::UntrustedRoot => "untrusted-root",
            Self::Certificate { fault, .. } => fault.name(),
            Self::Signature => "document-signature",
            Self::Debug { .. } => "debug-enclave",
            Self::PcrAbsent { .. } => "pcr-absent",
            Self::PcrMismatch { .. } => "pcr-mismatch",
            Self::Binding { binding, .. } => binding.mismatch_name(),
        }
    }
}

/// A part of the evidence, named in errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Part {
    /// The whole COSE_Sign1 structure.
    Evidence,
    /// The protected header.
    ProtectedHeader,
    /// The unprotected header.
    UnprotectedHeader,
    /// The signed payload: the attestation document proper.
    Payload,
    /// The signature.
    Signature,
    /// `module_id`.
    ModuleId,
    /// `digest`.
    Digest,
    /// `timestamp`.
    Timestamp,
    /// The map `pcrs`.
    Pcrs,
    /// A value in `pcrs`.
    Pcr,
    /// `certificate`, the leaf.
    Certificate,
    /// The array `cabundle`.
    CaBundle,
    /// A certificate in `cabundle`.
    CaBundleEntry,
    /// `public_key`.
    PublicKey,
    /// `user_data`.
    UserData,
    /// `nonce`.
    Nonce,
    /// A field that is not known here.
    UnknownField,
}

impl Part {
    fn length_name(self) -> &'static str {
        match self {
            Self::Evidence => "evidence-length",
            Self::ProtectedHeader => "protected-header-length",
            Self::UnprotectedHeader => "unprotected-header-length",
            Self::Payload => "payload-length",
            Self::Signature => "signature-length",
            Self::ModuleId => "module-id-length",
            Self::Digest => "digest-length",
            Self::Timestamp => "timestamp-length",
            Self::Pcrs => "pcrs-length",
            Self::Pcr => "pcr-length",
            Self::Certificate => "certificate-length",
            Self::CaBundle => "cabundle-length",
            Self::CaBundleEntry => "cabundle-entry-length",
            Self::PublicKey => "public-key-length",
            Self::UserData => "user-data-length",
            Self::Nonce => "nonce-length",
            Self::UnknownField => "unknown-field-length",
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Evidence => "evidence",
            Self::ProtectedHeader => "protected header",
            Self::UnprotectedHeader => "unprotected header",
            Self::Payload => "payload",
            Self::Signature => "signature",
            Self::ModuleId => "module_id",
            Self::Digest => "digest",
            Self::Timestamp => "timestamp",
            Self::Pcrs => "pcrs",
            Self::Pcr => "a value in pcrs",
            Self::Certificate => "certificate",
            Self::CaBundle => "cabundle",
            Self::CaBundleEntry => "a certificate in cabundle",
            Self::PublicKey => "public_key",
            Self::UserData => "user_data",
            Self::Nonce => "nonce",
            Self::UnknownField => "a field that is not known",
        })
    }
}

/// What a document can be bound to by the enclave that asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binding {
    /// `nonce`: the verifier's challenge.
    Nonce,
    /// `user_data`.
    UserData,
    /// `public_key`.
    PublicKey,
}

impl Binding {
    fn mismatch_name(self) -> &'static str {
        match self {
            Self::Nonce => "nonce-mismatch",
            Self::UserData => "user-data-mismatch",
            Self::PublicKey => "public-key-mismatch",
        }
    }
}

impl fmt::Display for Binding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nonce => "nonce",
            Self::UserData => "user_data",
            Self::PublicKey => "public_key",
        })
    }
}

/// Which certificate of a document's chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CertificatePosition {
    /// Entry of `cabundle`; 0 is the root.
    CaBundle(usize),
    /// `certificate`, whose key signed the document.
    Leaf,
}

impl fmt::Display for CertificatePosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CaBundle(index) => write!(f, "certificate {index} of the cabundle"),
            Self::Leaf => f.write_str("leaf certificate"),
        }
    }
}

/// Why something cannot be a trust anchor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AnchorFault {
    /// No PEM block of a certificate, or one that is damaged.
    #[error("is not a PEM certificate")]
    Pem,
    /// Which of several certificates is meant is not guessed.
    #[error("holds more than one PEM block, expected one certificate")]
    Several,
    /// Longer than a certificate in a document can be.
    #[error("has {actual} bytes, expected 1 to {max}")]
    Length {
        /// Its length.
        actual: usize,
        /// The limit.
        max: usize,
    },
    /// Not a certificate that could issue the next one.
    #[error("{0}")]
    Certificate(CertificateFault),
}

struct AtLeast(usize, usize);

impl fmt::Display for AtLeast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.0, if self.0 < self.1 { "" } else { " or more" })
    }
}

struct Between(usize, usize);

impl fmt::Display for Between {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0, self.1) {
            (min, max) if min == max => write!(f, "{min}"),
            (min, max) => write!(f, "{min} to {max}"),
        }
    }
}

struct Seconds(Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} s", self.0.as_secs())?;
        match self.0.subsec_millis() {
            0 => Ok(()),
            millis => write!(f, " {millis} ms"),
        }
    }
}
