//! How fast `GetMeta` is while everything else stands still, and what connections cost.
//!
//! ```text
//! cargo bench -p kms-server --bench quiet
//! ```
//!
//! Starts the program of this crate, whose authoriser and PCCS accept connections and never answer. 200 clients trickle
//! bytes, 50 `GetAppKey` a second wait for the authoriser, and `GetMeta` is timed, on one connection and on fresh ones.
//! Then 1,000 connections are opened and nothing is sent.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a measurement stops where something is wrong")]

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt as _, Empty};
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use kms_protocol::AppId;
use kms_protocol::attestation_encoding::Attestation;
use kms_protocol::report_data;
use nsm_emulator::Emulator;
use ratls::UnixTime;
use ratls::client::{ClientConfigBuilder, PinnedRoot, ServerTrust};
use ratls::issue::{self, Ca, Certificate, KeyPair};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use transport::{Endpoint, Stream};

const DEADLINE: Duration = Duration::from_secs(30);
const MEASURED: Duration = Duration::from_secs(20);
const TRICKLERS: usize = 200;
const IDLE: usize = 1000;

struct Target {
    endpoint: Endpoint,
    tls: Arc<rustls::ClientConfig>,
}

impl Target {
    async fn connect(&self) -> std::io::Result<TlsStream<Stream>> {
        let stream = self.endpoint.connect(DEADLINE).await.map_err(std::io::Error::other)?;
        let name = ServerName::try_from("localhost").unwrap();
        TlsConnector::from(Arc::clone(&self.tls)).connect(name, stream).await
    }

    async fn open(&self) -> SendRequest<Empty<Bytes>> {
        let stream = TokioIo::new(self.connect().await.unwrap());
        let (sender, connection) = hyper::client::conn::http1::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        sender
    }
}

async fn get(sender: &mut SendRequest<Empty<Bytes>>, path: &str) -> (u16, Vec<u8>) {
    let request = Request::get(path).header("host", "localhost").body(Empty::new()).unwrap();
    // The body before may have been read to its end a moment before the connection knows it.
    timeout(DEADLINE, sender.ready()).await.unwrap().unwrap();
    let response = timeout(DEADLINE, sender.send_request(request)).await.unwrap().unwrap();
    let status = response.status().as_u16();
    (status, response.into_body().collect().await.unwrap().to_bytes().to_vec())
}

#[tokio::main]
async fn main() {
    // What cargo passes to benchmarks, and to nobody else.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let emulator = Emulator::new(nsm_emulator::Config::default()).unwrap();
    let (authoriser, pccs) = (silence().await, silence().await);
    let config = settings(directory.path(), &emulator, authoriser, pccs);
    let mut child = tokio::process::Command::new(env!("CARGO_BIN_EXE_kms-server"))
        .args(["serve", "--config"])
        .arg(&config)
        .env("RUST_LOG", "error")
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let line = timeout(DEADLINE, lines.next_line()).await.unwrap().unwrap().unwrap();
    let endpoint: Endpoint = line.strip_prefix("listening on ").unwrap().parse().unwrap();
    let root = std::fs::read_to_string(directory.path().join("certs/root-ca.crt")).unwrap();
    let trust = || ServerTrust::pinned_root(PinnedRoot::from_pem(&root).unwrap());
    let builder = ClientConfigBuilder::new(trust()).with_alpn(&["http/1.1"]);
    let target = Arc::new(Target { endpoint: endpoint.clone(), tls: Arc::new(builder.build().unwrap()) });
    let (certificate, key) = certificate(&target, &emulator).await;
    let tls = builder.build_with_certificate(&certificate, &key).unwrap();
    let enclave = Arc::new(Target { endpoint, tls: Arc::new(tls) });
    let pid = child.id().unwrap();

    let resting = measure(&target).await;
    println!("GetMeta at rest, one connection   {resting}");
    println!("resident at rest                  {}", resident(pid));

    let mut noise = JoinSet::new();
    for number in 0..TRICKLERS {
        noise.spawn(trickle(Arc::clone(&target), number));
    }
    noise.spawn(ask_for_keys(enclave));
    // The authoriser's first deadlines pass, and its breaker opens and closes.
    let _settling = measure(&target).await;
    println!("GetMeta amid silence, one         {}", measure(&target).await);
    println!("GetMeta amid silence, fresh       {}", measure_fresh(&target).await);
    println!("resident amid silence             {}", resident(pid));
    noise.shutdown().await;

    let mut open = Vec::new();
    for _ in 0..IDLE {
        open.push(target.connect().await.unwrap());
    }
    println!("resident with {IDLE} connections   {}", resident(pid));
    println!("GetMeta beside them               {}", measure(&target).await);
}

/// Accepts, and never answers.
async fn silence() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut open = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            open.push(stream);
            if open.len() > 1024 {
                open.clear();
            }
        }
    });
    address
}

