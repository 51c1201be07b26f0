//! Platform configuration registers and the identity of an image that is computed from them.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::digest::{self, SHA256};

/// How many registers an NSM has (`max_pcrs` of `DescribeNSM`); indices are below this.
pub const PCR_COUNT: usize = 32;

/// The value of a register: a SHA-384 digest, 48 bytes, shown as lowercase hex.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pcr([u8; Self::LEN]);

impl Pcr {
    /// Length of a register in bytes.
    pub const LEN: usize = 48;
    /// A register that was never extended; PCR0 to PCR2 of a debug enclave.
    pub const ZERO: Self = Self([0; Self::LEN]);

    /// Wraps a SHA-384 digest.
    pub const fn new(bytes: [u8; Self::LEN]) -> Self {
        Self(bytes)
    }

    /// The digest.
    pub const fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }

    /// Whether every byte is zero.
    pub fn is_zero(&self) -> bool {
        *self == Self::ZERO
    }
}

impl From<[u8; Pcr::LEN]> for Pcr {
    fn from(bytes: [u8; Self::LEN]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for Pcr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl fmt::Debug for Pcr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pcr({self})")
    }
}

impl FromStr for Pcr {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        parse_hex(text).map(Self)
    }
}

/// The number of a register, 0 to 31.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PcrIndex(u8);

impl PcrIndex {
    /// PCR0: the whole enclave image.
    pub const IMAGE: Self = Self(0);
    /// PCR1: the kernel and the first ramdisk.
    pub const KERNEL: Self = Self(1);
    /// PCR2: the application, that is the later ramdisks.
    pub const APPLICATION: Self = Self(2);
    /// PCR3: the IAM role of the parent instance.
    pub const ROLE: Self = Self(3);
    /// PCR4: the identity of the parent instance.
    pub const INSTANCE: Self = Self(4);
    /// PCR8: the certificate that signed the image.
    pub const SIGNER: Self = Self(8);

    /// Checks that `index` names a register.
    pub const fn new(index: u8) -> Option<Self> {
        if (index as usize) < PCR_COUNT { Some(Self(index)) } else { None }
    }

    /// The number, below [`PCR_COUNT`].
    pub const fn get(self) -> u8 {
        self.0
    }
}

impl fmt::Display for PcrIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PCR{}", self.0)
    }
}

impl FromStr for PcrIndex {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let digits = text.len() <= 2 && text.bytes().all(|byte| byte.is_ascii_digit());
        let index = if digits { text.parse().ok() } else { None };
        index.and_then(Self::new).ok_or(ParseError::Index)
    }
}

/// `sha256(PCR0 ‖ PCR1 ‖ PCR2)`: how the KMS and its contracts name an enclave image.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OsImageHash([u8; Self::LEN]);

impl OsImageHash {
    /// Length of the hash in bytes.
    pub const LEN: usize = 32;

    /// Wraps a hash that was registered or received elsewhere.
    pub const fn new(bytes: [u8; Self::LEN]) -> Self {
        Self(bytes)
    }

    /// The hash.
    pub const fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }
}

impl From<[u8; OsImageHash::LEN]> for OsImageHash {
    fn from(bytes: [u8; Self::LEN]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for OsImageHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl fmt::Debug for OsImageHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OsImageHash({self})")
    }
}

impl FromStr for OsImageHash {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        parse_hex(text).map(Self)
    }
}

/// The name of the image that was measured into PCR0, PCR1 and PCR2.
///
/// ```
/// use attestation::{Pcr, os_image_hash};
///
/// // What a debug enclave has; a KMS must never allow this hash.
/// let debug = os_image_hash(&Pcr::ZERO, &Pcr::ZERO, &Pcr::ZERO);
/// assert_eq!(debug.to_string(), "81c611f35bff79491538b2f7cf201c7597a661a5c549633541c62bdc8af1613f");
/// ```
pub fn os_image_hash(pcr0: &Pcr, pcr1: &Pcr, pcr2: &Pcr) -> OsImageHash {
    let mut context = digest::Context::new(&SHA256);
    for pcr in [pcr0, pcr1, pcr2] {
        context.update(pcr.as_bytes());
    }
    let mut hash = [0; OsImageHash::LEN];
    hash.copy_from_slice(context.finish().as_ref());
    OsImageHash(hash)
}

/// A register, an index or an image hash was written wrongly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseError {
    /// Another number of characters.
    #[error("{actual} characters, expected {expected} hex digits")]
    Length {
        /// Hex digits of the type asked for.
        expected: usize,
        /// Characters found.
        actual: usize,
    },
    /// Something other than a hex digit.
    #[error("not a hex digit at character {at}")]
    Digit {
        /// Position of the first such character, from 0.
        at: usize,
    },
    /// Not a number from 0 to 31.
    #[error("not a PCR index, expected 0 to 31")]
    Index,
}

/// The registers of one document. Absent and zero are different things.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct PcrBank([Option<Pcr>; PCR_COUNT]);

impl PcrBank {
    pub(crate) const EMPTY: Self = Self([None; PCR_COUNT]);

    pub(crate) fn get(&self, index: PcrIndex) -> Option<&Pcr> {
        self.0[usize::from(index.get())].as_ref()
    }

    /// Sets a register; false if it was set before.
    pub(crate) fn set_once(&mut self, index: PcrIndex, pcr: Pcr) -> bool {
        self.0[usize::from(index.get())].replace(pcr).is_none()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (PcrIndex, &Pcr)> {
        (0..).map(PcrIndex).zip(&self.0).filter_map(|(index, pcr)| Some((index, pcr.as_ref()?)))
    }
}

pub(crate) fn write_hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

fn parse_hex<const N: usize>(text: &str) -> Result<[u8; N], ParseError> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return Err(ParseError::Length { expected: 2 * N, actual: text.chars().count() });
    }
    let nibble = |at: usize| match digits[at] {
        digit @ b'0'..=b'9' => Ok(digit - b'0'),
        digit @ b'a'..=b'f' => Ok(digit - b'a' + 10),
        digit @ b'A'..=b'F' => Ok(digit - b'A' + 10),
        _ => Err(ParseError::Digit { at }),
    };
    let mut bytes = [0; N];
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = nibble(2 * i)? << 4 | nibble(2 * i + 1)?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_index_is_below_32_and_plainly_written() {
        assert_eq!(PcrIndex::new(31).unwrap().to_string(), "PCR31");
        assert_eq!(PcrIndex::new(32), None);
        assert_eq!("8".parse::<PcrIndex>().unwrap(), PcrIndex::SIGNER);
        for wrong in ["", "32", "-1", "+1", "001", " 1", "1 ", "PCR1", "٣"] {
            assert_eq!(wrong.parse::<PcrIndex>(), Err(ParseError::Index), "{wrong:?}");
        }
    }

    #[test]
    fn hex_is_exact() {
        assert_eq!("00".repeat(48).parse(), Ok(Pcr::ZERO));
        assert_eq!("AB".repeat(48).parse(), Ok(Pcr::new([0xab; 48])));
        let short = "00".repeat(47).parse::<Pcr>();
        assert_eq!(short, Err(ParseError::Length { expected: 96, actual: 94 }));
        let letter = format!("{}0g", "00".repeat(47)).parse::<Pcr>();
        assert_eq!(letter, Err(ParseError::Digit { at: 95 }));
    }

    proptest! {
        #[test]
        fn hex_round_trips(bytes: [u8; 32]) {
            let hash = OsImageHash::new(bytes);
            prop_assert_eq!(hash.to_string().parse(), Ok(hash));
        }
    }
}
