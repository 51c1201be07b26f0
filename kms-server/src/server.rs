//! The server: from a [`Config`] to a listening KMS, and from an accepted connection to its end.
//!
//! Every connection holds one of a bounded number of places and has a deadline at each step: the handshake, the head
//! of a request, its body, its answer, and the time without a request.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use attestation::UnixMillis;
use hyper::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use ratls::server::SelfIssued;
use rustls_pki_types::PrivateKeyDer;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Notify, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};
use transport::{Listener, Stream};

use crate::attest::TrustError;
use crate::audit::{self, Event};
use crate::authorise;
use crate::config::{Config, Limits};
use crate::http::{Answers, Peer};
use crate::own;
use crate::peers::Peers;
use crate::rpc::{Clock, Kms};
use crate::sealed::Session;
use crate::start::Opened;
use crate::store::{self, Identity, Store};
use command_line::chain;

/// Pause after an accept that failed, which is how running out of descriptors shows.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Longest head of a request.
const MAX_HEAD: usize = 32 << 10;
/// Requests that one h2 connection may have open.
const MAX_STREAMS: u32 = 32;

/// Why the server does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The directory of keys cannot be used.
    #[error("the keys cannot be used")]
    Store(#[from] store::Error),
    /// There is nobody to decide who gets keys.
    #[error("there is no authoriser")]
    Authoriser(#[from] authorise::Error),
    /// Evidence could never be verified.
    #[error("evidence cannot be verified")]
    Trust(#[from] TrustError),
    /// The authoriser does not let this KMS make keys.
    #[error("KMS is not allowed to auto-bootstrap")]
    NotAllowed(#[source] own::Error),
    /// There is no evidence for the RPC certificate (`core.attest_rpc_cert`).
    #[error("no evidence for the RPC certificate")]
    OwnEvidence(#[source] own::Error),
    /// The audit log cannot be written.
    #[error("there is no audit log")]
    Audit(#[from] audit::OpenError),
    /// There is no randomness.
    #[error("the system gives no random numbers")]
    Random,
    /// TLS cannot be set up.
    #[error("TLS cannot be set up")]
    Tls(#[from] ratls::Error),
    /// The address cannot be bound.
    #[error("cannot listen")]
    Listen(#[from] transport::Error),
    /// The system gave no address.
    #[error("{0} has no socket address")]
    Address(String),
    /// A blocking task was lost.
    #[error("a task of the start was lost")]
    Task(#[from] tokio::task::JoinError),
}

/// A KMS; [`start`](Server::start) makes one run.
pub struct Server;

/// A running KMS. Dropping the handle stops it without waiting.
pub struct ServerHandle {
    pub(crate) address: SocketAddr,
    pub(crate) admin_address: Option<SocketAddr>,
    pub(crate) kms: Arc<Kms>,
    pub(crate) shutdown: CancellationToken,
    pub(crate) stopped: TaskTracker,
    /// Keeps the directory locked as long as the server runs.
    pub(crate) _store: Arc<Store>,
}

impl Server {
    /// Opens the keys (making them when the configuration says so), listens and serves in the background.
    ///
    /// # Errors
    ///
    /// [`StartError`]; nothing is served then.
    pub async fn start(config: Config) -> Result<ServerHandle, StartError> {
        Self::start_at(config, Arc::new(system_clock)).await
    }

    /// As [`start`](Self::start), with another clock than the system's (certificates of clients are still checked
    /// against that one).
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start).
    pub async fn start_at(config: Config, clock: Clock) -> Result<ServerHandle, StartError> {
        Opened::open(config, clock).await?.serve().await
    }
}

impl ServerHandle {
    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where its administration service listens, if it has one.
    #[must_use]
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin_address
    }

    /// PEM of the root CA, which clients pin.
    #[must_use]
    pub fn root_ca_pem(&self) -> &str {
        &self.kms.identity.root_ca_pem
    }

    /// The name in the server's certificate.
    #[must_use]
    pub fn domain(&self) -> &str {
        self.kms.identity.domain.as_str()
    }

    /// The root k256 public key, compressed, which clients pin.
    #[must_use]
    pub fn k256_public_key(&self) -> [u8; 33] {
        *self.kms.identity.roots.k256_public_key().as_bytes()
    }

    /// Stops accepting, lets open requests end within the configured grace, and returns when all is over. Cancel safe:
    /// the server stops also when the future is dropped.
    pub async fn shutdown(&self) {
        self.shutdown.cancel();
        self.stopped.wait().await;
        if let Some(audit) = &self.kms.audit
            && let Err(error) = audit.write(Event::Stop).await
        {
            warn!(%error, "the end is not in the audit log");
        }
    }

    /// Returns when the server has stopped, which nothing but [`shutdown`](Self::shutdown) makes it do. Cancel safe.
    pub async fn stopped(&self) {
        self.stopped.wait().await;
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// The system's clock.
pub(crate) fn system_clock() -> UnixMillis {
    #[expect(
        clippy::disallowed_methods,
        reason = "the server is the outermost layer; below it time is an argument"
    )]
    let now = std::time::SystemTime::now();
    let millis = now.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_millis();
    UnixMillis(u64::try_from(millis).unwrap_or(u64::MAX))
}

pub(crate) fn tls_acceptor(identity: &Identity, self_issued: SelfIssued) -> Result<TlsAcceptor, StartError> {
    let key = identity.rpc_key.to_pkcs8().map_err(store::Error::Key)?;
    let key = PrivateKeyDer::Pkcs8(key.to_vec().into());
    let config = ratls::server::ServerConfigBuilder::new(identity.temp_ca.clone())?
        .with_self_issued(self_issued)
        .build_from_der(identity.rpc_certificate.clone(), key)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// A listener and what answers on it.
pub(crate) struct Listening {
    listener: Listener,
    /// None for plain HTTP.
    tls: Option<TlsAcceptor>,
    http: Arc<dyn Answers>,
    limits: Limits,
    shutdown: CancellationToken,
}

impl Listening {
    pub(crate) fn tls(
        listener: Listener,
        tls: TlsAcceptor,
        http: Arc<dyn Answers>,
        limits: &Limits,
        shutdown: &CancellationToken,
    ) -> Self {
        Self { tls: Some(tls), ..Self::plain(listener, http, limits, shutdown) }
    }

    pub(crate) fn plain(
        listener: Listener,
        http: Arc<dyn Answers>,
        limits: &Limits,
        shutdown: &CancellationToken,
    ) -> Self {
        Self { listener, tls: None, http, limits: limits.clone(), shutdown: shutdown.clone() }
    }

    /// Accepts until shutdown, then lets what is open end.
    pub(crate) async fn run(self) {
        let places = Arc::new(Semaphore::new(self.limits.max_connections.min(Semaphore::MAX_PERMITS)));
        let peers = Arc::new(Peers::new(self.limits.max_connections_per_peer));
        let open = TaskTracker::new();
        while let Some(accepted) = self.shutdown.run_until_cancelled(self.listener.accept()).await {
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    warn!(error = chain(&error), "cannot accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let metrics = self.http.metrics();
            let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                metrics.connections_refused.fetch_add(1, Ordering::Relaxed);
                debug!(%peer, "too many connections");
                continue;
            };
            let address = match &peer {
                transport::Peer::Tcp(address) => Some(address.ip()),
                transport::Peer::Vsock { .. } | transport::Peer::Unix { .. } => None,
            };
            // Only TCP is listened on, so there is an address.
            let Some(seat) = address.and_then(|address| peers.admit(address)) else {
                metrics.connections_refused.fetch_add(1, Ordering::Relaxed);
                debug!(%peer, "the peer has too many connections");
                continue;
            };
            metrics.connections.fetch_add(1, Ordering::Relaxed);
            let connection = Connection {
                tls: self.tls.clone(),
                http: Arc::clone(&self.http),
                limits: self.limits.clone(),
                shutdown: self.shutdown.clone(),
            };
            open.spawn(async move {
                let _held = (place, seat);
                let metrics = Arc::clone(connection.http.metrics());
                if let Err(error) = connection.serve(stream, peer.to_string().into(), address).await {
                    debug!(%peer, error, "connection ended");
                }
                metrics.connections.fetch_sub(1, Ordering::Relaxed);
            });
        }
        // Closes the socket: who comes now is refused by the system instead of waiting for an answer.
        drop(self.listener);
        open.close();
        // A connection ends itself within the grace; the margin is for the scheduler.
        let drained = timeout(self.limits.shutdown_grace + Duration::from_secs(1), open.wait()).await;
        if drained.is_err() {
            warn!(left = open.len(), "grace period over, dropping connections");
        }
    }
}

struct Connection {
    tls: Option<TlsAcceptor>,
    http: Arc<dyn Answers>,
    limits: Limits,
    shutdown: CancellationToken,
}

impl Connection {
    /// From the handshake to the end. The error is for the log.
    async fn serve(self, stream: Stream, address: Arc<str>, ip: Option<IpAddr>) -> Result<(), String> {
        let Some(tls) = &self.tls else {
            let peer = Peer { address, ip, certificate: None, session: Session::new(None) };
            return self.serve_http(stream, peer).await;
        };
        let handshake = timeout(self.limits.handshake, tls.accept(stream));
        let failed = &self.http.metrics().handshakes_failed;
        let stream = match self.shutdown.run_until_cancelled(handshake).await {
            None => return Ok(()),
            Some(Ok(Ok(stream))) => stream,
            Some(Ok(Err(error))) => {
                failed.fetch_add(1, Ordering::Relaxed);
                return Err(format!("handshake: {error}"));
            }
            Some(Err(_)) => {
                failed.fetch_add(1, Ordering::Relaxed);
                return Err(format!("no handshake within {:?}", self.limits.handshake));
            }
        };
        let (_, tls) = stream.get_ref();
        let certificate =
            tls.peer_certificates().and_then(<[_]>::first).map(|certificate| certificate.to_vec());
        // Without an exporter (TLS 1.2) everything but sealed release works.
        let session = Session::new(ratls::sealed::exporter(tls).ok());
        self.serve_http(stream, Peer { address, ip, certificate, session }).await
    }

    async fn serve_http<S>(self, stream: S, peer: Peer) -> Result<(), String>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let peer = Arc::new(peer);
        let activity = Arc::new(Activity::default());
        let service = service_fn({
            let (http, activity) = (Arc::clone(&self.http), Arc::clone(&activity));
            move |request: Request<Incoming>| {
                let (http, peer) = (Arc::clone(&http), Arc::clone(&peer));
                let busy = activity.begin();
                async move {
                    let _busy = busy;
                    Ok::<_, std::convert::Infallible>(http.answer(request, &peer).await)
                }
            }
        });
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.header)
            .max_buf_size(MAX_HEAD);
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_STREAMS)
            .max_header_list_size(u32::try_from(MAX_HEAD).unwrap_or(u32::MAX));
        let connection = builder.serve_connection(TokioIo::new(stream), service);
        tokio::pin!(connection);
        let end = async {
            tokio::select! {
                () = self.shutdown.cancelled() => {}
                () = activity.idle_for(self.limits.idle) => {}
            }
        };
        tokio::select! {
            ended = &mut connection => return ended.map_err(|error| format!("{error}")),
            () = end => {}
        }
        // No further requests; those that are open may end, for a while. A peer that does not read its answer, or has
        // not finished the head of a request, is cut off here.
        connection.as_mut().graceful_shutdown();
        match timeout(self.limits.shutdown_grace, connection).await {
            Ok(ended) => ended.map_err(|error| format!("{error}")),
            Err(_) => Err("cut off: idle, or slower than the grace period".into()),
        }
    }
}

/// Knows whether a connection has an open request.
#[derive(Default)]
struct Activity {
    open: AtomicUsize,
    changed: Notify,
}

impl Activity {
    fn begin(self: &Arc<Self>) -> Busy {
        self.open.fetch_add(1, Ordering::SeqCst);
        self.changed.notify_one();
        Busy(Arc::clone(self))
    }

    /// Returns when there has been no open request for `limit`.
    async fn idle_for(&self, limit: Duration) {
        loop {
            let quiet = timeout(limit, self.changed.notified()).await.is_err();
            if quiet && self.open.load(Ordering::SeqCst) == 0 {
                return;
            }
        }
    }
}

struct Busy(Arc<Activity>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::SeqCst);
        self.0.changed.notify_one();
    }
}
