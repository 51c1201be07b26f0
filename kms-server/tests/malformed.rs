//! Requests that are wrong in every way, over the wire: each gets an answer of the right form, none a panic, and the
//! server serves on. `KEYFERRY_MALFORMED` sets how many there are.

#![expect(clippy::unwrap_used, reason = "a test stops where something is wrong")]

mod common;

use std::time::Duration;

use common::World;
use kms_protocol::wire::ErrorBody;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Requests when nobody says otherwise.
const DEFAULT: u64 = 600;
const SEED: u64 = 0x6b65_7966_6572_7279;

/// `SplitMix64`: small, seeded, and good enough to choose between mistakes.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap()
    }

    fn pick<'a, T: ?Sized>(&mut self, choices: &[&'a T]) -> &'a T {
        choices[self.below(choices.len())]
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        (0..self.below(most + 1)).map(|_| self.next().to_le_bytes()[0]).collect()
    }
}

/// What a request asks for, as far as the answer's form depends on it.
struct Request {
    bytes: Vec<u8>,
    /// Whether the answer is JSON, protobuf, or either.
    json: Option<bool>,
    /// Whether HTTP itself is broken, so that the server may just hang up.
    broken: bool,
}

const METHODS: [&str; 9] = [
    "GetAppKey",
    "GetKmsKey",
    "SignCert",
    "GetAppEnvEncryptPubKey",
    "KMS.SignCert",
    "GetAppKeySealed",
    "GetChallenge",
    "Kms.GetMeta",
    "Onboard.Bootstrap",
];

const JSON_BODIES: [&str; 16] = [
    "null",
    "1",
    "\"x\"",
    "[]",
    "{",
    "{\"api_version\":}",
    "{\"api_version\":-1}",
    "{\"api_version\":4294967296}",
    "{\"api_version\":2}",
    "{\"api_version\":\"1\"}",
    "{\"vm_config\":null}",
    "{\"csr\":\"zz\"}",
    "{\"csr\":\"0\",\"signature\":\"00\"}",
    "{\"app_id\":\"1\"}",
    "{\"app_id\":[1]}",
    "{} {}",
];

fn request(random: &mut Random) -> Request {
    let method = random.pick(&METHODS).to_owned();
    let json = random.below(2) == 0;
    let mut body = match random.below(5) {
        0 => Vec::new(),
        1 => random.bytes(2048),
        // Never 20 bytes: that is an app id.
        2 if json => format!("{{\"app_id\":\"{}\"}}", hex::encode(random.bytes(19))).into_bytes(),
        3 if json => {
            let csr = hex::encode([b"\x44please sign cert:".as_slice(), &random.bytes(512)].concat());
            format!("{{\"api_version\":{},\"csr\":\"{csr}\",\"signature\":\"30\"}}", random.below(4))
                .into_bytes()
        }
        _ => random.pick(&JSON_BODIES).as_bytes().to_vec(),
    };
    // A request that is right by chance would not be malformed.
    if body.is_empty() || body == b"{}" {
        body = if json { b"[".to_vec() } else { b"\xff\xff".to_vec() };
    }
    let path = match random.below(6) {
        0 => format!("/prpc/{method}.{}", hex::encode(random.bytes(8))),
        1 => format!("/prpc/{}", "KMS.".repeat(random.below(40)) + "x"),
        _ => format!("/prpc/{method}"),
    };
    let query = if json { "?json" } else { "" };
    let (head, broken) = match random.below(12) {
        0 => (
            format!(
                "POST {path}{query} HTTP/1.1\r\nhost: \r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
                body.len()
            ),
            false,
        ),
        1 => (format!("POST {path}{query} HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n"), true),
        2 => (format!("POST {path}{query} HTTP/9.9\r\n\r\n"), true),
        3 => (
            format!(
                "POST {path}{query} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"
            ),
            true,
        ),
        4 => (format!("POST  {path}{query}\r\n\r\n"), true),
        5 => (
            format!(
                "POST {path}{query} HTTP/1.1\r\nconnection: close\r\nx: {}\r\n\r\n",
                "y".repeat(random.below(40_000))
            ),
            true,
        ),
        6 => (String::from_utf8_lossy(&random.bytes(200)).into_owned() + "\r\n\r\n", true),
        7 => (
            format!("GET {path}?app_id=1&app_id=%ff HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"),
            false,
        ),
        _ => (
            format!(
                "POST {path}{query} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
                body.len()
            ),
            false,
        ),
    };
    let is_get = head.starts_with("GET ");
    let sends_body = !is_get && !broken;
    let bytes = if sends_body { [head.as_bytes(), &body].concat() } else { head.into_bytes() };
    Request { bytes, json: Some(json || is_get).filter(|_| !broken), broken }
}

#[tokio::test]
async fn every_malformed_request_is_answered_in_its_form() {
    let count = std::env::var("KEYFERRY_MALFORMED").ok().map_or(DEFAULT, |text| text.parse().unwrap());
    let world =
        World::with_policy("core.server.header_timeout = \"2s\"\ncore.server.body_timeout = \"2s\"\n").await;
    let mut random = Random(SEED);
    let mut resident = None;
    for number in 0..count {
        let request = request(&mut random);
        let mut stream = common::connect(&world.kms, None, &["http/1.1"]).await.unwrap();
        // The server may have hung up on something that is no HTTP.
        let written = stream.write_all(&request.bytes).await;
        assert!(written.is_ok() || request.broken, "{number}");
        let mut answer = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(30), stream.read_to_end(&mut answer)).await;
        let read =
            read.unwrap_or_else(|_| panic!("{number} hangs: {:?}", String::from_utf8_lossy(&request.bytes)));
        assert!(read.is_ok() || request.broken, "{number}: {read:?}");
        if !(request.broken && answer.is_empty()) {
            check(number, &request, &answer);
        }
        if number == count / 2 {
            resident = Some(resident_kib());
        }
    }
    // Growth is looked for in the second half, when every buffer has been used.
    let (before, after) = (resident.unwrap(), resident_kib());
    println!("{count} requests; resident memory {before} KiB after half of them, {after} KiB at the end");
    assert!(after < before + 8 * 1024, "{before} KiB became {after} KiB");
    assert_eq!(world.get("/prpc/GetMeta").await.status, 200);
}

fn check(number: u64, request: &Request, answer: &[u8]) {
    let what = || {
        format!(
            "{number}: {:?} was answered {:?}",
            String::from_utf8_lossy(&request.bytes),
            String::from_utf8_lossy(answer)
        )
    };
    let head_end =
        answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap_or_else(|| panic!("{}", what()));
    let (head, body) = (std::str::from_utf8(&answer[..head_end]).unwrap(), &answer[head_end + 4..]);
    let status: u16 = head.split(' ').nth(1).unwrap().parse().unwrap();
    if request.broken {
        assert!((400..=505).contains(&status), "{}", what());
        return;
    }
    assert_eq!(status, 400, "{}", what());
    let text = ErrorBody::sniff(body).unwrap_or_else(|| panic!("{}", what()));
    assert!(!text.is_empty() && text.len() < 2048, "{}", what());
    if let Some(json) = request.json {
        let content_type = if json { "application/json" } else { "application/octet-stream" };
        assert!(head.to_ascii_lowercase().contains(content_type), "{}", what());
        assert_eq!(body.starts_with(b"{\n  \"error\": "), json, "{}", what());
    }
}

/// Memory of this process, which the server shares.
fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
