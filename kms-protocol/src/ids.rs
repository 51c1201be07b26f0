//! The identifiers that go into derivations.

use std::fmt;
use std::str::FromStr;

/// An identifier that is not of the form it must have.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum IdError {
    /// Bytes of the wrong length.
    #[error("{what} is {actual} bytes, expected {expected}")]
    Length {
        /// Which identifier.
        what: &'static str,
        /// Its length.
        actual: usize,
        /// The allowed lengths.
        expected: &'static str,
    },
    /// Text that is not hex.
    #[error("{what} is not hex")]
    Hex {
        /// Which identifier.
        what: &'static str,
        /// What is wrong with it.
        source: hex::FromHexError,
    },
}

/// An application's identifier: 20 bytes, on chain the address of its contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AppId([u8; 20]);

impl AppId {
    /// An identifier from its bytes.
    #[must_use]
    pub const fn new(bytes: [u8; 20]) -> Self {
        Self(bytes)
    }

    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 20] {
        &self.0
    }
}

impl TryFrom<&[u8]> for AppId {
    type Error = IdError;

    fn try_from(bytes: &[u8]) -> Result<Self, IdError> {
        bytes.try_into().map(Self).map_err(|_| IdError::Length {
            what: "app_id",
            actual: bytes.len(),
            expected: "20",
        })
    }
}

impl FromStr for AppId {
    type Err = IdError;

    /// Reads 40 hex digits, with or without `0x`.
    fn from_str(text: &str) -> Result<Self, IdError> {
        let digits = text.strip_prefix("0x").unwrap_or(text);
        let bytes = hex::decode(digits).map_err(|source| IdError::Hex { what: "app_id", source })?;
        Self::try_from(bytes.as_slice())
    }
}

impl fmt::Display for AppId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// An instance's identifier: absent or 20 bytes. Other lengths are refused, because the derivation joins it to its
/// neighbours without separators (kms-protocol §12.2, 15).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct InstanceId(Option<[u8; 20]>);

impl InstanceId {
    /// No instance: every instance of the app gets the same disk key.
    pub const NONE: Self = Self(None);

    /// An identifier from its bytes.
    #[must_use]
    pub const fn new(bytes: [u8; 20]) -> Self {
        Self(Some(bytes))
    }

    /// The bytes, empty without an instance.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_ref().map_or(&[], |bytes| bytes.as_slice())
    }
}

impl TryFrom<&[u8]> for InstanceId {
    type Error = IdError;

    fn try_from(bytes: &[u8]) -> Result<Self, IdError> {
        if bytes.is_empty() {
            return Ok(Self::NONE);
        }
        bytes.try_into().map(Self::new).map_err(|_| IdError::Length {
            what: "instance_id",
            actual: bytes.len(),
            expected: "0 or 20",
        })
    }
}
