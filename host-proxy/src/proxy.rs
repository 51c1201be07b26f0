//! The running proxy: listeners, a new configuration without dropping connections, the stop.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};
use transport::{BindOptions, Endpoint, Listener, Peer};

use crate::accept::accept_loop;
use crate::admin;
use crate::config::{Config, Service};
use crate::error::Error;
use crate::limits::{Counts, Key, Limits, descriptors_allow};
use crate::metrics::Metrics;
use crate::record::{Observer, Tell};
use crate::resolve::{Answer, Resolve, ResolveError, SystemResolver};

/// What a caller may put in place of the proxy's own parts.
#[derive(Clone, Default)]
pub struct Options {
    /// Knows the addresses of names, in place of the system's resolver.
    pub resolver: Option<Arc<dyn Resolve>>,
    /// Told of each connection when it is over.
    pub observer: Option<Observer>,
}

/// A running proxy. Dropping it stops listening and cuts the connections; [`Proxy::shutdown`] lets them end.
pub struct Proxy {
    shared: Arc<Shared>,
    listeners: Vec<Running>,
    admin: Option<AdminTask>,
    grace: Duration,
    own_resolver: bool,
}

/// What the connections of all services share.
pub(crate) struct Shared {
    pub(crate) counts: Arc<Counts>,
    pub(crate) tell: Arc<Tell>,
    /// Cancelled when the time to end in peace is over.
    pub(crate) kill: CancellationToken,
    limits: RwLock<Limits>,
    resolver: RwLock<Arc<dyn Resolve>>,
    boots: watch::Sender<Option<Peer>>,
}

