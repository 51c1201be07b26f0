//! The rustls verifier behind a [`ServerTrust`].

use std::sync::Arc;

use kms_protocol::cert::{CertificateContents, Usage};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::{DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::trust::{Anchor, PinnedRoot, ServerTrust};
use crate::evidence::{EvidencePolicy, PeerEvidence};
use crate::{Refusal, verify};

#[derive(Debug)]
pub(super) struct TrustVerifier {
    trust: ServerTrust,
    algorithms: WebPkiSupportedAlgorithms,
}

impl TrustVerifier {
    pub(super) fn new(trust: ServerTrust, algorithms: WebPkiSupportedAlgorithms) -> Self {
        Self { trust, algorithms }
    }

    fn judge(&self, leaf: &CertificateDer<'_>, name: &ServerName<'_>, now: UnixTime) -> Result<(), Refusal> {
        let (root, policy) = match &self.trust.0 {
            Anchor::DangerAny => return Ok(()),
            Anchor::Root(root) => (Some(root), None),
            Anchor::Evidence(policy) => (None, Some(policy)),
            Anchor::Both(root, policy) => (Some(root), Some(policy)),
        };
        let contents = CertificateContents::decode(leaf).map_err(Refusal::Certificate)?;
        if let Some(root) = root {
            self.issued_by(leaf, root, now)?;
        }
        valid_at(leaf, now)?;
        EndEntityCert::try_from(leaf)
            .and_then(|end_entity| end_entity.verify_is_valid_for_subject_name(name))
            .map_err(|error| match error {
                webpki::Error::CertNotValidForName(_) => Refusal::WrongName(name.to_str().into_owned()),
                other => Refusal::WebPki(other),
            })?;
        if contents.usage != Some(Usage::KmsRpc) {
            let actual = contents.usage.map(|usage| usage.as_str().to_owned()).unwrap_or_default();
            return Err(Refusal::WrongUsage { actual });
        }
        if !verify::may_sign(leaf) || verify::is_ca(leaf) {
            return Err(Refusal::WrongPurpose);
        }
        policy.map_or(Ok(()), |policy| meets(contents, policy, now))
    }

    fn issued_by(&self, leaf: &CertificateDer<'_>, root: &PinnedRoot, now: UnixTime) -> Result<(), Refusal> {
        verify::issued_directly_by(
            leaf,
            root.spki_der(),
            root.subject(),
            &self.algorithms,
            now,
            KeyUsage::server_auth(),
        )
        .map_err(|error| match error {
            webpki::Error::CertExpired { .. } => Refusal::Expired,
            webpki::Error::CertNotValidYet { .. } => Refusal::NotYetValid,
            webpki::Error::UnknownIssuer
            | webpki::Error::InvalidSignatureForPublicKey
            | webpki::Error::UnsupportedSignatureAlgorithmForPublicKeyContext(_) => Refusal::NotIssuedByRoot,
            webpki::Error::CaUsedAsEndEntity | webpki::Error::RequiredEkuNotFoundContext(_) => {
                Refusal::WrongPurpose
            }
            other => Refusal::WebPki(other),
        })
    }
}

/// Validity by itself, for certificates whose issuer nobody knows.
fn valid_at(leaf: &CertificateDer<'_>, now: UnixTime) -> Result<(), Refusal> {
    let (_, certificate) = X509Certificate::from_der(leaf)
        .map_err(|_| Refusal::Certificate(kms_protocol::cert::Error::NotACertificate))?;
    let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    let validity = certificate.validity();
    if now < validity.not_before.timestamp() {
        Err(Refusal::NotYetValid)
    } else if now > validity.not_after.timestamp() {
        Err(Refusal::Expired)
    } else {
        Ok(())
    }
}

fn meets(
    contents: CertificateContents,
    policy: &Arc<dyn EvidencePolicy>,
    now: UnixTime,
) -> Result<(), Refusal> {
    let evidence = PeerEvidence::from_contents(contents)
        .map_err(|error| Refusal::Evidence(Arc::new(error)))?
        .ok_or(Refusal::NoEvidence)?;
    policy.appraise(&evidence, now).map_err(Refusal::Policy)
}

impl ServerCertVerifier for TrustVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        // Never looked at: the leaf has to come from the root itself.
        _intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.judge(end_entity, server_name, now)?;
        Ok(ServerCertVerified::assertion())
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
