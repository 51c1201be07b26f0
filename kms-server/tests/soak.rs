//! Polling, while the authoriser goes through everything that authorisers do: `GetMeta` never fails, `GetAppKey` is
//! answered or refused with a reason, memory stays.
//!
//! ```text
//! KEYFERRY_SOAK_SECONDS=1800 cargo nextest run -p kms-server --profile bench soak --no-capture
//! ```

#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test stops where something is wrong, and tells figures"
)]

mod common;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use common::{DEADLINE, World};
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use ratls::issue::{Certificate, KeyPair};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout, timeout_at};

/// Requests per second, of each kind.
const RATE: u32 = 50;
/// Connections that share the `GetAppKey` requests, so that those that wait fit into them.
const CONNECTIONS: usize = 8;
/// What may be resident more at the end than after the first phases.
const GROWTH: u64 = 16 << 20;

/// What the authoriser does for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Mood {
    Fine,
    Hangs,
    Refuses,
    Garbage,
    Gigabyte,
    Fails,
}

const CYCLE: [Mood; 10] = [
    Mood::Fine,
    Mood::Hangs,
    Mood::Fine,
    Mood::Refuses,
    Mood::Fine,
    Mood::Garbage,
    Mood::Fine,
    Mood::Gigabyte,
    Mood::Fine,
    Mood::Fails,
];

