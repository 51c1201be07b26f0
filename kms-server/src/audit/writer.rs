//! Writes the log from one thread: what comes while it waits for the disk goes to the disk together.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::BufReader;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use attestation::UnixMillis;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};
use tracing::error;

use super::record::line;
use super::verify::{self, AuditError};
use super::{Event, Hash};

/// Lines that may wait for the disk; with more, whoever wants to write is refused.
const WAITING: usize = 1024;
/// How long a line may take to the disk.
const DEADLINE: Duration = Duration::from_secs(5);
/// Lines per second about strangers, who could otherwise fill the disk.
const STRANGERS: u32 = 20;

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The file cannot be opened or written.
    #[error("cannot write the audit log {}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Another server writes it.
    #[error("the audit log {} is written by another process", path.display())]
    Locked {
        /// Which.
        path: PathBuf,
    },
    /// What is there does not hold together.
    #[error("the audit log {} cannot be continued", path.display())]
    Broken {
        /// Which.
        path: PathBuf,
        /// Where.
        source: AuditError,
    },
}

/// The line is not on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the audit log cannot be written")]
pub(crate) struct NotWritten;

/// The log, for many writers.
pub(crate) struct Audit {
    lines: mpsc::Sender<Waiting>,
    clock: crate::Clock,
    strangers: Mutex<Allowance>,
}

struct Waiting {
    event: Event,
    time: UnixMillis,
    written: oneshot::Sender<()>,
}

/// What strangers may still cause to be written in this second.
struct Allowance {
    left: u32,
    since: Instant,
    suppressed: u64,
}

impl Audit {
    /// Opens the log, checks all of it, cuts off a line that was never finished, and writes a `start` line. Blocks.
    pub(crate) fn open(path: &Path, clock: crate::Clock) -> Result<Self, OpenError> {
        let io = |source| OpenError::Io { path: path.to_owned(), source };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(io)?;
        file.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => OpenError::Locked { path: path.to_owned() },
            TryLockError::Error(source) => io(source),
        })?;
        let read = |source| AuditError::Read { path: path.to_owned(), source };
        let summary = verify::walk(BufReader::new(&file), read)
            .map_err(|source| OpenError::Broken { path: path.to_owned(), source })?;
        let length = file.metadata().map_err(io)?.len() - summary.unfinished;
        file.set_len(length).map_err(io)?;
        let mut log = Log { file, length, torn: false, seq: summary.lines, head: summary.head };
        let cut = (summary.unfinished > 0).then_some(summary.unfinished);
        let start = Event::Start { version: env!("CARGO_PKG_VERSION"), cut };
        log.append([(&start, clock())]).map_err(io)?;
        if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
            File::open(directory).and_then(|directory| directory.sync_all()).map_err(io)?;
        }
        Self::start(log, clock).map_err(io)
    }

    fn start(log: Log, clock: crate::Clock) -> std::io::Result<Self> {
        let (lines, waiting) = mpsc::channel(WAITING);
        std::thread::Builder::new().name("audit".into()).spawn(move || log.run(waiting))?;
        let strangers = Mutex::new(Allowance { left: STRANGERS, since: Instant::now(), suppressed: 0 });
        Ok(Self { lines, clock, strangers })
    }

    /// A log on a file that takes nothing.
    #[cfg(test)]
    pub(crate) fn unwritable(path: &Path, clock: crate::Clock) -> Self {
        std::fs::write(path, "").unwrap();
        let file = File::open(path).unwrap();
        Self::start(Log { file, length: 0, torn: false, seq: 0, head: super::NO_HASH }, clock).unwrap()
    }

    /// Returns when the line is on disk. Cancel safe: the line may still be written.
    pub(crate) async fn write(&self, event: Event) -> Result<(), NotWritten> {
        let (written, done) = oneshot::channel();
        let time = (self.clock)();
        self.lines.try_send(Waiting { event, time, written }).map_err(|_| NotWritten)?;
        match timeout(DEADLINE, done).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(NotWritten),
        }
    }

    /// A refusal before anything was verified. Anybody can cause these, so only some a second are written, with the
    /// number of the others; and nobody waits for the disk.
    pub(crate) fn refused(&self, reason: &'static str, text: &str, peer: Option<String>) {
        let mut allowance = self.strangers.lock().unwrap_or_else(PoisonError::into_inner);
        if allowance.since.elapsed() >= Duration::from_secs(1) {
            (allowance.left, allowance.since) = (STRANGERS, Instant::now());
        }
        allowance.suppressed += 1;
        let Some(left) = allowance.left.checked_sub(1) else { return };
        allowance.left = left;
        let suppressed = allowance.suppressed - 1;
        let event = Event::Refused { reason, text: text.to_owned(), peer, suppressed };
        let (written, _) = oneshot::channel();
        if self.lines.try_send(Waiting { event, time: (self.clock)(), written }).is_ok() {
            allowance.suppressed = 0;
        }
    }
}

struct Log {
    file: File,
    /// Bytes that are known to be whole lines.
    length: u64,
    /// There may be more than that.
    torn: bool,
    seq: u64,
    head: Hash,
}

impl Log {
    fn run(mut self, mut waiting: mpsc::Receiver<Waiting>) {
        let mut batch = Vec::with_capacity(WAITING);
        while waiting.blocking_recv_many(&mut batch, WAITING) > 0 {
            match self.append(batch.iter().map(|it| (&it.event, it.time))) {
                Ok(()) => {
                    for it in batch.drain(..) {
                        // Whoever wanted to know may have gone.
                        let _gone = it.written.send(());
                    }
                }
                // Dropping the senders tells those who wait.
                Err(error) => {
                    error!(%error, lines = batch.len(), "cannot write the audit log; what it should hold is refused");
                    batch.clear();
                }
            }
        }
    }

    /// All of the lines, or none.
    fn append<'e>(
        &mut self,
        events: impl IntoIterator<Item = (&'e Event, UnixMillis)>,
    ) -> std::io::Result<()> {
        let (mut seq, mut head, mut bytes) = (self.seq, self.head, Vec::new());
        for (event, time) in events {
            seq += 1;
            let (line, hash) = line(seq, &head, time, event);
            head = hash;
            bytes.extend_from_slice(&line);
        }
        if self.torn {
            self.file.set_len(self.length)?;
        }
        self.torn = true;
        self.file.write_all_at(&bytes, self.length)?;
        self.file.sync_data()?;
        (self.seq, self.head, self.torn) = (seq, head, false);
        self.length += bytes.len() as u64;
        Ok(())
    }
}
