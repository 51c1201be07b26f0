//! Errors of this crate, and why a server was refused.

use std::sync::Arc;

use kms_protocol::attestation_encoding;
use kms_protocol::cert;

/// Why a certificate could not be issued or read, or a configuration not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// PEM text that does not hold exactly one certificate.
    #[error("{what} holds {count} PEM certificates, expected one")]
    PemCount {
        /// Which text.
        what: &'static str,
        /// How many it holds.
        count: usize,
    },
    /// PEM text that cannot be read.
    #[error("{what} is not valid PEM")]
    Pem {
        /// Which text.
        what: &'static str,
        /// What is wrong with it.
        source: rustls_pki_types::pem::Error,
    },
    /// A private key that is not a P-256 key in PKCS#8.
    #[error("{what} is not a P-256 private key in PKCS#8")]
    Key {
        /// Which key.
        what: &'static str,
        /// What is wrong with it.
        source: rcgen::Error,
    },
    /// A CA certificate that is not the key's.
    #[error("{what}: the certificate is for another key")]
    KeyMismatch {
        /// Which CA.
        what: &'static str,
    },
    /// A certificate to trust that is no CA.
    #[error("{what} is not a CA certificate")]
    NotACa {
        /// Which certificate.
        what: &'static str,
    },
    /// A public key that is not a SubjectPublicKeyInfo.
    #[error("{what} is not a SubjectPublicKeyInfo in DER")]
    PublicKey {
        /// Which key.
        what: &'static str,
    },
    /// A certificate that cannot be read.
    #[error("{what} cannot be read")]
    Certificate {
        /// Which certificate.
        what: &'static str,
        /// What is wrong with it.
        source: cert::Error,
    },
    /// A certificate that could not be made.
    #[error("issuing {what} failed")]
    Issue {
        /// Which certificate.
        what: &'static str,
        /// Why.
        source: rcgen::Error,
    },
    /// A time outside what certificates can express.
    #[error("time {0} s is outside what a certificate can express")]
    Time(u64),
    /// TLS settings that rustls refuses.
    #[error("TLS configuration")]
    Tls(#[source] rustls::Error),
    /// The peer presented no certificate.
    #[error("the peer presented no certificate")]
    NoPeerCertificate,
    /// An attestation that cannot be decoded.
    #[error("attestation in the certificate")]
    Attestation(#[source] attestation_encoding::Error),
    /// Only the legacy quote extension, which predates every platform supported here.
    #[error("the certificate carries only a legacy TDX quote, expected an attestation")]
    LegacyQuote,
    /// Evidence that speaks for another key than the certificate's.
    #[error("report data of the attestation is not bound to the certificate's key")]
    NotBound,
    /// A connection whose exporter proves nothing.
    #[error("sealed release needs TLS 1.3, this connection has an older version")]
    ExporterVersion,
    /// Sealing or opening failed.
    #[error("HPKE")]
    Hpke(#[source] rustls::Error),
}

impl Error {
    /// A stable name for logs and machine output.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::PemCount { .. } => "pem-count",
            Self::Pem { .. } => "pem-invalid",
            Self::Key { .. } => "key-invalid",
            Self::KeyMismatch { .. } => "ca-key-mismatch",
            Self::NotACa { .. } => "not-a-ca",
            Self::PublicKey { .. } => "public-key-invalid",
            Self::Certificate { source, .. } => source.name(),
            Self::Issue { .. } => "issue-failed",
            Self::Time(_) => "time-out-of-range",
            Self::Tls(_) => "tls-configuration",
            Self::NoPeerCertificate => "no-peer-certificate",
            Self::Attestation(source) => source.name(),
            Self::LegacyQuote => "legacy-quote",
            Self::NotBound => "report-data-not-bound",
            Self::ExporterVersion => "tls-too-old-for-exporter",
            Self::Hpke(_) => "hpke",
        }
    }
}

/// Why a client refused a server, found again in the error of the connection with [`Refusal::in_error`].
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The certificate or its extensions cannot be read.
    #[error("server certificate cannot be read")]
    Certificate(#[source] cert::Error),
    /// Not signed by the pinned root key itself, or naming another issuer.
    #[error("server certificate is not issued directly by the pinned root CA")]
    NotIssuedByRoot,
    /// No longer valid.
    #[error("server certificate has expired")]
    Expired,
    /// Not valid yet.
    #[error("server certificate is not valid yet")]
    NotYetValid,
    /// For another host.
    #[error("server certificate is not for {0}")]
    WrongName(String),
    /// Not for a KMS listener: an app's certificate, for example, which any app can get for any name.
    #[error("server certificate is for {actual:?}, expected \"kms:rpc\"")]
    WrongUsage {
        /// What it is for; empty when it does not say.
        actual: String,
    },
    /// A CA's own certificate, or one without the digital signature usage.
    #[error("server certificate may not be used by a server")]
    WrongPurpose,
    /// Something else about the certificate.
    #[error("server certificate")]
    WebPki(#[source] webpki::Error),
    /// No attestation although the policy wants one.
    #[error("server certificate carries no attestation")]
    NoEvidence,
    /// An attestation that cannot be decoded or is bound to another key.
    #[error("server evidence")]
    Evidence(#[source] Arc<Error>),
    /// An attestation that the policy refuses.
    #[error("server evidence does not meet the policy")]
    Policy(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl Refusal {
    /// A stable name for logs and machine output.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Certificate(source) => source.name(),
            Self::NotIssuedByRoot => "server-not-issued-by-root",
            Self::Expired => "server-certificate-expired",
            Self::NotYetValid => "server-certificate-not-yet-valid",
            Self::WrongName(_) => "server-wrong-name",
            Self::WrongUsage { .. } => "server-wrong-usage",
            Self::WrongPurpose => "server-wrong-purpose",
            Self::WebPki(_) => "server-certificate-invalid",
            Self::NoEvidence => "server-no-evidence",
            Self::Evidence(source) => source.name(),
            Self::Policy(_) => "server-policy",
        }
    }

    /// The refusal inside the error that a handshake ended with, whatever wraps it.
    #[must_use]
    pub fn in_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(refusal) = error.downcast_ref::<Self>() {
                return Some(refusal);
            }
            if let Some(rustls::Error::InvalidCertificate(rustls::CertificateError::Other(other))) =
                error.downcast_ref::<rustls::Error>()
            {
                return other.0.downcast_ref::<Self>();
            }
            // io::Error's source skips the error it wraps.
            next = match error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
                Some(inner) => Some(inner),
                None => error.source(),
            };
        }
        None
    }
}

impl From<Refusal> for rustls::Error {
    fn from(refusal: Refusal) -> Self {
        Self::InvalidCertificate(rustls::CertificateError::Other(rustls::OtherError(Arc::new(refusal))))
    }
}
