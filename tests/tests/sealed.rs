//! Sealed release with real programs: the same keys in either exchange, insistence, and a relay with the KMS's TLS key.

#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use attestation::{Pcr, os_image_hash};
use e2e::{Finished, IMAGE, Trip, Variation, run};
use ratls::CertificateDer;
use ratls::client::{ClientConfigBuilder, ServerTrust};
use ratls::server::ServerConfigBuilder;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{PrivateKeyDer, ServerName};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use transport::{BindOptions, Endpoint, Listener};

/// No command of these tests takes this long; it only keeps a hang from holding everything up.
const DEADLINE: Duration = Duration::from_secs(120);
/// The KMS as upstream's: without sealed release.
const OFF: &str = "sealed_release = \"off\"";

fn image() -> String {
    let [pcr0, pcr1, pcr2] = IMAGE.map(Pcr::new);
    os_image_hash(&pcr0, &pcr1, &pcr2).to_string()
}

fn insisting(trip: &Trip) -> Vec<String> {
    [trip.agent_arguments(), vec!["--require-sealed".to_owned()]].concat()
}

/// The keys, and the exchange that the agent says they came by.
fn keys(trip: &Trip, finished: &Finished) -> (Value, String) {
    assert_eq!(finished.code, Some(0), "{finished:?}");
    let keys = serde_json::from_slice(&fs::read(trip.output()).unwrap()).unwrap();
    let report: Value = serde_json::from_str(&finished.stdout).unwrap();
    (keys, report["exchange"].as_str().unwrap().to_owned())
}

fn error_line(finished: &Finished) -> &str {
    finished.stderr.lines().find(|line| line.starts_with("error: ")).unwrap_or_default()
}

#[test]
fn both_exchanges_give_the_same_keys() {
    let sealing = Trip::start(&image(), Variation::default());
    let (sealed, exchange) = keys(&sealing, &run("enclave-agent", &insisting(&sealing), DEADLINE));
    assert_eq!(exchange, "sealed");
    assert!(sealing.kms.log().contains("released app keys"));

    let same_roots = Variation { kms: OFF, kms_keys: Some(&sealing.kms_keys()), ..Variation::default() };
    let plain = Trip::start(&image(), same_roots);
    let (upstream, exchange) = keys(&plain, &run("enclave-agent", &plain.agent_arguments(), DEADLINE));
    assert_eq!(exchange, "upstream");
    for key in ["disk_crypt_key", "env_crypt_key", "k256_key", "k256_signature", "gateway_app_id"] {
        assert!(sealed[key].is_string());
        assert_eq!(sealed[key], upstream[key], "{key}");
    }
    for secret in ["disk_crypt_key", "env_crypt_key", "k256_key"] {
        let secret = sealed[secret].as_str().unwrap();
        for daemon in [&sealing.kms, &sealing.proxy, &sealing.module] {
            assert!(!daemon.log().contains(secret));
        }
    }
}

#[test]
fn who_requires_it_is_refused_by_a_kms_without_it() {
    let trip = Trip::start(&image(), Variation { kms: OFF, ..Variation::default() });
    let finished = run("enclave-agent", &insisting(&trip), DEADLINE);
    assert_eq!(finished.code, Some(3), "{finished:?}");
    assert!(error_line(&finished).contains("offers no sealed release"), "{finished:?}");
    assert!(finished.stderr.contains("\nhint: set core.sealed_release"), "{finished:?}");
    assert!(!trip.output().exists());
    assert!(!trip.kms.log().contains("released app keys"));
}

#[test]
fn a_kms_that_requires_it_serves_the_agent() {
    let require = "sealed_release = \"require\"";
    let trip = Trip::start(&image(), Variation { kms: require, ..Variation::default() });
    let (_, exchange) = keys(&trip, &run("enclave-agent", &trip.agent_arguments(), DEADLINE));
    assert_eq!(exchange, "sealed");
}

