//! At a limit there is an answer, and nobody else notices.

use std::time::Duration;

use host_proxy::Options;
use host_proxy::config::{Config, Service};
use host_proxy::limits::Limits;
use host_proxy::policy::RuleSet;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

use crate::support::{Rig, connect, dial, listen, read_head, rules, soon, status, tunnel};

#[tokio::test]
async fn at_the_limit_there_is_an_answer() {
    let (listener, address) = listen().await;
    let service =
        Service::egress("egress", "tcp:127.0.0.1:0".parse().unwrap(), rules(&[&address.to_string()]));
    let mut config = Config::new(vec![service]).unwrap();
    config.limits = Limits { max_connections: 2, max_connections_per_cid: 2 };
    let mut rig = Rig::start(config, Options::default()).await;
    let one = tunnel(&rig, &listener).await;
    let _two = tunnel(&rig, &listener).await;
    let mut third = rig.dial().await;
    // Told before it has said a word.
    let head = read_head(&mut third).await;
    assert_eq!(status(&head), 503);
    assert!(
        head.contains("Retry-After: 1\r\n") && head.contains("X-Host-Proxy: limit-connections\r\n"),
        "{head}"
    );
    drop(third);
    assert_eq!(rig.outcome().await.end, "limit-connections");
    // A place that is free again is taken by the next.
    drop(one);
    assert_eq!(rig.outcome().await.end, "finished");
    tunnel(&rig, &listener).await;
}

#[tokio::test]
async fn rules_and_services_have_limits_of_their_own() {
    let (listener, address) = listen().await;
    let mut entries = rules(&[&address.to_string()]).entries().to_vec();
    entries[0].max_connections = Some(1);
    let service = Service::egress("egress", "tcp:127.0.0.1:0".parse().unwrap(), RuleSet::new(entries));
    let mut rig = Rig::start(Config::new(vec![service]).unwrap(), Options::default()).await;
    let _one = tunnel(&rig, &listener).await;
    let mut client = rig.dial().await;
    assert_eq!(connect(&mut client, &address.to_string()).await, 503);
    drop(client);
    assert_eq!(rig.outcome().await.end, "limit-rule");

    let target = format!("tcp:{address}").parse().unwrap();
    let mut service = Service::forward("out", "tcp:127.0.0.1:0".parse().unwrap(), target, RuleSet::default());
    service.tunnel.max_connections = Some(1);
    let mut rig = Rig::start(Config::new(vec![service]).unwrap(), Options::default()).await;
    let _first = rig.dial().await;
    soon("the target's connection", listener.accept()).await.unwrap();
    // A forward has no words; it closes at once instead of holding the line.
    let mut second = rig.dial().await;
    assert!(matches!(soon("the close", second.read(&mut [0])).await, Ok(0) | Err(_)));
    assert_eq!(rig.outcome().await.end, "limit-service");
}

#[tokio::test]
async fn a_service_for_context_ids_is_not_for_others() {
    let mut service =
        Service::egress("egress", "tcp:127.0.0.1:0".parse().unwrap(), rules(&["a.example:443"]));
    service.cids = Some(vec![16]);
    let mut rig = Rig::start(Config::new(vec![service]).unwrap(), Options::default()).await;
    let mut client = rig.dial().await;
    assert_eq!(status(&read_head(&mut client).await), 403);
    drop(client);
    assert_eq!(rig.outcome().await.end, "cid-not-allowed");
}

