//! The methods of the KMS service: messages in, messages out, without HTTP.
//!
//! | module | methods |
//! | --- | --- |
//! | [`keys`] | `GetAppKey`, `GetKmsKey`, `GetAppEnvEncryptPubKey` |
//! | [`meta`] | `GetMeta`, `GetTempCaCert` |
//! | [`sign`] | `SignCert` |

mod keys;
mod meta;
mod sign;

use std::sync::Arc;

use attestation::UnixMillis;
use kms_protocol::attestation_encoding::Error as DecodeError;
use kms_protocol::derive::Error as DeriveError;
use kms_protocol::wire::webhook::bounded_reason;
use kms_protocol::wire::{Method, Service};
use tracing::info;

use crate::admin::ImageCache;
use crate::attest::{self, AttestedClient, Attester, ClientEvidence};
use crate::audit::Audit;
use crate::authorise::decider::Decider;
use crate::authorise::{Grant, Pending, Purpose, Refusal};
use crate::context;
use crate::http::{Body, Caller, Failure, Message, Methods};
use crate::metrics::{Gauges, Metrics};
use crate::offload::{Busy, Offload};
use crate::own::{self, Own};
use crate::sealed::{self, SealedRelease};
use crate::store::Identity;
use command_line::chain;

/// Reads the time.
pub type Clock = Arc<dyn Fn() -> UnixMillis + Send + Sync>;

/// The KMS behind its protocol.
pub(crate) struct Kms {
    pub(crate) identity: Identity,
    pub(crate) decider: Arc<Decider>,
    pub(crate) audit: Option<Arc<Audit>>,
    pub(crate) attester: Arc<Attester>,
    pub(crate) own: Arc<Own>,
    pub(crate) nitro_enclave_key_release: bool,
    pub(crate) sealed_release: SealedRelease,
    pub(crate) image_cache: ImageCache,
    pub(crate) offload: Arc<Offload>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) clock: Clock,
}

