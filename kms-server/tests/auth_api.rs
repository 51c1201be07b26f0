//! `auth-api` keeps upstream's contract, and our webhook understands it.

#![expect(clippy::unwrap_used, reason = "a test stops where something is wrong")]

mod common;

use std::process::Stdio;

use bytes::Bytes;
use common::{APP, DEADLINE, World};
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;
use transport::Endpoint;

/// The program, listening.
struct Service {
    _child: Child,
    endpoint: Endpoint,
    address: String,
}

impl Service {
    async fn start(arguments: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_kms-server"))
            .args(["auth-api", "--listen", "tcp:127.0.0.1:0"])
            .args(arguments)
            .env_remove("ETH_RPC_URL")
            .env_remove("KMS_CONTRACT_ADDR")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let line = timeout(DEADLINE, lines.next_line()).await.unwrap().unwrap().unwrap();
        let text = line.strip_prefix("listening on ").unwrap();
        let address = text.strip_prefix("tcp:").unwrap().to_owned();
        Self { _child: child, endpoint: text.parse().unwrap(), address }
    }

    async fn ask(&self, method: &str, path: &str, body: &str) -> (u16, serde_json::Value) {
        let exchange = async {
            let stream = self.endpoint.connect(DEADLINE).await.unwrap();
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
            tokio::spawn(connection);
            let request = Request::builder()
                .method(method)
                .uri(path)
                .header("host", &self.address)
                .body(Full::new(Bytes::copy_from_slice(body.as_bytes())))
                .unwrap();
            let response = sender.send_request(request).await.unwrap();
            let status = response.status().as_u16();
            (status, response.into_body().collect().await.unwrap().to_bytes())
        };
        let (status, body) = timeout(DEADLINE, exchange).await.unwrap();
        (status, serde_json::from_slice(&body).unwrap())
    }
}

/// The body that upstream's KMS was seen to send for an enclave (reference §13.7).
fn question(image: &str) -> String {
    format!(
        "{{\"teeVariant\":\"dstack-nitro-enclave\",\"mrAggregated\":\"{image}\",\"osImageHash\":\"{image}\",\
         \"mrSystem\":\"{image}\",\"appId\":\"{APP}\",\"composeHash\":\"{image}\",\"instanceId\":\"\",\
         \"deviceId\":\"de7d1b721a1e0632b7cf04edf5032c8ecffa9f9a08492152b926f1a5a7e765d7\",\
         \"keyProviderInfo\":\"\",\"tcbStatus\":\"\",\"advisoryIds\":[]}}"
    )
}

#[tokio::test]
async fn the_contract_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    common::policy(&directory);
    let policy = directory.path().join("policy.toml");
    let service = Service::start(&["--policy", policy.to_str().unwrap()]).await;
    let allowed = question(&hex::encode(common::image()));

    let (status, about) = service.ask("GET", "/", "").await;
    assert_eq!((status, &about["status"]), (200, &"ok".into()));
    for key in ["kmsContractAddr", "gatewayAppId", "appImplementation", "appAuthImplementation"] {
        assert!(about[key].is_string(), "{key}");
    }
    assert!(about["chainId"].is_u64());

    let (status, answer) = service.ask("POST", "/bootAuth/app", &allowed).await;
    let yes = serde_json::json!({ "isAllowed": true, "gatewayAppId": "", "reason": "" });
    assert_eq!((status, answer), (200, yes));
    let no = |reason: &str| serde_json::json!({ "isAllowed": false, "gatewayAppId": "", "reason": reason });
    let other = question(&"00".repeat(32));
    let (status, answer) = service.ask("POST", "/bootAuth/app", &other).await;
    assert_eq!((status, answer), (200, no("compose hash not allowed")));
    let (status, answer) = service.ask("POST", "/bootAuth/kms", &allowed).await;
    assert_eq!((status, answer), (200, no("the policy has no rules for a KMS")));

    let long = allowed.replace("\"tcbStatus\":\"\"", &format!("\"tcbStatus\":\"{}\"", "x".repeat(200)));
    let huge = "x".repeat(256 << 10);
    for (name, body) in [
        ("nothing", ""),
        ("no JSON", "no"),
        ("an empty object", "{}"),
        ("a long status", &long),
        ("a huge body", &huge),
    ] {
        let (status, answer) = service.ask("POST", "/bootAuth/app", body).await;
        assert_eq!((status, answer), (400, no("invalid authorization request")), "{name}");
    }
    for (method, path) in
        [("GET", "/bootAuth/app"), ("POST", "/"), ("POST", "/bootAuth"), ("PUT", "/bootAuth/app")]
    {
        assert_eq!(service.ask(method, path, &allowed).await.0, 404, "{method} {path}");
    }
}

#[tokio::test]
async fn our_kms_asks_it() {
    let directory = tempfile::tempdir().unwrap();
    common::policy(&directory);
    let policy = directory.path().join("policy.toml");
    let service = Service::start(&["--policy", policy.to_str().unwrap()]).await;
    let world =
        World::with(directory, &format!("core.auth_api.webhook.url = \"http://{}\"\n", service.address))
            .await;
    let certificate = world.certificate().await;
    assert_eq!(world.app_key(&certificate).await.status, 200);
}

/// An authoriser that knows a gateway, and says no.
async fn stern_backend() -> std::net::SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = vec![0; 4096];
            let length = stream.read(&mut head).await.unwrap();
            let body = match head[..length].starts_with(b"GET ") {
                true => {
                    r#"{"status":"ok","kmsContractAddr":"0x2","gatewayAppId":"gw","chainId":7,"appImplementation":"0x3"}"#
                }
                false => r#"{"isAllowed":false,"gatewayAppId":"gw","reason":"not today"}"#,
            };
            let head =
                format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
            stream.write_all([head.as_bytes(), body.as_bytes()].concat().as_slice()).await.unwrap();
        }
    });
    address
}

#[tokio::test]
async fn a_no_names_the_gateway_as_upstreams_service_does() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("auth.toml");
    let text = format!("[core.auth_api.webhook]\nurl = \"http://{}\"\n", stern_backend().await);
    std::fs::write(&config, text).unwrap();
    let service = Service::start(&["--config", config.to_str().unwrap()]).await;
    let described = async { while service.ask("GET", "/", "").await.0 != 200 {} };
    timeout(DEADLINE, described).await.unwrap();
    let (status, answer) = service.ask("POST", "/bootAuth/app", &question(&"00".repeat(32))).await;
    let no = serde_json::json!({ "isAllowed": false, "gatewayAppId": "gw", "reason": "not today" });
    assert_eq!((status, answer), (200, no));
}

#[tokio::test]
async fn a_backend_that_is_silent_is_told_from_a_no() {
    let nobody = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("auth.toml");
    let text = format!(
        "[core.auth_api.webhook]\nurl = \"http://{}\"\ntimeout = \"200ms\"\n",
        nobody.local_addr().unwrap()
    );
    std::fs::write(&config, text).unwrap();
    let service = Service::start(&["--config", config.to_str().unwrap()]).await;
    let (status, about) = service.ask("GET", "/", "").await;
    assert_eq!((status, &about["status"]), (503, &"error".into()));
    let (status, answer) = service.ask("POST", "/bootAuth/app", &question(&"00".repeat(32))).await;
    assert_eq!((status, &answer["isAllowed"]), (503, &false.into()));
    let reason = answer["reason"].as_str().unwrap();
    assert!(reason.starts_with("authorization backend unavailable: auth api http://127.0.0.1:"), "{reason}");
}
