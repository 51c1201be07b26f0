//! Real AF_VSOCK, through the loopback transport where the kernel has it. Pitfall 22.

use std::time::Duration;

use host_proxy::Options;
use host_proxy::config::{Config, Service};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use transport::{ConnectTarget, Endpoint, connect_through};

use crate::support::{listen, observer, rules, soon};

/// A port that nothing else uses.
const PORT: u32 = 3_128_999;

#[tokio::test]
async fn pitfall_22_vsock_itself() {
    let (listener, address) = listen().await;
    let listen_on: Endpoint = format!("vsock:any:{PORT}").parse().unwrap();
    let mut entries = rules(&[&address.to_string()]).entries().to_vec();
    // The loopback's context id is 1; a rule for 16 is for somebody else.
    entries[0].cids = Some(vec![1]);
    let mut service = Service::egress("egress", listen_on, host_proxy::policy::RuleSet::new(entries));
    let config = Config::new(vec![service.clone()]).unwrap();
    let (observer, mut outcomes) = observer();
    let proxy =
        match host_proxy::Proxy::start_with(config, Options { observer: Some(observer), resolver: None })
            .await
        {
            Ok(proxy) => proxy,
            Err(error) => return println!("skipped: no vsock on this kernel: {error}"),
        };
    let local: Endpoint = format!("vsock:1:{PORT}").parse().unwrap();
    let stream = match local.connect(Duration::from_secs(5)).await {
        Ok(stream) => stream,
        Err(error) => return println!("skipped: no vsock loopback on this kernel: {error}"),
    };
    let target = ConnectTarget::new(address.ip().to_string().parse().unwrap(), address.port());
    let mut tunnel =
        soon("the tunnel", connect_through(stream, &target, Duration::from_secs(5))).await.unwrap();
    let (mut server, _) = soon("the target's connection", listener.accept()).await.unwrap();
    tunnel.write_all(b"from the enclave").await.unwrap();
    tunnel.shutdown().await.unwrap();
    let mut seen = Vec::new();
    soon("the end", server.read_to_end(&mut seen)).await.unwrap();
    assert_eq!(seen, b"from the enclave");
    drop((tunnel, server));
    let outcome = soon("an outcome", outcomes.recv()).await.unwrap();
    assert_eq!((outcome.end, outcome.path), ("finished", "copy"));
    soon("the stop", proxy.shutdown()).await;

    service.cids = Some(vec![16]);
    let rig_config = Config::new(vec![service]).unwrap();
    let proxy = host_proxy::Proxy::start(rig_config).await.unwrap();
    let mut stranger = local.connect(Duration::from_secs(5)).await.unwrap();
    let mut answer = Vec::new();
    soon("the refusal", stranger.read_to_end(&mut answer)).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 403 "));
    soon("the stop", proxy.shutdown()).await;
}
