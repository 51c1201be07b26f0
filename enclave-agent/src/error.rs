//! Why there are no keys, how the process ends for it, and what to do next.

use std::error::Error as StdError;
use std::io;
use std::time::Duration;

use command_line::{Exit, Failure};
use kms_protocol::derive::SignatureError;
use kms_protocol::wire;
use transport::Endpoint;

use crate::evidence::EvidenceError;
use crate::nsm::NsmError;
use crate::{HttpError, KmsUrl, ProxyError};

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// This enclave has no evidence to show.
    #[error(transparent)]
    Evidence(#[from] EvidenceError),
    /// The environment's proxy cannot be used.
    #[error(transparent)]
    Proxy(#[from] ProxyError),
    /// The KMS, or the proxy, could not be reached.
    #[error(transparent)]
    Connect(#[from] transport::Error),
    /// The proxy gave no tunnel.
    #[error("{proxy}: no tunnel to the KMS")]
    Tunnel {
        /// The proxy.
        proxy: Endpoint,
        /// What the proxy said.
        source: transport::connect::Error,
    },
    /// The TLS handshake took too long.
    #[error("{url}: no TLS handshake within {after:?}")]
    HandshakeTimedOut {
        /// The KMS.
        url: KmsUrl,
        /// The deadline that passed.
        after: Duration,
    },
    /// The connection broke during the handshake.
    #[error("{url}: TLS handshake")]
    Handshake {
        /// The KMS.
        url: KmsUrl,
        /// What broke.
        source: io::Error,
    },
    /// The server proved to be something else than the trusted KMS.
    #[error("{url}: not the trusted KMS: {reason}")]
    Untrusted {
        /// The KMS asked for.
        url: KmsUrl,
        /// Stable name of the refusal.
        name: &'static str,
        /// Why.
        reason: String,
    },
    /// The server ended the handshake with an alert.
    #[error("{url}: the KMS refused the TLS connection: {alert}")]
    Alert {
        /// The KMS.
        url: KmsUrl,
        /// The alert's name.
        alert: String,
    },
    /// What answers there does not speak TLS as a KMS does.
    #[error("{url}: {reason}")]
    NotTls {
        /// The KMS asked for.
        url: KmsUrl,
        /// rustls's words.
        reason: String,
    },
    /// A call failed.
    #[error("{url}")]
    Call {
        /// The KMS.
        url: KmsUrl,
        /// How.
        source: HttpError,
    },
    /// An answer that is not the message.
    #[error("{url}: {method}: the answer is not what a KMS sends")]
    Answer {
        /// The KMS.
        url: KmsUrl,
        /// The method called.
        method: &'static str,
        /// What is wrong with it.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// The KMS names another root CA than the one that authenticates it.
    #[error("{url}: {method}: the root CA in the answer is not the one that is trusted")]
    OtherRoot {
        /// The KMS.
        url: KmsUrl,
        /// The method called.
        method: &'static str,
    },
    /// The app's k256 key is not signed by the KMS's root k256 key.
    #[error("{url}: the app's k256 key is not signed by the KMS's root key")]
    KeySignature {
        /// The KMS.
        url: KmsUrl,
        /// What is wrong with the signature.
        source: Box<SignatureError>,
    },
    /// The keys were released for another image than this one.
    #[error("{url}: the keys are for image {actual}, this is {expected}")]
    OtherImage {
        /// The KMS.
        url: KmsUrl,
        /// Our image, hex.
        expected: String,
        /// The answer's, hex.
        actual: String,
    },
    /// The KMS releases no sealed keys, and others are not accepted.
    #[error("{url}: the KMS offers no sealed release, and keys are accepted in no other way")]
    NotSealed {
        /// The KMS.
        url: KmsUrl,
    },
    /// Sealed release was offered earlier in this run and is not any more.
    #[error("{url}: sealed release was offered before and is not any more")]
    SealedWithdrawn {
        /// The KMS.
        url: KmsUrl,
    },
    /// The KMS's root key did not sign the sealed answer.
    #[error("{url}: the sealed keys are not signed by the KMS's root key")]
    SealedSignature {
        /// The KMS.
        url: KmsUrl,
        /// What is wrong with the signature.
        source: Box<SignatureError>,
    },
    /// Our own certificate or configuration could not be made.
    #[error("cannot prepare the TLS connection")]
    Tls(#[source] ratls::Error),
    /// Our own attestation could not be encoded.
    #[error("cannot encode the attestation")]
    Encode(#[source] kms_protocol::attestation_encoding::Error),
    /// The system's clock cannot be read.
    #[error("cannot read the clock")]
    Clock,
    /// All attempts failed in ways that another could have mended.
    #[error("gave up after {attempts} attempts")]
    GaveUp {
        /// How many.
        attempts: u32,
        /// The last one's failure.
        source: Box<Error>,
    },
    /// The whole run took too long.
    #[error("no keys within {after:?}")]
    TimedOut {
        /// The deadline that passed.
        after: Duration,
        /// The last attempt's failure, if one was over.
        source: Option<Box<Error>>,
    },
}

impl Error {
    pub(crate) fn answer(url: &KmsUrl, method: &'static str, source: wire::Error) -> Self {
        Self::Answer { url: url.clone(), method, source: source.into() }
    }

    /// Sorts what came out of a handshake.
    pub(crate) fn handshake(url: &KmsUrl, error: io::Error) -> Self {
        tls_refusal(url, &error).unwrap_or_else(|| Self::Handshake { url: url.clone(), source: error })
    }

    /// Sorts what came out of a call: in TLS 1.3 the server judges our certificate after our handshake is done.
    pub(crate) fn call(url: &KmsUrl, error: HttpError) -> Self {
        tls_refusal(url, &error).unwrap_or_else(|| Self::Call { url: url.clone(), source: error })
    }

    /// Whether starting over may help, and how long the KMS wants to be left alone; `None` for everything final.
    /// Refusals are final, whoever refused.
    pub fn retry(&self) -> Option<Option<Duration>> {
        let again = match self {
            Self::Connect(error) => !matches!(error, transport::Error::NotConnectable { .. }),
            Self::Tunnel { source, .. } => source.is_transient(),
            Self::HandshakeTimedOut { .. } | Self::Handshake { .. } => true,
            Self::Call { source: HttpError::Busy { retry_after, .. }, .. } => return Some(*retry_after),
            Self::Call { source: HttpError::TimedOut { .. }, .. } => true,
            Self::Call { source: error @ HttpError::Exchange { .. }, .. } => !error.is_not_http(),
            _ => false,
        };
        again.then_some(None)
    }

    /// How a command that fails with this ends.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Evidence(EvidenceError::Nsm(NsmError::TimedOut { .. })) => Exit::NoAnswer,
            Self::Evidence(EvidenceError::Debug | EvidenceError::ClockSkew { .. }) => Exit::Refused,
            Self::Proxy(_) => Exit::Usage,
            Self::Tunnel { source, .. } => match source {
                transport::connect::Error::Status { .. } if !source.is_transient() => Exit::Refused,
                source if source.is_transient() => Exit::NoAnswer,
                _ => Exit::Internal,
            },
            Self::Connect(transport::Error::NotConnectable { .. }) => Exit::Usage,
            Self::Connect(_)
            | Self::HandshakeTimedOut { .. }
            | Self::Handshake { .. }
            | Self::TimedOut { .. } => Exit::NoAnswer,
            Self::Call { source, .. } => match source {
                HttpError::Refused { .. } => Exit::Refused,
                HttpError::Busy { .. } | HttpError::TimedOut { .. } => Exit::NoAnswer,
                HttpError::Exchange { .. } if !source.is_not_http() => Exit::NoAnswer,
                _ => Exit::Internal,
            },
            Self::Untrusted { .. }
            | Self::Alert { .. }
            | Self::OtherRoot { .. }
            | Self::NotSealed { .. }
            | Self::SealedWithdrawn { .. }
            | Self::SealedSignature { .. }
            | Self::KeySignature { .. }
            | Self::OtherImage { .. } => Exit::Refused,
            Self::GaveUp { source, .. } => source.exit(),
            Self::Evidence(_)
            | Self::NotTls { .. }
            | Self::Answer { .. }
            | Self::Tls(_)
            | Self::Encode(_)
            | Self::Clock => Exit::Internal,
        }
    }

    /// The next step, where it is known.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::Evidence(EvidenceError::Nsm(NsmError::Open { .. })) => {
                "run this inside a Nitro Enclave, or name a stand-in for its module with --nsm unix:PATH"
            }
            Self::Evidence(EvidenceError::Debug) => {
                "start the enclave without --debug-mode; for keys that nobody needs, add --danger-allow-debug"
            }
            Self::Evidence(EvidenceError::ClockSkew { .. }) => {
                "set this machine's clock; the KMS refuses documents and certificates by their time"
            }
            Self::Proxy(_) => {
                "give --proxy vsock:3:PORT, unix:PATH or tcp:HOST:PORT, or set HTTPS_PROXY to http://HOST:PORT"
            }
            Self::Connect(transport::Error::Resolve { .. }) => {
                "check the host name in --kms-url; an enclave has no DNS, so there --proxy is needed, which resolves names itself"
            }
            Self::Connect(_) => {
                "check host and port, that the KMS (or the proxy) is running, and that nothing filters the port"
            }
            Self::Tunnel { source: transport::connect::Error::Status { status: 403, .. }, .. } => {
                "allow the KMS's host and port in the proxy's list"
            }
            Self::Tunnel { source: transport::connect::Error::Status { status: 407, .. }, .. } => {
                "the proxy wants a user name and password in HTTPS_PROXY"
            }
            Self::Tunnel { .. } => "check that the proxy speaks HTTP CONNECT and can reach the KMS",
            Self::Untrusted { name, .. } => untrusted_hint(name)?,
            Self::Alert { .. } => {
                "the KMS did not take this enclave's certificate; compare the clocks of both machines"
            }
            Self::NotTls { .. } => {
                "check the port in --kms-url: the KMS's main listener speaks HTTPS, its onboarding page does not"
            }
            Self::HandshakeTimedOut { .. } | Self::Handshake { .. } => {
                "something accepts connections there but does not answer; look at the KMS's log and at the proxy's"
            }
            Self::Call { source: HttpError::Status { .. }, .. } => {
                "check --kms-url: host, port and path must be those of a dstack KMS; redirects are not followed"
            }
            // Upstream's words for evidence that does not verify (kms-protocol §1.5).
            Self::Call { source: HttpError::Refused { reason, .. }, .. }
                if reason.starts_with("invalid quote") =>
            {
                "the KMS does not believe this enclave's evidence: compare the clocks, and the NSM root that the KMS trusts"
            }
            Self::Call { source: HttpError::Refused { .. }, .. } => {
                "allow this image's os_image_hash and app id at the KMS's authoriser (`enclave-agent attest --json` shows the hash)"
            }
            Self::Call { source: HttpError::Busy { .. } | HttpError::TimedOut { .. }, .. } => {
                "try again later, or look at the KMS's log: its authoriser may not be answering"
            }
            Self::Call { .. } | Self::Answer { .. } => {
                "check that --kms-url is a dstack KMS and not another service"
            }
            Self::OtherRoot { .. } => {
                "the KMS, or somebody on the way, changed its root CA; do not use its keys before you know why"
            }
            Self::NotSealed { .. } => {
                "set core.sealed_release = \"offer\" at a KMS of this project; where keys may come in upstream's exchange, leave out --require-sealed (require_sealed in the measured configuration)"
            }
            Self::SealedWithdrawn { .. } => {
                "somebody leads this enclave to a KMS that releases keys unsealed; let all replicas offer sealed release"
            }
            Self::KeySignature { .. } | Self::SealedSignature { .. } => {
                "compare --kms-k256-pubkey with k256_pubkey in the KMS's GetMeta, over a way you trust"
            }
            Self::OtherImage { .. } => "the KMS mixed up images or is not one to trust",
            Self::GaveUp { source, .. } => source.hint()?,
            Self::TimedOut { source: Some(source), .. } => source.hint()?,
            Self::TimedOut { source: None, .. } => "raise --timeout, or look at the KMS's log",
            Self::Evidence(_) | Self::Tls(_) | Self::Encode(_) | Self::Clock => return None,
        })
    }
}

