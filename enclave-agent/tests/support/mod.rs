//! A KMS that plays a script on real sockets, and an enclave to talk to it.

#![allow(dead_code, reason = "every test program uses a part of it")]

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use attestation::{Pcr, UnixMillis, os_image_hash};
use enclave_agent::nsm::{Nsm, NsmSource};
use enclave_agent::{Deadlines, DebugMode, GetKeys, KmsTrust, Proxy, Retry, SealedRelease};
use kms_protocol::AppId;
use kms_protocol::derive::{K256Root, P256Scalar, RootKeys, sign_app_key};
use kms_protocol::ids::InstanceId;
use kms_protocol::wire::{AppKeyResponse, GetMetaResponse, GetTempCaCertResponse, json};
use nsm_emulator::Emulator;
use ratls::UnixTime;
use ratls::client::PinnedRoot;
use ratls::evidence::PeerEvidence;
use ratls::issue::{Ca, Certificate, KeyPair, root_ca, rpc_leaf, temp_ca};
use ratls::server::ServerConfigBuilder;
use rustls::ServerConfig;
use rustls::time_provider::{DefaultTimeProvider, TimeProvider};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use transport::{BindOptions, Endpoint, Listener};

pub(crate) const APP: AppId = AppId::new([0x11; 20]);
/// The name in the script's certificates; the sockets listen on this address.
pub(crate) const DOMAIN: &str = "127.0.0.1";

/// The clock of both ends.
pub(crate) fn now() -> UnixTime {
    DefaultTimeProvider.current_time().expect("a clock")
}

/// Keys and certificates of a KMS.
pub(crate) struct Authority {
    pub(crate) roots: RootKeys,
    pub(crate) root: Ca,
    pub(crate) root_pem: String,
    pub(crate) temp_pem: String,
    pub(crate) temp_key_pem: String,
    temp: Ca,
}

impl Authority {
    /// Different for each seed, the same for the same one.
    pub(crate) fn new(seed: u8) -> Self {
        let scalar = P256Scalar::from_slice(&[seed; 32]).unwrap();
        let key = KeyPair::from_scalar("root", &scalar).unwrap();
        let certificate = root_ca(&key, now()).unwrap();
        let temp_key = KeyPair::generate().unwrap();
        let temp_certificate = temp_ca(&temp_key, now()).unwrap();
        let temp_key_pem = temp_key.to_pem().to_string();
        Self {
            roots: RootKeys::new(scalar, K256Root::from_slice(&[seed + 1; 32]).unwrap()).unwrap(),
            root_pem: certificate.pem(),
            root: Ca::new("root", certificate.der().clone(), key).unwrap(),
            temp_pem: temp_certificate.pem(),
            temp: Ca::from_pem("temp", &temp_certificate.pem(), &temp_key_pem).unwrap(),
            temp_key_pem,
        }
    }

    pub(crate) fn pinned(&self) -> PinnedRoot {
        PinnedRoot::from_pem(&self.root_pem).unwrap()
    }

    pub(crate) fn trust(&self) -> KmsTrust {
        KmsTrust::anchored(Some(self.pinned()), None, None).unwrap()
    }

    /// TLS with a certificate for `domain`, issued at `issued`.
    pub(crate) fn tls(&self, domain: &str, issued: UnixTime) -> Arc<ServerConfig> {
        let key = KeyPair::generate().unwrap();
        self.tls_with(&rpc_leaf(&self.root, &key, domain, None, issued).unwrap(), &key)
    }

    /// TLS with this certificate, asking clients for one of the temp CA.
    pub(crate) fn tls_with(&self, certificate: &Certificate, key: &KeyPair) -> Arc<ServerConfig> {
        let builder = ServerConfigBuilder::new(self.temp.certificate().clone()).unwrap();
        Arc::new(builder.build(certificate, key).unwrap())
    }

    pub(crate) fn temp_ca(&self) -> GetTempCaCertResponse {
        GetTempCaCertResponse {
            temp_ca_cert: self.temp_pem.clone(),
            temp_ca_key: self.temp_key_pem.clone(),
            ca_cert: self.root_pem.clone(),
        }
    }

    pub(crate) fn meta(&self) -> GetMetaResponse {
        GetMetaResponse {
            ca_cert: self.root_pem.clone(),
            k256_pubkey: self.roots.k256_public_key().as_bytes().to_vec(),
            ..GetMetaResponse::default()
        }
    }

