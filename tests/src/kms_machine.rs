//! What runs on a machine that a KMS is brought up on: a guest agent whose evidence comes from an emulated module, and a
//! KMS without keys.

use std::convert::Infallible;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use kms_protocol::AppId;
use kms_protocol::attestation_encoding::Attestation;
use nsm_emulator::Emulator;
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::{Notify, oneshot};

use crate::{Daemon, TdxHost};

/// How a machine's KMS is set up, where that differs from the usual.
#[derive(Default)]
pub struct Setup<'a> {
    /// Its port; a free one when none is given.
    pub port: Option<u16>,
    /// A machine under whose root the evidence is.
    pub like: Option<&'a KmsMachine>,
    /// The TDX host it runs on, and the hash of its compose; an enclave when none is given.
    pub tdx: Option<(Arc<TdxHost>, [u8; 32])>,
    /// Settings of `core.auth_api`; a policy when none are given.
    pub authoriser: Option<&'a str>,
    /// More settings.
    pub more: &'a str,
}

/// A machine's KMS and what it needs there.
pub struct KmsMachine {
    agent: GuestAgent,
    attester: Arc<Attester>,
    kms: Option<Daemon>,
    directory: TempDir,
    /// Where the KMS is reached.
    pub port: u16,
}

impl KmsMachine {
    /// Starts a KMS without keys whose guest is the app `app_id` (hex). Under the root of `like`, if given, so that the
    /// two know each other.
    ///
    /// # Panics
    /// When something does not start.
    #[must_use]
    pub fn start(app_id: &str, like: Option<&Self>) -> Self {
        Self::start_with(app_id, &Setup { like, ..Setup::default() })
    }

    /// Starts a KMS without keys that is set up in another way.
    ///
    /// # Panics
    /// When something does not start.
    #[must_use]
    pub fn start_with(app_id: &str, setup: &Setup<'_>) -> Self {
        let config = nsm_emulator::Config::default();
        let like = setup.like.map(|machine| machine.attester.as_ref());
        let attester = match (&setup.tdx, like) {
            (Some((host, compose_hash)), _) => Attester::Tdx(Arc::clone(host), *compose_hash),
            (None, Some(Attester::Nitro(emulator, _))) => Attester::nitro(emulator.another(config), app_id),
            (None, _) => Attester::nitro(Emulator::new(config), app_id),
        };
        let attester = Arc::new(attester);
        let agent = GuestAgent::start(Arc::clone(&attester));
        let directory = tempfile::tempdir().expect("a temporary directory");
        let port = setup.port.unwrap_or_else(free_port);
        let mut machine = Self { agent, attester, kms: None, directory, port };
        machine.write_settings(setup);
        machine.restart();
        machine
    }

    /// The token that the KMS asks those who set it up for.
    ///
    /// # Panics
    /// When it printed none.
    #[must_use]
    pub fn setup_token(&self) -> String {
        self.kms.as_ref().expect("the KMS runs").logged("setup token: ")
    }

    /// Hash of the image that the machine's evidence shows, hex.
    ///
    /// # Panics
    /// Never: the module signs.
    #[must_use]
    pub fn image_hash(&self) -> String {
        match self.attester.as_ref() {
            Attester::Nitro(emulator, _) => hex::encode(image_hash(&document(emulator, &[0; 64]))),
            Attester::Tdx(host, _) => host.image_hash(),
        }
    }

