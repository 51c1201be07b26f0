//! What makes a server the KMS.

use std::sync::Arc;

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use crate::evidence::EvidencePolicy;
use crate::{Error, verify};

/// The KMS's root CA, pinned by its key. Upstream before generation C rewrites the certificate on every start with
/// the same key, so certificate bytes are no anchor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PinnedRoot {
    spki_der: Vec<u8>,
    subject: Option<Vec<u8>>,
}

impl PinnedRoot {
    /// Pins the key of the one CA certificate in a PEM text, and its name.
    ///
    /// # Errors
    /// [`Error::Pem`], [`Error::PemCount`], [`Error::Certificate`], [`Error::NotACa`].
    pub fn from_pem(pem: &str) -> Result<Self, Error> {
        Self::from_der(&one_certificate(pem, "pinned root CA")?)
    }

    /// Pins the key of a CA certificate, and its name.
    ///
    /// # Errors
    /// [`Error::Certificate`], [`Error::NotACa`].
    pub fn from_der(der: &CertificateDer<'_>) -> Result<Self, Error> {
        let what = "pinned root CA";
        let spki_der =
            kms_protocol::cert::spki_der(der).map_err(|source| Error::Certificate { what, source })?;
        if !verify::is_ca(der) {
            return Err(Error::NotACa { what });
        }
        Ok(Self { spki_der, subject: verify::names(der).map(|(_, subject)| subject) })
    }

    /// Pins a key by its SubjectPublicKeyInfo in DER, under any name.
    ///
    /// # Errors
    /// [`Error::PublicKey`].
    pub fn from_spki_der(spki_der: &[u8]) -> Result<Self, Error> {
        if !verify::is_spki(spki_der) {
            return Err(Error::PublicKey { what: "pinned root key" });
        }
        Ok(Self { spki_der: spki_der.to_vec(), subject: None })
    }

    /// The pinned key.
    #[must_use]
    pub fn spki_der(&self) -> &[u8] {
        &self.spki_der
    }

    /// Whether a PEM certificate, such as the `ca_cert` of a response, is for the pinned key.
    ///
    /// # Errors
    /// [`Error::Pem`], [`Error::PemCount`], [`Error::Certificate`].
    pub fn is_key_of(&self, pem: &str) -> Result<bool, Error> {
        let what = "CA certificate";
        let der = one_certificate(pem, what)?;
        let spki =
            kms_protocol::cert::spki_der(&der).map_err(|source| Error::Certificate { what, source })?;
        Ok(spki == self.spki_der)
    }

    pub(super) fn subject(&self) -> Option<&[u8]> {
        self.subject.as_deref()
    }
}

/// The only certificate in a PEM text.
pub(crate) fn one_certificate(pem: &str, what: &'static str) -> Result<CertificateDer<'static>, Error> {
    let mut certificates = CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| Error::Pem { what, source })?;
    match (certificates.len(), certificates.pop()) {
        (1, Some(certificate)) => Ok(certificate),
        (count, _) => Err(Error::PemCount { what, count }),
    }
}

/// Which server a client accepts. There is no value that stands for "nothing configured".
#[derive(Debug, Clone)]
pub struct ServerTrust(pub(super) Anchor);

#[derive(Debug, Clone)]
pub(super) enum Anchor {
    Root(PinnedRoot),
    Evidence(Arc<dyn EvidencePolicy>),
    Both(PinnedRoot, Arc<dyn EvidencePolicy>),
    DangerAny,
}

impl ServerTrust {
    /// A server whose certificate the pinned root issued itself, for its host name, with usage `kms:rpc`.
    #[must_use]
    pub fn pinned_root(root: PinnedRoot) -> Self {
        Self(Anchor::Root(root))
    }

    /// A server whose evidence, bound to its certificate's key, meets a policy, whoever issued the certificate. Host
    /// name, validity and usage are checked as well.
    #[must_use]
    pub fn evidence(policy: Arc<dyn EvidencePolicy>) -> Self {
        Self(Anchor::Evidence(policy))
    }

    /// A server that satisfies both.
    #[must_use]
    pub fn pinned_root_and_evidence(root: PinnedRoot, policy: Arc<dyn EvidencePolicy>) -> Self {
        Self(Anchor::Both(root, policy))
    }

    /// Any server that holds the key of the certificate it presents: the handshake's signature is checked, nothing
    /// else. Anybody on the way can be the KMS, as with upstream's `get-keys` without a root CA.
    #[must_use]
    pub fn danger_accept_any_kms() -> Self {
        Self(Anchor::DangerAny)
    }

    /// Whether this is [`Self::danger_accept_any_kms`].
    #[must_use]
    pub fn is_danger(&self) -> bool {
        matches!(self.0, Anchor::DangerAny)
    }

    /// The pinned root, if there is one.
    #[must_use]
    pub fn root(&self) -> Option<&PinnedRoot> {
        match &self.0 {
            Anchor::Root(root) | Anchor::Both(root, _) => Some(root),
            Anchor::Evidence(_) | Anchor::DangerAny => None,
        }
    }
}
