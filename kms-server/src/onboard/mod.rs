//! The life of a KMS before it has keys: the Onboard service (reference §2.2, §8.3 to §8.7).
//!
//! ```text
//!            ┌── Bootstrap: makes new keys ────────────────┐
//! no keys ───┤                                             ├──▶ keys on the disk ── Finish ──▶ the main service
//!            └── Onboard: takes over another KMS's keys ───┘
//! ```
//!
//! Keys are made or received in memory, together with their evidence, and become the directory's in one step. Whoever
//! comes second is refused; nothing is overwritten. `Finish` without keys is refused too: it would end the service
//! and leave a KMS that cannot serve.

pub(crate) mod gate;
mod page;
mod source;

use std::sync::{Arc, OnceLock};

use hyper::StatusCode;
use hyper::http::request::Parts;
use kms_protocol::report_data;
use kms_protocol::runtime_events::Moment;
use kms_protocol::wire::{
    AttestationInfoResponse, BootstrapRequest, BootstrapResponse, Method, OnboardRequest, OnboardResponse,
    Service,
};
use sha2::{Digest as _, Sha256};
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::gate::{Gate, Refused};
use self::page::{AuthoriserStatus, Made, Status};
use crate::agent::AgentError;
use crate::attest;
use crate::authorise::Pending;
use crate::authorise::decider::Decider;
use crate::http::{Answer, Body, Caller, Failure, Message, Methods, Peer, plain, refuse_early};
use crate::own::{self, Own};
use crate::store::{self, Domain, DomainError, Evidence, NewKeys, Store};
use command_line::chain;

const TEXT: &str = "text/plain; charset=utf-8";

/// The Onboard service.
pub(crate) struct Onboarding {
    pub(crate) store: Arc<Store>,
    pub(crate) own: Arc<Own>,
    pub(crate) decider: Arc<Decider>,
    pub(crate) site_name: String,
    /// Whether the RPC certificate shows evidence of this machine.
    pub(crate) attest_rpc_cert: bool,
    pub(crate) source_timeout: std::time::Duration,
    /// Who may.
    pub(crate) gate: Gate,
    /// Where the key service will listen.
    pub(crate) port: u16,
    /// The keys that were made or taken over.
    pub(crate) made: OnceLock<Made>,
    /// One at a time.
    pub(crate) busy: Mutex<()>,
    /// Cancelled when the operator is done.
    pub(crate) finished: CancellationToken,
}

/// Why onboarding goes no further. The text goes to the operator.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Domain(#[from] DomainError),
    #[error("KMS has already been bootstrapped")]
    Bootstrapped,
    #[error("KMS has already been onboarded")]
    Onboarded,
    #[error("KMS is not allowed to bootstrap: {0}")]
    NotAllowed(own::Error),
    #[error("Failed to get attestation: {0}")]
    Own(own::Error),
    #[error("Failed to get VM info: {0}")]
    Agent(#[from] AgentError),
    #[error("Failed to decode app info: {0}")]
    Claims(attest::Error),
    #[error("Failed to onboard: {0}")]
    Source(Box<source::Error>),
    #[error("Failed to store keys: {}", chain(.0))]
    Store(store::Error),
    #[error("there are no keys yet: call Bootstrap or Onboard first")]
    Unfinished,
    #[error("a task was lost")]
    Lost,
}

impl From<source::Error> for Error {
    fn from(error: source::Error) -> Self {
        Self::Source(Box::new(error))
    }
}

impl Onboarding {
    async fn bootstrap(&self, request: BootstrapRequest) -> Result<BootstrapResponse, Error> {
        let domain = Domain::parse(&request.domain)?;
        let _alone = self.busy.lock().await;
        if self.has_keys()? {
            return Err(Error::Bootstrapped);
        }
        self.own.ensure_allowed(&self.decider).await.map_err(Error::NotAllowed)?;
        let keys = NewKeys::generate().map_err(Error::Store)?;
        let (ca_pubkey, k256_pubkey) = (keys.ca_spki().map_err(Error::Store)?, keys.k256_public_key());
        let binding = report_data::bootstrap(&ca_pubkey, &k256_pubkey);
        let (attestation, _) = self.own.evidence(binding).await.map_err(Error::Own)?;
        let response = BootstrapResponse { ca_pubkey, k256_pubkey: k256_pubkey.to_vec(), attestation };
        let made = Made {
            domain: domain.to_string(),
            k256_pubkey: hex::encode(k256_pubkey),
            ca_pubkey: hex::encode(&response.ca_pubkey),
            attestation: hex::encode(&response.attestation),
        };
        self.commit(keys, domain, Some(response.clone())).await?;
        self.made.get_or_init(|| made);
        info!(k256_pubkey = hex::encode(k256_pubkey), "made new root keys");
        Ok(response)
    }

    async fn onboard(&self, request: OnboardRequest) -> Result<OnboardResponse, Error> {
        let domain = Domain::parse(&request.domain)?;
        let _alone = self.busy.lock().await;
        if self.has_keys()? {
            return Err(Error::Onboarded);
        }
        let source = source::Source::new(&request.source_url, self.source_timeout)?;
        let keys = source.keys(&self.own, &self.decider).await?;
        let k256_pubkey = keys.k256_public_key();
        let made = Made {
            domain: domain.to_string(),
            k256_pubkey: hex::encode(k256_pubkey),
            ca_pubkey: hex::encode(keys.ca_spki().map_err(Error::Store)?),
            attestation: String::new(),
        };
        self.commit(keys, domain, None).await?;
        self.made.get_or_init(|| made);
        info!(source = %source, k256_pubkey = hex::encode(k256_pubkey), "took over the root keys of another KMS");
        Ok(OnboardResponse { k256_pubkey: k256_pubkey.to_vec() })
    }