#[tokio::test]
async fn a_burst_of_20000_attempts_leaves_others_alone() {
    const ATTEMPTS: usize = 20_000;
    const AT_ONCE: usize = 250;
    let (listener, address) = listen().await;
    let service =
        Service::egress("egress", "tcp:127.0.0.1:0".parse().unwrap(), rules(&[&address.to_string()]));
    let mut config = Config::new(vec![service]).unwrap();
    config.limits.max_connections = 64;
    let rig = Rig::start(config, Options::default()).await;
    let (mut client, mut server) = tunnel(&rig, &listener).await;
    let mut attempts = JoinSet::new();
    for at in 0..ATTEMPTS {
        let proxy = rig.address;
        attempts.spawn(async move {
            let mut stream = dial(proxy).await;
            // Half of them leave at once, half ask for something that is refused; either is an end, not a wait.
            if at % 2 == 0 {
                let asked = stream.write_all(b"CONNECT evil.example:1 HTTP/1.1\r\n\r\n").await;
                // An error is the close that came first.
                let _answer = soon("an answer or a close", stream.read(&mut [0; 256])).await;
                drop(asked);
            }
        });
        if attempts.len() >= AT_ONCE {
            soon("an attempt's end", attempts.join_next()).await.unwrap().unwrap();
        }
        if at % 1000 == 0 {
            client.write_all(b"x").await.unwrap();
            assert_eq!(soon("a byte through the tunnel", server.read_u8()).await.unwrap(), b'x');
        }
    }
    while let Some(ended) = soon("the last attempts", attempts.join_next()).await {
        ended.unwrap();
    }
    // Everything was told, and the tunnel is the only connection left.
    let mut outcomes = rig.outcomes;
    for _ in 0..ATTEMPTS {
        soon("an outcome", outcomes.recv()).await.unwrap();
    }
    assert_eq!(rig.proxy.open_connections(), 1);
}

#[tokio::test]
async fn the_stop_lets_connections_end_and_cuts_the_rest() {
    let (listener, address) = listen().await;
    let service =
        Service::egress("egress", "tcp:127.0.0.1:0".parse().unwrap(), rules(&[&address.to_string()]));
    let mut config = Config::new(vec![service]).unwrap();
    config.grace = Duration::from_millis(200);
    let mut rig = Rig::start(config.clone(), Options::default()).await;
    let (mut client, _server) = tunnel(&rig, &listener).await;
    let left = soon("the stop", rig.proxy.shutdown()).await;
    assert_eq!(left, 1);
    assert!(soon("the cut", client.read(&mut [0])).await.is_err(), "a cut is no clean end");
    assert_eq!(soon("an outcome", rig.outcomes.recv()).await.unwrap().end, "proxy-stopped");

    let rig = Rig::start(Config { grace: Duration::from_secs(20), ..config }, Options::default()).await;
    let (mut client, mut server) = tunnel(&rig, &listener).await;
    let stopping = tokio::spawn(rig.proxy.shutdown());
    server.write_all(b"last words").await.unwrap();
    drop(server);
    let mut words = Vec::new();
    soon("the last words", client.read_to_end(&mut words)).await.unwrap();
    assert_eq!(words, b"last words");
    drop(client);
    assert_eq!(soon("the stop", stopping).await.unwrap(), 0);
}

#[tokio::test]
async fn a_new_configuration_leaves_connections_alone() {
    let (listener, address) = listen().await;
    let (other, other_address) = listen().await;
    let listen_on: transport::Endpoint = "tcp:127.0.0.1:0".parse().unwrap();
    let config = |rule: String| {
        Config::new(vec![Service::egress("egress", listen_on.clone(), rules(&[&rule]))]).unwrap()
    };
    let mut rig = Rig::start(config(address.to_string()), Options::default()).await;
    let (mut client, mut server) = tunnel(&rig, &listener).await;
    rig.proxy.reload(config(other_address.to_string())).await.unwrap();
    // The old tunnel goes on, the new list decides about new ones, on the same port.
    client.write_all(b"still here").await.unwrap();
    soon("bytes", server.read_exact(&mut [0; 10])).await.unwrap();
    let mut refused = rig.dial().await;
    assert_eq!(connect(&mut refused, &address.to_string()).await, 403);
    tunnel(&rig, &other).await;
    // A configuration that cannot be opened changes nothing.
    let mut broken = config(address.to_string());
    broken.services.push(Service::egress(
        "second",
        format!("tcp:{address}").parse().unwrap(),
        RuleSet::default(),
    ));
    rig.proxy.reload(broken).await.unwrap_err();
    tunnel(&rig, &other).await;
}
