use std::path::Path;

use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use transport::{Stream, VsockCid, VsockPort};

use super::*;
use crate::config::Forward;

const DEADLINE: Duration = Duration::from_secs(10);

/// A free port, for the moment; port 0 cannot be configured.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn network(forward: Option<Forward>, allowed: Option<u16>) -> Network {
    Network {
        proxy_port: VsockPort::new(3128),
        local_proxy_port: None,
        allowed_ports: allowed.into_iter().collect(),
        forwards: forward.into_iter().collect(),
    }
}

fn parent(directory: &Path) -> Parent {
    Parent::Unix(directory.join("p"))
}

/// Says `words`, ends its side, and gives what came until the other end's end.
async fn say(mut stream: Stream, words: &str) -> String {
    stream.write_all(words.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut heard = String::new();
    stream.read_to_string(&mut heard).await.unwrap();
    heard
}

/// Waits for the end of the peer's words before it answers, so that only half-close lets it.
async fn answer(listener: Listener, words: &str) -> String {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut heard = String::new();
    stream.read_to_string(&mut heard).await.unwrap();
    stream.write_all(words.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    heard
}

#[tokio::test]
async fn a_local_port_leads_to_the_parent_and_half_close_goes_through() {
    let directory = tempfile::tempdir().unwrap();
    let parent = parent(directory.path());
    let service =
        Listener::bind(&parent.port(VsockPort::new(70_000)).unwrap(), BindOptions::default()).await.unwrap();
    let local = free_port();
    let forward = Forward { local, parent: VsockPort::new(70_000) };
    let network = AppNetwork::start(&network(Some(forward), None), &parent).await.unwrap();
    assert_eq!(network.environment(), []);
    let client = loopback(local).unwrap().connect(DEADLINE).await.unwrap();
    let (heard, answered) = tokio::join!(answer(service, "hello app"), say(client, "hello parent"));
    assert_eq!((heard.as_str(), answered.as_str()), ("hello parent", "hello app"));
}

#[tokio::test]
async fn the_parent_reaches_an_allowed_port_and_an_absent_app_is_an_end() {
    let directory = tempfile::tempdir().unwrap();
    let parent = parent(directory.path());
    let port = free_port();
    let _network = AppNetwork::start(&network(None, Some(port)), &parent).await.unwrap();
    let way_in = parent.own_port(port).unwrap();

    let mut early = way_in.connect(DEADLINE).await.unwrap();
    let mut nothing = Vec::new();
    early.read_to_end(&mut nothing).await.unwrap();
    assert_eq!(nothing, b"", "nobody listens yet");

    let app = Listener::bind(&loopback(port).unwrap(), BindOptions::default()).await.unwrap();
    let client = way_in.connect(DEADLINE).await.unwrap();
    let (heard, answered) = tokio::join!(answer(app, "hello parent"), say(client, "hello app"));
    assert_eq!((heard.as_str(), answered.as_str()), ("hello app", "hello parent"));
}

#[tokio::test]
async fn a_port_that_is_taken_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let forward = Forward { local: taken.local_addr().unwrap().port(), parent: VsockPort::new(1) };
    let started = AppNetwork::start(&network(Some(forward), None), &parent(directory.path())).await;
    assert!(matches!(started, Err(NetworkError::Bind(_))));
}

#[tokio::test(start_paused = true)]
async fn a_silent_connection_is_given_up_and_a_slow_one_is_not() {
    let (client, one) = duplex(64);
    let (other, mut server) = duplex(64);
    let carried = tokio::spawn(relay::carry(one, other));
    let (mut from_client, mut to_server) = tokio::io::split(client);
    for _ in 0..5 {
        sleep(relay::IDLE - Duration::from_secs(1)).await;
        to_server.write_all(b"x").await.unwrap();
        assert_eq!(server.read_u8().await.unwrap(), b'x');
    }
    let error = carried.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert_eq!(from_client.read(&mut [0]).await.unwrap(), 0);
}

#[test]
fn only_the_parent_comes_in() {
    let vsock = |cid| Peer::Vsock { cid: VsockCid::new(cid), port: VsockPort::new(1) };
    assert!(is(&Parent::default(), &vsock(3)));
    assert!(!is(&Parent::default(), &vsock(1)), "a process of the enclave itself");
    assert!(!is(&Parent::default(), &vsock(16)));
    assert!(!is(&Parent::default(), &Peer::Tcp("127.0.0.1:1".parse().unwrap())));
}

#[test]
fn both_spellings_name_the_proxy() {
    let environment = proxy_environment(3128);
    let value = |name: &str| environment.iter().find(|(it, _)| it == name).map(|(_, value)| value.as_str());
    for name in ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"] {
        assert_eq!(value(name), Some("http://127.0.0.1:3128"), "{name}");
    }
    for name in ["NO_PROXY", "no_proxy"] {
        assert_eq!(value(name), Some("localhost,127.0.0.1,::1"), "{name}");
    }
}
