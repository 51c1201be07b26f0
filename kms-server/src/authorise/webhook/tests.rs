use super::*;
use kms_protocol::wire::webhook::MAX_REASON;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Answers one connection with `answer`, after reading a request head, and hands the request over.
async fn service(answer: Vec<u8>) -> (Webhook, tokio::task::JoinHandle<String>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = WebhookUrl::parse(&format!("http://{}/auth", listener.local_addr().unwrap())).unwrap();
    let config = WebhookConfig { url, timeout: Duration::from_secs(10), root_ca: None };
    let task = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = vec![0; 4096];
        let length = stream.read(&mut request).await.unwrap();
        // The client may have hung up on an answer it does not want to read to the end.
        let _written = stream.write_all(&answer).await;
        request.truncate(length);
        String::from_utf8(request).unwrap()
    });
    (Webhook::new(config).unwrap(), task)
}

fn http(status: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

async fn decision(answer: Vec<u8>) -> Result<BootResponse, Refusal> {
    let (webhook, task) = service(answer).await;
    let answer = webhook.ask(Method::POST, BOOT_AUTH_APP, b"{}".to_vec()).await;
    task.await.unwrap();
    answer
}

#[tokio::test]
async fn the_contract_is_kept() {
    let (webhook, task) =
        service(http("200 OK", r#"{"isAllowed":true,"gatewayAppId":"0x1","reason":"","more":1}"#)).await;
    let answer: BootResponse = webhook.ask(Method::POST, BOOT_AUTH_APP, b"{}".to_vec()).await.unwrap();
    assert!(answer.is_allowed);
    assert_eq!(answer.gateway_app_id, "0x1");
    let request = task.await.unwrap().to_ascii_lowercase();
    assert!(request.starts_with("post /auth/bootauth/app http/1.1\r\n"), "{request}");
    assert!(request.contains("content-type: application/json\r\n"));
    assert!(request.contains("user-agent: dstack-kms/"));
}

#[tokio::test]
async fn description_is_asked_for_without_a_suffix() {
    let body =
        r#"{"status":"ok","kmsContractAddr":"0x2","gatewayAppId":"","chainId":7,"appImplementation":"0x3"}"#;
    let (webhook, task) = service(http("200 OK", body)).await;
    assert_eq!(webhook.describe().await.unwrap().unwrap().chain_id, 7);
    assert!(task.await.unwrap().starts_with("GET /auth/ HTTP/1.1\r\n"));
}

#[tokio::test]
async fn everything_else_refuses() {
    for (name, answer) in [
        (
            "a server error",
            http("500 Internal Server Error", r#"{"isAllowed":true,"gatewayAppId":"","reason":""}"#),
        ),
        ("a redirect", http("302 Found", "")),
        ("a missing key", http("200 OK", r#"{"isAllowed":true,"reason":""}"#)),
        ("a wrong type", http("200 OK", r#"{"isAllowed":"yes","gatewayAppId":"","reason":""}"#)),
        ("no JSON", http("200 OK", "yes")),
        ("nothing", Vec::new()),
        ("garbage", vec![0xff; 1000]),
        ("a cut answer", b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{".to_vec()),
        ("a huge answer", http("200 OK", &" ".repeat(1 << 20))),
    ] {
        assert!(matches!(decision(answer).await, Err(Refusal::Unavailable(_))), "{name}");
    }
}

#[tokio::test]
async fn reasons_of_any_length_and_character_are_cut_cleanly() {
    // Upstream dies when byte 512 of an answer falls inside a character.
    for (name, reason) in [
        ("long", "x".repeat(50_000)),
        ("multi-byte", "é☃𝄞".repeat(5_000)),
        ("offset", format!("x{}", "☃".repeat(9_000))),
    ] {
        let body = serde_json::json!({"isAllowed": false, "gatewayAppId": "", "reason": reason}).to_string();
        let answer = decision(http("200 OK", &body)).await.unwrap();
        let Refusal::Denied { reason } = Refusal::denied(&answer.reason) else { panic!("{name}") };
        assert!(reason.len() <= MAX_REASON && reason.len() > MAX_REASON - 4, "{name}: {}", reason.len());
        // The same in an error status.
        let Err(Refusal::Unavailable(text)) = decision(http("500 Oops", &body)).await else {
            panic!("{name}")
        };
        assert!(text.len() <= MAX_REASON, "{name}");
    }
    let Refusal::Denied { reason } = Refusal::denied("no\r\nforged: line\u{1b}[31m") else { panic!() };
    assert!(!reason.chars().any(char::is_control));
}

#[tokio::test]
async fn nobody_there_is_a_refusal() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = WebhookUrl::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
    drop(listener);
    let config = WebhookConfig { url, timeout: Duration::from_secs(10), root_ca: None };
    let webhook = Webhook::new(config).unwrap();
    let answer: Result<BootResponse, _> = webhook.ask(Method::POST, BOOT_AUTH_APP, Vec::new()).await;
    let Err(Refusal::Unavailable(text)) = answer else { panic!("answered") };
    assert!(text.contains("cannot be reached"), "{text}");
}

#[test]
fn urls_are_split_strictly() {
    let url = WebhookUrl::parse("https://[2001:db8::1]/a/secret").unwrap();
    assert!(url.is_https());
    // The path may be a capability.
    assert_eq!(url.name(), "https://[2001:db8::1]");
    assert_eq!(url.0.join("x").path, "/a/secret/x");
    for text in ["", "auth-api:8000", "ftp://x", "http://", "http://u:p@x", "http://x/?k=v", "/x"] {
        assert!(WebhookUrl::parse(text).is_err(), "{text:?}");
    }
}

#[test]
fn roots_that_are_none_are_errors() {
    let directory = tempfile::tempdir().unwrap();
    let empty = directory.path().join("empty.pem");
    std::fs::write(&empty, "").unwrap();
    assert!(matches!(roots(&empty), Err(TrustError::NoRoots { .. })));
    assert!(matches!(roots(&directory.path().join("absent")), Err(TrustError::Read { .. })));
}
