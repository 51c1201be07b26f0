//! A KMS on a loopback port, an emulated module, and a client built from parts.

#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test program uses its part of this, and stops where something is wrong"
)]

pub(crate) mod agent;
pub(crate) mod browser;
pub(crate) mod machine;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use hyper_util::rt::TokioIo;
use kms_protocol::AppId;
use kms_protocol::attestation_encoding::Attestation;
use kms_protocol::report_data;
use kms_server::{Config, Server, ServerHandle};
use nsm_emulator::Emulator;
use ratls::UnixTime;
use ratls::client::{ClientConfigBuilder, PinnedRoot, ServerTrust};
use ratls::issue::{self, Ca, Certificate, KeyPair};
use rustls_pki_types::ServerName;
use transport::Endpoint;

pub(crate) const DEADLINE: Duration = Duration::from_secs(30);
pub(crate) const APP: AppId = AppId::new([0x11; 20]);

/// A KMS and what belongs to it.
pub(crate) struct World {
    pub(crate) kms: ServerHandle,
    pub(crate) emulator: Emulator,
    pub(crate) directory: tempfile::TempDir,
}

/// What a client sends and shows.
pub(crate) struct Ask<'a> {
    pub(crate) verb: &'a str,
    pub(crate) path: &'a str,
    pub(crate) headers: &'a [(&'a str, &'a str)],
    pub(crate) body: &'a [u8],
    pub(crate) certificate: Option<&'a (Certificate, KeyPair)>,
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Told {
    pub(crate) status: u16,
    pub(crate) content_type: String,
    pub(crate) headers: hyper::HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Told {
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&self.body)))
    }

    /// The text of an error body in JSON, whose form is checked too.
    pub(crate) fn error(&self) -> String {
        let text = self.json()["error"].as_str().unwrap_or_else(|| panic!("{self:?}")).to_owned();
        let expected = format!("{{\n  \"error\": {}\n}}", serde_json::to_string(&text).unwrap());
        assert_eq!(String::from_utf8_lossy(&self.body), expected);
        text
    }
}

/// Settings for a KMS in `directory` that trusts `emulator`'s root.
pub(crate) fn settings(directory: &tempfile::TempDir, emulator: &Emulator, more: &str) -> Config {
    let more = format!(
        "core.enforce_self_authorization = false\ncore.attest_rpc_cert = false\n\
         core.onboard.auto_bootstrap_domain = \"localhost\"\n{more}"
    );
    let text = settings_text(directory.path(), emulator, &more);
    Config::from_toml(&text).unwrap().0
}

/// The same for a KMS that says itself what it is and how it gets its keys.
pub(crate) fn settings_text(directory: &std::path::Path, emulator: &Emulator, more: &str) -> String {
    let root = directory.join("nitro-root.pem");
    std::fs::write(&root, emulator.root_pem()).unwrap();
    format!(
        "rpc.address = \"127.0.0.1\"\nrpc.port = 0\n\
         core.cert_dir = \"{}\"\n\
         core.attestation.insecure_allow_external_trust_anchors = true\n\
         core.attestation.root_ca.aws_nitro_enclave = \"{}\"\n\
         {more}",
        directory.join("certs").display(),
        root.display()
    )
}

/// Settings that name a policy which allows `emulator`'s image to be [`APP`].
pub(crate) fn policy(directory: &tempfile::TempDir) -> String {
    let file = directory.path().join("policy.toml");
    std::fs::write(&file, format!("[apps.{APP}]\nimages = [\"{}\"]\n", hex::encode(image()))).unwrap();
    format!("core.auth_api.type = \"policy\"\ncore.auth_api.policy.file = \"{}\"\n", file.display())
}

/// Hash of the default emulator's image.
pub(crate) fn image() -> [u8; 32] {
    let [zero, one, two] = [0xa0, 0xa1, 0xa2].map(|byte| attestation::Pcr::new([byte; 48]));
    *attestation::os_image_hash(&zero, &one, &two).as_bytes()
}

impl World {
    /// With the policy of [`policy`], and further settings.
    pub(crate) async fn with_policy(more: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let more = policy(&directory) + more;
        Self::with(directory, &more).await
    }

    pub(crate) async fn with(directory: tempfile::TempDir, more: &str) -> Self {
        let emulator = Emulator::new(nsm_emulator::Config::default()).unwrap();
        let kms = Server::start(settings(&directory, &emulator, more)).await.unwrap();
        Self { kms, emulator, directory }
    }

    /// Asks on a connection of its own.
    pub(crate) async fn ask(&self, ask: Ask<'_>) -> std::io::Result<Told> {
        ask_kms(&self.kms, ask).await
    }

    /// `POST` without a certificate.
    pub(crate) async fn post(&self, path: &str, body: &[u8]) -> Told {
        let ask = Ask { verb: "POST", path, headers: &[], body, certificate: None };
        self.ask(ask).await.unwrap()
    }

    /// `GET` without a certificate.
    pub(crate) async fn get(&self, path: &str) -> Told {
        let ask = Ask { verb: "GET", path, headers: &[], body: b"", certificate: None };
        self.ask(ask).await.unwrap()
    }

    /// `GetAppKey` in JSON with that certificate.
    pub(crate) async fn app_key(&self, certificate: &(Certificate, KeyPair)) -> Told {
        let ask = Ask {
            verb: "POST",
            path: "/prpc/GetAppKey?json",
            headers: &[],
            body: br#"{"api_version":1,"vm_config":""}"#,
            certificate: Some(certificate),
        };
        self.ask(ask).await.unwrap()
    }

