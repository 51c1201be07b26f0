//! Takes what an enclave delivers: one message per connection, whole or not at all.
//!
//! A framed message, numbers big endian:
//!
//! | offset | bytes | what |
//! | --- | --- | --- |
//! | 0 | 4 | the letters `KFMS` |
//! | 4 | 1 | version, 1 |
//! | 5 | 3 | zero |
//! | 8 | 8 | length of the message in bytes, 1 to the receiver's maximum |
//! | 16 | 32 | SHA-256 of the message |
//! | 48 | length | the message |
//!
//! and the receiver's answer of 40 bytes, after which it closes:
//!
//! | offset | bytes | what |
//! | --- | --- | --- |
//! | 0 | 4 | the letters `KFAK` |
//! | 4 | 1 | version, 1 |
//! | 5 | 1 | [`Status`] |
//! | 6 | 2 | zero |
//! | 8 | 32 | SHA-256 of the message, as received |
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
use zeroize::Zeroizing;

use super::within;
use crate::config::{Format, Receive};
use crate::limits::TunnelLimits;
use crate::record::Record;

/// First bytes of a framed message.
pub const MAGIC: [u8; 4] = *b"KFMS";
/// First bytes of the answer.
pub const ANSWER_MAGIC: [u8; 4] = *b"KFAK";
/// The only version there is.
pub const VERSION: u8 = 1;
/// Bytes in front of a framed message.
pub const HEADER_LEN: usize = 48;
/// Bytes of the answer.
pub const ANSWER_LEN: usize = 40;

/// Time for a whole message where the service has no total time.
const WHOLE_MESSAGE: Duration = Duration::from_secs(60);
/// Received at a time. Each chunk is wiped, and none is ever moved, as a growing buffer would be.
const CHUNK: usize = 64 << 10;

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Whole, and on disk.
    Stored = 0,
    /// Not a header of this version.
    BadHeader = 1,
    /// Longer than the receiver takes, or empty.
    BadLength = 2,
    /// The digest is another one: the message was damaged.
    DigestDiffers = 3,
    /// The receiver could not write its file.
    NotStored = 4,
}

/// The header for a message.
pub fn header(message: &[u8]) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    header[..4].copy_from_slice(&MAGIC);
    header[4] = VERSION;
    header[8..16].copy_from_slice(&(message.len() as u64).to_be_bytes());
    header[16..].copy_from_slice(&Sha256::digest(message));
    header
}

/// What a header announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Announced {
    /// Length of the message in bytes.
    pub len: u64,
    /// SHA-256 of the message.
    pub digest: [u8; 32],
}

/// Reads a header.
///
/// # Errors
/// [`Status::BadHeader`], or [`Status::BadLength`] when the length is zero or above `max`.
pub fn read_header(header: &[u8; HEADER_LEN], max: u64) -> Result<Announced, Status> {
    let ([magic @ .., _, _, _, _], rest) = header.split_first_chunk::<8>().ok_or(Status::BadHeader)?;
    if *magic != MAGIC || header[4..8] != [VERSION, 0, 0, 0] {
        return Err(Status::BadHeader);
    }
    let (len, digest) = rest.split_first_chunk::<8>().ok_or(Status::BadHeader)?;
    let len = u64::from_be_bytes(*len);
    if len == 0 || len > max {
        return Err(Status::BadLength);
    }
    Ok(Announced { len, digest: digest.try_into().map_err(|_| Status::BadHeader)? })
}

/// The answer's bytes.
pub fn answer(status: Status, digest: [u8; 32]) -> [u8; ANSWER_LEN] {
    let mut answer = [0; ANSWER_LEN];
    answer[..4].copy_from_slice(&ANSWER_MAGIC);
    answer[4] = VERSION;
    answer[5] = status as u8;
    answer[8..].copy_from_slice(&digest);
    answer
}

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
            stream.write_all(&answer(status, digest)).await?;
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
    let mut header = [0; HEADER_LEN];
    let got = fill(stream, &mut header).await.map_err(|error| gone(record, "sender-reset", error))?;
    if got == 0 {
        record.end = "probe";
        return Err(Cut::Gone);
    }
    if got < HEADER_LEN {
        return Err(gone(record, "message-cut", format!("{got} of {HEADER_LEN} header bytes")));
    }
    let announced = read_header(&header, receive.max_bytes).map_err(|status| {
        match status {
            Status::BadLength => {
                record.fail("message-too-large", format!("not 1 to {} bytes", receive.max_bytes));
            }
            _ => record.fail("bad-header", "not a framed message of version 1"),
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_as_it_is_written() {
        let header = header(b"keys");
        let announced = read_header(&header, 4).unwrap();
        assert_eq!(announced.len, 4);
        assert_eq!(announced.digest, <[u8; 32]>::from(Sha256::digest(b"keys")));
        assert_eq!(&header[..16], b"KFMS\x01\0\0\0\0\0\0\0\0\0\0\x04");
    }

    #[test]
    fn wrong_headers_are_named() {
        let with = |at: usize, byte: u8| {
            let mut header = header(b"keys");
            header[at] = byte;
            read_header(&header, 1 << 20)
        };
        assert_eq!(with(0, b'X'), Err(Status::BadHeader));
        assert_eq!(with(4, 2), Err(Status::BadHeader));
        assert_eq!(with(7, 1), Err(Status::BadHeader));
        assert_eq!(with(15, 0), Err(Status::BadLength));
        assert_eq!(with(8, 1), Err(Status::BadLength));
        assert_eq!(read_header(&header(b"keys"), 3), Err(Status::BadLength));
    }

    #[test]
    fn an_answer_has_the_documented_bytes() {
        let bytes = answer(Status::Stored, [7; 32]);
        assert_eq!(&bytes[..8], b"KFAK\x01\0\0\0");
        assert_eq!(bytes[8..], [7; 32]);
        assert_eq!(answer(Status::DigestDiffers, [0; 32])[5], 3);
    }
}
