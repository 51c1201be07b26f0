//! Takes what an enclave delivers: one message per connection, whole or not at all.
//!
//! The framed form is [`transport::delivery`].
//!
//! The file is replaced in one step and only by a message whose length and digest are right; it has mode 0600 and is on
//! disk before the answer says `Stored`. A connection that leaves without a byte changes nothing, nor does a second
//! sender that does not finish: each has a file of its own until it is whole. The content is never logged.
//!
//! The unframed form ends with the stream. It exists for senders that know no other; a transfer that was cut by a
//! clean close cannot be told from a whole one there, so it must be asked for.

use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::spawn_blocking;
use transport::Stream;
use transport::delivery::{Answer, Error, Header, Status};
use zeroize::Zeroizing;

use super::within;
use crate::config::{Format, Receive};
use crate::limits::TunnelLimits;
use crate::record::Record;

/// Time for a whole message where the service has no total time.
const WHOLE_MESSAGE: Duration = Duration::from_secs(60);
/// Received at a time. Each chunk is wiped, and none is ever moved, as a growing buffer would be.
const CHUNK: usize = 64 << 10;

pub(crate) async fn serve(mut stream: Stream, receive: &Receive, limits: &TunnelLimits, record: &mut Record) {
    let whole = limits.total.unwrap_or(WHOLE_MESSAGE);
    let taken = within(whole, async {
        match receive.format {
            Format::Framed => take_framed(&mut stream, receive, record).await,
            Format::Unframed => take_unframed(&mut stream, receive, record).await,
        }
    })
    .await;
    let (status, digest) = match taken {
        Some(Ok(message)) => store(message, receive.path.clone(), record).await,
        Some(Err(Cut::Said(status))) => (status, [0; 32]),
        Some(Err(Cut::Gone)) => return,
        None => return record.fail("message-timeout", format!("no whole message within {whole:?}")),
    };
    if receive.format == Format::Framed {
        // The file is what counts; a sender that left without waiting for the answer asked for no answer.
        let _left = within(limits.connect, async {
            stream.write_all(&Answer { status, digest }.encode()).await?;
            stream.shutdown().await
        })
        .await;
    }
}

/// A message in wiped chunks, and its digest.
struct Message {
    chunks: Vec<Zeroizing<Vec<u8>>>,
    digest: [u8; 32],
}

enum Cut {
    /// The sender is told.
    Said(Status),
    /// Nobody is left to tell.
    Gone,
}

async fn take_framed(stream: &mut Stream, receive: &Receive, record: &mut Record) -> Result<Message, Cut> {
    let mut header = [0; Header::LEN];
    let got = fill(stream, &mut header).await.map_err(|error| gone(record, "sender-reset", error))?;
    if got == 0 {
        record.end = "probe";
        return Err(Cut::Gone);
    }
    if got < Header::LEN {
        return Err(gone(record, "message-cut", format!("{got} of {} header bytes", Header::LEN)));
    }
    let announced = Header::decode(&header, receive.max_bytes).map_err(|error| {
        let (end, status) = match error {
            Error::BadLength { .. } => ("message-too-large", Status::BadLength),
            _ => ("bad-header", Status::BadHeader),
        };
        record.fail(end, error);
        Cut::Said(status)
    })?;
    let message = take(stream, announced.len, record).await?;
    let got: u64 = message.chunks.iter().map(|chunk| chunk.len() as u64).sum();
    if got < announced.len {
        return Err(gone(record, "message-cut", format!("{got} of {} bytes", announced.len)));
    }
    if message.digest != announced.digest {
        record.fail("digest-differs", "the message is not the one that was announced");
        return Err(Cut::Said(Status::DigestDiffers));
    }
    Ok(message)
}

async fn take_unframed(stream: &mut Stream, receive: &Receive, record: &mut Record) -> Result<Message, Cut> {
    // One byte more than allowed tells a message that is too long from one that just fits.
    let message = take(stream, receive.max_bytes.saturating_add(1), record).await?;
    let got: u64 = message.chunks.iter().map(|chunk| chunk.len() as u64).sum();
    if got == 0 {
        record.end = "probe";
        return Err(Cut::Gone);
    }
    if got > receive.max_bytes {
        return Err(gone(record, "message-too-large", format!("more than {} bytes", receive.max_bytes)));
    }
    Ok(message)
}

/// Reads up to `len` bytes, fewer when the stream ends before.
async fn take(stream: &mut Stream, len: u64, record: &mut Record) -> Result<Message, Cut> {
    let mut chunks = Vec::new();
    let mut hash = Sha256::new();
    let mut left = len;
    while left > 0 {
        let size = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        let mut chunk = Zeroizing::new(vec![0; size]);
        let got = fill(stream, &mut chunk).await.map_err(|error| gone(record, "sender-reset", error))?;
        chunk.truncate(got);
        hash.update(&*chunk);
        chunks.push(chunk);
        record.traffic.up += got as u64;
        left -= got as u64;
        if got < size {
            break;
        }
    }
    Ok(Message { chunks, digest: hash.finalize().into() })
}

fn gone(record: &mut Record, end: &'static str, detail: impl ToString) -> Cut {
    record.fail(end, detail);
    Cut::Gone
}

/// Reads until `buffer` is full or the stream ends; gives the bytes read.
async fn fill(stream: &mut Stream, buffer: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match stream.read(&mut buffer[got..]).await? {
            0 => break,
            n => got += n,
        }
    }
    Ok(got)
}

async fn store(message: Message, path: PathBuf, record: &mut Record) -> (Status, [u8; 32]) {
    let digest = message.digest;
    let written = spawn_blocking(move || replace(&path, &message)).await;
    match written.map_err(io::Error::other).flatten() {
        Ok(()) => {
            record.end = "finished";
            (Status::Stored, digest)
        }
        Err(error) => {
            record.fail("not-stored", error);
            (Status::NotStored, digest)
        }
    }
}

/// Writes a file beside `path`, brings it to disk and puts it in place.
fn replace(path: &Path, message: &Message) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut file = tempfile::Builder::new()
        .prefix(".receive-")
        .permissions(Permissions::from_mode(0o600))
        .tempfile_in(folder)?;
    for chunk in &message.chunks {
        file.write_all(chunk)?;
    }
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    File::open(folder)?.sync_all()
}