/// The relay holds the KMS's TLS key, so the agent takes it for the KMS; it passes everything on to the KMS over a
/// connection of its own and keeps a copy. The second connection is another one, and that is what the evidence says.
#[tokio::test(flavor = "multi_thread")]
async fn pitfall_13_a_relay_with_the_kmss_tls_key_gets_nothing() {
    for (kms, expected) in [("", "it is not bound to this request"), (OFF, "No attestation provided")] {
        let trip = Trip::start(&image(), Variation { kms, ..Variation::default() });
        let relay = Relay::start(&trip.kms_keys(), trip.kms.port()).await;
        let mut arguments = trip.agent_arguments();
        let at = |flag: &str| arguments.iter().position(|it| it == flag).unwrap();
        let (url, proxy) = (at("--kms-url") + 1, at("--proxy"));
        arguments[url] = format!("https://localhost:{}", relay.port);
        arguments.drain(proxy..proxy + 2);
        let finished = tokio::task::spawn_blocking(move || {
            let mut command = std::process::Command::new(e2e::program("enclave-agent"));
            command.args(&arguments).env("NO_PROXY", "*");
            e2e::finish(command, DEADLINE)
        })
        .await
        .unwrap();
        assert_eq!(finished.code, Some(3), "{finished:?}");
        assert!(error_line(&finished).contains(expected), "{finished:?}");
        assert!(!trip.output().exists());
        assert!(!trip.kms.log().contains("released app keys"));
        // It did sit in the middle of a conversation that got as far as the evidence.
        let copy = relay.copy.lock().unwrap().clone();
        let copy = String::from_utf8_lossy(&copy);
        assert!(copy.contains("/prpc/GetTempCaCert") && copy.contains(expected), "{copy}");

        // The same trip without the relay gives keys, none of which the relay has seen.
        let (keys, _) = keys(&trip, &run("enclave-agent", &trip.agent_arguments(), DEADLINE));
        for secret in ["disk_crypt_key", "env_crypt_key", "k256_key"] {
            assert!(!copy.contains(keys[secret].as_str().unwrap()), "{secret}");
        }
    }
}

/// Terminates TLS with the KMS's own certificate and key, and passes on what it hears.
struct Relay {
    port: u16,
    /// Everything that passed, both ways.
    copy: Arc<Mutex<Vec<u8>>>,
}

impl Relay {
    async fn start(kms_keys: &Path, kms_port: u16) -> Self {
        let pem = |name: &str| fs::read(kms_keys.join(name)).unwrap();
        let certificate = |name: &str| CertificateDer::from_pem_slice(&pem(name)).unwrap();
        let key = PrivateKeyDer::from_pem_slice(&pem("rpc.key")).unwrap();
        let stolen = ServerConfigBuilder::new(certificate("tmp-ca.crt"))
            .unwrap()
            .build_from_der(certificate("rpc.crt"), key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(stolen));
        let onward = ClientConfigBuilder::new(ServerTrust::danger_accept_any_kms()).build().unwrap();
        let connector = TlsConnector::from(Arc::new(onward));
        let listener =
            Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap(), BindOptions::default()).await.unwrap();
        let port = listener.endpoint().to_string().rsplit(':').next().unwrap().parse().unwrap();
        let copy = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&copy);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, connector, kept) = (acceptor.clone(), connector.clone(), Arc::clone(&kept));
                tokio::spawn(async move {
                    let Ok(client) = acceptor.accept(stream).await else { return };
                    let kms: Endpoint = format!("tcp:127.0.0.1:{kms_port}").parse().unwrap();
                    let kms = kms.connect(DEADLINE).await.unwrap();
                    let name = ServerName::try_from("localhost").unwrap();
                    let kms = connector.connect(name, kms).await.unwrap();
                    let (from_client, to_client) = tokio::io::split(client);
                    let (from_kms, to_kms) = tokio::io::split(kms);
                    tokio::join!(pass(from_client, to_kms, &kept), pass(from_kms, to_client, &kept));
                });
            }
        });
        Self { port, copy }
    }
}

/// Passes bytes on until either side has gone, and keeps them.
async fn pass(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, kept: &Mutex<Vec<u8>>) {
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        kept.lock().unwrap().extend(&buffer[..length]);
        if to.write_all(&buffer[..length]).await.is_err() || to.flush().await.is_err() {
            break;
        }
    }
    // The other side may have gone first; either way this direction is over.
    drop(to.shutdown().await);
}
