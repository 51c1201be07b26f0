//! The client's end: which server it accepts, and the certificate it shows.

mod trust;
mod verifier;

pub(crate) use trust::one_certificate;
pub use trust::{PinnedRoot, ServerTrust};

use std::sync::Arc;

use kms_protocol::cert::CertificateContents;
use rustls::client::Resumption;
use rustls::time_provider::{DefaultTimeProvider, TimeProvider};
use rustls_pki_types::CertificateDer;

use crate::issue::{Certificate, KeyPair};
use crate::{Error, provider};
use verifier::TrustVerifier;

/// Makes client configurations. Every connection to a KMS must be made with the same [`ServerTrust`].
#[derive(Debug)]
pub struct ClientConfigBuilder {
    trust: ServerTrust,
    time: Arc<dyn TimeProvider>,
    alpn: Vec<Vec<u8>>,
}

impl ClientConfigBuilder {
    /// A configuration that accepts what `trust` accepts.
    #[must_use]
    pub fn new(trust: ServerTrust) -> Self {
        // Upstream's clients speak HTTP/1.1 without offering anything.
        Self { trust, time: Arc::new(DefaultTimeProvider), alpn: Vec::new() }
    }

    /// Takes the time from elsewhere than the system's clock.
    #[must_use]
    pub fn with_time(mut self, time: Arc<dyn TimeProvider>) -> Self {
        self.time = time;
        self
    }

    /// Offers application protocols, such as `h2`.
    #[must_use]
    pub fn with_alpn(mut self, protocols: &[&str]) -> Self {
        self.alpn = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
        self
    }

    /// A configuration without a client certificate.
    ///
    /// # Errors
    /// [`Error::Tls`].
    pub fn build(&self) -> Result<rustls::ClientConfig, Error> {
        Ok(self.finish(self.start()?.with_no_client_auth()))
    }

    /// A configuration that shows an RA-TLS certificate.
    ///
    /// # Errors
    /// [`Error::Tls`].
    pub fn build_with_certificate(
        &self,
        certificate: &Certificate,
        key: &KeyPair,
    ) -> Result<rustls::ClientConfig, Error> {
        let config = self
            .start()?
            .with_client_auth_cert(vec![certificate.der().clone()], key.private_key_der())
            .map_err(Error::Tls)?;
        Ok(self.finish(config))
    }

    fn start(
        &self,
    ) -> Result<rustls::ConfigBuilder<rustls::ClientConfig, rustls::client::WantsClientCert>, Error> {
        let provider = provider();
        let verifier = TrustVerifier::new(self.trust.clone(), provider.signature_verification_algorithms);
        Ok(rustls::ClientConfig::builder_with_details(provider, Arc::clone(&self.time))
            .with_safe_default_protocol_versions()
            .map_err(Error::Tls)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier)))
    }

    fn finish(&self, mut config: rustls::ClientConfig) -> rustls::ClientConfig {
        // See the crate's documentation: every connection is verified by itself.
        config.resumption = Resumption::disabled();
        config.alpn_protocols.clone_from(&self.alpn);
        config
    }
}

/// The certificate a server presented, for checks after the handshake and for comparing two connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PresentedServer {
    der: CertificateDer<'static>,
    contents: CertificateContents,
}

impl PresentedServer {
    /// Reads what the peer presented ([`rustls::CommonState::peer_certificates`]).
    ///
    /// # Errors
    /// [`Error::NoPeerCertificate`], [`Error::Certificate`].
    pub fn from_peer(certificates: Option<&[CertificateDer<'_>]>) -> Result<Self, Error> {
        let leaf = certificates.and_then(<[_]>::first).ok_or(Error::NoPeerCertificate)?;
        let contents = CertificateContents::decode(leaf)
            .map_err(|source| Error::Certificate { what: "server certificate", source })?;
        Ok(Self { der: leaf.clone().into_owned(), contents })
    }

    /// The certificate.
    #[must_use]
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    /// The protocol's part of it.
    #[must_use]
    pub fn contents(&self) -> &CertificateContents {
        &self.contents
    }

    /// SubjectPublicKeyInfo, DER.
    #[must_use]
    pub fn spki_der(&self) -> &[u8] {
        &self.contents.spki_der
    }
}

#[cfg(test)]
mod tests;
