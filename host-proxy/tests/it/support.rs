//! A proxy with short deadlines, and clients that speak CONNECT.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use host_proxy::config::{Config, Service};
use host_proxy::limits::TunnelLimits;
use host_proxy::policy::{Entry, RuleSet};
use host_proxy::{Observer, Options, Outcome, Proxy};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;
use transport::Endpoint;

/// Longest wait for anything that must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Waits for `future`, and fails the test when it takes too long.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("{what}: nothing happened in {PATIENCE:?}"))
}

pub(crate) fn rules(texts: &[&str]) -> RuleSet {
    RuleSet::new(texts.iter().map(|text| Entry::new(text.parse().unwrap())).collect())
}

/// A CONNECT proxy on a free port, and the outcomes of its connections.
pub(crate) struct Rig {
    pub(crate) proxy: Proxy,
    pub(crate) address: SocketAddr,
    pub(crate) outcomes: mpsc::UnboundedReceiver<Outcome>,
}

impl Rig {
    pub(crate) async fn egress(texts: &[&str], tunnel: TunnelLimits) -> Self {
        let mut service = Service::egress("egress", "tcp:127.0.0.1:0".parse().unwrap(), rules(texts));
        service.tunnel = tunnel;
        Self::start(Config::new(vec![service]).unwrap(), Options::default()).await
    }

    pub(crate) async fn start(config: Config, mut options: Options) -> Self {
        let (observer, outcomes) = observer();
        options.observer = Some(observer);
        let name = config.services[0].name.clone();
        let proxy = Proxy::start_with(config, options).await.unwrap();
        let address = socket_address(proxy.endpoint(&name).unwrap());
        Self { proxy, address, outcomes }
    }

    pub(crate) async fn dial(&self) -> TcpStream {
        dial(self.address).await
    }

    /// The next connection that is over.
    pub(crate) async fn outcome(&mut self) -> Outcome {
        soon("an outcome", self.outcomes.recv()).await.unwrap()
    }
}

pub(crate) fn observer() -> (Observer, mpsc::UnboundedReceiver<Outcome>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    // A test that has seen enough drops the receiver.
    let observer: Observer = Arc::new(move |outcome: &Outcome| drop(sender.send(outcome.clone())));
    (observer, receiver)
}

pub(crate) fn socket_address(endpoint: &Endpoint) -> SocketAddr {
    endpoint.to_string().strip_prefix("tcp:").unwrap().parse().unwrap()
}

pub(crate) async fn dial(address: SocketAddr) -> TcpStream {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.unwrap();
    soon("a connection", socket.connect(address)).await.unwrap()
}

pub(crate) async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Sends a CONNECT and gives the status line's number.
pub(crate) async fn connect(stream: &mut TcpStream, target: &str) -> u16 {
    let head = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    status(&read_head(stream).await)
}

/// Reads an answer's head and leaves what follows unread.
pub(crate) async fn read_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    soon("an answer", async {
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
    })
    .await;
    String::from_utf8(head).unwrap()
}

pub(crate) fn status(head: &str) -> u16 {
    head.split(' ').nth(1).unwrap().parse().unwrap()
}

/// A tunnel through `rig` to `listener`, both ends.
pub(crate) async fn tunnel(rig: &Rig, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let mut client = rig.dial().await;
    let target = listener.local_addr().unwrap().to_string();
    assert_eq!(connect(&mut client, &target).await, 200);
    let (server, _) = soon("the target's connection", listener.accept()).await.unwrap();
    (client, server)
}
