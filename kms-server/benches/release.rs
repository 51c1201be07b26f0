//! How many app keys a KMS releases per second, and how much memory it takes with a thousand open connections.
//!
//! ```text
//! cargo bench -p kms-server --bench release                       # ours alone
//! cargo bench -p kms-server --bench release -- prepare DIR        # evidence, and the root that KMSs must trust
//! cargo bench -p kms-server --bench release -- run DIR [SECONDS] NAME=URL[,PID]...
//! ```
//!
//! `run` measures every KMS that is named, in turns, with the same evidence from the same driver; `ours` is started by
//! it. A KMS must trust `DIR/root.pem` as Nitro's root and allow the app `1111…`. Evidence is good for an hour.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark stops where something is wrong, and prints"
)]

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use kms_protocol::AppId;
use kms_protocol::attestation_encoding::Attestation;
use kms_protocol::report_data;
use kms_protocol::wire::{Encoding, GetTempCaCertResponse, WireMessage as _};
use nsm_emulator::Emulator;
use ratls::UnixTime;
use ratls::client::{ClientConfigBuilder, ServerTrust};
use ratls::issue::{self, Ca, KeyPair};
use rustls_pki_types::ServerName;
use transport::Endpoint;

const APP: AppId = AppId::new([0x11; 20]);
/// Instances with evidence; a run that asks for more starts over with ones that are known by then, and says so.
const INSTANCES: usize = 20_000;
/// Enclaves of the runs with known instances.
const KNOWN: usize = 16;
/// Clients at the same time.
const CLIENTS: usize = 16;
const CONNECTIONS: usize = 1000;
const ROUNDS: usize = 3;
const DEADLINE: Duration = Duration::from_secs(30);

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["prepare", directory] => prepare(Path::new(directory), INSTANCES),
        ["run", directory, rest @ ..] => {
            let (seconds, peers) = match rest.split_first() {
                Some((first, peers)) if first.parse::<u64>().is_ok() => (first.parse().unwrap(), peers),
                _ => (10, rest),
            };
            runtime.block_on(run(Path::new(directory), Duration::from_secs(seconds), peers));
        }
        [] => {
            let directory = tempfile::tempdir().unwrap();
            prepare(directory.path(), 1000);
            runtime.block_on(run(directory.path(), Duration::from_secs(2), &[]));
        }
        other => panic!("{other:?} is neither `prepare DIR` nor `run DIR [SECONDS] NAME=URL[,PID]...`"),
    }
}

/// One enclave: its key and what its module says about it.
struct Enclave {
    key: String,
    attestation: Vec<u8>,
}

/// Writes the root, and a line of key and evidence for each instance, all of them different machines.
fn prepare(directory: &Path, instances: usize) {
    std::fs::create_dir_all(directory).unwrap();
    let first = Emulator::new(nsm_emulator::Config::default()).unwrap();
    std::fs::write(directory.join("root.pem"), first.root_pem()).unwrap();
    let mut lines = String::new();
    for _ in 0..instances {
        let emulator = first.another(nsm_emulator::Config::default()).unwrap();
        let key = KeyPair::generate().unwrap();
        let report_data = report_data::ratls_cert(&key.spki_der());
        let document = document(&emulator, &report_data);
        let decoded = attestation::AttestationDocument::decode(&document).unwrap();
        let hash = *decoded.os_image_hash().as_bytes();
        let attestation = Attestation::nitro(document, Some(&APP), report_data, &hash).encode_v0().unwrap();
        lines.push_str(&format!("{} {}\n", hex::encode(key.to_pem().as_bytes()), hex::encode(attestation)));
    }
    std::fs::write(directory.join("evidence.txt"), lines).unwrap();
    println!("{instances} instances in {}", directory.display());
}

fn document(emulator: &Emulator, user_data: &[u8; 64]) -> Vec<u8> {
    let mut request = b"\xa1\x6bAttestation\xa3\x69user_data\x58\x40".to_vec();
    request.extend(user_data);
    request.extend(b"\x65nonce\xf6\x6apublic_key\xf6");
    let response = emulator.process(&request);
    let head = b"\xa1\x6bAttestation\xa1\x68document\x59";
    assert!(response.starts_with(head));
    response[head.len() + 2..].to_vec()
}

fn enclaves(directory: &Path) -> Vec<Enclave> {
    let text = std::fs::read_to_string(directory.join("evidence.txt")).unwrap();
    let unhex = |text: &str| hex::decode(text).unwrap();
    text.lines()
        .map(|line| {
            let (key, attestation) = line.split_once(' ').unwrap();
            Enclave { key: String::from_utf8(unhex(key)).unwrap(), attestation: unhex(attestation) }
        })
        .collect()
}

