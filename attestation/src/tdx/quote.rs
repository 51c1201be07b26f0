use std::fmt;

use dcap_qvl::quote::{Quote, TDReport10};

use super::error::Error;
use super::verify::MAX_QUOTE_LEN;
use crate::pcr::write_hex;

/// A SHA-384 measurement of a TD, shown as lowercase hex.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Measurement(pub [u8; 48]);

impl fmt::Display for Measurement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl fmt::Debug for Measurement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Measurement({self})")
    }
}

/// The 64 bytes that a TD chose when it asked for the quote, shown as lowercase hex.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ReportData(pub [u8; 64]);

impl fmt::Display for ReportData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl fmt::Debug for ReportData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ReportData({self})")
    }
}

/// What a TD is, by the CPU's word (Intel TDX module, `TDREPORT_STRUCT`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TdReport {
    /// The TD's memory at its start: firmware.
    pub mrtd: Measurement,
    /// Extended at run time; what goes where is the firmware's and the guest's convention.
    pub rtmrs: [Measurement; 4],
    /// Set by the owner at creation.
    pub mr_config_id: Measurement,
    /// Set by the owner at creation.
    pub mr_owner: Measurement,
    /// Set by the owner at creation.
    pub mr_owner_config: Measurement,
    /// The TDX module.
    pub mr_seam: Measurement,
    /// Who signed the TDX module; zero for Intel's.
    pub mr_signer_seam: Measurement,
    /// What the TD asked to be signed.
    pub report_data: ReportData,
}

impl From<&TDReport10> for TdReport {
    fn from(report: &TDReport10) -> Self {
        Self {
            mrtd: Measurement(report.mr_td),
            rtmrs: [report.rt_mr0, report.rt_mr1, report.rt_mr2, report.rt_mr3].map(Measurement),
            mr_config_id: Measurement(report.mr_config_id),
            mr_owner: Measurement(report.mr_owner),
            mr_owner_config: Measurement(report.mr_owner_config),
            mr_seam: Measurement(report.mr_seam),
            mr_signer_seam: Measurement(report.mr_signer_seam),
            report_data: ReportData(report.report_data),
        }
    }
}

/// The quote without its padding: configfs-tsm and Google's guests pad to a fixed length with zeros.
///
/// A TD under debug, and anything but padding at the end, is refused here, before any signature is looked at.
pub(super) fn trimmed(padded: &[u8]) -> Result<&[u8], Error> {
    let malformed = |reason: &dyn fmt::Display| Error::Quote { reason: reason.to_string() };
    let quote = Quote::parse(padded).map_err(|error| malformed(&error))?;
    let report = quote.report.as_td10().ok_or_else(|| malformed(&"it is of an SGX enclave"))?;
    // All of the TUD group, bits 7:0 (TDX module ABI, TD attributes): any of them makes the TD untrusted.
    match report.td_attributes[0] {
        0 => {}
        bits => return Err(Error::Debug { bits }),
    }

    // The authentication data follows the signed part behind its length, four bytes little-endian.
    let signed = quote.signed_length();
    let auth_len: [u8; 4] = padded
        .get(signed..signed + 4)
        .and_then(|len| len.try_into().ok())
        .ok_or_else(|| malformed(&"it ends too early"))?;
    let len = usize::try_from(u32::from_le_bytes(auth_len)).map_err(|error| malformed(&error))?;
    let len = (signed + 4).saturating_add(len);
    let (quote, padding) = padded.split_at_checked(len).ok_or_else(|| malformed(&"it ends too early"))?;
    if padding.iter().any(|byte| *byte != 0) {
        return Err(Error::TrailingBytes { len });
    }
    Ok(quote)
}

/// What the TD of a quote asked to be signed, read without verifying anything.
///
/// # Errors
/// [`Error::QuoteTooLarge`], [`Error::Quote`].
pub fn report_data(quote: &[u8]) -> Result<ReportData, Error> {
    if quote.len() > MAX_QUOTE_LEN {
        return Err(Error::QuoteTooLarge { actual: quote.len(), max: MAX_QUOTE_LEN });
    }
    let malformed = |reason: &dyn fmt::Display| Error::Quote { reason: reason.to_string() };
    let quote = Quote::parse(quote).map_err(|error| malformed(&error))?;
    let report = quote.report.as_td10().ok_or_else(|| malformed(&"it is of an SGX enclave"))?;
    Ok(ReportData(report.report_data))
}
