//! Bytes from one connection to another, both ways, with half-close, until one side has been silent for long.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};
use tokio::time::{Instant, sleep_until};
use transport::{Endpoint, Stream};

/// For the connection to the target.
const CONNECT: Duration = Duration::from_secs(5);
/// A connection on which nothing moved for so long is given up; its owner may be gone without a word.
pub(super) const IDLE: Duration = Duration::from_secs(3600);
/// For each direction.
const BUFFER: usize = 8 * 1024;

/// Connects to `target` and carries bytes until both sides are done.
pub(super) async fn relay(accepted: Stream, target: &Endpoint) -> io::Result<()> {
    let connected = target.connect(CONNECT).await.map_err(io::Error::other)?;
    carry(accepted, connected).await
}

pub(super) async fn carry(
    one: impl AsyncRead + AsyncWrite,
    other: impl AsyncRead + AsyncWrite,
) -> io::Result<()> {
    let activity = Activity::new();
    let (mut one_reads, mut one_writes) = split(one);
    let (mut other_reads, mut other_writes) = split(other);
    let both = async {
        tokio::try_join!(
            one_way(&mut one_reads, &mut other_writes, &activity),
            one_way(&mut other_reads, &mut one_writes, &activity),
        )
    };
    tokio::select! {
        carried = both => carried.map(drop),
        () = activity.silence() => Err(io::ErrorKind::TimedOut.into()),
    }
}

async fn one_way(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    activity: &Activity,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let len = from.read(&mut buffer).await?;
        activity.note();
        let Some(bytes) = buffer.get(..len).filter(|bytes| !bytes.is_empty()) else {
            return to.shutdown().await;
        };
        to.write_all(bytes).await?;
        activity.note();
    }
}

/// When something moved last, in milliseconds after the start.
struct Activity {
    start: Instant,
    last: AtomicU64,
}

impl Activity {
    fn new() -> Self {
        Self { start: Instant::now(), last: AtomicU64::new(0) }
    }

    fn note(&self) {
        let now = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(now, Ordering::Relaxed);
    }

    /// Returns when nothing moved for [`IDLE`].
    async fn silence(&self) {
        loop {
            let end = self.start + Duration::from_millis(self.last.load(Ordering::Relaxed)) + IDLE;
            if end <= Instant::now() {
                return;
            }
            sleep_until(end).await;
        }
    }
}