/// A KMS under test.
struct Target {
    name: String,
    host: String,
    endpoint: Endpoint,
    pid: Option<u32>,
    /// With certificates of its temporary CA.
    clients: Vec<Arc<rustls::ClientConfig>>,
    /// How many of them have asked.
    used: AtomicUsize,
    /// Ends it, if we started it.
    _child: Option<Running>,
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only when it has ended.
        let _gone = self.0.kill();
        let _gone = self.0.wait();
    }
}

impl Target {
    async fn new(
        name: &str,
        url: &str,
        pid: Option<u32>,
        child: Option<Running>,
        enclaves: &[Enclave],
    ) -> Self {
        let authority = url.strip_prefix("https://").unwrap().trim_end_matches('/');
        let (host, _) = authority.split_once(':').unwrap();
        let endpoint = format!("tcp:{authority}").parse().unwrap();
        let mut target = Self {
            name: name.to_owned(),
            host: host.to_owned(),
            endpoint,
            pid,
            clients: Vec::new(),
            used: AtomicUsize::new(0),
            _child: child,
        };
        let builder = ClientConfigBuilder::new(ServerTrust::danger_accept_any_kms());
        let mut plain = target.connect(Arc::new(builder.build().unwrap())).await;
        let answer = ask(&mut plain, "GetTempCaCert", "null").await.unwrap();
        let temp_ca = GetTempCaCertResponse::decode_body(Encoding::Json, &answer).unwrap();
        let ca = Ca::from_pem("temp CA", &temp_ca.temp_ca_cert, &temp_ca.temp_ca_key).unwrap();
        for enclave in enclaves {
            let key = KeyPair::from_pem("client", &enclave.key).unwrap();
            let certificate =
                issue::client_certificate(&key, &enclave.attestation, Some(&ca), UnixTime::now()).unwrap();
            target.clients.push(Arc::new(builder.build_with_certificate(&certificate, &key).unwrap()));
        }
        target
    }

    async fn connect(&self, config: Arc<rustls::ClientConfig>) -> SendRequest<Full<Bytes>> {
        let stream = self.endpoint.connect(DEADLINE).await.unwrap();
        let name = ServerName::try_from(self.host.clone()).unwrap();
        let stream = tokio_rustls::TlsConnector::from(config).connect(name, stream).await.unwrap();
        let (sender, connection) = handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        sender
    }

    /// Keys per second: a handshake for each, from instances that the KMS has never seen.
    async fn unknown(&self, time: Duration) -> f64 {
        measure(time, |_| async {
            let index = self.used.fetch_add(1, Ordering::Relaxed);
            assert!(index < self.clients.len(), "{} has seen all instances: prepare more", self.name);
            let mut connection = self.connect(Arc::clone(&self.clients[index])).await;
            keys(&mut connection).await;
        })
        .await
    }

    /// Keys per second: a handshake for each, from a few instances again and again.
    async fn known(&self, time: Duration) -> f64 {
        measure(time, |count| async move {
            let mut connection = self.connect(Arc::clone(&self.clients[count % KNOWN])).await;
            keys(&mut connection).await;
        })
        .await
    }

    /// Keys per second on connections that stay open.
    async fn kept(&self, time: Duration) -> f64 {
        let mut connections = Vec::new();
        for index in 0..CLIENTS {
            connections
                .push(tokio::sync::Mutex::new(self.connect(Arc::clone(&self.clients[index % KNOWN])).await));
        }
        let connections = &connections;
        measure(time, |count| async move { keys(&mut *connections[count % CLIENTS].lock().await).await })
            .await
    }

    /// Resident memory in MiB with so many open connections that have all been used.
    async fn memory(&self) -> Option<f64> {
        let pid = self.pid?;
        let mut open = Vec::new();
        for index in 0..CONNECTIONS {
            let mut connection = self.connect(Arc::clone(&self.clients[index % KNOWN])).await;
            ask(&mut connection, "GetMeta", "null").await.unwrap();
            open.push(connection);
        }
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
        let kib: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
        assert_eq!(open.iter().filter(|connection| connection.is_closed()).count(), 0);
        Some(kib / 1024.0)
    }
}

