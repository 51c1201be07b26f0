//! Bytes, ends and resets. Pitfalls 21 and 23.

use std::io::ErrorKind;
use std::time::Duration;

use host_proxy::config::{Config, Kind, Service};
use host_proxy::limits::TunnelLimits;
use host_proxy::policy::RuleSet;
use host_proxy::{Options, Outcome};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use crate::support::{Rig, connect, dial, listen, read_head, rules, soon, status, tunnel};

/// Large enough to pass through every buffer on the way, and to be spliced.
const BULK: usize = 8 << 20;

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from(at * 31 % 251).unwrap()).collect()
}

async fn rig(listener: &TcpListener) -> Rig {
    rig_with(listener, TunnelLimits::default()).await
}

async fn rig_with(listener: &TcpListener, limits: TunnelLimits) -> Rig {
    Rig::egress(&[&listener.local_addr().unwrap().to_string()], limits).await
}

async fn read_all(stream: &mut (impl AsyncReadExt + Unpin)) -> Vec<u8> {
    let mut bytes = Vec::new();
    soon("the end", stream.read_to_end(&mut bytes)).await.unwrap();
    bytes
}

fn check(outcome: &Outcome, end: &str, up: usize, down: usize) {
    assert_eq!((outcome.end, outcome.up, outcome.down), (end, up as u64, down as u64), "{outcome:?}");
}

#[tokio::test]
async fn an_answer_after_the_clients_end_arrives_whole() {
    let (listener, _) = listen().await;
    let mut rig = rig(&listener).await;
    let (mut client, mut server) = tunnel(&rig, &listener).await;
    let request = pattern(BULK);
    let sent = request.clone();
    let client_side = tokio::spawn(async move {
        client.write_all(&sent).await.unwrap();
        client.shutdown().await.unwrap();
        read_all(&mut client).await
    });
    // The server sees the whole request and its end before it says a word.
    assert_eq!(read_all(&mut server).await, request);
    let answer = pattern(BULK + 7);
    server.write_all(&answer).await.unwrap();
    drop(server);
    assert_eq!(soon("the answer", client_side).await.unwrap(), answer);
    let outcome = rig.outcome().await;
    check(&outcome, "finished", BULK, BULK + 7);
    assert_eq!(outcome.path, "splice");
}

#[tokio::test]
async fn a_client_may_go_on_after_the_servers_end() {
    let (listener, _) = listen().await;
    let mut rig = rig(&listener).await;
    let (mut client, mut server) = tunnel(&rig, &listener).await;
    server.write_all(b"hello").await.unwrap();
    server.shutdown().await.unwrap();
    assert_eq!(read_all(&mut client).await, b"hello");
    let bytes = pattern(BULK);
    let sent = bytes.clone();
    let client_side = tokio::spawn(async move {
        client.write_all(&sent).await.unwrap();
        client.shutdown().await.unwrap();
        client
    });
    assert_eq!(read_all(&mut server).await, bytes);
    let _client = client_side.await.unwrap();
    check(&rig.outcome().await, "finished", BULK, 5);
}

#[tokio::test]
async fn a_reset_stays_a_reset_in_both_directions() {
    let (listener, _) = listen().await;
    let mut rig = rig(&listener).await;
    let (mut client, server) = tunnel(&rig, &listener).await;
    server.set_zero_linger().unwrap();
    drop(server);
    let seen = soon("the reset", client.read(&mut [0])).await;
    assert_eq!(seen.unwrap_err().kind(), ErrorKind::ConnectionReset);
    check(&rig.outcome().await, "target-reset", 0, 0);

    let (client, mut server) = tunnel(&rig, &listener).await;
    client.set_zero_linger().unwrap();
    drop(client);
    let seen = soon("the reset", server.read(&mut [0])).await;
    assert_eq!(seen.unwrap_err().kind(), ErrorKind::ConnectionReset);
    check(&rig.outcome().await, "client-reset", 0, 0);
}

