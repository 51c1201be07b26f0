//! Peers that say nothing, or too much: the server answers everybody else, and them with a reason.

#![expect(clippy::unwrap_used, reason = "a test stops where something is wrong")]

mod common;

use common::{DEADLINE, World};
use kms_server::Server;
use nsm_emulator::{Config as EmulatorConfig, Emulator};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::time::timeout;

/// Settings that ask `listener` about every app, with that deadline.
fn webhook(listener: &TcpListener, deadline: &str) -> String {
    let address = listener.local_addr().unwrap();
    format!(
        "core.auth_api.webhook.url = \"http://{address}\"\ncore.auth_api.webhook.timeout = \"{deadline}\"\n"
    )
}

#[tokio::test]
async fn a_silent_authoriser_delays_nothing_but_its_own_question() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let world = World::with(tempfile::tempdir().unwrap(), &webhook(&listener, "300ms")).await;
    // The kernel accepts for it; it never reads, and never answers.
    let certificate = world.certificate().await;
    let meta = world.get("/prpc/GetMeta").await.json();
    assert!(meta["chain_id"].is_null() && !meta["is_dev"].as_bool().unwrap());
    let refused = world.app_key(&certificate).await;
    assert_eq!(refused.status, 503);
    assert!(refused.headers.contains_key("retry-after"));
    let text = refused.error();
    assert!(text.starts_with("App not allowed: auth api http://127.0.0.1:"), "{text}");
    assert!(text.ends_with("/bootAuth/app gave no answer within 300ms"), "{text}");
    assert_eq!(world.get("/prpc/GetMeta").await.status, 200);
}

#[tokio::test]
async fn no_reason_of_any_length_or_character_stops_the_server() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let world = World::with(tempfile::tempdir().unwrap(), &webhook(&listener, "10s")).await;
    let reasons = [format!("x{}", "☃".repeat(20_000)), "é".repeat(30_000), "no\r\nway\u{0}".to_owned()];
    let expected = reasons.len();
    let service = tokio::spawn(async move {
        let mut denied = 0;
        while denied < expected {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = vec![0; 4096];
            let length = stream.read(&mut head).await.unwrap();
            let asks_about_app = head[..length].starts_with(b"POST /bootAuth/app HTTP/1.1");
            let body = if asks_about_app {
                denied += 1;
                let reason = &reasons[denied - 1];
                serde_json::json!({"isAllowed": false, "gatewayAppId": "", "reason": reason}).to_string()
            } else {
                "{}".to_owned()
            };
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            // An answer over the limit is not read to its end.
            let _written = stream.write_all(answer.as_bytes()).await;
        }
    });
    let certificate = world.certificate().await;
    for _ in 0..expected {
        let told = world.app_key(&certificate).await;
        // Too long to be read, or read.
        assert!(matches!(told.status, 400 | 503), "{told:?}");
        let text = told.error();
        assert!(text.starts_with("App not allowed: "), "{text}");
        assert!(text.len() < 600 && !text.chars().any(char::is_control), "{text}");
    }
    timeout(DEADLINE, service).await.unwrap().unwrap();
    assert_eq!(world.get("/health").await.status, 200);
}

#[tokio::test]
async fn what_the_authoriser_says_about_itself_appears_in_meta() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let world = World::with(tempfile::tempdir().unwrap(), &webhook(&listener, "10s")).await;
    let (mut stream, _) = timeout(DEADLINE, listener.accept()).await.unwrap().unwrap();
    let mut head = vec![0; 4096];
    let length = stream.read(&mut head).await.unwrap();
    assert!(head[..length].starts_with(b"GET / HTTP/1.1\r\n"));
    let body = r#"{"status":"ok","kmsContractAddr":"0x2","gatewayAppId":"0x1","chainId":7,"appImplementation":"0x3"}"#;
    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    stream.write_all(answer.as_bytes()).await.unwrap();
    let known = async {
        loop {
            let meta = world.get("/prpc/GetMeta").await.json();
            if !meta["chain_id"].is_null() {
                return meta;
            }
            tokio::task::yield_now().await;
        }
    };
    let meta = timeout(DEADLINE, known).await.unwrap();
    assert_eq!(meta["chain_id"], 7);
    assert_eq!(meta["gateway_app_id"], "0x1");
    assert_eq!(meta["kms_contract_address"], "0x2");
    assert_eq!(meta["app_auth_implementation"], "0x3");
}

