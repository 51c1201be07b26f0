//! Messages arrive whole or not at all; heartbeats are answered.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use host_proxy::Options;
use host_proxy::config::{Config, Format, Kind, Receive, Service};
use host_proxy::limits::TunnelLimits;
use host_proxy::service::heartbeat::{BEAT, wait_for_boot};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use transport::delivery::{Answer, Header, Status};

use crate::support::{Rig, soon};

const MAX: u64 = 1 << 20;

struct Receiver {
    rig: Rig,
    path: PathBuf,
    folder: TempDir,
}

impl Receiver {
    async fn start(format: Format) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("app_keys.json");
        let kind = Kind::Receive(Receive { path: path.clone(), max_bytes: MAX, format });
        let tunnel = TunnelLimits { total: Some(Duration::from_secs(2)), ..TunnelLimits::default() };
        let listen = "tcp:127.0.0.1:0".parse().unwrap();
        let service = Service { name: "keys".into(), listen, cids: None, tunnel, kind };
        let rig = Rig::start(Config::new(vec![service]).unwrap(), Options::default()).await;
        Self { rig, path, folder }
    }

    /// Sends these bytes, ends the stream, and gives the answer.
    async fn send(&self, parts: &[&[u8]]) -> Vec<u8> {
        let mut stream = self.rig.dial().await;
        for part in parts {
            stream.write_all(part).await.unwrap();
        }
        stream.shutdown().await.unwrap();
        read_answer(stream).await
    }

    /// What lies beside the file: nothing, whatever was sent.
    fn leftovers(&self) -> usize {
        fs::read_dir(self.folder.path())
            .unwrap()
            .filter(|entry| entry.as_ref().unwrap().path() != self.path)
            .count()
    }
}

async fn read_answer(mut stream: TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    soon("the answer", stream.read_to_end(&mut bytes)).await.unwrap();
    bytes
}

#[tokio::test]
async fn a_whole_message_is_stored_and_acknowledged() {
    let mut receiver = Receiver::start(Format::Framed).await;
    let message = b"{\"app_key\":\"canary\"}".repeat(5000);
    let told = receiver.send(&[&Header::of(&message).encode(), &message]).await;
    assert_eq!(told, Answer { status: Status::Stored, digest: Header::of(&message).digest }.encode());
    assert_eq!(fs::read(&receiver.path).unwrap(), message);
    assert_eq!(fs::metadata(&receiver.path).unwrap().permissions().mode() & 0o777, 0o600);
    let outcome = receiver.rig.outcome().await;
    assert_eq!((outcome.end, outcome.up), ("finished", message.len() as u64));
    assert!(!format!("{outcome:?}").contains("canary"));
    // The next whole message takes its place.
    receiver.send(&[&Header::of(b"second").encode(), b"second"]).await;
    assert_eq!(fs::read(&receiver.path).unwrap(), b"second");
    assert_eq!(receiver.leftovers(), 0);
}

#[tokio::test]
async fn what_is_not_whole_is_not_stored() {
    let mut receiver = Receiver::start(Format::Framed).await;
    let head = Header::of(b"keys").encode();
    let mut other = Header::of(b"keys").encode();
    other[4] = 2;
    let long = Header::of(&vec![0; usize::try_from(MAX).unwrap() + 1]).encode();
    let refusal = |status| Answer { status, digest: [0; 32] }.encode().to_vec();
    type Case<'a> = (&'a [&'a [u8]], &'a str, Vec<u8>);
    let cases: [Case<'_>; 7] = [
        (&[], "probe", vec![]),
        (&[&head[..20]], "message-cut", vec![]),
        (&[&head], "message-cut", vec![]),
        (&[&head, b"key"], "message-cut", vec![]),
        (&[&head, b"sekk"], "digest-differs", refusal(Status::DigestDiffers)),
        (&[&other, b"keys"], "bad-header", refusal(Status::BadHeader)),
        (&[&long], "message-too-large", refusal(Status::BadLength)),
    ];
    for (parts, end, told) in cases {
        assert_eq!(receiver.send(parts).await, told, "{end}");
        assert_eq!(receiver.rig.outcome().await.end, end);
        assert!(!receiver.path.exists(), "{end}: something was stored");
    }
    assert_eq!(receiver.leftovers(), 0);
}

