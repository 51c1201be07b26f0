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

use crate::Daemon;

/// How a machine's KMS is set up, where that differs from the usual.
#[derive(Default)]
pub struct Setup<'a> {
    /// Its port; a free one when none is given.
    pub port: Option<u16>,
    /// A machine under whose root the evidence is.
    pub like: Option<&'a KmsMachine>,
    /// Settings of `core.auth_api`; a policy when none are given.
    pub authoriser: Option<&'a str>,
    /// More settings.
    pub more: &'a str,
}

/// A machine's KMS and what it needs there.
pub struct KmsMachine {
    agent: GuestAgent,
    emulator: Arc<Emulator>,
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
        let emulator = match setup.like {
            Some(machine) => machine.emulator.another(config),
            None => Emulator::new(config),
        };
        let emulator = Arc::new(emulator.expect("a module starts"));
        let agent = GuestAgent::start(Arc::clone(&emulator), app_id.parse().expect("an app id"));
        let directory = tempfile::tempdir().expect("a temporary directory");
        let port = setup.port.unwrap_or_else(free_port);
        let mut machine = Self { agent, emulator, kms: None, directory, port };
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
        let decoded = attestation::AttestationDocument::decode(&document(&self.emulator, &[0; 64]));
        hex::encode(decoded.expect("the module's documents are readable").os_image_hash().as_bytes())
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
        write(&self.path("root.pem"), &self.emulator.root_pem());
        let image = self.image_hash();
        write(
            &self.path("policy.toml"),
            &format!(
                "[apps.{}]\nimages = [\"{image}\"]\n\
                 [kms]\nimages = [\"{image}\"]\nmr_aggregated = [\"{image}\"]\nallow_any_device = true\n",
                crate::APP_ID
            ),
        );
        let trust = format!(
            "core.attestation.insecure_allow_external_trust_anchors = true\n\
             core.attestation.root_ca.aws_nitro_enclave = {:?}\n",
            self.path("root.pem")
        );
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
    fn start(emulator: Arc<Emulator>, app_id: AppId) -> Self {
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
                    () = serve(listener, emulator, app_id, held) => {}
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

async fn serve(listener: tokio::net::TcpListener, emulator: Arc<Emulator>, app_id: AppId, hold: Hold) {
    while let Ok((stream, _)) = listener.accept().await {
        let (emulator, hold) = (Arc::clone(&emulator), hold.clone());
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let (emulator, hold) = (Arc::clone(&emulator), hold.clone());
                async move { Ok::<_, Infallible>(respond(&emulator, app_id, &hold, request).await) }
            });
            // The client may hang up whenever it likes.
            let _ended = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn respond(
    emulator: &Emulator,
    app_id: AppId,
    hold: &Hold,
    request: Request<Incoming>,
) -> Response<Full<Bytes>> {
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
            format!("{{\"attestation\":\"{}\"}}", hex::encode(evidence(emulator, app_id, report_data)))
        }
        "/Info" => "{\"vm_config\":\"\",\"app_name\":\"kms\"}".to_owned(),
        other => panic!("the agent has no {other}"),
    };
    Response::new(Full::new(Bytes::from(answer)))
}

fn evidence(emulator: &Emulator, app_id: AppId, report_data: [u8; 64]) -> Vec<u8> {
    let document = document(emulator, &report_data);
    let decoded = attestation::AttestationDocument::decode(&document).expect("the module's own document");
    let hash = *decoded.os_image_hash().as_bytes();
    let attestation = Attestation::nitro(document, Some(&app_id), report_data, &hash);
    attestation.encode_v0().expect("a small attestation")
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