/// Why a method gives no answer. The text goes to the client.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("Unsupported API version: {0}")]
    ApiVersion(u32),
    #[error("App not allowed: No attestation provided")]
    NoAppAttestation,
    #[error("No attestation provided")]
    NoAttestation,
    #[error(transparent)]
    Attest(#[from] attest::Error),
    #[error("KMS self authorization failed: {0}")]
    Own(#[from] own::Error),
    #[error("App not allowed: key release to Nitro Enclaves is not enabled (core.nitro_enclave_key_release)")]
    ReleaseDisabled,
    #[error("App not allowed: this KMS releases app keys only sealed (GetAppKeySealed, core.sealed_release)")]
    SealedOnly,
    #[error(transparent)]
    Sealed(#[from] sealed::Error),
    #[error("App not allowed: {0}")]
    AppRefused(Refusal),
    #[error("{0}")]
    Refused(Refusal),
    #[error("app_id must be 20 bytes")]
    AppId,
    #[error("Failed to parse csr: {}", chain(.0))]
    Csr(DecodeError),
    #[error("Failed to verify csr signature")]
    CsrSignature,
    #[error("Quote verification failed: {0}")]
    CsrQuote(attest::Error),
    #[error("the certificate would be valid for this KMS's own name, {0}")]
    OwnName(String),
    #[error("Failed to sign certificate: {}", chain(.0))]
    Issue(ratls::Error),
    #[error("cannot encode keys: {}", chain(.0))]
    Store(crate::store::Error),
    #[error("cannot derive keys: {0}")]
    Derive(#[from] DeriveError),
    #[error("too many requests; try again")]
    Busy,
}

impl From<Busy> for Error {
    fn from(_: Busy) -> Self {
        Self::Busy
    }
}

impl Error {
    /// A stable name for logs and metrics.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::ApiVersion(_) => "api-version",
            Self::NoAppAttestation | Self::NoAttestation => "no-attestation",
            Self::Attest(error) | Self::CsrQuote(error) => error.name(),
            Self::Own(_) => "self-authorisation",
            Self::ReleaseDisabled => "release-disabled",
            Self::SealedOnly => "sealed-only",
            Self::Sealed(error) => error.name(),
            Self::AppRefused(refusal) | Self::Refused(refusal) => match refusal {
                Refusal::Denied { .. } => "denied",
                Refusal::Unavailable(_) => "authoriser-unavailable",
            },
            Self::AppId => "app-id-length",
            Self::Csr(_) => "csr-malformed",
            Self::CsrSignature => "csr-signature",
            Self::OwnName(_) => "csr-own-name",
            Self::Issue(error) => error.name(),
            Self::Store(_) => "encoding",
            Self::Derive(_) => "derivation",
            Self::Busy => "busy",
        }
    }

    /// Whether the same request may succeed a moment later.
    fn is_busy(&self) -> bool {
        match self {
            Self::Busy => true,
            Self::Attest(error) | Self::CsrQuote(error) => {
                matches!(error, attest::Error::Busy | attest::Error::Collateral(_))
            }
            Self::AppRefused(refusal) | Self::Refused(refusal) | Self::Own(own::Error::Refused(refusal)) => {
                matches!(refusal, Refusal::Unavailable(_))
            }
            _ => false,
        }
    }

    /// Whether an authoriser said so, whose answers are recorded where they are given.
    fn was_decided(&self) -> bool {
        matches!(self, Self::AppRefused(_) | Self::Refused(_) | Self::Own(own::Error::Refused(_)))
    }
}

impl Kms {
    async fn authorise(&self, purpose: Purpose, client: &AttestedClient) -> Result<Grant, Refusal> {
        let question = own::question(purpose, client);
        let answer = self.decider.decide(question).await;
        if let Err(refusal) = &answer {
            let purpose = purpose.name();
            info!(app = %client.app_id, image = %client.os_image_hash, purpose, %refusal, "not authorised");
        }
        answer
    }

    /// Upstream's later generations make it explicit that enclaves may have keys.
    fn ensure_release(&self, client: &AttestedClient) -> Result<(), Error> {
        let is_enclave = !client.registers.is_empty();
        if is_enclave && !self.nitro_enclave_key_release { Err(Error::ReleaseDisabled) } else { Ok(()) }
    }

    /// For `/health`: `OK`, and what an operator should look at, a line each.
    fn health(&self) -> String {
        let mut text = "OK".to_owned();
        for it in self.gauges().dependencies.into_iter().filter(|it| !it.is_good()) {
            if it.failures > 0 {
                let paused = if it.paused { ", and is not asked for a while" } else { "" };
                text.push_str(&format!(
                    "\n{}: {} questions in a row without an answer{paused}",
                    it.name, it.failures
                ));
            }
            if let Some(trouble) = it.trouble {
                text.push_str(&format!("\n{}: {trouble}", it.name));
            }
        }
        text
    }

    fn gauges(&self) -> Gauges {
        let (waiting, running) = self.offload.depth();
        let statistics = self.decider.statistics().clone();
        Gauges {
            waiting,
            running,
            decisions: statistics.decisions,
            decision_time: statistics.time,
            dependencies: [self.decider.health()].into_iter().chain(self.attester.dependencies()).collect(),
        }
    }

    async fn ensure_self_allowed(&self) -> Result<(), Error> {
        Ok(self.own.ensure_allowed(&self.decider).await?)
    }
}

/// The main listener's methods.
pub(crate) struct Main(pub(crate) Arc<Kms>);

impl Methods for Main {
    fn service(&self) -> Service {
        Service::Kms
    }

    fn serves(&self, method: Method) -> bool {
        match method {
            Method::GetChallenge | Method::GetAppKeySealed => self.0.sealed_release != SealedRelease::Off,
            Method::LegacyClearImageCache => self.0.image_cache.has_legacy_token(),
            _ => true,
        }
    }

    fn health(&self) -> String {
        self.0.health()
    }

    fn metrics(&self) -> String {
        self.0.metrics.render(&self.0.gauges())
    }

    fn verify_client(&self, certificate: Vec<u8>) -> Pending<'_, Result<Option<ClientEvidence>, Failure>> {
        Box::pin(async move {
            let verified = self.0.attester.certificate(certificate, (self.0.clock)()).await;
            verified.map_err(|error| self.refused(error.into()))
        })
    }

    fn call<'a>(
        &'a self,
        method: Method,
        message: Message<'a>,
        caller: Caller<'a>,
    ) -> Pending<'a, Result<Body, Failure>> {
        Box::pin(async move {
            let kms = &self.0;
            let Caller { evidence, session } = caller;
            match method {
                Method::GetAppKey => {
                    let request = message.decode()?;
                    message.answer(kms.app_key(&request, evidence).await.map_err(|error| self.refused(error)))
                }
                Method::GetChallenge => {
                    let answer = kms.challenge(&message.decode()?, session);
                    message.answer(answer.map_err(|error| self.refused(error.into())))
                }
                Method::GetAppKeySealed => {
                    let answer = kms.app_key_sealed(message.decode()?, session).await;
                    message.answer(answer.map_err(|error| self.refused(error)))
                }
                Method::GetKmsKey => {
                    let request = message.decode()?;
                    message.answer(kms.kms_key(&request, evidence).await.map_err(|error| self.refused(error)))
                }
                Method::GetAppEnvEncryptPubKey => {
                    let request = message.decode()?;
                    let answer = kms.env_encrypt_public_key(&request).await;
                    message.answer(answer.map_err(|error| self.refused(error)))
                }
                Method::SignCert => {
                    let request = message.decode()?;
                    message.answer(kms.sign_cert(request).await.map_err(|error| self.refused(error)))
                }
                Method::GetMeta => message.answer(Ok(kms.meta())),
                Method::GetTempCaCert => {
                    message.answer(kms.temp_ca_cert().await.map_err(|error| self.refused(error)))
                }
                Method::LegacyClearImageCache => {
                    let request = message.decode()?;
                    kms.image_cache.clear_legacy(request).await.map_err(Failure::bad)?;
                    message.empty()
                }
                other => Err(Failure::unknown(other.name())),
            }
        })
    }
}

impl Main {
    fn refused(&self, error: Error) -> Failure {
        let (name, busy, was_decided) = (error.name(), error.is_busy(), error.was_decided());
        self.0.metrics.refused(name);
        let text = error.to_string();
        // Parts of the text are the client's.
        let shown = bounded_reason(&text);
        info!(error = shown, "refused");
        if let Some(audit) = &self.0.audit
            && !was_decided
        {
            audit.refused(name, &shown, context::peer());
        }
        if busy { Failure::busy(text) } else { Failure::bad(text) }
    }
}
