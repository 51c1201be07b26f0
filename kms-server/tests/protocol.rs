//! What upstream's clients see: encodings, routes, errors, limits.

#![expect(clippy::unwrap_used, reason = "a test stops where something is wrong")]

mod common;

use common::{Ask, Told, World};
use kms_protocol::wire::{ErrorBody, GetMetaResponse, PublicKeyResponse};
use prost::Message as _;

fn protobuf_error(told: &Told) -> String {
    assert_eq!(told.content_type, "application/octet-stream");
    ErrorBody::decode(told.body.as_slice()).unwrap().error
}

#[tokio::test]
async fn names_and_verbs_choose_the_same_method() {
    let world = World::with_policy("").await;
    let first = world.post("/prpc/GetMeta?json", b"null").await;
    assert_eq!((first.status, first.content_type.as_str()), (200, "application/json"));
    let keys = [
        "ca_cert",
        "allow_any_upgrade",
        "k256_pubkey",
        "bootstrap_info",
        "is_dev",
        "gateway_app_id",
        "kms_contract_address",
        "chain_id",
        "app_auth_implementation",
    ];
    let text = String::from_utf8(first.body.clone()).unwrap();
    let positions = keys.map(|key| text.find(&format!("\"{key}\":")).unwrap());
    assert!(positions.is_sorted(), "{text}");
    assert!(first.json()["chain_id"].is_null() && first.json()["bootstrap_info"].is_null());

    for path in ["/prpc/KMS.GetMeta?json", "/prpc/KMS.KMS.GetMeta?json=1", "/prpc/GetMeta?json=true"] {
        // A method without a request never looks at the body.
        assert_eq!(world.post(path, b"{nonsense").await.body, first.body, "{path}");
    }
    assert_eq!(world.get("/prpc/GetMeta?anything=1").await.body, first.body);
    let head = Ask { verb: "HEAD", path: "/prpc/GetMeta", headers: &[], body: b"", certificate: None };
    assert_eq!(world.ask(head).await.unwrap().status, 200);

    for path in ["/prpc/GetMeta", "/prpc/GetMeta?json=0"] {
        let told = world.post(path, b"").await;
        assert_eq!(told.content_type, "application/octet-stream");
        let meta = GetMetaResponse::decode(told.body.as_slice()).unwrap();
        assert_eq!(meta.k256_pubkey, world.kms.k256_public_key());
    }
    let headers = [("content-type", "application/json; charset=utf-8")];
    let ask = Ask { verb: "POST", path: "/prpc/GetMeta", headers: &headers, body: b"", certificate: None };
    assert_eq!(world.ask(ask).await.unwrap().body, first.body);
}

