//! The server's end: optional client certificates (kms-protocol §1.1).

use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::time_provider::{DefaultTimeProvider, TimeProvider};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, SignatureScheme};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, KeyUsage};

use crate::issue::{Certificate, KeyPair};
use crate::{Error, provider, verify};

/// Whether clients may sign their certificates themselves (generation D). Nothing is lost by it: the temp CA's key is
/// handed to everybody, so its signature proves nothing either. The evidence inside is what counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SelfIssued {
    /// Only certificates of the temp CA, as generations A to C.
    #[default]
    Refuse,
    /// Also self-issued ones.
    Accept,
}

/// Makes server configurations.
#[derive(Debug)]
pub struct ServerConfigBuilder {
    temp_ca: CertificateDer<'static>,
    self_issued: SelfIssued,
    time: Arc<dyn TimeProvider>,
}

impl ServerConfigBuilder {
    /// A configuration that accepts clients of this temp CA.
    ///
    /// # Errors
    /// [`Error::NotACa`].
    pub fn new(temp_ca: CertificateDer<'static>) -> Result<Self, Error> {
        if !verify::is_ca(&temp_ca) {
            return Err(Error::NotACa { what: "temp CA" });
        }
        Ok(Self { temp_ca, self_issued: SelfIssued::Refuse, time: Arc::new(DefaultTimeProvider) })
    }

    /// Says whether clients may sign their certificates themselves.
    #[must_use]
    pub fn with_self_issued(mut self, self_issued: SelfIssued) -> Self {
        self.self_issued = self_issued;
        self
    }

    /// Takes the time from elsewhere than the system's clock.
    #[must_use]
    pub fn with_time(mut self, time: Arc<dyn TimeProvider>) -> Self {
        self.time = time;
        self
    }

    /// A configuration that presents exactly this certificate.
    ///
    /// # Errors
    /// [`Error::Tls`], also when the key is not the certificate's; [`Error::NotACa`].
    pub fn build(&self, certificate: &Certificate, key: &KeyPair) -> Result<rustls::ServerConfig, Error> {
        self.build_from_der(certificate.der().clone(), key.private_key_der())
    }

    /// The same from DER.
    ///
    /// # Errors
    /// See [`Self::build`].
    pub fn build_from_der(
        &self,
        certificate: CertificateDer<'static>,
        key: PrivateKeyDer<'static>,
    ) -> Result<rustls::ServerConfig, Error> {
        let provider = provider();
        let verifier =
            TempCaVerifier::new(&self.temp_ca, self.self_issued, provider.signature_verification_algorithms)?;
        let mut config = rustls::ServerConfig::builder_with_details(provider, Arc::clone(&self.time))
            .with_safe_default_protocol_versions()
            .map_err(Error::Tls)?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_single_cert(vec![certificate], key)
            .map_err(Error::Tls)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        // See the crate's documentation: no session outlives the evidence it was opened with.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }
}

#[derive(Debug)]
struct TempCaVerifier {
    temp_ca: TrustAnchor<'static>,
    hints: Vec<DistinguishedName>,
    self_issued: SelfIssued,
    algorithms: WebPkiSupportedAlgorithms,
}

impl TempCaVerifier {
    fn new(
        temp_ca: &CertificateDer<'_>,
        self_issued: SelfIssued,
        algorithms: WebPkiSupportedAlgorithms,
    ) -> Result<Self, Error> {
        let not_a_ca = || Error::NotACa { what: "temp CA" };
        let anchor = webpki::anchor_from_trusted_cert(temp_ca).map_err(|_| not_a_ca())?.to_owned();
        let (_, subject) = verify::names(temp_ca).ok_or_else(not_a_ca)?;
        Ok(Self { temp_ca: anchor, hints: vec![DistinguishedName::from(subject)], self_issued, algorithms })
    }

    fn judge(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), webpki::Error> {
        let by_temp_ca = EndEntityCert::try_from(leaf)?
            .verify_for_usage(
                self.algorithms.all,
                std::slice::from_ref(&self.temp_ca),
                intermediates,
                now,
                KeyUsage::client_auth(),
                None,
                None,
            )
            .map(|_| ());
        match (by_temp_ca, self.self_issued) {
            (Err(webpki::Error::UnknownIssuer), SelfIssued::Accept) => {
                let spki = kms_protocol::cert::spki_der(leaf).map_err(|_| webpki::Error::BadDer)?;
                let (_, subject) = verify::names(leaf).ok_or(webpki::Error::BadDer)?;
                verify::issued_directly_by(
                    leaf,
                    &spki,
                    Some(&subject),
                    &self.algorithms,
                    now,
                    KeyUsage::client_auth(),
                )
            }
            (result, _) => result,
        }
    }
}

/// The TLS alert follows from this, and upstream's clients see the same one.
fn certificate_error(error: webpki::Error) -> CertificateError {
    match error {
        webpki::Error::CertExpired { .. } => CertificateError::Expired,
        webpki::Error::CertNotValidYet { .. } => CertificateError::NotValidYet,
        webpki::Error::UnknownIssuer => CertificateError::UnknownIssuer,
        webpki::Error::InvalidSignatureForPublicKey => CertificateError::BadSignature,
        webpki::Error::RequiredEkuNotFoundContext(_) | webpki::Error::CaUsedAsEndEntity => {
            CertificateError::InvalidPurpose
        }
        webpki::Error::BadDer => CertificateError::BadEncoding,
        other => CertificateError::Other(rustls::OtherError(Arc::new(other))),
    }
}

impl ClientCertVerifier for TempCaVerifier {
    fn offer_client_auth(&self) -> bool {
        true
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.hints
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.judge(end_entity, intermediates, now)
            .map_err(|error| rustls::Error::InvalidCertificate(certificate_error(error)))?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