fn settings(
    directory: &Path,
    emulator: &Emulator,
    authoriser: std::net::SocketAddr,
    pccs: std::net::SocketAddr,
) -> std::path::PathBuf {
    let root = directory.join("nitro-root.pem");
    std::fs::write(&root, emulator.root_pem()).unwrap();
    let file = directory.join("kms.toml");
    let text = format!(
        "rpc.address = \"127.0.0.1\"\nrpc.port = 0\ncore.cert_dir = \"{certs}\"\n\
         core.enforce_self_authorization = false\ncore.attest_rpc_cert = false\n\
         core.attestation.insecure_allow_external_trust_anchors = true\n\
         core.attestation.root_ca.aws_nitro_enclave = \"{root}\"\n\
         core.attestation.urls.pccs = \"http://{pccs}\"\n\
         core.onboard.auto_bootstrap_domain = \"localhost\"\n\
         core.auth_api.webhook.url = \"http://{authoriser}\"\ncore.auth_api.webhook.timeout = \"2s\"\n",
        certs = directory.join("certs").display(),
        root = root.display(),
    );
    std::fs::write(&file, text).unwrap();
    file
}

async fn certificate(target: &Target, emulator: &Emulator) -> (Certificate, KeyPair) {
    let (status, body) = get(&mut target.open().await, "/prpc/GetTempCaCert").await;
    assert_eq!(status, 200);
    let answer: serde_json::Value = serde_json::from_slice(&body).unwrap();
    let text = |key: &str| answer[key].as_str().unwrap().to_owned();
    let ca = Ca::from_pem("temp CA", &text("temp_ca_cert"), &text("temp_ca_key")).unwrap();
    let key = KeyPair::generate().unwrap();
    let report_data = report_data::ratls_cert(&key.spki_der());
    let mut request = b"\xa1\x6bAttestation\xa3\x69user_data\x58\x40".to_vec();
    request.extend(report_data);
    request.extend(b"\x65nonce\xf6\x6apublic_key\xf6");
    // `{"Attestation": {"document": bytes}}`, whose length takes two bytes.
    let document = emulator.process(&request)[26..].to_vec();
    let hash = attestation::AttestationDocument::decode(&document).unwrap().os_image_hash();
    let app = AppId::new([0x11; 20]);
    let attestation = Attestation::nitro(document, Some(&app), report_data, hash.as_bytes());
    let encoded = attestation.encode_v0().unwrap();
    (issue::client_certificate(&key, &encoded, Some(&ca), UnixTime::now()).unwrap(), key)
}

/// One byte a second, of a handshake, of a head or of a body, over and over.
async fn trickle(target: Arc<Target>, number: usize) {
    let mut ticks = interval(Duration::from_secs(1));
    loop {
        let body = "POST /prpc/GetAppKey?json HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9999\r\n\r\n";
        if number.is_multiple_of(3) {
            let Ok(mut stream) = target.endpoint.connect(DEADLINE).await else { continue };
            while stream.write_all(&[0x16]).await.is_ok() {
                ticks.tick().await;
            }
        } else if let Ok(mut stream) = target.connect().await {
            let start = if number % 3 == 1 { "GET /prpc/GetMeta HTTP/1.1\r\nx: " } else { body };
            let mut sent = stream.write_all(start.as_bytes()).await;
            while sent.is_ok() {
                ticks.tick().await;
                sent = async {
                    stream.write_all(b"{").await?;
                    stream.flush().await
                }
                .await;
            }
        }
        ticks.tick().await;
    }
}

async fn ask_for_keys(enclave: Arc<Target>) {
    let mut ticks = interval(Duration::from_millis(20));
    let mut open = JoinSet::new();
    loop {
        ticks.tick().await;
        let enclave = Arc::clone(&enclave);
        open.spawn(async move {
            let mut sender = enclave.open().await;
            let (status, _) = get(&mut sender, "/prpc/GetAppKey?api_version=1").await;
            assert_ne!(status, 200, "nobody allowed it");
        });
        while let Some(ended) = open.try_join_next() {
            ended.unwrap();
        }
    }
}

async fn measure(target: &Target) -> Times {
    let mut sender = target.open().await;
    let mut times = Vec::new();
    let mut ticks = interval(Duration::from_millis(5));
    let until = Instant::now() + MEASURED;
    while Instant::now() < until {
        ticks.tick().await;
        let started = Instant::now();
        assert_eq!(get(&mut sender, "/prpc/GetMeta").await.0, 200);
        times.push(started.elapsed());
    }
    Times::of(times)
}

async fn measure_fresh(target: &Target) -> Times {
    let mut times = Vec::new();
    let mut ticks = interval(Duration::from_millis(20));
    let until = Instant::now() + MEASURED;
    while Instant::now() < until {
        ticks.tick().await;
        let started = Instant::now();
        assert_eq!(get(&mut target.open().await, "/prpc/GetMeta").await.0, 200);
        times.push(started.elapsed());
    }
    Times::of(times)
}

struct Times(Vec<Duration>);

impl Times {
    fn of(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        Self(times)
    }
}

impl std::fmt::Display for Times {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let at = |percent: usize| self.0[(self.0.len() - 1) * percent / 1000];
        write!(out, "{} calls", self.0.len())?;
        for (name, permille) in [("p50", 500), ("p99", 990), ("p99.9", 999), ("longest", 1000)] {
            write!(out, ", {name} {:.2?}", at(permille))?;
        }
        Ok(())
    }
}

fn resident(pid: u32) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().to_owned()
    };
    format!("{} (at most so far {})", line("VmRSS:"), line("VmHWM:"))
}
