//! The evidence a peer presented in its certificate.

use std::fmt;

use kms_protocol::attestation_encoding::{Attestation, VersionedAttestation};
use kms_protocol::cert::CertificateContents;
use kms_protocol::report_data;
use rustls_pki_types::{CertificateDer, UnixTime};

use crate::Error;

/// Evidence from a peer's certificate whose report data is bound to the certificate's key. The platform's part of it
/// is still to be verified; only then does the binding mean something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerEvidence {
    spki_der: Vec<u8>,
    attestation: Attestation,
}

impl PeerEvidence {
    /// Reads the certificate a peer presented; `None` when it carries no evidence.
    ///
    /// # Errors
    /// [`Error::Certificate`], [`Error::Attestation`], [`Error::LegacyQuote`]; [`Error::NotBound`] when the report
    /// data is not the `ratls-cert` hash of the certificate's own key.
    pub fn from_certificate(certificate: &CertificateDer<'_>) -> Result<Option<Self>, Error> {
        let contents = CertificateContents::decode(certificate)
            .map_err(|source| Error::Certificate { what: "peer certificate", source })?;
        Self::from_contents(contents)
    }

    /// Reads the first of the certificates a connection's peer presented
    /// ([`rustls::CommonState::peer_certificates`]); `None` without certificates or without evidence.
    ///
    /// # Errors
    /// See [`Self::from_certificate`].
    pub fn from_peer(certificates: Option<&[CertificateDer<'_>]>) -> Result<Option<Self>, Error> {
        match certificates.and_then(<[_]>::first) {
            Some(certificate) => Self::from_certificate(certificate),
            None => Ok(None),
        }
    }

    pub(crate) fn from_contents(contents: CertificateContents) -> Result<Option<Self>, Error> {
        let Some(encoded) = contents.attestation else {
            return if contents.legacy_quote.is_some() { Err(Error::LegacyQuote) } else { Ok(None) };
        };
        let attestation =
            VersionedAttestation::decode(&encoded).map_err(Error::Attestation)?.into_attestation();
        if attestation.report_data != report_data::ratls_cert(&contents.spki_der) {
            return Err(Error::NotBound);
        }
        Ok(Some(Self { spki_der: contents.spki_der, attestation }))
    }

    /// SubjectPublicKeyInfo of the certificate, DER.
    #[must_use]
    pub fn spki_der(&self) -> &[u8] {
        &self.spki_der
    }

    /// The attestation. Compare the platform's signed report data with [`Attestation::report_data`].
    #[must_use]
    pub fn attestation(&self) -> &Attestation {
        &self.attestation
    }

    /// The attestation, owned.
    #[must_use]
    pub fn into_attestation(self) -> Attestation {
        self.attestation
    }
}

/// Judges a server's evidence during the handshake. Implementations verify the platform's signature, compare its
/// signed report data with the evidence's, and appraise the measurements.
pub trait EvidencePolicy: fmt::Debug + Send + Sync {
    /// Accepts or refuses.
    ///
    /// # Errors
    /// Why the evidence is refused, for the error chain.
    fn appraise(
        &self,
        evidence: &PeerEvidence,
        now: UnixTime,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;
}
