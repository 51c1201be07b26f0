use std::fmt;
use std::str::FromStr;

use aws_lc_rs::digest::{Algorithm, SHA256, SHA384, digest};
use dcap_qvl::config::{Config, CryptoProvider};
use dcap_qvl::signature::DerSigEncoder;
use dcap_qvl::verify::QuoteVerifier;
use dcap_qvl::x509::X509CertBackend;
use rustls_pki_types::SignatureVerificationAlgorithm;

use super::collateral::Collateral;
use super::error::Error;
use super::quote::{Measurement, TdReport, trimmed};
use crate::UnixMillis;

/// The longest quote that is looked at, padding included. Real ones have 5 KB, padded ones 8,000 bytes.
pub const MAX_QUOTE_LEN: usize = 16 * 1024;

/// Intel's SGX root CA, which also signs for TDX.
static INTEL_ROOT: &[u8] = include_bytes!("intel-sgx-root-ca.der");

/// How Intel rates the patch level of a platform.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum TcbStatus {
    /// Nothing is missing.
    UpToDate,
    /// Software inside of the TD has to mitigate something.
    SwHardeningNeeded,
    /// The platform's configuration has to change.
    ConfigurationNeeded,
    /// Both of the two before.
    ConfigurationAndSwHardeningNeeded,
    /// Patches are missing.
    OutOfDate,
    /// Patches and configuration are missing.
    OutOfDateConfigurationNeeded,
    /// The TD was started on an older TCB than the platform has now.
    TdRelaunchAdvised,
    /// The same, and configuration is missing.
    TdRelaunchAdvisedConfigurationNeeded,
    /// Not to be trusted any more.
    Revoked,
}

impl TcbStatus {
    const NAMES: [(Self, &'static str); 9] = [
        (Self::UpToDate, "UpToDate"),
        (Self::SwHardeningNeeded, "SWHardeningNeeded"),
        (Self::ConfigurationNeeded, "ConfigurationNeeded"),
        (Self::ConfigurationAndSwHardeningNeeded, "ConfigurationAndSWHardeningNeeded"),
        (Self::OutOfDate, "OutOfDate"),
        (Self::OutOfDateConfigurationNeeded, "OutOfDateConfigurationNeeded"),
        (Self::TdRelaunchAdvised, "TDRelaunchAdvised"),
        (Self::TdRelaunchAdvisedConfigurationNeeded, "TDRelaunchAdvisedConfigurationNeeded"),
        (Self::Revoked, "Revoked"),
    ];
}

/// Intel's spelling.
impl fmt::Display for TcbStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::NAMES.iter().find(|(status, _)| status == self).map_or("", |(_, name)| name);
        f.write_str(name)
    }
}

/// The name is no TCB status.
impl FromStr for TcbStatus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let status = Self::NAMES.iter().find(|(_, name)| *name == text).map(|(status, _)| *status);
        status.ok_or_else(|| {
            format!("{text:?} is not a TCB status, expected UpToDate or another of Intel's names")
        })
    }
}

/// Verifies quotes under Intel's root.
pub struct Verifier(QuoteVerifier<AwsLc>);

impl Default for Verifier {
    fn default() -> Self {
        Self::new()
    }
}

impl Verifier {
    /// A verifier that trusts Intel's SGX root CA.
    pub fn new() -> Self {
        Self::with_root(INTEL_ROOT)
    }

    /// A verifier that trusts another root, DER, instead of Intel's.
    pub fn with_root(root: &[u8]) -> Self {
        Self(QuoteVerifier::new_with_config(root.to_vec()))
    }

    /// Verifies a quote, padded or not, with collateral that must be valid at `now`.
    ///
    /// What the quote says, and the TCB status, are still to be appraised.
    ///
    /// # Errors
    /// The first check that fails. All failures inside of the quote library are [`Error::Unverified`].
    pub fn verify(
        &self,
        quote: &[u8],
        collateral: &Collateral,
        now: UnixMillis,
    ) -> Result<VerifiedQuote, Error> {
        if quote.len() > MAX_QUOTE_LEN {
            return Err(Error::QuoteTooLarge { actual: quote.len(), max: MAX_QUOTE_LEN });
        }
        let quote = trimmed(quote)?;
        let unverified = |reason: String| Error::Unverified { reason };
        let verified = self.0.verify(quote, collateral.inner(), now.as_secs());
        let verified = verified.map_err(|error| unverified(format!("{error:#}")))?;
        // A status that this version does not know cannot be judged, so it is refused.
        let tcb_status = verified.status.parse().map_err(unverified)?;
        let report = verified.report.as_td10().ok_or_else(|| unverified("it has no TD report".into()))?;
        let report = TdReport::from(report);
        // Anything but zero is a TDX module that Intel has not signed.
        let (expected, actual) = (Measurement([0; 48]), report.mr_signer_seam);
        if actual != expected {
            return Err(Error::Measurement { register: "MRSIGNERSEAM", expected, actual });
        }
        Ok(VerifiedQuote { report, tcb_status, advisories: verified.advisory_ids, ppid: verified.ppid })
    }
}

/// A quote whose signatures, chains and TCB level were checked. Only [`Verifier::verify`] makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifiedQuote {
    report: TdReport,
    tcb_status: TcbStatus,
    advisories: Vec<String>,
    ppid: Vec<u8>,
}

impl VerifiedQuote {
    /// What the TD is.
    pub fn report(&self) -> &TdReport {
        &self.report
    }

    /// How Intel rates the platform. The verifier does not judge it, the policy does.
    pub fn tcb_status(&self) -> TcbStatus {
        self.tcb_status
    }

    /// Intel's advisories that apply to the platform (`INTEL-SA-…`).
    pub fn advisories(&self) -> &[String] {
        &self.advisories
    }

    /// The platform's identifier (PPID) from its PCK certificate.
    pub fn ppid(&self) -> &[u8] {
        &self.ppid
    }
}

/// The quote library's audited parser with the signatures of aws-lc-rs, the one cryptographic library of this project.
pub(super) struct AwsLc;

impl Config for AwsLc {
    type X509 = X509CertBackend;
    type SigEncoder = DerSigEncoder;
    type Crypto = Self;
}

impl CryptoProvider for AwsLc {
    fn sig_algo() -> &'static dyn SignatureVerificationAlgorithm {
        webpki::aws_lc_rs::ECDSA_P256_SHA256
    }

    fn sha256(data: &[u8]) -> [u8; 32] {
        hash(&SHA256, data)
    }

    fn sha384(data: &[u8]) -> [u8; 48] {
        hash(&SHA384, data)
    }
}

fn hash<const N: usize>(algorithm: &'static Algorithm, data: &[u8]) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(digest(algorithm, data).as_ref());
    out
}
