//! The module behind a Unix socket.

#![expect(clippy::unwrap_used, reason = "a test stops where something is wrong")]

use std::sync::Arc;
use std::time::Duration;

use nsm_emulator::{Config, Emulator, MAX_REQUEST, MAX_RESPONSE, serve};
use tokio_util::sync::CancellationToken;
use transport::{BindOptions, Endpoint, Listener, Stream, frame};

const DEADLINE: Duration = Duration::from_secs(10);
const DESCRIBE: &[u8] = b"\x6bDescribeNSM";

struct Daemon {
    endpoint: Endpoint,
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<()>,
    _directory: tempfile::TempDir,
}

impl Daemon {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let endpoint: Endpoint =
            format!("unix:{}", directory.path().join("nsm.sock").display()).parse().unwrap();
        let listener = Listener::bind(&endpoint, BindOptions::default()).await.unwrap();
        let emulator = Arc::new(Emulator::new(Config::default()).unwrap());
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(serve(emulator, listener, shutdown.clone()));
        Self { endpoint, shutdown, task, _directory: directory }
    }

    async fn connect(&self) -> Stream {
        self.endpoint.connect(DEADLINE).await.unwrap()
    }
}

async fn ask(stream: &mut Stream, request: &[u8]) -> Vec<u8> {
    frame::write_async(stream, request, usize::MAX).await.unwrap();
    frame::read_async(stream, MAX_RESPONSE).await.unwrap().unwrap()
}

#[tokio::test]
async fn a_connection_carries_many_requests() {
    let daemon = Daemon::start().await;
    let mut stream = daemon.connect().await;
    let first = ask(&mut stream, DESCRIBE).await;
    assert!(first.starts_with(b"\xa1\x6bDescribeNSM"));
    assert_eq!(ask(&mut stream, b"").await, b"\xa1\x65Error\x6fInvalidArgument");
    assert_eq!(ask(&mut stream, DESCRIBE).await, first);
}

#[tokio::test]
async fn connections_share_the_registers() {
    let daemon = Daemon::start().await;
    let (mut one, mut other) = (daemon.connect().await, daemon.connect().await);
    assert_eq!(ask(&mut one, b"\xa1\x67LockPCR\xa1\x65index\x14").await, b"\x67LockPCR");
    assert_eq!(ask(&mut other, b"\xa1\x67LockPCR\xa1\x65index\x14").await, b"\xa1\x65Error\x6dReadOnlyIndex");
}

#[tokio::test]
async fn a_request_over_the_limit_is_answered_and_ends_the_connection() {
    let daemon = Daemon::start().await;
    let mut stream = daemon.connect().await;
    let response = ask(&mut stream, &vec![0; MAX_REQUEST + 1]).await;
    assert_eq!(response, b"\xa1\x65Error\x6dInputTooLarge");
    // Closed with the request unread, so the next read sees an end or a reset, never another answer.
    assert!(!matches!(frame::read_async(&mut stream, MAX_RESPONSE).await, Ok(Some(_))));
    // Others are not disturbed.
    assert!(ask(&mut daemon.connect().await, DESCRIBE).await.starts_with(b"\xa1"));
}

#[tokio::test]
async fn shutdown_ends_open_connections() {
    let daemon = Daemon::start().await;
    let mut stream = daemon.connect().await;
    assert!(!ask(&mut stream, DESCRIBE).await.is_empty());
    daemon.shutdown.cancel();
    tokio::time::timeout(DEADLINE, daemon.task).await.unwrap().unwrap();
    assert!(!matches!(frame::read_async(&mut stream, MAX_RESPONSE).await, Ok(Some(_))));
}