impl Shared {
    pub(crate) fn limits(&self) -> Limits {
        *self.limits.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn resolver(&self) -> Arc<dyn Resolve> {
        Arc::clone(&self.resolver.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn booted(&self, peer: Peer) {
        self.boots.send_replace(Some(peer));
    }

    /// Connections open now.
    pub(crate) fn open(&self) -> u32 {
        self.counts.get(&Key::All)
    }
}

struct Running {
    wanted: Endpoint,
    bound: Endpoint,
    service: watch::Sender<Arc<Service>>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

struct AdminTask {
    wanted: Endpoint,
    bound: Endpoint,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Starts listening, on the runtime this is called in.
    ///
    /// # Errors
    /// [`Error::Listen`]; then nothing is left open.
    pub async fn start(config: Config) -> Result<Self, Error> {
        Self::start_with(config, Options::default()).await
    }

    /// As [`start`](Self::start), with parts of the caller's.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub async fn start_with(config: Config, options: Options) -> Result<Self, Error> {
        let own_resolver = options.resolver.is_none();
        let resolver = options.resolver.unwrap_or_else(|| system_resolver(&config));
        let shared = Arc::new(Shared {
            counts: Arc::new(Counts::default()),
            tell: Arc::new(Tell { metrics: Metrics::new(), observer: options.observer }),
            kill: CancellationToken::new(),
            limits: RwLock::new(fit_limits(config.limits)),
            resolver: RwLock::new(resolver),
            boots: watch::Sender::new(None),
        });
        let mut proxy =
            Self { shared, listeners: Vec::new(), admin: None, grace: config.grace, own_resolver };
        proxy.apply(config).await?;
        Ok(proxy)
    }

    /// Takes a new configuration. Listeners that are in both go on; connections keep the rules they began with.
    ///
    /// # Errors
    /// [`Error::Listen`]; then the old configuration stays in force, whole.
    pub async fn reload(&mut self, config: Config) -> Result<(), Error> {
        let limits = fit_limits(config.limits);
        let resolver = self.own_resolver.then(|| system_resolver(&config));
        self.apply(config).await?;
        *self.shared.limits.write().unwrap_or_else(PoisonError::into_inner) = limits;
        if let Some(resolver) = resolver {
            *self.shared.resolver.write().unwrap_or_else(PoisonError::into_inner) = resolver;
        }
        self.shared.tell.metrics.reloaded();
        Ok(())
    }

    /// Where a service listens, by its name; for TCP with the port the system gave.
    pub fn endpoint(&self, service: &str) -> Option<&Endpoint> {
        self.listeners
            .iter()
            .find(|running| *running.service.borrow().name == *service)
            .map(|running| &running.bound)
    }

    /// Everything that is listened on.
    pub fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        self.listeners.iter().map(|running| &running.bound)
    }

    /// Where metrics and health are served.
    pub fn admin_endpoint(&self) -> Option<&Endpoint> {
        self.admin.as_ref().map(|admin| &admin.bound)
    }

    /// Connections open now.
    pub fn open_connections(&self) -> u32 {
        self.shared.open()
    }

    /// The last enclave whose heartbeat was answered, and each one after.
    pub fn boots(&self) -> watch::Receiver<Option<Peer>> {
        self.shared.boots.subscribe()
    }

    /// Stops listening, lets connections end for the configured grace time, cuts what is left, and says how many that
    /// were.
    pub async fn shutdown(mut self) -> u32 {
        for running in &self.listeners {
            running.stop.cancel();
        }
        let mut tasks: Vec<_> = self.listeners.drain(..).map(|running| running.task).collect();
        let ended = timeout(self.grace, async {
            for task in &mut tasks {
                // A task that panicked has ended too; its panic was reported.
                let _ended = task.await;
            }
        });
        let left = match ended.await {
            Ok(()) => 0,
            Err(_elapsed) => {
                let left = self.shared.open();
                self.shared.kill.cancel();
                for task in tasks.iter_mut().filter(|task| !task.is_finished()) {
                    let _ended = task.await;
                }
                left
            }
        };
        if let Some(admin) = self.admin.take() {
            admin.stop.cancel();
            let _ended = admin.task.await;
        }
        left
    }

    /// Opens what is new, and only when all of it is open changes anything.
    async fn apply(&mut self, config: Config) -> Result<(), Error> {
        config.check()?;
        let options = BindOptions { unix_mode: config.unix_mode, ..BindOptions::default() };
        let mut fresh = Vec::new();
        let mut kept = Vec::new();
        for service in config.services {
            if let Some(at) = self.listeners.iter().position(|running| running.wanted == service.listen) {
                kept.push((at, service));
                continue;
            }
            let bound = Listener::bind(&service.listen, options).await;
            let listener =
                bound.map_err(|source| Error::Listen { service: service.name.to_string(), source })?;
            fresh.push((service, listener));
        }
        let admin = self.bind_admin(config.admin.as_ref(), options).await?;
        // Nothing fails from here on.
        let mut old: Vec<_> = self.listeners.drain(..).map(Some).collect();
        for (at, service) in kept {
            if let Some(running) = old[at].take() {
                running.service.send_replace(Arc::new(service));
                self.listeners.push(running);
            }
        }
        for running in old.into_iter().flatten() {
            info!(endpoint = %running.bound, "no longer listening");
            running.stop.cancel();
        }
        for (service, listener) in fresh {
            self.listeners.push(self.spawn(service, listener));
        }
        match admin {
            AdminChange::Same => {}
            AdminChange::To(task) => {
                if let Some(old) = std::mem::replace(&mut self.admin, task) {
                    old.stop.cancel();
                }
            }
        }
        self.grace = config.grace;
        Ok(())
    }

    fn spawn(&self, service: Service, listener: Listener) -> Running {
        let (wanted, bound) = (service.listen.clone(), listener.endpoint().clone());
        info!(service = &*service.name, endpoint = %bound, "listening");
        let stop = CancellationToken::new();
        let (service, receiver) = watch::channel(Arc::new(service));
        let task = accept_loop(listener, receiver, Arc::clone(&self.shared), stop.clone());
        Running { wanted, bound, service, stop, task: tokio::spawn(task) }
    }

    async fn bind_admin(
        &self,
        wanted: Option<&Endpoint>,
        options: BindOptions,
    ) -> Result<AdminChange, Error> {
        if self.admin.as_ref().map(|admin| &admin.wanted) == wanted {
            return Ok(AdminChange::Same);
        }
        let Some(wanted) = wanted else { return Ok(AdminChange::To(None)) };
        let bound = Listener::bind(wanted, options).await;
        let listener = bound.map_err(|source| Error::Listen { service: "admin".to_owned(), source })?;
        let bound = listener.endpoint().clone();
        info!(endpoint = %bound, "metrics and health");
        let stop = CancellationToken::new();
        let task = tokio::spawn(admin::serve(listener, Arc::clone(&self.shared), stop.clone()));
        Ok(AdminChange::To(Some(AdminTask { wanted: wanted.clone(), bound, stop, task })))
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.kill.cancel();
        for running in &self.listeners {
            running.stop.cancel();
        }
        if let Some(admin) = &self.admin {
            admin.stop.cancel();
        }
    }
}

enum AdminChange {
    Same,
    To(Option<AdminTask>),
}

/// More connections than descriptors would only move the limit to where it cannot be told.
fn fit_limits(wanted: Limits) -> Limits {
    let max_connections = wanted.max_connections.min(descriptors_allow());
    if max_connections < wanted.max_connections {
        info!(
            wanted = wanted.max_connections,
            max_connections, "fewer connections, for the limit of open files"
        );
    }
    Limits { max_connections, ..wanted }
}

fn system_resolver(config: &Config) -> Arc<dyn Resolve> {
    match SystemResolver::new(config.cache) {
        Ok(resolver) => Arc::new(resolver),
        Err(source) => {
            error!(error = %source, "no resolver: targets given by name will not be reached");
            Arc::new(NoResolver(source.to_string()))
        }
    }
}

/// Answers every look-up with the reason why there is no resolver.
struct NoResolver(String);

impl Resolve for NoResolver {
    fn resolve<'a>(&'a self, name: &'a crate::policy::target::HostName) -> Answer<'a> {
        let error = ResolveError { name: name.to_string(), reason: self.0.clone() };
        Box::pin(async move { Err(error) })
    }
}