    pub(crate) fn app_keys(&self) -> AppKeyResponse {
        let key = self.roots.app_k256_key(&APP).unwrap();
        let signature = sign_app_key(&self.roots, &APP, &key.public_key().unwrap());
        let mut answer = AppKeyResponse::default();
        answer.ca_cert.clone_from(&self.root_pem);
        answer.disk_crypt_key = self.roots.disk_crypt_key(&APP, &InstanceId::NONE).unwrap().expose().to_vec();
        answer.env_crypt_key = self.roots.env_crypt_key(&APP).unwrap().expose().to_vec();
        answer.k256_key = key.expose().to_vec();
        answer.k256_signature = signature.as_bytes().to_vec();
        answer.gateway_app_id = "any".into();
        answer.os_image_hash = image_hash().to_vec();
        answer
    }
}

/// What the emulator's default registers hash to.
pub(crate) fn image_hash() -> [u8; 32] {
    let pcr = |byte| Pcr::new([byte; 48]);
    *os_image_hash(&pcr(0xa0), &pcr(0xa1), &pcr(0xa2)).as_bytes()
}

/// What a method is answered with.
#[derive(Clone)]
pub(crate) enum Answer {
    /// Status line, further headers, body; with its length.
    Http(&'static str, &'static str, Vec<u8>),
    /// These bytes, then silence.
    RawThenHang(Vec<u8>),
    /// The connection is closed without a word.
    Close,
}

impl Answer {
    /// Upstream's answer to a method it does not have.
    fn unknown(method: &str) -> Self {
        let body = format!("{{\n  \"error\": \"Service not found: {method}\"\n}}");
        Self::Http("400 Bad Request", "", body.into_bytes())
    }

    pub(crate) fn ok(message: &impl serde::Serialize) -> Self {
        Self::Http("200 OK", "", json::encode(message))
    }
}

/// A KMS's play.
pub(crate) struct Script {
    /// TLS of the first connection of each attempt (none yet), and of the second.
    pub(crate) tls: [Option<Arc<ServerConfig>>; 2],
    pub(crate) answers: HashMap<&'static str, Answer>,
    /// Answers of `GetAppKey` given first, one each.
    pub(crate) first_app_key_answers: Mutex<Vec<Answer>>,
}

impl Script {
    /// Plays an honest KMS.
    pub(crate) fn honest(authority: &Authority) -> Self {
        let tls = authority.tls(DOMAIN, now());
        Self {
            tls: [Some(Arc::clone(&tls)), Some(tls)],
            answers: HashMap::from([
                ("GetTempCaCert", Answer::ok(&authority.temp_ca())),
                ("GetMeta", Answer::ok(&authority.meta())),
                ("GetAppKey", Answer::ok(&authority.app_keys())),
            ]),
            first_app_key_answers: Mutex::default(),
        }
    }

    pub(crate) fn with(mut self, method: &'static str, answer: Answer) -> Self {
        self.answers.insert(method, answer);
        self
    }

    pub(crate) async fn start(self) -> Stage {
        let listener =
            Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap(), BindOptions::default()).await.unwrap();
        let endpoint = listener.endpoint().clone();
        let calls = Arc::new(Mutex::new(Vec::new()));
        let evidence = Arc::new(Mutex::new(Vec::new()));
        let (of_calls, of_evidence) = (Arc::clone(&calls), Arc::clone(&evidence));
        let script = Arc::new(self);
        let accepted = AtomicU32::new(0);
        let playing = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // Attempts make two connections, one after the other.
                let number = accepted.fetch_add(1, Ordering::SeqCst);
                let (script, calls, evidence) =
                    (Arc::clone(&script), Arc::clone(&calls), Arc::clone(&evidence));
                tokio::spawn(async move {
                    let number = usize::try_from(number % 2).unwrap();
                    let Some(tls) = script.tls[number].clone() else {
                        return script.serve(stream, &calls).await;
                    };
                    let Ok(tls) = TlsAcceptor::from(tls).accept(stream).await else { return };
                    if let Ok(Some(found)) = PeerEvidence::from_peer(tls.get_ref().1.peer_certificates()) {
                        evidence.lock().unwrap().push(found);
                    }
                    script.serve(tls, &calls).await;
                });
            }
        });
        Stage { endpoint, calls: of_calls, evidence: of_evidence, playing: playing.abort_handle() }
    }

    async fn serve<S: AsyncRead + AsyncWrite + Unpin>(&self, mut stream: S, calls: &Mutex<Vec<String>>) {
        while let Some(method) = read_call(&mut stream).await {
            calls.lock().unwrap().push(method.clone());
            let first =
                if method == "GetAppKey" { self.first_app_key_answers.lock().unwrap().pop() } else { None };
            let answer = first.or_else(|| self.answers.get(method.as_str()).cloned());
            let unknown = || Answer::unknown(&method);
            let written = match answer.unwrap_or_else(unknown) {
                Answer::Close => return,
                Answer::RawThenHang(bytes) => {
                    let _written = stream.write_all(&bytes).await;
                    let _flushed = stream.flush().await;
                    return std::future::pending().await;
                }
                Answer::Http(status, headers, body) => {
                    let length = body.len();
                    let head = format!("HTTP/1.1 {status}\r\n{headers}content-length: {length}\r\n\r\n");
                    stream.write_all(&[head.as_bytes(), &body].concat()).await
                }
            };
            if written.is_err() || stream.flush().await.is_err() {
                return;
            }
        }
    }
}

