//! Requests that are wrong, large, slow or many.

use std::time::Duration;

use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::app::{App, exchange};

#[tokio::test]
async fn wrong_requests_have_a_status_and_a_reason() {
    let app = App::start().await;
    let cases: [(&str, &str, u16); 12] = [
        ("/GetKey", "{", 400),
        ("/GetKey", "null", 400),
        ("/GetKey", "[]", 400),
        ("/GetKey", r#"{"path":1}"#, 400),
        ("/GetKey", r#"{"path":"a","path":"b"}"#, 400),
        ("/GetKey", r#"{"algorithm":"rsa"}"#, 400),
        ("/GetQuote", r#"{"report_data":"abc"}"#, 400),
        ("/GetQuote", &json!({"report_data": "00".repeat(65)}).to_string(), 400),
        ("/Sign", r#"{"algorithm":"secp256k1_prehashed","data":"00"}"#, 400),
        ("/Verify", r#"{"algorithm":"ed25519"}"#, 400),
        ("/NoSuchCall", "{}", 404),
        ("/prpc/Worker.GetKey", "{}", 404),
    ];
    for (path, body, expected) in cases {
        let (status, answer) = app.post(path, "application/json", body.as_bytes()).await;
        assert_eq!(status, expected, "{path} {body}: {answer}");
        assert!(answer["error"].as_str().is_some_and(|reason| !reason.is_empty()), "{path} {body}: {answer}");
    }
    let (status, _) = app.raw(b"PUT /GetKey HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
    assert_eq!(status, 405);
    app.ask("GetKey", json!({})).await;
}

#[tokio::test]
async fn what_is_not_http_is_sent_away() {
    let app = App::start().await;
    let long_head = [b"GET / HTTP/1.1\r\nX: ".as_slice(), &[b'a'; 40_000]].concat();
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(100));
    let requests: [&[u8]; 6] = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\0\0\0\0\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /GetKey HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        &long_head,
        many.as_bytes(),
    ];
    for request in requests {
        let all = exchange(&app.socket, request).await;
        let start = String::from_utf8_lossy(&all[..all.len().min(12)]).into_owned();
        assert!(all.is_empty() || start.starts_with("HTTP/1.1 4"), "{start}");
    }
    app.ask("GetKey", json!({})).await;
}

#[tokio::test]
async fn large_bodies_are_refused_announced_or_not() {
    let app = App::start().await;
    let announced = b"POST /Sign?json HTTP/1.1\r\nContent-Length: 99999999999\r\nConnection: close\r\n\r\n";
    assert_eq!(app.raw(announced).await.0, 413);
    let mut chunked =
        b"POST /Sign?json HTTP/1.1\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n".to_vec();
    for _ in 0..5 {
        chunked.extend(b"10000\r\n");
        chunked.extend([b' '; 0x10000]);
        chunked.extend(b"\r\n");
    }
    assert_eq!(app.raw(&chunked).await.0, 413);
    app.ask("Sign", json!({"algorithm": "ed25519", "data": "00".repeat(100_000)})).await;
}

#[tokio::test]
async fn a_connection_ends_when_the_app_closes_its_half() {
    // The Node SDK closes its half after an answer and waits for the other.
    let app = App::start().await;
    let mut stream = UnixStream::connect(&app.socket).await.unwrap();
    let request = b"POST /Version HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}";
    stream.write_all(request).await.unwrap();
    let mut first = vec![0; 12];
    stream.read_exact(&mut first).await.unwrap();
    assert_eq!(first, b"HTTP/1.1 200");
    stream.shutdown().await.unwrap();
    let mut rest = Vec::new();
    tokio::time::timeout(Duration::from_secs(60), stream.read_to_end(&mut rest)).await.unwrap().unwrap();
}

#[tokio::test]
async fn one_connection_carries_many_requests() {
    let app = App::start().await;
    let one = "POST /Version HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n";
    let last = "POST /Version HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    let all = exchange(&app.socket, format!("{one}{one}{last}").as_bytes()).await;
    assert_eq!(String::from_utf8_lossy(&all).matches("HTTP/1.1 200 OK").count(), 3);
}

#[tokio::test]
async fn more_connections_than_are_served_wait_for_their_turn() {
    let app = App::start().await;
    let mut idle = Vec::new();
    for _ in 0..32 {
        let mut stream = UnixStream::connect(&app.socket).await.unwrap();
        let request = b"POST /Version HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n";
        stream.write_all(request).await.unwrap();
        stream.read_exact(&mut [0; 12]).await.unwrap();
        idle.push(stream);
    }
    let call = app.call("Version", json!({}));
    tokio::pin!(call);
    // It gets its turn when one of the others leaves, and not before.
    let early = futures_util::poll!(call.as_mut());
    assert!(early.is_pending());
    drop(idle.pop());
    assert_eq!(call.await.0, 200);
}

#[tokio::test(start_paused = true)]
async fn a_body_that_does_not_come_is_not_waited_for() {
    let app = App::start().await;
    let (status, _) = app
        .raw(b"POST /GetKey?json HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nConnection: close\r\n\r\n{")
        .await;
    assert_eq!(status, 408);
}

#[test]
fn any_body_gets_an_answer() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let app = runtime.block_on(App::start());
    // Without the calls that go to the KMS or use up registers.
    let methods =
        ["GetKey", "GetQuote", "Attest", "Sign", "Verify", "TdxQuote", "RawQuote", "DeriveK256Key", "Info"];
    let value = prop_oneof![
        any::<String>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[0-9a-f]{0,200}".prop_map(Value::from),
        Just(Value::Null),
    ];
    let name = prop::sample::select(vec![
        "path",
        "purpose",
        "algorithm",
        "data",
        "report_data",
        "signature",
        "public_key",
    ]);
    let object =
        prop::collection::hash_map(name, value, 0..5).prop_map(|fields| serde_json::to_vec(&fields).unwrap());
    let body = prop_oneof![object, prop::collection::vec(any::<u8>(), 0..200)];
    let input = (prop::sample::select(methods.to_vec()), body, any::<bool>());
    let config = ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |((method, body, json) in input)| {
        let content_type = if json { "application/json" } else { "application/octet-stream" };
        let (status, _) = runtime.block_on(app.post(&format!("/{method}"), content_type, &body));
        prop_assert!([200, 400].contains(&status), "{status}");
    });
}