    /// The kind of evidence it gives.
    #[must_use]
    pub fn platform(&self) -> &'static str {
        match self.attester.as_ref() {
            Attester::Nitro(..) => "dstack-nitro-enclave",
            Attester::Tdx(..) => "dstack-tdx",
        }
    }

    /// Settings that name the root of the machine's evidence.
    #[must_use]
    pub fn trust(&self) -> PathBuf {
        self.path("trust.toml")
    }

    /// What holds the KMS's answer to `Bootstrap` back.
    #[must_use]
    pub fn hold(&self) -> &Hold {
        &self.agent.hold
    }

    /// Ends the KMS.
    pub fn stop(&mut self) {
        if let Some(kms) = self.kms.take() {
            kms.stop();
        }
    }

    /// Ends the KMS and starts it again.
    pub fn restart(&mut self) {
        self.stop();
        let settings = self.path("kms.toml").display().to_string();
        self.kms = Some(Daemon::start("kms-server", &["serve", "-c", &settings]));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write_settings(&self, setup: &Setup<'_>) {
        let image = self.image_hash();
        write(
            &self.path("policy.toml"),
            &format!(
                "[apps.{}]\nimages = [\"{image}\"]\n\
                 [kms]\nimages = [\"{image}\"]\nmr_aggregated = [\"{image}\"]\nallow_any_device = true\n",
                crate::APP_ID
            ),
        );
        let root = self.path("root.pem");
        let anchors = match self.attester.as_ref() {
            Attester::Nitro(emulator, _) => {
                write(&root, &emulator.root_pem());
                format!("core.attestation.root_ca.aws_nitro_enclave = {root:?}\n")
            }
            Attester::Tdx(host, _) => {
                let measurements = self.path("measurements.json");
                write(&root, host.root_pem());
                write(&measurements, &host.measurements());
                format!(
                    "core.attestation.root_ca.tdx = {root:?}\ncore.attestation.urls.pccs = {:?}\n\
                     core.image.tdx_measurements = {measurements:?}\n",
                    host.pccs()
                )
            }
        };
        let trust = format!("core.attestation.insecure_allow_external_trust_anchors = true\n{anchors}");
        write(&self.trust(), &trust);
        let policy = self.path("policy.toml");
        let policy = format!("core.auth_api.type = \"policy\"\ncore.auth_api.policy.file = {policy:?}\n");
        let authoriser = setup.authoriser.unwrap_or(&policy);
        let settings = format!(
            "rpc.address = \"127.0.0.1\"\nrpc.port = {}\ncore.cert_dir = {:?}\n\
             {authoriser}core.agent.address = \"http://{}\"\n{trust}{}",
            self.port,
            self.path("certs"),
            self.agent.address,
            setup.more,
        );
        write(&self.path("kms.toml"), &settings);
    }
}

/// A port that programs do not get by chance: below those that the kernel gives out, beginning at one of the test's
/// process, and each tried once.
///
/// # Panics
/// When a thousand of them are taken.
#[must_use]
pub fn free_port() -> u16 {
    static TRIED: AtomicU16 = AtomicU16::new(0);
    let start = u16::try_from(std::process::id() % 1_000).expect("below 1000") * 20;
    let free = std::iter::repeat_with(|| 12_000 + (start + TRIED.fetch_add(1, Ordering::Relaxed)) % 20_000)
        .take(1_000)
        .find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok());
    free.expect("one of many ports is free")
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).expect("a file in a directory of ours");
}

/// Holds evidence for new keys back, so that what happens then can be seen.
#[derive(Clone, Default)]
pub struct Hold {
    state: Arc<(Mutex<State>, Condvar)>,
    released: Arc<Notify>,
}

#[derive(Default)]
struct State {
    on: bool,
    holding: bool,
}

impl Hold {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.0.lock().expect("no holder of this lock panics")
    }

    /// From now on.
    pub fn on(&self) {
        self.state().on = true;
    }

    /// Waits until something is held back.
    ///
    /// # Panics
    /// When nothing is within `deadline`.
    pub fn wait(&self, deadline: Duration) {
        let held = self.state.1.wait_timeout_while(self.state(), deadline, |state| !state.holding);
        assert!(
            !held.expect("no holder of this lock panics").1.timed_out(),
            "no evidence for new keys is asked for"
        );
    }

    /// Lets it go, and everything after it.
    pub fn release(&self) {
        *self.state() = State::default();
        self.released.notify_one();
    }

    async fn pass(&self) {
        {
            let mut state = self.state();
            if !state.on {
                return;
            }
            state.holding = true;
        }
        self.state.1.notify_all();
        self.released.notified().await;
    }
}

