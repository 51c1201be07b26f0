//! `TPMS_ATTEST` of a quote (TCG TPM 2.0 Library, part 2, §10.12): big-endian, lengths of two bytes.

use super::error::Error;

/// `TPM_GENERATED_VALUE`: what no key of a TPM signs for anybody else.
const MAGIC: u32 = 0xFF54_4347;
/// `TPM_ST_ATTEST_QUOTE`.
const QUOTE: u16 = 0x8018;
/// `TPM_ALG_SHA256`.
pub(super) const SHA256: u16 = 0x000B;
/// A TPM has 24 registers, and one bank is all that is read here.
const MAX_SELECTIONS: u32 = 16;

/// What the TPM signed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Attest<'a> {
    /// The caller's choice.
    pub(super) qualifying_data: &'a [u8],
    /// The registers, in order.
    pub(super) pcrs: Vec<u32>,
    /// Hash over their values.
    pub(super) pcr_digest: &'a [u8],
}

impl<'a> Attest<'a> {
    pub(super) fn decode(bytes: &'a [u8]) -> Result<Self, Error> {
        let mut reader = Reader(bytes);
        if reader.u32()? != MAGIC {
            return Err(Error::Attest { reason: "it was not made by a TPM" });
        }
        if reader.u16()? != QUOTE {
            return Err(Error::Attest { reason: "it is not a quote" });
        }
        let _qualified_signer = reader.sized()?;
        let qualifying_data = reader.sized()?;
        // Clock, reset and restart counts, the "safe" flag, the firmware's version.
        reader.take(8 + 4 + 4 + 1 + 8)?;
        let selections = reader.u32()?;
        if selections > MAX_SELECTIONS {
            return Err(Error::Attest { reason: "it selects too many banks" });
        }
        let mut pcrs = Vec::new();
        for _ in 0..selections {
            let bank = reader.u16()?;
            if bank != SHA256 {
                return Err(Error::Bank { actual: bank });
            }
            let len = reader.take(1)?[0];
            let bitmap = reader.take(usize::from(len))?;
            let bits = bitmap.iter().flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1 == 1));
            pcrs.extend((0..).zip(bits).filter_map(|(index, selected)| selected.then_some(index)));
        }
        let pcr_digest = reader.sized()?;
        if !reader.0.is_empty() {
            return Err(Error::Attest { reason: "bytes follow it" });
        }
        Ok(Self { qualifying_data, pcrs, pcr_digest })
    }
}

/// Reads from the front.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn take(&mut self, len: usize) -> Result<&'a [u8], Error> {
        let (head, rest) =
            self.0.split_at_checked(len).ok_or(Error::Attest { reason: "it ends too early" })?;
        self.0 = rest;
        Ok(head)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Error> {
        let bytes = self.take(2)?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    fn u32(&mut self) -> Result<u32, Error> {
        let bytes = self.take(4)?;
        Ok(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    pub(super) fn sized(&mut self) -> Result<&'a [u8], Error> {
        let len = self.u16()?;
        self.take(usize::from(len))
    }
}