    /// A temporary CA as a client gets it.
    pub(crate) async fn temp_ca(&self) -> Ca {
        let meta = self.post("/prpc/GetTempCaCert?json", b"null").await.json();
        let text = |key: &str| meta[key].as_str().unwrap().to_owned();
        Ca::from_pem("temp CA", &text("temp_ca_cert"), &text("temp_ca_key")).unwrap()
    }

    /// A certificate with evidence of this world's emulator.
    pub(crate) async fn certificate(&self) -> (Certificate, KeyPair) {
        self.certificate_with(&self.emulator, |attestation| attestation).await
    }

    /// A certificate with evidence of `emulator`, changed by `change`.
    pub(crate) async fn certificate_with(
        &self,
        emulator: &Emulator,
        change: impl FnOnce(Attestation) -> Attestation,
    ) -> (Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let report_data = report_data::ratls_cert(&key.spki_der());
        let document = document(emulator, &report_data);
        let decoded = attestation::AttestationDocument::decode(&document).unwrap();
        let hash = *decoded.os_image_hash().as_bytes();
        let attestation = change(Attestation::nitro(document, Some(&APP), report_data, &hash));
        let encoded = attestation.encode_v0().unwrap();
        (issue::client_certificate(&key, &encoded, Some(&self.temp_ca().await), now()).unwrap(), key)
    }
}

pub(crate) fn now() -> UnixTime {
    UnixTime::now()
}

/// A document of `emulator` with that user data.
pub(crate) fn document(emulator: &Emulator, user_data: &[u8; 64]) -> Vec<u8> {
    document_of(emulator, Some(user_data.to_vec()), None, None)
}

/// A document of `emulator` with these fields.
pub(crate) fn document_of(
    emulator: &Emulator,
    user_data: Option<Vec<u8>>,
    nonce: Option<Vec<u8>>,
    public_key: Option<Vec<u8>>,
) -> Vec<u8> {
    let mut request = b"\xa1\x6bAttestation\xa3".to_vec();
    for (name, value) in
        [(&b"\x69user_data"[..], user_data), (b"\x65nonce", nonce), (b"\x6apublic_key", public_key)]
    {
        request.extend(name);
        match value {
            None => request.push(0xf6),
            Some(value) => {
                request.push(0x59);
                request.extend(u16::try_from(value.len()).unwrap().to_be_bytes());
                request.extend(value);
            }
        }
    }
    let response = emulator.process(&request);
    let head = b"\xa1\x6bAttestation\xa1\x68document\x59";
    assert!(response.starts_with(head), "{response:02x?}");
    response[head.len() + 2..].to_vec()
}

/// Asks a KMS, which must show the certificate that its handle names.
pub(crate) async fn ask_kms(kms: &ServerHandle, ask: Ask<'_>) -> std::io::Result<Told> {
    tokio::time::timeout(DEADLINE, exchange(kms, ask)).await.unwrap()
}

/// A TLS connection to a KMS.
pub(crate) async fn connect(
    kms: &ServerHandle,
    certificate: Option<&(Certificate, KeyPair)>,
    alpn: &[&str],
) -> std::io::Result<tokio_rustls::client::TlsStream<transport::Stream>> {
    let trust = ServerTrust::pinned_root(PinnedRoot::from_pem(kms.root_ca_pem()).unwrap());
    let builder = ClientConfigBuilder::new(trust).with_alpn(alpn);
    let config = match certificate {
        Some((certificate, key)) => builder.build_with_certificate(certificate, key).unwrap(),
        None => builder.build().unwrap(),
    };
    let stream = raw(kms).await;
    let name = ServerName::try_from(kms.domain().to_owned()).unwrap();
    tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

/// A connection without TLS.
pub(crate) async fn raw(kms: &ServerHandle) -> transport::Stream {
    let endpoint: Endpoint = format!("tcp:{}", kms.address()).parse().unwrap();
    endpoint.connect(DEADLINE).await.unwrap()
}

async fn exchange(kms: &ServerHandle, ask: Ask<'_>) -> std::io::Result<Told> {
    let stream = connect(kms, ask.certificate, &["http/1.1"]).await?;
    converse(stream, kms.domain(), ask).await
}

async fn converse<S>(stream: S, host: &str, ask: Ask<'_>) -> std::io::Result<Told>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
{
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(std::io::Error::other)?;
    let driver = tokio::spawn(connection);
    let mut request = Request::builder().method(ask.verb).uri(ask.path).header("host", host);
    for (name, value) in ask.headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Full::new(Bytes::copy_from_slice(ask.body))).unwrap();
    let response = sender.send_request(request).await.map_err(std::io::Error::other)?;
    let (parts, body) = response.into_parts();
    let body = body.collect().await.map_err(std::io::Error::other)?.to_bytes().to_vec();
    driver.abort();
    let content_type = parts.headers.get("content-type").map(|value| value.to_str().unwrap().to_owned());
    Ok(Told {
        status: parts.status.as_u16(),
        content_type: content_type.unwrap_or_default(),
        headers: parts.headers,
        body,
    })
}

/// Asks over plain HTTP.
pub(crate) async fn ask_plain(address: std::net::SocketAddr, verb: &str, path: &str, body: &[u8]) -> Told {
    ask_plain_with(address, verb, path, &[], body).await
}

/// The same, with headers.
pub(crate) async fn ask_plain_with(
    address: std::net::SocketAddr,
    verb: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Told {
    let endpoint: Endpoint = format!("tcp:{address}").parse().unwrap();
    let stream = endpoint.connect(DEADLINE).await.unwrap();
    let ask = Ask { verb, path, headers, body, certificate: None };
    tokio::time::timeout(DEADLINE, converse(stream, "localhost", ask)).await.unwrap().unwrap()
}

/// `GET` without a certificate.
pub(crate) fn get(path: &str) -> Ask<'_> {
    Ask { verb: "GET", path, headers: &[], body: b"", certificate: None }
}
