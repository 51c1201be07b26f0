//! From settings to a running KMS: open the directory of keys, find out who we are, get keys if there are none, serve.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};
use transport::{BindOptions, Endpoint, Listener};

use crate::admin::{Admin, ImageCache};
use crate::attest::Attester;
use crate::audit::Audit;
use crate::authorise::decider::Decider;
use crate::authorise::{self, Authoriser};
use crate::config::{AuthoriserConfig, Config, OnboardConfig};
use crate::http::{Http, Methods};
use crate::metrics::Metrics;
use crate::offload::Offload;
use crate::onboard::gate::{Gate, SetupToken};
use crate::onboard::{OnboardMethods, Onboarding};
use crate::own::Own;
use crate::rpc::{Clock, Kms, Main};
use crate::server::{Listening, ServerHandle, StartError, tls_acceptor};
use crate::store::{Domain, Identity, Recovery, Store};

/// A KMS that has opened its directory of keys and does not listen yet.
pub struct Opened {
    config: Config,
    clock: Clock,
    store: Arc<Store>,
    offload: Arc<Offload>,
    attester: Arc<Attester>,
    decider: Arc<Decider>,
    audit: Option<Arc<Audit>>,
    own: Arc<Own>,
}

/// The Onboard service, running. Dropping the handle stops it without waiting.
pub struct OnboardHandle {
    address: SocketAddr,
    token: Option<SetupToken>,
    finished: CancellationToken,
    shutdown: CancellationToken,
    stopped: TaskTracker,
}

impl Opened {
    /// Opens the directory, cleaning up after an interrupted bootstrap, and prepares everything that serving takes.
    ///
    /// # Errors
    ///
    /// [`StartError`].
    pub async fn open(config: Config, clock: Clock) -> Result<Self, StartError> {
        let directory = config.cert_dir.clone();
        let store = tokio::task::spawn_blocking(move || Store::open(&directory)).await??;
        match store.recovery() {
            Recovery::Clean => {}
            Recovery::Discarded => warn!("removed the remains of a bootstrap that had made no keys yet"),
            Recovery::Finished => warn!("finished an interrupted bootstrap; its keys are in place"),
        }
        let settings = (config.authoriser.clone(), config.audit_file.clone(), Arc::clone(&clock));
        let (authoriser, audit) = tokio::task::spawn_blocking(move || open_authoriser(settings)).await??;
        let limits = &config.limits;
        let offload = Arc::new(Offload::new(limits.max_verifications, limits.verification_queue));
        let attester = Arc::new(Attester::new(config.trust.clone(), Arc::clone(&offload))?);
        let own = Own::new(
            config.agent.clone(),
            Arc::clone(&attester),
            Arc::clone(&clock),
            config.enforce_self_authorization,
        );
        Ok(Self {
            decider: Arc::new(Decider::new(authoriser, config.decision_cache, audit.clone())),
            audit,
            store: Arc::new(store),
            own: Arc::new(own),
            config,
            clock,
            offload,
            attester,
        })
    }

    /// What the directory holds, in words for the log.
    ///
    /// # Errors
    ///
    /// When it holds something that cannot be used.
    pub fn has_keys(&self) -> Result<bool, StartError> {
        Ok(self.store.has_keys()?)
    }

    /// Whether an operator has to bootstrap or onboard it first: there are no keys, and the settings neither make them
    /// nor switch onboarding off.
    ///
    /// # Errors
    ///
    /// As [`has_keys`](Self::has_keys).
    pub fn needs_onboarding(&self) -> Result<bool, StartError> {
        let asks = self.config.onboard.enabled && self.config.auto_bootstrap_domain.is_none();
        Ok(asks && !self.has_keys()?)
    }

    /// Starts the Onboard service, over plain HTTP as upstream has it.
    ///
    /// # Errors
    ///
    /// When it cannot listen.
    pub async fn onboard(&self) -> Result<OnboardHandle, StartError> {
        let (listener, address) = listen(self.config.onboard.address).await?;
        let finished = CancellationToken::new();
        let OnboardConfig { allow_from, token, .. } = self.config.onboard.clone();
        let open = allow_from.is_none() && !token;
        let (gate, token) = Gate::new(allow_from, token).map_err(|_| StartError::Random)?;
        let service = Arc::new(Onboarding {
            store: Arc::clone(&self.store),
            own: Arc::clone(&self.own),
            decider: Arc::clone(&self.decider),
            site_name: self.config.site_name.clone(),
            attest_rpc_cert: self.config.attest_rpc_cert,
            source_timeout: self.config.trust.fetch_timeout,
            gate,
            port: self.config.address.1,
            made: OnceLock::new(),
            busy: Mutex::new(()),
            finished: finished.clone(),
        });
        let (shutdown, stopped) = (CancellationToken::new(), TaskTracker::new());
        let http = self.http(Arc::new(OnboardMethods(service)), Arc::default(), false);
        stopped.spawn(Listening::plain(listener, http, &self.config.limits, &shutdown).run());
        self.describe(&stopped, &shutdown);
        stopped.close();
        if open {
            warn!(%address, "whoever reaches this address can set up this KMS; core.onboard.token and allow_from limit it");
        }
        info!(%address, "this KMS has no keys: waiting for Bootstrap or Onboard");
        Ok(OnboardHandle { address, token, finished, shutdown, stopped })
    }