#[tokio::test]
async fn an_answer_of_a_server_that_stops_reading_arrives() {
    let (listener, _) = listen().await;
    let mut rig = rig(&listener).await;
    let (mut client, mut server) = tunnel(&rig, &listener).await;
    // Says no and closes without reading the upload, as HTTP servers do with 413.
    server.write_all(b"too much").await.unwrap();
    server.shutdown().await.unwrap();
    let mut answer = [0; 8];
    soon("the answer", client.read_exact(&mut answer)).await.unwrap();
    drop(server);
    let bytes = pattern(BULK);
    // The upload breaks off with an error at some point; how much was taken is up to the kernels.
    let broken = soon("the break", async {
        loop {
            if let Err(error) = client.write_all(&bytes).await {
                return error.kind();
            }
        }
    })
    .await;
    assert!(matches!(broken, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{broken}");
    assert_eq!(&answer, b"too much");
    assert_eq!(rig.outcome().await.end, "target-reset");
}

#[tokio::test]
async fn pitfall_23_smuggling() {
    let (listener, address) = listen().await;
    let rig = rig(&listener).await;
    // Bytes behind the head go through, once; they are not read as a second request.
    let mut client = rig.dial().await;
    let early = format!("CONNECT {address} HTTP/1.1\r\n\r\nCONNECT 169.254.169.254:80 HTTP/1.1\r\n\r\n");
    client.write_all(early.as_bytes()).await.unwrap();
    assert_eq!(status(&read_head(&mut client).await), 200);
    let (mut server, _) = soon("the target's connection", listener.accept()).await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(read_all(&mut server).await, b"CONNECT 169.254.169.254:80 HTTP/1.1\r\n\r\n");
    // Lengths and codings make no sense on a CONNECT.
    for line in
        ["Content-Length: 5", "Transfer-Encoding: chunked", "content-length: 0", "Host: other.example:443"]
    {
        let mut client = rig.dial().await;
        client
            .write_all(format!("CONNECT {address} HTTP/1.1\r\n{line}\r\n\r\nhello").as_bytes())
            .await
            .unwrap();
        assert_eq!(status(&read_head(&mut client).await), 400, "{line}");
        assert!(!read_all(&mut client).await.is_empty(), "the answer has a body that says why");
    }
}

#[tokio::test]
async fn a_head_may_come_byte_by_byte() {
    let (listener, address) = listen().await;
    let rig = rig(&listener).await;
    let mut client = rig.dial().await;
    client.set_nodelay(true).unwrap();
    for byte in format!("CONNECT {address} HTTP/1.1\r\nHost: {address}\r\n\r\n").bytes() {
        client.write_all(&[byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    assert_eq!(status(&read_head(&mut client).await), 200);
}

#[tokio::test]
async fn pitfall_21_slow_and_many() {
    const SLOW: usize = 200;
    let (listener, address) = listen().await;
    let limits = TunnelLimits { head: Duration::from_millis(300), ..TunnelLimits::default() };
    let mut rig = rig_with(&listener, limits).await;
    let mut slow = Vec::new();
    for at in 0..SLOW {
        let mut client = rig.dial().await;
        // Some say nothing, some begin a head and never end it.
        if at % 2 == 0 {
            client.write_all(b"CONNECT a.example:443 HTTP/1.1\r\nX-Slow: ").await.unwrap();
        }
        slow.push(client);
    }
    // An honest client is served while they wait.
    let (mut client, mut server) = tunnel(&rig, &listener).await;
    client.write_all(b"x").await.unwrap();
    assert_eq!(soon("a byte", server.read_u8()).await.unwrap(), b'x');
    for client in &mut slow {
        assert_eq!(status(&read_head(client).await), 408);
    }
    drop(slow);
    for _ in 0..SLOW {
        assert_eq!(rig.outcome().await.end, "head-timeout");
    }
    assert_eq!(rig.proxy.open_connections(), 1, "only the tunnel to {address} is left");
}

#[tokio::test]
async fn a_head_that_is_too_large_is_refused() {
    let (listener, address) = listen().await;
    let rig = rig(&listener).await;
    let mut client = rig.dial().await;
    let head = format!("CONNECT {address} HTTP/1.1\r\nX-Big: {}", "a".repeat(8192));
    client.write_all(head.as_bytes()).await.unwrap();
    assert_eq!(status(&read_head(&mut client).await), 431);
}

#[tokio::test]
async fn an_unread_flood_is_bounded_in_both_directions() {
    let (listener, _) = listen().await;
    let rig = rig(&listener).await;
    let (client, server) = tunnel(&rig, &listener).await;
    flood(server, client).await;
    let (client, server) = tunnel(&rig, &listener).await;
    flood(client, server).await;
}

/// One side sends and the other does not read: at some point nothing more is taken, and nothing is lost.
async fn flood(mut sender: TcpStream, mut reader: TcpStream) {
    let chunk = pattern(64 << 10);
    let mut taken = 0;
    while let Ok(written) = tokio::time::timeout(Duration::from_millis(500), sender.write(&chunk)).await {
        taken += written.unwrap();
        assert!(taken < 64 << 20, "the path swallows without bound");
    }
    sender.shutdown().await.unwrap();
    assert_eq!(read_all(&mut reader).await.len(), taken);
}

#[tokio::test]
async fn an_idle_tunnel_ends_and_a_busy_one_does_not() {
    let (listener, _) = listen().await;
    let limits = TunnelLimits { idle: Duration::from_millis(300), ..TunnelLimits::default() };
    let mut rig = rig_with(&listener, limits).await;
    let (mut client, mut server) = tunnel(&rig, &listener).await;
    // Forty exchanges take longer than the idle time by far when each waits for a tick of 10 ms.
    let mut tick = tokio::time::interval(Duration::from_millis(10));
    for _ in 0..40 {
        tick.tick().await;
        client.write_all(b"ping").await.unwrap();
        soon("a ping", server.read_exact(&mut [0; 4])).await.unwrap();
    }
    let seen = soon("the idle end", client.read(&mut [0])).await;
    assert_eq!(seen.unwrap_err().kind(), ErrorKind::ConnectionReset, "a cut is no clean end");
    check(&rig.outcome().await, "idle-timeout", 160, 0);
}

#[tokio::test]
async fn a_tunnel_has_a_total_time_and_a_bandwidth() {
    let (listener, _) = listen().await;
    let limits = TunnelLimits {
        total: Some(Duration::from_millis(500)),
        bytes_per_second: std::num::NonZeroU64::new(100_000),
        ..TunnelLimits::default()
    };
    let mut rig = rig_with(&listener, limits).await;
    let (_client, mut server) = tunnel(&rig, &listener).await;
    let flood = pattern(1 << 20);
    assert!(soon("the cut", server.write_all(&flood)).await.is_err() || server.read(&mut [0]).await.is_err());
    let outcome = rig.outcome().await;
    assert_eq!(outcome.end, "total-timeout");
    // Half a second at 100,000 bytes a second, and a burst of a tenth; twice that would be no limit.
    assert!((10_000..150_000).contains(&outcome.down), "{outcome:?}");
}

#[tokio::test]
async fn targets_that_do_not_answer_are_told_apart() {
    let (listener, address) = listen().await;
    let rig = rig(&listener).await;
    drop(listener);
    let mut client = rig.dial().await;
    assert_eq!(connect(&mut client, &address.to_string()).await, 502);
    let unknown = Rig::egress(&["no-such-name.invalid:443"], TunnelLimits::default()).await;
    let mut client = unknown.dial().await;
    assert_eq!(connect(&mut client, "no-such-name.invalid:443").await, 502);
}

#[tokio::test]
async fn a_forward_carries_bytes_both_ways_with_a_proxy_header() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("target.sock");
    let target = UnixListener::bind(&path).unwrap();
    let to_unix = format!("unix:{}", path.display()).parse().unwrap();
    let mut service = Service::forward("in", "tcp:127.0.0.1:0".parse().unwrap(), to_unix, RuleSet::default());
    if let Kind::Forward(forward) = &mut service.kind {
        forward.proxy_protocol = true;
    }
    let mut rig = Rig::start(Config::new(vec![service]).unwrap(), Options::default()).await;
    let mut client = rig.dial().await;
    let (mut server, _) = soon("the target's connection", target.accept()).await.unwrap();
    let mut header = [0; 28];
    soon("the PROXY header", server.read_exact(&mut header)).await.unwrap();
    assert_eq!(&header[..16], b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c");
    let port = client.local_addr().unwrap().port().to_be_bytes();
    assert_eq!(header[24..26], port);
    let bytes = pattern(BULK);
    let sent = bytes.clone();
    let server_side = tokio::spawn(async move {
        server.write_all(&sent).await.unwrap();
        server.shutdown().await.unwrap();
        read_all(&mut server).await
    });
    assert_eq!(read_all(&mut client).await, bytes);
    client.write_all(b"thanks").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(server_side.await.unwrap(), b"thanks");
    check(&rig.outcome().await, "finished", 6, BULK);
}

#[tokio::test]
async fn a_forward_whose_target_is_gone_resets() {
    let (listener, address) = listen().await;
    drop(listener);
    let target = format!("tcp:{address}").parse().unwrap();
    let service = Service::forward("out", "tcp:127.0.0.1:0".parse().unwrap(), target, RuleSet::default());
    let mut rig = Rig::start(Config::new(vec![service]).unwrap(), Options::default()).await;
    let mut client = rig.dial().await;
    let seen = soon("the reset", client.read(&mut [0])).await;
    assert_eq!(seen.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(rig.outcome().await.end, "connect-refused");
}

#[tokio::test]
async fn a_forward_to_a_name_reaches_no_special_address_unless_named() {
    let (listener, address) = listen().await;
    let target: transport::Endpoint = format!("tcp:localhost:{}", address.port()).parse().unwrap();
    let listen_on = || "tcp:127.0.0.1:0".parse().unwrap();
    let closed = Service::forward("out", listen_on(), target.clone(), RuleSet::default());
    let mut rig = Rig::start(Config::new(vec![closed]).unwrap(), Options::default()).await;
    drop(rig.dial().await);
    assert_eq!(rig.outcome().await.end, "address-not-allowed");
    let open = Service::forward("out", listen_on(), target, rules(&[&address.to_string()]));
    let rig = Rig::start(Config::new(vec![open]).unwrap(), Options::default()).await;
    let _client = rig.dial().await;
    soon("the target's connection", listener.accept()).await.unwrap();
}

#[tokio::test]
async fn a_unix_client_reaches_a_tcp_target() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("proxy.sock");
    let (listener, address) = listen().await;
    let list = rules(&[&address.to_string()]);
    let service = Service::egress("egress", format!("unix:{}", path.display()).parse().unwrap(), list);
    let proxy = host_proxy::Proxy::start(Config::new(vec![service]).unwrap()).await.unwrap();
    let mut client = soon("a connection", UnixStream::connect(&path)).await.unwrap();
    client.write_all(format!("CONNECT {address} HTTP/1.1\r\n\r\n").as_bytes()).await.unwrap();
    let (mut server, _) = soon("the target's connection", listener.accept()).await.unwrap();
    let answer = b"HTTP/1.1 200 Connection established\r\n\r\n";
    let mut head = vec![0; answer.len()];
    soon("the answer", client.read_exact(&mut head)).await.unwrap();
    assert_eq!(head, answer);
    let bytes = pattern(BULK);
    let sent = bytes.clone();
    let server_side = tokio::spawn(async move {
        server.write_all(&sent).await.unwrap();
        server.shutdown().await.unwrap();
        read_all(&mut server).await
    });
    assert_eq!(read_all(&mut client).await, bytes);
    client.write_all(&bytes).await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(server_side.await.unwrap(), bytes);
    soon("the stop", proxy.shutdown()).await;
    assert!(!path.exists(), "the socket file is removed");
}

/// A ClientHello that names `server`, in one record.
fn client_hello(server: &str) -> Vec<u8> {
    let prefixed = |width: usize, body: &[u8]| {
        let len = body.len().to_be_bytes();
        [&len[len.len() - width..], body].concat()
    };
    let name = [&[0][..], &prefixed(2, server.as_bytes())].concat();
    let extension = [&[0, 0][..], &prefixed(2, &prefixed(2, &name))].concat();
    let body = [&[3, 3][..], &[7; 32], &[0], &[0, 2, 0x13, 1], &[1, 0], &prefixed(2, &extension)].concat();
    let message = [&[1][..], &prefixed(3, &body)].concat();
    [&[22, 3, 1][..], &prefixed(2, &message)].concat()
}

#[tokio::test]
async fn the_server_name_is_checked_where_the_rule_says_so() {
    let (listener, address) = listen().await;
    let port = address.port();
    let mut entries = rules(&[&format!("localhost:{port}"), &format!("127.0.0.1:{port}")]).entries().to_vec();
    entries[0].check_sni = true;
    let service = Service::egress("egress", "tcp:127.0.0.1:0".parse().unwrap(), RuleSet::new(entries));
    let mut rig = Rig::start(Config::new(vec![service]).unwrap(), Options::default()).await;
    let open = async |bytes: Vec<u8>| {
        let mut client = dial(rig.address).await;
        assert_eq!(connect(&mut client, &format!("localhost:{port}")).await, 200);
        client.write_all(&bytes).await.unwrap();
        client
    };
    let hello = client_hello("LocalHost");
    let client = open(hello.clone()).await;
    let (mut server, _) = soon("the target's connection", listener.accept()).await.unwrap();
    let mut seen = vec![0; hello.len()];
    soon("the ClientHello", server.read_exact(&mut seen)).await.unwrap();
    assert_eq!(seen, hello, "passed on unchanged, once");
    drop((client, server));
    let mut refused: Vec<TcpStream> = Vec::new();
    for bytes in [client_hello("evil.example"), b"SSH-2.0-x\r\n".to_vec()] {
        refused.push(open(bytes).await);
    }
    for client in &mut refused {
        // Closed; as an end or as a reset, depending on what was read.
        let gone = soon("the close", client.read(&mut [0])).await;
        assert!(matches!(gone, Ok(0) | Err(_)));
    }
    let mut ends = Vec::new();
    for _ in 0..3 {
        ends.push(rig.outcome().await.end);
    }
    ends.sort_unstable();
    assert!(ends.contains(&"not-tls") && ends.contains(&"sni-differs"), "{ends:?}");
}
