//! An app, and the service beside it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use enclave_agent::delivery::{Refresher, RingReader};
use enclave_agent::service::{Service, Settings, StartError};
use nsm_emulator::Config;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

use crate::support::{Answer, Authority, Enclave, Script, Stage, config};

pub(crate) const KMS: u8 = 7;

/// A running service and what it talks to.
pub(crate) struct App {
    pub(crate) authority: Authority,
    pub(crate) enclave: Enclave,
    pub(crate) keys: RingReader,
    pub(crate) refresher: Refresher,
    pub(crate) stage: Stage,
    pub(crate) socket: PathBuf,
    service: JoinHandle<()>,
    _dir: tempfile::TempDir,
}

impl Drop for App {
    fn drop(&mut self) {
        self.service.abort();
    }
}

impl App {
    pub(crate) async fn start() -> Self {
        Self::with(|_| {}, |script| script).await.unwrap_or_else(|error| panic!("{error}"))
    }

    /// A service with changed settings under a KMS with a changed script.
    pub(crate) async fn with(
        settings: impl FnOnce(&mut Settings),
        script: impl FnOnce(Script) -> Script,
    ) -> Result<Self, StartError> {
        let authority = Authority::new(KMS);
        let stage = script(Script::honest(&authority)).start().await;
        let enclave = Enclave::start(Config::default()).await;
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("dstack.sock");
        let mut wanted = Settings { sockets: vec![socket.clone()], ..Settings::default() };
        settings(&mut wanted);
        let fetch = config(&[stage.url()], authority.trust());
        let service = Service::start(wanted, fetch, Arc::clone(&enclave.nsm), &mut |_| {}).await?;
        let (keys, refresher) = (service.keys().clone(), service.refresher().clone());
        let service = tokio::spawn(async move { match service.run(|_| {}).await {} });
        Ok(Self { authority, enclave, keys, refresher, stage, socket, service, _dir: dir })
    }

    /// A call in JSON, as the SDKs make it.
    pub(crate) async fn call(&self, method: &str, body: Value) -> (u16, Value) {
        self.post(&format!("/{method}"), "application/json", body.to_string().as_bytes()).await
    }

    /// A call that must succeed.
    pub(crate) async fn ask(&self, method: &str, body: Value) -> Value {
        let (status, answer) = self.call(method, body).await;
        assert_eq!(status, 200, "{method}: {answer}");
        answer
    }

    pub(crate) async fn post(&self, path: &str, content_type: &str, body: &[u8]) -> (u16, Value) {
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n\
             Content-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        );
        let (status, body) = self.raw(&[head.as_bytes(), body].concat()).await;
        (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
    }

    /// Sends these bytes and reads until the service closes: status and body.
    pub(crate) async fn raw(&self, request: &[u8]) -> (u16, Vec<u8>) {
        answer(&exchange(&self.socket, request).await)
    }
}

/// All that comes back for these bytes until the service closes.
pub(crate) async fn exchange(socket: &Path, request: &[u8]) -> Vec<u8> {
    let mut stream = UnixStream::connect(socket).await.unwrap();
    // A service that refuses may close before it has read everything.
    let _cut = stream.write_all(request).await;
    let mut all = Vec::new();
    let reading = tokio::time::timeout(Duration::from_secs(120), stream.read_to_end(&mut all));
    let _reset = reading.await.expect("an answer and the end");
    all
}

/// Status and body of an answer.
pub(crate) fn answer(bytes: &[u8]) -> (u16, Vec<u8>) {
    let at = bytes.windows(4).position(|it| it == b"\r\n\r\n").unwrap_or_else(|| {
        panic!("no HTTP in {:?}", String::from_utf8_lossy(bytes));
    });
    let status = std::str::from_utf8(&bytes[9..12]).unwrap().parse().unwrap();
    (status, bytes[at + 4..].to_vec())
}

/// Bytes in a field.
pub(crate) fn hex_of(value: &Value) -> Vec<u8> {
    hex::decode(value.as_str().unwrap_or_else(|| panic!("{value} is no text"))).unwrap()
}

/// The honest answer of `GetAppKey` with another disk key.
pub(crate) fn other_keys(authority: &Authority) -> Answer {
    let mut keys = authority.app_keys();
    keys.disk_crypt_key = vec![9; 32];
    Answer::ok(&keys)
}
