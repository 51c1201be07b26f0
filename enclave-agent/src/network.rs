//! The app's network: ports on 127.0.0.1 that lead to the parent, and ports of the parent that lead to the app.
//!
//! ```text
//!   app ─▶ 127.0.0.1:3128 ─┐                 ┌─▶ parent's CONNECT proxy, port 3128
//!   app ─▶ 127.0.0.1:5432 ─┼─ relay ─ vsock ─┼─▶ a service of the parent, port 5432
//!   app ◀─ 127.0.0.1:8080 ◀┘                 └── the parent connects to port 8080
//! ```
//!
//! There is no other interface, and no DNS: the app gives the proxy names, and the proxy's allow-list decides. The
//! relay looks at nothing; what has to be private or authentic is inside the app's own TLS.

mod relay;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::sleep;
use transport::{BindOptions, Endpoint, Listener, ParseEndpointError, Peer};

use crate::config::Network;
use crate::init::Parent;

/// Connections at a time, all ports together. With their buffers they take 8 MiB at most.
const MAX_CONNECTIONS: usize = 512;
/// Pause after an accept that failed: without descriptors the next one fails at once as well.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why the app has no network.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetworkError {
    /// There is no such address.
    #[error("address of a port")]
    Address(#[from] ParseEndpointError),
    /// A port is taken.
    #[error(transparent)]
    Bind(#[from] transport::Error),
}

/// The relays, which end when this is dropped.
#[derive(Debug)]
pub struct AppNetwork {
    environment: Vec<(String, String)>,
    _relays: JoinSet<()>,
}

impl AppNetwork {
    /// Listens on all ports.
    ///
    /// # Errors
    /// [`NetworkError`]; one port that is missing is a service that the app was promised.
    pub async fn start(network: &Network, parent: &Parent) -> Result<Self, NetworkError> {
        let Network { proxy_port, local_proxy_port, allowed_ports, forwards } = network;
        let proxy = local_proxy_port.map(|port| (port, *proxy_port));
        let outward = proxy.into_iter().chain(forwards.iter().map(|forward| (forward.local, forward.parent)));
        let mut relays = JoinSet::new();
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        for (local, remote) in outward {
            let listener = Listener::bind(&loopback(local)?, BindOptions::default()).await?;
            relays.spawn(accept(listener, parent.port(remote)?, None, Arc::clone(&slots)));
        }
        for port in allowed_ports {
            let listener = Listener::bind(&parent.own_port(*port)?, BindOptions::default()).await?;
            relays.spawn(accept(listener, loopback(*port)?, Some(parent.clone()), Arc::clone(&slots)));
        }
        let environment = local_proxy_port.map(proxy_environment).unwrap_or_default();
        Ok(Self { environment, _relays: relays })
    }

    /// What tells the app of its proxy.
    pub fn environment(&self) -> &[(String, String)] {
        &self.environment
    }
}

fn loopback(port: u16) -> Result<Endpoint, ParseEndpointError> {
    Endpoint::tcp("127.0.0.1", port)
}

/// The variables that HTTP clients look at, in both spellings: some read only the one, some only the other.
fn proxy_environment(port: u16) -> Vec<(String, String)> {
    let proxy = format!("http://127.0.0.1:{port}");
    let names = ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"].map(|name| (name, proxy.as_str()));
    let none = ("NO_PROXY", "localhost,127.0.0.1,::1");
    let pairs = names.into_iter().chain([none]);
    pairs
        .flat_map(|(name, value)| {
            [name.to_owned(), name.to_ascii_lowercase()].map(|name| (name, value.to_owned()))
        })
        .collect()
}

/// Relays every connection to `target`; with `only`, every connection of that parent.
async fn accept(listener: Listener, target: Endpoint, only: Option<Parent>, slots: Arc<Semaphore>) {
    let target = Arc::new(target);
    let mut open = JoinSet::new();
    loop {
        // Waiting for a slot before the accept leaves the rest in the kernel's queue, which is bounded too.
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, peer)) if only.as_ref().is_none_or(|parent| is(parent, &peer)) => {
                let target = Arc::clone(&target);
                open.spawn(async move {
                    // Either end may break off at any time; the other one sees the end of its connection.
                    let _broken: io::Result<()> = relay::relay(stream, &target).await;
                    drop(slot);
                });
            }
            Ok((_stranger, _)) => {}
            Err(_) => sleep(ACCEPT_PAUSE).await,
        }
        while open.try_join_next().is_some() {}
    }
}

/// Whether the peer is the parent. A process of the enclave itself comes from its own CID.
fn is(parent: &Parent, peer: &Peer) -> bool {
    match (parent, peer) {
        (Parent::Vsock(parent), Peer::Vsock { cid, .. }) => cid == parent,
        (Parent::Unix(_), Peer::Unix { .. }) => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests;