    /// Everything on the disk, or nothing.
    async fn commit(
        &self,
        keys: NewKeys,
        domain: Domain,
        info: Option<BootstrapResponse>,
    ) -> Result<(), Error> {
        let evidence = match self.attest_rpc_cert {
            true => {
                let spki = keys.rpc_spki().map_err(Error::Store)?;
                Some(self.own.for_certificate(&spki).await.map_err(Error::Own)?)
            }
            false => None,
        };
        let (store, now) = (Arc::clone(&self.store), (self.own.clock)());
        let work = move || {
            let evidence = Evidence { rpc: evidence.as_deref(), bootstrap: info.as_ref() };
            store.commit(&keys, &domain, evidence, now)
        };
        tokio::task::spawn_blocking(work).await.map_err(|_| Error::Lost)?.map_err(Error::Store)
    }

    async fn attestation_info(&self) -> Result<AttestationInfoResponse, Error> {
        let (_, evidence) = self.own.evidence(report_data::LOCAL).await.map_err(Error::Own)?;
        let (tee_variant, ppid) = (evidence.tee_variant().to_owned(), evidence.raw_device_id());
        let vm_config = self.own.agent.vm_config().await?;
        let client = evidence.into_client(&vm_config, Moment::Now).map_err(Error::Claims)?;
        let chain = self.decider.description();
        Ok(AttestationInfoResponse {
            device_id: Sha256::digest(&ppid).to_vec(),
            mr_aggregated: client.boot_info.mr_aggregated,
            os_image_hash: client.boot_info.os_image_hash,
            tee_variant,
            site_name: self.site_name.clone(),
            eth_rpc_url: chain.as_ref().and_then(|info| info.eth_rpc_url.clone()).unwrap_or_default(),
            kms_contract_address: chain.map(|info| info.kms_contract_addr).unwrap_or_default(),
            ppid,
        })
    }

    /// How things are, for the page.
    fn status(&self, parts: &Parts, peer: &Peer) -> Answer {
        let status = match self.gate.authorise(parts, peer.ip) {
            Ok(()) => Status {
                locked: false,
                site_name: &self.site_name,
                port: self.port,
                authoriser: Some(AuthoriserStatus::of(&self.decider)),
                keys: self.made.get(),
            },
            // The page shows that by itself, and asks again with a token.
            Err(Refused::Token) => {
                Status { locked: true, site_name: "", port: self.port, authoriser: None, keys: None }
            }
            Err(refused) => return refused_early(parts, peer, refused),
        };
        status.answer()
    }

    fn has_keys(&self) -> Result<bool, Error> {
        self.store.has_keys().map_err(Error::Store)
    }

    /// Ends the service, when there is something to go on with.
    pub(crate) fn finish(&self) -> Result<(), Error> {
        if !self.has_keys()? {
            return Err(Error::Unfinished);
        }
        info!("onboarding is finished");
        self.finished.cancel();
        Ok(())
    }
}

fn refused_early(parts: &Parts, peer: &Peer, refused: Refused) -> Answer {
    warn!(peer = %peer.address, %refused, "onboarding refused");
    page::guarded(refuse_early(parts, refused.status(), refused.to_string()))
}

/// The service on its listener.
pub(crate) struct OnboardMethods(pub(crate) Arc<Onboarding>);

impl Methods for OnboardMethods {
    fn service(&self) -> Service {
        Service::Onboard
    }

    fn call<'a>(
        &'a self,
        method: Method,
        message: Message<'a>,
        _caller: Caller<'a>,
    ) -> Pending<'a, Result<Body, Failure>> {
        Box::pin(async move {
            let service = &self.0;
            match method {
                Method::Bootstrap => {
                    message.answer(service.bootstrap(message.decode()?).await.map_err(refused))
                }
                Method::Onboard => message.answer(service.onboard(message.decode()?).await.map_err(refused)),
                Method::GetAttestationInfo => {
                    message.answer(service.attestation_info().await.map_err(refused))
                }
                Method::Finish => {
                    service.finish().map_err(refused)?;
                    message.empty()
                }
                other => Err(Failure::unknown(other.name())),
            }
        })
    }

    fn refuse(&self, parts: &Parts, peer: &Peer) -> Option<Answer> {
        self.0.gate.authorise(parts, peer.ip).err().map(|refused| refused_early(parts, peer, refused))
    }

    fn page<'a>(&'a self, parts: &'a Parts, peer: &'a Peer) -> Option<Pending<'a, Answer>> {
        let service = &self.0;
        let path = parts.uri.path();
        let allowed = match path {
            "/" | "/onboard.css" | "/onboard.js" | "/status" => service.gate.admit(parts, peer.ip),
            "/finish" => service.gate.authorise(parts, peer.ip),
            _ => return None,
        };
        let answer = match (allowed, path) {
            (Err(refused), _) => refused_early(parts, peer, refused),
            (Ok(()), "/status") => service.status(parts, peer),
            (Ok(()), "/finish") => match service.finish() {
                Ok(()) => plain(StatusCode::OK, TEXT, "OK"),
                Err(error) => plain(StatusCode::BAD_REQUEST, TEXT, error.to_string()),
            },
            (Ok(()), path) => page::file(path)?,
        };
        Some(Box::pin(std::future::ready(answer)))
    }
}

fn refused(error: Error) -> Failure {
    let text = error.to_string();
    warn!(error = text, "onboarding refused");
    Failure::bad(text)
}