fn untrusted_hint(name: &str) -> Option<&'static str> {
    Some(match name {
        "server-not-issued-by-root" => {
            "compare --root-ca with the KMS's root-ca.crt, obtained over a way you trust"
        }
        "server-wrong-name" => "use the host name the KMS was bootstrapped with in --kms-url",
        "server-certificate-expired" => {
            "restart the KMS, which renews its certificate, or set this machine's clock"
        }
        "server-certificate-not-yet-valid" => "set this machine's clock",
        "server-wrong-usage" => {
            "another certificate of the same root answers there, such as an app's: this is not the KMS"
        }
        "server-no-evidence" => {
            "the KMS must put evidence into its certificate (attest_rpc_cert), or be pinned by --root-ca"
        }
        "server-policy" => "compare the KMS's measurements with --kms-policy",
        _ => return None,
    })
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let hint = error.hint();
        let failure = Self::new(error.exit(), error);
        match hint {
            Some(hint) => failure.with_hint(hint),
            None => failure,
        }
    }
}

/// What TLS has to say inside an error of any layer; `None` for a connection that just broke.
fn tls_refusal(url: &KmsUrl, error: &(dyn StdError + 'static)) -> Option<Error> {
    let url = url.clone();
    if let Some(refusal) = ratls::Refusal::in_error(error) {
        return Some(Error::Untrusted { url, name: refusal.name(), reason: command_line::chain(refusal) });
    }
    match rustls_error(error)? {
        rustls::Error::AlertReceived(alert) => Some(Error::Alert { url, alert: format!("{alert:?}") }),
        rustls::Error::InvalidCertificate(reason) => Some(Error::Untrusted {
            url,
            name: "server-certificate-invalid",
            reason: format!("server certificate: {reason}"),
        }),
        other => Some(Error::NotTls { url, reason: other.to_string() }),
    }
}

fn rustls_error<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        // io::Error's source skips the error it wraps.
        next = match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}