#[tokio::test]
async fn messages_that_do_not_fit_are_refused_in_their_own_encoding() {
    let world = World::with_policy("").await;
    for (path, body, expected) in [
        ("/prpc/Kms.GetMeta?json", b"".as_slice(), "Service not found: Kms.GetMeta"),
        ("/prpc/KMS.Foo?json", b"", "Service not found: Foo"),
        // Methods of other services.
        ("/prpc/Bootstrap?json", b"", "Service not found: Bootstrap"),
        ("/prpc/GetKmsKey?json", b"{}", "No attestation provided"),
        ("/prpc/SignCert?json", b"{}", "Unsupported API version: 0"),
        ("/prpc/GetAppKey?json", br#"{"api_version":2}"#, "Unsupported API version: 2"),
        ("/prpc/GetAppKey?json", b"", "App not allowed: No attestation provided"),
        ("/prpc/GetAppKey?json", br#"{"api_version":1}"#, "App not allowed: No attestation provided"),
        ("/prpc/GetAppEnvEncryptPubKey?json", br#"{"app_id":"11"}"#, "app_id must be 20 bytes"),
        ("/prpc/GetAppEnvEncryptPubKey?json", b"{}", "app_id must be 20 bytes"),
    ] {
        let told = world.post(path, body).await;
        assert_eq!((told.status, told.error().as_str()), (400, expected), "{path}");
        assert_eq!(told.content_type, "application/json");
    }
    for (name, body) in [
        ("null", b"null".as_slice()),
        ("a number", b"1"),
        ("text", b"\"x\""),
        ("cut", br#"{"api_version":1"#),
        ("a wrong type", br#"{"api_version":"x"}"#),
        ("null in a field", br#"{"vm_config":null}"#),
        ("a negative number", br#"{"api_version":-1}"#),
        ("a number that is too large", br#"{"api_version":4294967296}"#),
        ("bytes after the end", b"{} {}"),
        ("not UTF-8", b"{\"vm_config\":\"\xff\"}"),
        ("deep", &b"[".repeat(100_000)),
    ] {
        let told = world.post("/prpc/GetAppKey?json", body).await;
        assert_eq!(told.status, 400, "{name}");
        assert!(!told.error().contains("attestation"), "{name} was accepted");
    }
    for (name, app_id) in
        [("odd", "\"123\""), ("base64", "\"ERERERERERERERERERERERERERE=\""), ("an array", "[17]")]
    {
        let body = format!("{{\"app_id\":{app_id}}}");
        let told = world.post("/prpc/GetAppEnvEncryptPubKey?json", body.as_bytes()).await;
        assert_eq!(told.status, 400, "{name}");
        assert_ne!(told.error(), "app_id must be 20 bytes", "{name}");
    }
    for (name, body) in [
        ("a cut varint", b"\xff\xff".as_slice()),
        ("a wrong wire type", b"\x0a\x01x"),
        ("a length past the end", b"\x12\x05x"),
    ] {
        let told = world.post("/prpc/GetAppKey", body).await;
        assert_eq!(told.status, 400, "{name}");
        assert!(!protobuf_error(&told).is_empty());
    }
    assert_eq!(protobuf_error(&world.post("/prpc/Foo", b"").await), "Service not found: Foo");
    let told = world.get("/prpc/GetAppEnvEncryptPubKey?app_id=11&app_id=22").await;
    assert_eq!(told.status, 400);
    assert!(!told.error().is_empty());
}

#[tokio::test]
async fn hex_is_read_in_every_form_upstream_reads() {
    let world = World::with_policy("").await;
    let expected = world.get(&format!("/prpc/GetAppEnvEncryptPubKey?app_id={}", common::APP)).await.json();
    for app_id in ["0x".to_owned() + &"11".repeat(20), "0x0x".to_owned() + &"11".repeat(20)] {
        let body = format!("{{\"app_id\":\"{app_id}\",\"unknown\":[1]}}");
        let told = world.post("/prpc/GetAppEnvEncryptPubKey?json", body.as_bytes()).await;
        assert_eq!(told.json()["public_key"], expected["public_key"], "{app_id}");
    }
    let body = [b"\x0a\x14".as_slice(), &[0x11; 20]].concat();
    let told = world.post("/prpc/GetAppEnvEncryptPubKey", &body).await;
    let answer = PublicKeyResponse::decode(told.body.as_slice()).unwrap();
    assert_eq!(hex::encode(answer.public_key), expected["public_key"].as_str().unwrap());
}

#[tokio::test]
async fn bodies_are_limited_and_early_errors_forget_the_content_type() {
    let world = World::with_policy("rpc.limits.GetAppKey = \"1KiB\"\n").await;
    let (fits, too_long) = (vec![b' '; 1024], vec![b' '; 1025]);
    let text = "failed to read data: payload too large";
    assert_eq!(world.post("/prpc/GetAppKey?json", &too_long).await.error(), text);
    assert_eq!(world.post("/prpc/KMS.GetAppKey?json", &too_long).await.error(), text);
    assert_eq!(
        world.post("/prpc/GetAppKey?json", &fits).await.error(),
        "App not allowed: No attestation provided"
    );
    let headers = [("content-type", "application/json")];
    let ask =
        |body| Ask { verb: "POST", path: "/prpc/GetAppKey", headers: &headers, body, certificate: None };
    assert_eq!(protobuf_error(&world.ask(ask(&too_long)).await.unwrap()), text);
    // Later ones do not.
    assert_eq!(world.ask(ask(&fits)).await.unwrap().error(), "App not allowed: No attestation provided");
    // Other methods have upstream's default of 10 MiB.
    assert_eq!(world.post("/prpc/GetMeta?json", &vec![0; 10 << 20]).await.status, 200);
    assert_eq!(world.post("/prpc/GetMeta?json", &vec![0; (10 << 20) + 1]).await.error(), text);
}

#[tokio::test]
async fn other_paths_and_verbs_are_not_found() {
    let world = World::with_policy("").await;
    for path in ["/", "/prpc", "/prpc/", "/prpc/GetMeta/", "/prpc/GetMeta/x", "/PRPC/GetMeta", "/finish"] {
        let told = world.get(path).await;
        assert_eq!((told.status, told.content_type.as_str()), (404, "text/html; charset=utf-8"), "{path}");
    }
    for verb in ["PUT", "DELETE", "OPTIONS", "BREW"] {
        let ask = Ask { verb, path: "/prpc/GetMeta?json", headers: &[], body: b"", certificate: None };
        assert_eq!(world.ask(ask).await.unwrap().status, 404, "{verb}");
    }
    let headers = [("accept", "application/json")];
    let ask = Ask { verb: "GET", path: "/", headers: &headers, body: b"", certificate: None };
    assert_eq!(world.ask(ask).await.unwrap().json()["error"]["code"], 404);
}

#[tokio::test]
async fn health_and_metrics_answer() {
    let world = World::with_policy("").await;
    let health = world.get("/health").await;
    assert_eq!((health.status, health.body.as_slice()), (200, b"OK".as_slice()));
    assert!(health.headers["x-app-version"].to_str().unwrap().starts_with('v'));
    assert_eq!(world.post("/prpc/KMS.GetAppKey?json", b"").await.status, 400);
    let metrics = String::from_utf8(world.get("/metrics").await.body).unwrap();
    for line in [
        "# TYPE dstack_kms_attestation_requests_total counter",
        "dstack_kms_attestation_requests_total 1",
        "dstack_kms_attestation_failures_total 1",
        "keyferry_kms_requests_total{method=\"GetAppKey\",status=\"400\"} 1",
        "keyferry_kms_refusals_total{reason=\"no-attestation\"} 1",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line}\n{metrics}");
    }
    let silent = World::with_policy("core.metrics.enabled = false\n").await;
    assert_eq!(silent.get("/metrics").await.status, 404);
}

#[tokio::test]
async fn http_2_is_served_where_the_client_asks_for_it() {
    let world = World::with_policy("").await;
    let stream = common::connect(&world.kms, None, &["h2"]).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(b"h2".as_slice()));
    let io = hyper_util::rt::TokioIo::new(stream);
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(hyper_util::rt::TokioExecutor::new(), io).await.unwrap();
    let driver = tokio::spawn(connection);
    let request = hyper::Request::post("https://localhost/prpc/GetMeta?json")
        .body(http_body_util::Full::new(bytes::Bytes::from_static(b"null")))
        .unwrap();
    assert_eq!(sender.send_request(request).await.unwrap().status(), 200);
    driver.abort();
}
