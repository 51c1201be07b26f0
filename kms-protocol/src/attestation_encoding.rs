//! Attestation as it travels in certificates and messages (kms-protocol §4): V0 in SCALE, V1 in MessagePack.
//!
//! Decoding is strict: trailing bytes, overlong lengths, repeated keys and anything larger than [`MAX_LEN`] are
//! refused, and nothing is allocated on the word of a length that the input cannot hold. What comes out is decoded,
//! not verified: the platform's evidence has to be checked before any of it means something.
//!
//! Both readers are our own. The published SCALE and MessagePack decoders cannot be told to refuse repeated keys and
//! integers of the wrong width, and this format is what the crate is for.

mod model;
mod msgpack;
mod scale;
mod v0;
mod v1;

pub use model::{
    Attestation, Config, ConfigError, PcrValue, PlatformEvidence, RuntimeEvent, Stack, TdxEvent, TdxEvidence,
    TpmEvent, TpmPlatform, TpmQuote,
};

pub(crate) use msgpack::{Once as MsgpackOnce, Reader as MsgpackReader, Writer as MsgpackWriter};
pub(crate) use scale::{Reader as ScaleReader, Writer as ScaleWriter};

/// Largest encoded attestation, in bytes (§1.6).
pub const MAX_LEN: usize = 10 * 1024 * 1024;

/// Why an encoded attestation was refused, or could not be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No bytes at all.
    #[error("attestation is empty")]
    Empty,
    /// More than [`MAX_LEN`] bytes.
    #[error("attestation is {0} bytes, at most {MAX_LEN} are read")]
    TooLong(usize),
    /// A first byte that starts neither version.
    #[error("attestation starts with {0:#04x}, which is no known version")]
    UnknownVersion(u8),
    /// The input ends inside a value.
    #[error("{what}: the input ends too early")]
    Truncated {
        /// What was being read.
        what: &'static str,
    },
    /// Bytes after the end.
    #[error("{left} bytes after the end of the attestation")]
    TrailingBytes {
        /// How many.
        left: usize,
    },
    /// A length or integer not in its shortest form, or a value the type does not have.
    #[error("{what}: not a valid encoding")]
    Invalid {
        /// What was being read.
        what: &'static str,
    },
    /// A value of another type.
    #[error("{what}: wrong type, marker {marker:#04x}")]
    WrongType {
        /// What was being read.
        what: &'static str,
        /// The marker byte found.
        marker: u8,
    },
    /// Text that is not UTF-8.
    #[error("{what}: not UTF-8")]
    NotUtf8 {
        /// What was being read.
        what: &'static str,
    },
    /// A map that has a key twice.
    #[error("key {key} appears twice")]
    DuplicateKey {
        /// The key.
        key: &'static str,
    },
    /// A map without a key it must have.
    #[error("key {key} is missing")]
    MissingKey {
        /// The key.
        key: &'static str,
    },
    /// A name that is none of the known ones.
    #[error("{what} is none of the known ones")]
    UnknownName {
        /// Which choice.
        what: &'static str,
    },
    /// A `version` other than 1 in a V1 encoding, or an unknown event version.
    #[error("{what} is {actual}")]
    UnsupportedVersion {
        /// Which version.
        what: &'static str,
        /// Its value.
        actual: u64,
    },
    /// Values nested too deeply.
    #[error("values nested deeper than {0}")]
    TooDeep(usize),
    /// Report data that is not 64 bytes long.
    #[error("report data is {0} bytes, expected 64")]
    ReportDataLength(usize),
    /// Something V0 has no place for.
    #[error("V0 cannot hold {what}")]
    NotInV0 {
        /// What.
        what: &'static str,
    },
}

impl Error {
    /// A stable name for logs and machine output.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Empty => "attestation-empty",
            Self::TooLong(_) => "attestation-too-long",
            Self::UnknownVersion(_) => "attestation-unknown-version",
            Self::Truncated { .. } => "attestation-truncated",
            Self::TrailingBytes { .. } => "attestation-trailing-bytes",
            Self::Invalid { .. } => "attestation-invalid-encoding",
            Self::WrongType { .. } => "attestation-wrong-type",
            Self::NotUtf8 { .. } => "attestation-not-utf8",
            Self::DuplicateKey { .. } => "attestation-duplicate-key",
            Self::MissingKey { .. } => "attestation-missing-key",
            Self::UnknownName { .. } => "attestation-unknown-name",
            Self::UnsupportedVersion { .. } => "attestation-unsupported-version",
            Self::TooDeep(_) => "attestation-too-deep",
            Self::ReportDataLength(_) => "attestation-report-data-length",
            Self::NotInV0 { .. } => "attestation-not-in-v0",
        }
    }
}

/// Which encoding an attestation came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// SCALE; what clients write, because every server reads it.
    V0,
    /// MessagePack; read by servers since generation B.
    V1,
}

/// A decoded attestation together with the encoding it came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VersionedAttestation {
    version: Version,
    attestation: Attestation,
}

impl VersionedAttestation {
    /// Decodes either version.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        if bytes.len() > MAX_LEN {
            return Err(Error::TooLong(bytes.len()));
        }
        let (version, attestation) = match bytes.first() {
            None => return Err(Error::Empty),
            Some(0x00) => (Version::V0, v0::decode(bytes)?),
            Some(0x80..=0x8F | 0xDE | 0xDF) => (Version::V1, v1::decode(bytes)?),
            Some(other) => return Err(Error::UnknownVersion(*other)),
        };
        Ok(Self { version, attestation })
    }

    /// The encoding it came in.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// The content.
    #[must_use]
    pub fn attestation(&self) -> &Attestation {
        &self.attestation
    }

    /// The content, owned.
    #[must_use]
    pub fn into_attestation(self) -> Attestation {
        self.attestation
    }
}

impl Attestation {
    /// Encodes as V0, the form every server reads.
    ///
    /// # Errors
    /// [`Error::NotInV0`] for pods and for events of version 2; [`Error::TooLong`].
    pub fn encode_v0(&self) -> Result<Vec<u8>, Error> {
        bounded(v0::encode(self)?)
    }

    /// Encodes as V1.
    ///
    /// # Errors
    /// [`Error::TooLong`].
    pub fn encode_v1(&self) -> Result<Vec<u8>, Error> {
        bounded(v1::encode(self))
    }
}

fn bounded(bytes: Vec<u8>) -> Result<Vec<u8>, Error> {
    if bytes.len() > MAX_LEN { Err(Error::TooLong(bytes.len())) } else { Ok(bytes) }
}

#[cfg(test)]
mod tests;