#[derive(Default)]
struct Tally {
    answered: usize,
    refused: usize,
    times: Vec<Duration>,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_the_authoriser_does_the_kms_answers() {
    let total = std::env::var("KEYFERRY_SOAK_SECONDS").map_or(60, |text| text.parse().unwrap());
    let cycles = (total / 300).max(1);
    let phase = Duration::from_secs(total / cycles) / 10;

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let directory = tempfile::tempdir().unwrap();
    let audit = directory.path().join("audit.jsonl");
    let settings = format!(
        "core.auth_api.webhook.url = \"http://{address}\"\ncore.auth_api.webhook.timeout = \"2s\"\n\
         core.audit.file = \"{}\"\n",
        audit.display()
    );
    let world = Arc::new(World::with(directory, &settings).await);
    let certificate = world.certificate().await;

    let mut settled = 0;
    let mut totals: BTreeMap<(&str, Mood), Tally> = BTreeMap::new();
    for cycle in 0..cycles {
        for (number, mood) in CYCLE.into_iter().enumerate() {
            let until = Instant::now() + phase;
            let authoriser = tokio::spawn(authoriser(address, mood, until));
            let meta = tokio::spawn(poll(Arc::clone(&world), None, "/prpc/GetMeta?json", "null", until));
            let body = r#"{"api_version":1,"vm_config":""}"#;
            let keys =
                poll(Arc::clone(&world), Some(&certificate), "/prpc/GetAppKey?json", body, until).await;
            let meta = meta.await.unwrap();
            authoriser.await.unwrap();
            assert!(meta.refused == 0 && meta.answered > 0, "{mood:?}: {} GetMeta failed", meta.refused);
            match mood {
                Mood::Fine => {
                    assert!(keys.answered > 0, "never recovered in phase {number} of cycle {cycle}")
                }
                _ => assert!(keys.refused > 0, "{mood:?} allowed everything"),
            }
            let resident = resident();
            eprintln!(
                "cycle {cycle} {mood:?}: GetMeta {}, GetAppKey {} answered {} refused, {} KiB resident",
                meta.answered,
                keys.answered,
                keys.refused,
                resident >> 10
            );
            for (name, tally) in [("GetMeta", meta), ("GetAppKey", keys)] {
                let sum = totals.entry((name, mood)).or_default();
                sum.answered += tally.answered;
                sum.refused += tally.refused;
                sum.times.extend(tally.times);
            }
            if cycle == 0 && number < CYCLE.len() / 2 {
                settled = settled.max(resident);
            }
            // What the figures above take is the driver's.
            let driver: usize =
                totals.values().map(|tally| tally.times.capacity() * size_of::<Duration>()).sum();
            assert!(
                resident < settled + GROWTH + driver as u64,
                "{resident} bytes resident, {settled} at first"
            );
        }
    }
    let decisions: usize = totals
        .iter()
        .filter(|((name, _), _)| *name == "GetAppKey")
        .map(|(_, tally)| tally.answered + tally.refused)
        .sum();
    for ((name, mood), tally) in totals {
        report(name, mood, tally);
    }
    let last = world.get("/health").await;
    assert_eq!(last.status, 200);
    // Everything that was decided is in the log: the first line says that it began.
    let summary = kms_server::audit::verify(&audit).unwrap();
    assert_eq!(summary.lines, 1 + decisions as u64);
}

/// Asks `RATE` times a second until `until`, and hears all answers.
async fn poll(
    world: Arc<World>,
    certificate: Option<&(Certificate, KeyPair)>,
    path: &'static str,
    body: &'static str,
    until: Instant,
) -> Tally {
    let mut senders = Vec::new();
    for _ in 0..CONNECTIONS {
        senders.push(sender(&world, certificate).await);
    }
    let next = AtomicUsize::new(0);
    let mut ticks = interval(Duration::from_secs(1) / RATE);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut open = JoinSet::new();
    while Instant::now() < until {
        ticks.tick().await;
        let (sender, _) = &senders[next.fetch_add(1, Ordering::Relaxed) % senders.len()];
        let mut sender = sender.clone();
        open.spawn(async move {
            let started = Instant::now();
            let request = Request::post(format!("https://localhost{path}"))
                .body(Full::new(Bytes::from_static(body.as_bytes())))
                .unwrap();
            let answer = async {
                let response = sender.send_request(request).await.unwrap();
                let status = response.status();
                let body = response.into_body().collect().await.unwrap().to_bytes();
                (status, serde_json::from_slice::<serde_json::Value>(&body).unwrap())
            };
            let (status, body) = timeout(DEADLINE, answer).await.expect("an answer, whatever it is");
            if status.is_success() {
                return (true, started.elapsed());
            }
            let reason = body["error"].as_str().unwrap();
            assert!(status == 400 || status == 503, "{status}: {reason}");
            assert!(!reason.is_empty());
            (false, started.elapsed())
        });
    }
    let mut tally = Tally::default();
    while let Some(ended) = open.join_next().await {
        let (answered, time) = ended.unwrap();
        *(if answered { &mut tally.answered } else { &mut tally.refused }) += 1;
        tally.times.push(time);
    }
    tally
}

type Sender = SendRequest<Full<Bytes>>;

async fn sender(
    world: &World,
    certificate: Option<&(Certificate, KeyPair)>,
) -> (Sender, JoinHandle<hyper::Result<()>>) {
    let stream = common::connect(&world.kms, certificate, &["h2"]).await.unwrap();
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    (sender, tokio::spawn(connection))
}

async fn authoriser(address: SocketAddr, mood: Mood, until: Instant) {
    if mood == Mood::Refuses {
        tokio::time::sleep_until(until).await;
        return;
    }
    let listener = TcpListener::bind(address).await.unwrap();
    let mut open = JoinSet::new();
    while let Ok(accepted) = timeout_at(until, listener.accept()).await {
        let (stream, _) = accepted.unwrap();
        open.spawn(async move {
            // The KMS hangs up on what it does not want to hear to the end.
            let _heard = timeout_at(until, behave(stream, mood)).await;
        });
    }
    drop(listener);
    while open.join_next().await.is_some() {}
}

async fn behave(mut stream: TcpStream, mood: Mood) -> std::io::Result<()> {
    let mut head = vec![0; 4096];
    let length = stream.read(&mut head).await?;
    let yes = r#"{"isAllowed":true,"gatewayAppId":"","reason":""}"#;
    let about =
        r#"{"status":"ok","kmsContractAddr":"0x2","gatewayAppId":"","chainId":7,"appImplementation":"0x3"}"#;
    let body = if head[..length].starts_with(b"GET ") { about } else { yes };
    match mood {
        Mood::Fine => stream.write_all(http("200 OK", body).as_bytes()).await,
        Mood::Fails => stream.write_all(http("500 Internal Server Error", body).as_bytes()).await,
        Mood::Garbage => stream.write_all(&[0xe2; 4096]).await,
        Mood::Gigabyte => {
            let size = 1_u64 << 30;
            stream.write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: {size}\r\n\r\n").as_bytes()).await?;
            let part = vec![b' '; 64 << 10];
            for _ in 0..size / part.len() as u64 {
                stream.write_all(&part).await?;
            }
            Ok(())
        }
        Mood::Hangs => std::future::pending().await,
        Mood::Refuses => unreachable!("nobody listens"),
    }
}

fn http(status: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

/// Bytes of this process in memory: the KMS, its clients and its authoriser.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    // 4 KiB everywhere that this runs.
    pages << 12
}

fn report(name: &str, mood: Mood, mut tally: Tally) {
    tally.times.sort_unstable();
    let at = |permille: usize| tally.times[(tally.times.len() - 1) * permille / 1000];
    eprintln!(
        "{name} while it is {mood:?}: {} answered, {} refused; p50 {:.2?}, p99 {:.2?}, longest {:.2?}",
        tally.answered,
        tally.refused,
        at(500),
        at(990),
        at(1000)
    );
}
