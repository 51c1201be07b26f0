//! Real vsock: the agent reaches the proxy over it, and the proxy listens on it. In a Linux guest, for a test must not
//! depend on what the kernel of this machine has loaded. Pitfall 22 of the field: vsock itself.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a set-up that fails is a failed test, and one that is missing is named"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use e2e::{APP_ID, Daemon, Guest, IMAGE, Machine, Variation, start_kms};
use serde_json::Value;

const PROXY_CONFIG: &str = r#"
[limits]
max_connections_per_cid = 4

[[egress]]
listen = ["vsock:any:3128"]
allow = ["127.0.0.1:7000"]
[[egress.rule]]
allow = "127.0.0.1:7002"
cids = [16]

[[egress]]
name = "for-another"
listen = ["vsock:any:3129"]
allow = ["127.0.0.1:7000"]
cids = [16]
"#;

fn machine() -> Option<Machine> {
    match Machine::find() {
        Ok(machine) => Some(machine),
        Err(reason) => {
            println!("skipped: {reason}");
            None
        }
    }
}

#[test]
fn the_agent_reaches_the_proxy_over_vsock() {
    let Some(mut machine) = machine() else { return };
    let [pcr0, pcr1, pcr2] = IMAGE.map(attestation::Pcr::new);
    let image = attestation::os_image_hash(&pcr0, &pcr1, &pcr2).to_string();
    let kms = start_kms(machine.directory(), &machine.module_root(), &image, Variation::default());
    let (listen, port) = (format!("unix:{}", machine.socket(3128).display()), kms.port());
    let rules = [format!("localhost:{port}"), format!("127.0.0.1:{port}")];
    let proxy =
        Daemon::start("host-proxy", &["--listen", &listen, "--allow", &rules[0], "--allow", &rules[1]]);

    machine.program("/init", "guest");
    machine.program("/bin/enclave-agent", "enclave-agent");
    let root = std::fs::read(machine.directory().join("certs/root-ca.crt")).unwrap();
    machine.file("/etc/kms-root.pem", root);
    let url = format!("https://localhost:{port}");
    let arguments = [
        "get-keys",
        "--kms-url",
        &url,
        "--app-id",
        APP_ID,
        "--root-ca",
        "/etc/kms-root.pem",
        "--nsm",
        "/dev/nsm",
        "--proxy",
        "vsock:2:3128",
        "--output",
        "/tmp/app_keys.json",
        "--json",
    ];
    machine.file("/etc/agent-arguments", arguments.join("\n"));
    let guest = machine.boot("test=agent");
    let code = guest.said("code");
    assert_eq!(code, "Some(0)", "{}\nproxy:\n{}", guest.console(), proxy.log());
    let summary: Value = serde_json::from_str(&guest.said("summary")).unwrap();
    assert_eq!(summary["os_image_hash"], image);
    let connected = format!("target=\"localhost:{port}\"");
    assert!(proxy.log().contains(&connected), "{}", proxy.log());
    guest.finish();
}

/// A connection of this process to a listener in the guest, through the machine's vsock device.
fn connect_into(guest: &Guest, port: u32) -> (UnixStream, BufReader<UnixStream>) {
    let mut answer = String::new();
    // The device (vhost-device-vsock 0.3.0) was seen to drop an attempt; without a listener it drops every one.
    for _ in 0..20 {
        let mut host = UnixStream::connect(guest.machine().vsock()).unwrap();
        host.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        host.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        let mut reader = BufReader::new(host.try_clone().unwrap());
        answer.clear();
        reader.read_line(&mut answer).unwrap();
        if answer.starts_with("OK ") {
            return (host, reader);
        }
    }
    panic!("{answer:?} for connections to the guest's listener\n{}", guest.console());
}

#[test]
fn the_proxy_serves_real_vsock() {
    let Some(mut machine) = machine() else { return };
    machine.program("/init", "guest");
    machine.program("/bin/host-proxy", "host-proxy");
    machine.file("/etc/host-proxy.toml", PROXY_CONFIG);
    let guest = machine.boot("test=proxy");
    for what in ["proxy", "bulk", "half-close", "flood", "reset", "refusals", "limit", "waiting"] {
        println!("{what} {}", guest.said(what));
    }
    // All four places of CID 1 are taken; the host is another peer.
    let (mut host, mut reader) = connect_into(&guest, 3128);
    let mut line = || {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        line
    };
    host.write_all(b"CONNECT 127.0.0.1:7000 HTTP/1.1\r\nHost: 127.0.0.1:7000\r\n\r\n").unwrap();
    assert!(line().starts_with("HTTP/1.1 200 "));
    while !line().trim().is_empty() {}
    host.write_all(b"hello from this side").unwrap();
    assert_eq!(guest.said("host-said"), "hello from this side");
    let mut answer = [0; 20];
    reader.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"and hello from there");
    // A close, for the device passes no half-close on.
    drop((reader, host));
    assert_eq!(guest.said("stopped"), "Some(0)");

    let console = guest.console();
    let lines: Vec<&str> = console.lines().filter(|line| line.contains("guest: log ")).collect();
    for expected in [
        &["peer=vsock:1:", "rule=\"127.0.0.1:7000\"", "path=\"copy\"", "end=\"finished\""][..],
        &["peer=vsock:1:", "end=\"limit-cid\""],
        &["peer=vsock:1:", "end=\"cid-not-allowed\""],
        &["peer=vsock:1:", "end=\"target-reset\""],
        &["peer=vsock:2:", "up=20 down=20"],
    ] {
        let found = lines.iter().any(|line| expected.iter().all(|part| line.contains(part)));
        assert!(found, "no line with {expected:?} in\n{console}");
    }
    guest.finish();
}