#[tokio::test]
async fn a_sender_that_dies_leaves_the_old_message() {
    let mut receiver = Receiver::start(Format::Framed).await;
    receiver.send(&[&Header::of(b"old").encode(), b"old"]).await;
    assert_eq!(receiver.rig.outcome().await.end, "finished");
    let mut dying = receiver.rig.dial().await;
    dying.write_all(&Header::of(b"newer").encode()).await.unwrap();
    dying.write_all(b"new").await.unwrap();
    // While it hangs, a second sender is served.
    receiver.send(&[&Header::of(b"second").encode(), b"second"]).await;
    assert_eq!(receiver.rig.outcome().await.end, "finished");
    dying.set_zero_linger().unwrap();
    drop(dying);
    assert_eq!(receiver.rig.outcome().await.end, "sender-reset");
    assert_eq!(fs::read(&receiver.path).unwrap(), b"second");
    assert_eq!(receiver.leftovers(), 0);
}

#[tokio::test]
async fn a_silent_sender_is_cut_off() {
    let mut receiver = Receiver::start(Format::Framed).await;
    let mut silent = receiver.rig.dial().await;
    silent.write_all(&Header::of(b"keys").encode()).await.unwrap();
    assert_eq!(receiver.rig.outcome().await.end, "message-timeout");
}

#[tokio::test]
async fn a_folder_that_is_gone_is_told_to_the_sender() {
    let mut receiver = Receiver::start(Format::Framed).await;
    fs::remove_dir_all(receiver.folder.path()).unwrap();
    let told = receiver.send(&[&Header::of(b"keys").encode(), b"keys"]).await;
    assert_eq!(told[5], Status::NotStored as u8);
    assert_eq!(receiver.rig.outcome().await.end, "not-stored");
}

#[tokio::test]
async fn the_unframed_form_ends_with_the_stream() {
    let mut receiver = Receiver::start(Format::Unframed).await;
    assert_eq!(receiver.send(&[]).await, b"");
    assert_eq!(receiver.rig.outcome().await.end, "probe");
    assert!(!receiver.path.exists());
    assert_eq!(receiver.send(&[b"{\"app_key\":", b"\"x\"}"]).await, b"");
    assert_eq!(receiver.rig.outcome().await.end, "finished");
    assert_eq!(fs::read(&receiver.path).unwrap(), b"{\"app_key\":\"x\"}");
    let long = vec![b'x'; usize::try_from(MAX).unwrap() + 1];
    let mut stream = receiver.rig.dial().await;
    // The receiver may close before all of it is sent.
    let _cut = stream.write_all(&long).await;
    assert_eq!(receiver.rig.outcome().await.end, "message-too-large");
    assert_eq!(fs::read(&receiver.path).unwrap(), b"{\"app_key\":\"x\"}");
}

#[tokio::test]
async fn a_heartbeat_is_answered_and_seen() {
    let listen = "tcp:127.0.0.1:0".parse().unwrap();
    let tunnel = TunnelLimits::default();
    let service = Service { name: "heartbeat".into(), listen, cids: None, tunnel, kind: Kind::Heartbeat };
    let mut rig = Rig::start(Config::new(vec![service]).unwrap(), Options::default()).await;
    let mut boots = rig.proxy.boots();
    let mut stream = rig.dial().await;
    stream.write_all(&[BEAT]).await.unwrap();
    assert_eq!(read_answer(stream).await, [BEAT]);
    soon("the boot", boots.changed()).await.unwrap();
    assert_eq!(rig.outcome().await.end, "finished");
    let mut stream = rig.dial().await;
    stream.write_all(&[0]).await.unwrap();
    // No answer; the close may be an end or a reset.
    assert!(matches!(soon("the close", stream.read(&mut [0])).await, Ok(0) | Err(_)));
    assert_eq!(rig.outcome().await.end, "bad-heartbeat");
}

#[tokio::test]
async fn waiting_for_a_boot_ends_with_the_heartbeat_or_with_the_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("9000.sock");
    let listen: transport::Endpoint = format!("unix:{}", path.display()).parse().unwrap();
    assert_eq!(wait_for_boot(&listen, None, Duration::from_millis(50)).await.unwrap(), None);
    let waiting = tokio::spawn({
        let listen = listen.clone();
        async move { wait_for_boot(&listen, None, Duration::from_secs(20)).await }
    });
    let beat = async {
        loop {
            // Until the listener is there.
            if let Ok(mut stream) = listen.connect(Duration::from_secs(1)).await {
                stream.write_all(&[BEAT]).await.unwrap();
                return stream.read_u8().await.unwrap();
            }
            tokio::task::yield_now().await;
        }
    };
    assert_eq!(soon("the beat", beat).await, BEAT);
    assert!(soon("the end", waiting).await.unwrap().unwrap().is_some());
}