#[tokio::test]
async fn silent_clients_are_cut_off_at_every_step() {
    let more = "core.server.handshake_timeout = \"200ms\"\ncore.server.header_timeout = \"200ms\"\n\
                core.server.body_timeout = \"200ms\"\ncore.server.idle_timeout = \"200ms\"\n\
                core.server.shutdown_grace = \"200ms\"\n";
    let world = World::with_policy(more).await;
    let mut end = [0; 1];
    // No handshake.
    let mut stream = common::raw(&world.kms).await;
    assert_eq!(timeout(DEADLINE, stream.read(&mut end)).await.unwrap().unwrap(), 0);
    // No request, with either protocol; half of a head.
    for (alpn, sent) in [("http/1.1", ""), ("h2", ""), ("http/1.1", "GET /prpc/GetMeta HTTP/1.1\r\nx: ")] {
        let mut stream = common::connect(&world.kms, None, &[alpn]).await.unwrap();
        stream.write_all(sent.as_bytes()).await.unwrap();
        let mut rest = Vec::new();
        // With or without a farewell: what counts is that the connection ends.
        let _read = timeout(DEADLINE, stream.read_to_end(&mut rest)).await.unwrap();
    }
    // Half of a body.
    let mut stream = common::connect(&world.kms, None, &["http/1.1"]).await.unwrap();
    let head = "POST /prpc/GetAppKey?json HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut rest = Vec::new();
    let _read = timeout(DEADLINE, stream.read_to_end(&mut rest)).await.unwrap();
    assert!(rest.starts_with(b"HTTP/1.1 408 "), "{}", String::from_utf8_lossy(&rest));
    assert_eq!(world.get("/health").await.status, 200);
}

#[tokio::test]
async fn connections_over_the_limit_are_closed_at_once() {
    let world = World::with_policy("core.server.max_connections = 1\n").await;
    let first = common::connect(&world.kms, None, &["http/1.1"]).await.unwrap();
    let mut second = common::raw(&world.kms).await;
    let mut end = [0; 1];
    assert_eq!(timeout(DEADLINE, second.read(&mut end)).await.unwrap().unwrap(), 0);
    drop(first);
}

#[tokio::test]
async fn shutdown_closes_the_socket_and_frees_the_keys() {
    let directory = tempfile::tempdir().unwrap();
    let emulator = Emulator::new(EmulatorConfig::default()).unwrap();
    let config = common::settings(&directory, &emulator, &common::policy(&directory));
    let kms = Server::start(config.clone()).await.unwrap();
    let (address, root) = (kms.address(), kms.root_ca_pem().to_owned());
    let idle = common::connect(&kms, None, &["http/1.1"]).await.unwrap();
    assert!(Server::start(config.clone()).await.is_err(), "two servers on the same keys");
    timeout(DEADLINE, kms.shutdown()).await.unwrap();
    let endpoint: transport::Endpoint = format!("tcp:{address}").parse().unwrap();
    assert!(endpoint.connect(DEADLINE).await.is_err(), "still listening");
    drop((kms, idle));
    assert_eq!(Server::start(config).await.unwrap().root_ca_pem(), root);
}

#[tokio::test]
async fn a_server_without_keys_does_not_start() {
    let directory = tempfile::tempdir().unwrap();
    let emulator = Emulator::new(EmulatorConfig::default()).unwrap();
    let mut config = common::settings(&directory, &emulator, &common::policy(&directory));
    config.auto_bootstrap_domain = None;
    let error = Server::start(config).await.err().unwrap();
    assert!(matches!(error, kms_server::StartError::Store(kms_server::store::Error::NotBootstrapped { .. })));
}