/// The method of the next call; `None` when the peer has gone.
async fn read_call<S: AsyncRead + Unpin>(stream: &mut S) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let head = String::from_utf8(head).ok()?;
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "))?.parse().ok()?;
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    let path = head.split(' ').nth(1)?;
    Some(path.strip_prefix("/prpc/")?.strip_suffix("?json")?.to_owned())
}

/// A running script, and what happened on it.
pub(crate) struct Stage {
    pub(crate) endpoint: Endpoint,
    calls: Arc<Mutex<Vec<String>>>,
    evidence: Arc<Mutex<Vec<PeerEvidence>>>,
    playing: tokio::task::AbortHandle,
}

impl Stage {
    /// Takes no more connections.
    pub(crate) fn stop(&self) {
        self.playing.abort();
    }

    pub(crate) fn url(&self) -> String {
        format!("https://{}", self.endpoint.to_string().strip_prefix("tcp:").unwrap())
    }

    pub(crate) fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }

    pub(crate) fn evidence(&self) -> Vec<PeerEvidence> {
        self.evidence.lock().unwrap().clone()
    }
}

/// An enclave: its module behind a socket.
pub(crate) struct Enclave {
    pub(crate) nsm: Arc<dyn Nsm>,
    pub(crate) root_pem: String,
    _dir: tempfile::TempDir,
    _stop: tokio_util::sync::DropGuard,
}

impl Enclave {
    pub(crate) async fn start(config: nsm_emulator::Config) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = Endpoint::unix(dir.path().join("nsm")).unwrap();
        let emulator = Emulator::new(config).unwrap();
        let root_pem = emulator.root_pem();
        let listener = Listener::bind(&socket, BindOptions::default()).await.unwrap();
        let stop = CancellationToken::new();
        tokio::spawn(nsm_emulator::serve(Arc::new(emulator), listener, stop.clone()));
        let nsm = socket.to_string().parse::<NsmSource>().unwrap().open().unwrap();
        Self { nsm, root_pem, _dir: dir, _stop: stop.drop_guard() }
    }

    /// Verifies a document as a KMS does, with this enclave's root.
    pub(crate) fn verify(&self, document: &[u8]) {
        let root = attestation::TrustAnchor::from_pem(&self.root_pem).unwrap();
        let now = UnixMillis::from_secs(now().as_secs());
        attestation::Verifier::new(root).verify(document, now).unwrap();
    }
}

/// A configuration for these replicas, with no pauses worth waiting for.
pub(crate) fn config(urls: &[String], trust: KmsTrust) -> GetKeys {
    GetKeys {
        kms_urls: urls.iter().map(|url| url.parse().unwrap()).collect(),
        app_id: APP,
        trust,
        sealed: SealedRelease::Prefer,
        proxy: Proxy::Direct,
        deadlines: Deadlines::default(),
        retry: Retry {
            attempts: 3,
            first_pause: Duration::from_millis(1),
            longest_pause: Duration::from_millis(1),
        },
        debug_mode: DebugMode::Refuse,
        max_clock_skew: Duration::from_secs(300),
        time: Arc::new(DefaultTimeProvider),
    }
}