    /// Listens and serves in the background.
    ///
    /// # Errors
    ///
    /// [`StartError`]; nothing is served then.
    pub async fn serve(self) -> Result<ServerHandle, StartError> {
        self.auto_bootstrap().await?;
        let identity = self.identity().await?;
        let tls = tls_acceptor(&identity, self.config.self_issued)?;
        let (listener, address) = listen(self.config.address).await?;
        let admin = match &self.config.admin {
            Some(admin) => Some((listen(admin.address).await?, admin.auth.clone())),
            None => None,
        };
        let config = &self.config;
        let metrics = Arc::new(Metrics::default());
        let image_cache = ImageCache::new(config.image_cache.clone(), config.legacy_admin_token.clone());
        let kms = Arc::new(Kms {
            identity,
            decider: Arc::clone(&self.decider),
            audit: self.audit.clone(),
            attester: Arc::clone(&self.attester),
            own: Arc::clone(&self.own),
            nitro_enclave_key_release: config.nitro_enclave_key_release,
            sealed_release: config.sealed_release,
            image_cache: image_cache.clone(),
            offload: Arc::clone(&self.offload),
            metrics: Arc::clone(&metrics),
            clock: Arc::clone(&self.clock),
        });
        let (shutdown, stopped) = (CancellationToken::new(), TaskTracker::new());
        let http = self.http(Arc::new(Main(Arc::clone(&kms))), Arc::clone(&metrics), config.metrics);
        stopped.spawn(Listening::tls(listener, tls, http, &config.limits, &shutdown).run());
        let mut admin_address = None;
        if let Some(((listener, address), auth)) = admin {
            let http = self.http(Arc::new(Admin { auth, cache: image_cache }), metrics, false);
            stopped.spawn(Listening::plain(listener, http, &config.limits, &shutdown).run());
            info!(%address, "administration is open");
            admin_address = Some(address);
        }
        self.describe(&stopped, &shutdown);
        stopped.close();
        info!(%address, domain = %kms.identity.domain, "serving");
        Ok(ServerHandle { address, admin_address, kms, shutdown, stopped, _store: self.store })
    }

    fn http(&self, methods: Arc<dyn Methods>, metrics: Arc<Metrics>, show_metrics: bool) -> Arc<Http> {
        let (limits, body_limits) = (&self.config.limits, self.config.body_limits.clone());
        Arc::new(Http::new(
            methods,
            metrics,
            body_limits,
            show_metrics,
            limits.body,
            limits.request,
            limits.max_requests,
        ))
    }

    fn describe(&self, tasks: &TaskTracker, shutdown: &CancellationToken) {
        let (decider, stop) = (Arc::clone(&self.decider), shutdown.clone());
        tasks.spawn(async move { stop.run_until_cancelled(decider.tend()).await });
    }

    /// Makes keys when there are none and the settings name a domain.
    async fn auto_bootstrap(&self) -> Result<(), StartError> {
        let Some(domain) = self.config.auto_bootstrap_domain.clone() else { return Ok(()) };
        if self.has_keys()? {
            return Ok(());
        }
        self.own.ensure_allowed(&self.decider).await.map_err(StartError::NotAllowed)?;
        let now = (self.clock)();
        self.blocking(move |store| store.bootstrap(&domain, now)).await?;
        info!(directory = %self.config.cert_dir.display(), "made new root keys");
        Ok(())
    }

    /// Reads the keys and issues the RPC certificate, with evidence when the settings ask for it.
    async fn identity(&self) -> Result<Identity, StartError> {
        let now = (self.clock)();
        let domain: Option<Domain> = self.config.auto_bootstrap_domain.clone();
        let prepared = self.blocking(move |store| store.prepare(domain.as_ref(), now)).await?;
        let attestation = match self.config.attest_rpc_cert {
            true => {
                let spki = prepared.rpc_spki()?;
                Some(self.own.for_certificate(&spki).await.map_err(StartError::OwnEvidence)?)
            }
            false => None,
        };
        let identity = self.blocking(move |store| store.issue(prepared, attestation.as_deref(), now)).await?;
        for file in &identity.renewed {
            warn!(file, "was missing or about to expire; made again");
        }
        let k256 = hex::encode(identity.roots.k256_public_key().as_bytes());
        info!(domain = %identity.domain, k256, attested = self.config.attest_rpc_cert, "the directory holds keys");
        Ok(identity)
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, crate::store::Error> + Send + 'static,
    ) -> Result<T, StartError> {
        let store = Arc::clone(&self.store);
        Ok(tokio::task::spawn_blocking(move || work(&store)).await??)
    }
}

impl OnboardHandle {
    /// The token that it asks for, if the settings say so. For the console and for nothing else.
    #[must_use]
    pub fn token(&self) -> Option<&SetupToken> {
        self.token.as_ref()
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns when the operator has finished. Cancel safe.
    pub async fn finished(&self) {
        self.finished.cancelled().await;
    }

    /// Stops accepting, lets open requests end within the configured grace, and returns when all is over. Cancel safe.
    pub async fn shutdown(&self) {
        self.shutdown.cancel();
        self.stopped.wait().await;
    }
}

impl Drop for OnboardHandle {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

type Deciding = (Box<dyn Authoriser>, Option<Arc<Audit>>);

pub(crate) fn open_authoriser(
    (authoriser, audit, clock): (AuthoriserConfig, Option<PathBuf>, Clock),
) -> Result<Deciding, StartError> {
    let audit = audit.map(|file| Audit::open(&file, clock)).transpose()?.map(Arc::new);
    Ok((authorise::from_config(authoriser)?, audit))
}

async fn listen((ip, port): (IpAddr, u16)) -> Result<(Listener, SocketAddr), StartError> {
    let endpoint = Endpoint::Tcp { host: transport::TcpHost::Address(ip), port };
    let listener = Listener::bind(&endpoint, BindOptions::default()).await?;
    match listener.endpoint() {
        Endpoint::Tcp { host: transport::TcpHost::Address(ip), port } => {
            let address = SocketAddr::new(*ip, *port);
            Ok((listener, address))
        }
        other => Err(StartError::Address(other.to_string())),
    }
}
