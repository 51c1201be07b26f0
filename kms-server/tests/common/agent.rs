//! A guest agent whose evidence comes from an emulated module, and a KMS that uses it.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use kms_protocol::AppId;
use kms_protocol::attestation_encoding::Attestation;
use nsm_emulator::Emulator;

/// The app id that a KMS has as a guest.
pub(crate) const KMS_APP: AppId = AppId::new([0x22; 20]);

/// A running agent.
pub(crate) struct Agent {
    pub(crate) address: String,
    /// What it answers instead, when set.
    pub(crate) instead: Arc<Mutex<Option<String>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Agent {
    /// Evidence of `emulator`, for everybody who asks.
    pub(crate) async fn start(emulator: Arc<Emulator>) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let instead: Arc<Mutex<Option<String>>> = Arc::default();
        let answer = Arc::clone(&instead);
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (emulator, answer) = (Arc::clone(&emulator), Arc::clone(&answer));
                let service = service_fn(move |request| {
                    let (emulator, answer) = (Arc::clone(&emulator), Arc::clone(&answer));
                    async move { Ok::<_, Infallible>(respond(&emulator, &answer, request).await) }
                });
                tokio::spawn(async move {
                    // The client may hang up whenever it likes.
                    let _ended = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Self { address, instead, task }
    }

    /// Settings that use it.
    pub(crate) fn settings(&self) -> String {
        format!("core.agent.address = \"{}\"\n", self.address)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn respond(
    emulator: &Emulator,
    instead: &Mutex<Option<String>>,
    request: Request<hyper::body::Incoming>,
) -> Response<Full<Bytes>> {
    let path = request.uri().path().to_owned();
    assert_eq!(request.uri().query(), Some("json"));
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let instead = instead.lock().unwrap().clone();
    let answer = match (path.as_str(), instead) {
        (_, Some(text)) => text,
        ("/Attest", None) => {
            let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
            let report_data: [u8; 64] =
                hex::decode(body["report_data"].as_str().unwrap()).unwrap().try_into().unwrap();
            format!("{{\"attestation\":\"{}\"}}", hex::encode(evidence(emulator, report_data)))
        }
        ("/Info", None) => {
            assert_eq!(body.as_ref(), b"null");
            "{\"vm_config\":\"\",\"app_name\":\"kms\"}".to_owned()
        }
        (other, None) => panic!("the agent has no {other}"),
    };
    Response::new(Full::new(Bytes::from(answer)))
}

/// What a KMS in an enclave shows.
pub(crate) fn evidence(emulator: &Emulator, report_data: [u8; 64]) -> Vec<u8> {
    let document = super::document(emulator, &report_data);
    let decoded = attestation::AttestationDocument::decode(&document).unwrap();
    let hash = *decoded.os_image_hash().as_bytes();
    Attestation::nitro(document, Some(&KMS_APP), report_data, &hash).encode_v0().unwrap()
}