/// The agent, on a port of its own. It ends when dropped.
struct GuestAgent {
    address: SocketAddr,
    hold: Hold,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl GuestAgent {
    fn start(attester: Arc<Attester>) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
        listener.set_nonblocking(true).expect("a socket can be made non-blocking");
        let address = listener.local_addr().expect("a listener has an address");
        let (stop, stopped) = oneshot::channel();
        let hold = Hold::default();
        let held = hold.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime starts").block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).expect("the listener is usable");
                tokio::select! {
                    () = serve(listener, attester, held) => {}
                    _ = stopped => {}
                }
            });
        });
        Self { address, hold, stop: Some(stop), thread: Some(thread) }
    }
}

impl Drop for GuestAgent {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // Fails only when the agent has ended already.
            let _ended = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

async fn serve(listener: tokio::net::TcpListener, attester: Arc<Attester>, hold: Hold) {
    while let Ok((stream, _)) = listener.accept().await {
        let (attester, hold) = (Arc::clone(&attester), hold.clone());
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let (attester, hold) = (Arc::clone(&attester), hold.clone());
                async move { Ok::<_, Infallible>(respond(&attester, &hold, request).await) }
            });
            // The client may hang up whenever it likes.
            let _ended = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn respond(attester: &Attester, hold: &Hold, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let path = request.uri().path().to_owned();
    let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let answer = match path.as_str() {
        "/Attest" => {
            let body: Value = serde_json::from_slice(&body).expect("a request in JSON");
            let mut report_data = [0; 64];
            let text = body["report_data"].as_str().expect("report data in hex");
            hex::decode_to_slice(text, &mut report_data).expect("64 bytes");
            // That of a bootstrap is a hash of 32 bytes and zeros; that of a local question is all zeros.
            if report_data[..32] != [0; 32] && report_data[32..] == [0; 32] {
                hold.pass().await;
            }
            format!("{{\"attestation\":\"{}\"}}", hex::encode(attester.evidence(report_data)))
        }
        "/Info" => "{\"vm_config\":\"\",\"app_name\":\"kms\"}".to_owned(),
        other => panic!("the agent has no {other}"),
    };
    Response::new(Full::new(Bytes::from(answer)))
}

/// What gives a machine its evidence.
enum Attester {
    /// An emulated module, for the app.
    Nitro(Arc<Emulator>, AppId),
    /// A TDX host, for a guest with this compose.
    Tdx(Arc<TdxHost>, [u8; 32]),
}

impl Attester {
    fn nitro<E: std::fmt::Debug>(emulator: Result<Emulator, E>, app_id: &str) -> Self {
        Self::Nitro(Arc::new(emulator.expect("a module starts")), app_id.parse().expect("an app id"))
    }

    fn evidence(&self, report_data: [u8; 64]) -> Vec<u8> {
        let attestation = match self {
            Self::Nitro(emulator, app_id) => {
                let document = document(emulator, &report_data);
                let hash = image_hash(&document);
                Attestation::nitro(document, Some(app_id), report_data, &hash)
            }
            Self::Tdx(host, compose_hash) => host.attestation(compose_hash, report_data),
        };
        attestation.encode_v0().expect("a small attestation")
    }
}

fn image_hash(document: &[u8]) -> [u8; 32] {
    let decoded = attestation::AttestationDocument::decode(document).expect("the module's own document");
    *decoded.os_image_hash().as_bytes()
}

/// A document of the module with that user data.
fn document(emulator: &Emulator, user_data: &[u8; 64]) -> Vec<u8> {
    let mut request = b"\xa1\x6bAttestation\xa3\x69user_data\x58\x40".to_vec();
    request.extend(user_data);
    request.extend(b"\x65nonce\xf6\x6apublic_key\xf6");
    let response = emulator.process(&request);
    let head = b"\xa1\x6bAttestation\xa1\x68document\x59";
    assert!(response.starts_with(head), "the module signs");
    response[head.len() + 2..].to_vec()
}