/// Repeats `work` from several clients for a time; its rate.
async fn measure<F: Future<Output = ()>>(time: Duration, work: impl Fn(usize) -> F) -> f64 {
    let (started, count) = (Instant::now(), AtomicUsize::new(0));
    let client = || async {
        while started.elapsed() < time {
            work(count.fetch_add(1, Ordering::Relaxed)).await;
        }
    };
    futures_util::future::join_all((0..CLIENTS).map(|_| client())).await;
    #[expect(clippy::cast_precision_loss, reason = "counts of a few seconds")]
    let count = count.into_inner() as f64;
    count / started.elapsed().as_secs_f64()
}

async fn keys(connection: &mut SendRequest<Full<Bytes>>) {
    let answer = ask(connection, "GetAppKey", r#"{"api_version":1,"vm_config":""}"#).await;
    let answer = answer.unwrap_or_else(|error| panic!("no keys: {error}"));
    assert!(answer.windows(16).any(|part| part == b"\"disk_crypt_key\""));
}

async fn ask(connection: &mut SendRequest<Full<Bytes>>, method: &str, body: &str) -> Result<Bytes, String> {
    let request = Request::post(format!("/prpc/{method}?json"))
        .header("host", "localhost")
        .body(Full::new(Bytes::copy_from_slice(body.as_bytes())))
        .unwrap();
    let response = connection.send_request(request).await.unwrap();
    let status = response.status();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    if status.is_success() { Ok(body) } else { Err(String::from_utf8_lossy(&body).into_owned()) }
}

/// Our own program, with a policy that allows the emulator's image.
fn ours(directory: &Path) -> (Running, String, u32) {
    let home = directory.join("ours");
    std::fs::create_dir_all(&home).unwrap();
    let image = {
        let [zero, one, two] = [0xa0, 0xa1, 0xa2].map(|byte| attestation::Pcr::new([byte; 48]));
        attestation::os_image_hash(&zero, &one, &two)
    };
    std::fs::write(home.join("policy.toml"), format!("[apps.{APP}]\nimages = [\"{image}\"]\n")).unwrap();
    let settings = format!(
        "rpc.address = \"127.0.0.1\"\nrpc.port = 0\ncore.cert_dir = {:?}\n\
         core.enforce_self_authorization = false\ncore.attest_rpc_cert = false\n\
         core.attestation.insecure_allow_external_trust_anchors = true\n\
         core.attestation.root_ca.aws_nitro_enclave = {:?}\n\
         core.onboard.auto_bootstrap_domain = \"localhost\"\n\
         core.auth_api.type = \"policy\"\ncore.auth_api.policy.file = {:?}\n",
        home.join("certs"),
        directory.join("root.pem"),
        home.join("policy.toml"),
    );
    std::fs::write(home.join("kms.toml"), settings).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_kms-server"));
    command.arg("serve").arg("-c").arg(home.join("kms.toml")).env("RUST_LOG", "warn");
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let (mut line, pid) = (String::new(), child.id());
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let port = line.trim().rsplit_once(':').unwrap_or_else(|| panic!("{line:?}")).1.to_owned();
    (Running(child), format!("https://localhost:{port}"), pid)
}

async fn run(directory: &Path, time: Duration, peers: &[&str]) {
    let enclaves = enclaves(directory);
    let (child, url, pid) = ours(directory);
    let mut targets = vec![Target::new("ours", &url, Some(pid), Some(child), &enclaves).await];
    for peer in peers {
        let (name, place) = peer.split_once('=').unwrap();
        let (url, pid) =
            place.split_once(',').map_or((place, None), |(url, pid)| (url, Some(pid.parse().unwrap())));
        targets.push(Target::new(name, url, pid, None, &enclaves).await);
    }
    let mut results = vec![[Vec::new(), Vec::new(), Vec::new()]; targets.len()];
    let share = time / u32::try_from(ROUNDS).unwrap();
    for _ in 0..ROUNDS {
        for (target, results) in targets.iter().zip(&mut results) {
            results[0].push(target.unknown(share).await);
            results[1].push(target.known(share).await);
            results[2].push(target.kept(share).await);
        }
    }
    println!(
        "{:<12} {:>18} {:>18} {:>18} {:>22}",
        "keys/s", "unknown instances", "known instances", "kept connections", "MiB, 1000 connections"
    );
    for (target, results) in targets.iter().zip(&mut results) {
        let [unknown, known, kept] = results.each_mut().map(|values| {
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        });
        let memory = target.memory().await.map_or_else(|| "-".to_owned(), |mib| format!("{mib:.1}"));
        println!("{:<12} {unknown:>18.0} {known:>18.0} {kept:>18.0} {memory:>22}", target.name);
    }
}
