//! The root that is trusted, given by bytes and never taken from a document.

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use crate::certificate::Certificate;
use crate::document::MAX_CERTIFICATE_LEN;
use crate::error::{AnchorFault, Error};
use crate::key::IssuerKey;

const AWS_NITRO_G1: &str = include_str!("aws-nitro-root-g1.pem");

/// The root certificate that chains must start with.
///
/// A verifier differs between production and development in this alone: AWS's root, or the root of an emulator.
#[derive(Clone)]
pub struct TrustAnchor {
    der: Box<[u8]>,
    key: IssuerKey,
}

impl TrustAnchor {
    /// AWS Nitro Enclaves Root CA G1 (`CN=aws.nitro-enclaves`), 2019-10-28 to 2049-10-28, of AWS's commercial regions.
    /// SHA-256 fingerprint `641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b`.
    #[expect(clippy::missing_panics_doc, reason = "the certificate is a constant, and a test reads it")]
    pub fn aws_nitro_g1() -> Self {
        Self::from_pem(AWS_NITRO_G1).expect("the built-in root is a valid anchor")
    }

    /// Reads a root from PEM that holds exactly one certificate.
    ///
    /// # Errors
    /// [`Error::TrustAnchor`] if it is no certificate, more than one, or cannot issue certificates.
    pub fn from_pem(pem: &str) -> Result<Self, Error> {
        let fault = |reason| Error::TrustAnchor { reason };
        let mut blocks = CertificateDer::pem_slice_iter(pem.as_bytes());
        let first = blocks.next().and_then(Result::ok).ok_or(fault(AnchorFault::Pem))?;
        match blocks.next() {
            None => Self::from_der(&first),
            Some(_) => Err(fault(AnchorFault::Several)),
        }
    }

    /// Reads a root from DER.
    ///
    /// # Errors
    /// [`Error::TrustAnchor`] if it is no certificate or cannot issue certificates.
    pub fn from_der(der: &[u8]) -> Result<Self, Error> {
        Self::checked(der).map_err(|reason| Error::TrustAnchor { reason })
    }

    fn checked(der: &[u8]) -> Result<Self, AnchorFault> {
        if der.is_empty() || der.len() > MAX_CERTIFICATE_LEN {
            return Err(AnchorFault::Length { actual: der.len(), max: MAX_CERTIFICATE_LEN });
        }
        let certificate = Certificate::decode(der).map_err(AnchorFault::Certificate)?;
        certificate.check_ca(0).map_err(AnchorFault::Certificate)?;
        let key = IssuerKey::new(certificate.public_key).map_err(AnchorFault::Certificate)?;
        Ok(Self { der: der.into(), key })
    }

    /// The certificate, DER.
    pub fn as_der(&self) -> &[u8] {
        &self.der
    }

    pub(crate) fn key(&self) -> &IssuerKey {
        &self.key
    }

    /// The root's fields, read out of the same bytes again: that costs a microsecond and keeps this free of lifetimes.
    pub(crate) fn certificate(&self) -> Certificate<'_> {
        Certificate::decode(&self.der).expect("the constructor decoded these bytes")
    }
}
