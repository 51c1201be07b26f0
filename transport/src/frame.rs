//! Frames: a `u32` big-endian length, then that many bytes.
//!
//! The reader names the largest payload it takes, and nothing is allocated for a larger one. A stream that ends
//! between two frames ends cleanly; one that ends inside a frame is an error.

use std::io::{self, Read, Write};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Bytes of the length in front of a payload.
const HEADER: usize = 4;

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The length is larger than the caller allows.
    #[error("a frame of {len} bytes, expected at most {max}")]
    TooLong {
        /// Announced or given length.
        len: usize,
        /// The caller's maximum.
        max: usize,
    },
    /// The stream failed or ended inside a frame.
    #[error("frame cut short")]
    Io(#[from] io::Error),
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Io(source) => source,
            Error::TooLong { .. } => Self::new(io::ErrorKind::InvalidData, error),
        }
    }
}

/// Reads one frame; `None` when the stream ends before its first byte.
///
/// # Errors
/// [`Error::TooLong`] when more than `max` bytes are announced, [`Error::Io`] when the stream fails or ends early.
pub fn read(from: &mut impl Read, max: usize) -> Result<Option<Vec<u8>>, Error> {
    let mut header = [0; HEADER];
    let mut have = 0;
    while have < HEADER {
        match from.read(&mut header[have..]) {
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(Error::Io(io::ErrorKind::UnexpectedEof.into())),
            Ok(n) => have += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::Io(error)),
        }
    }
    let mut payload = vec![0; payload_len(header, max)?];
    from.read_exact(&mut payload)?;
    Ok(Some(payload))
}

/// Writes one frame and flushes it.
///
/// # Errors
/// [`Error::TooLong`] when the payload has more than `max` bytes (nothing is written), [`Error::Io`] when the stream
/// fails.
pub fn write(to: &mut impl Write, payload: &[u8], max: usize) -> Result<(), Error> {
    to.write_all(&encode(payload, max)?)?;
    Ok(to.flush()?)
}

/// Reads one frame; `None` when the stream ends before its first byte. Not cancel safe: a dropped future loses what
/// it has read.
///
/// # Errors
/// As [`read`].
pub async fn read_async<R>(from: &mut R, max: usize) -> Result<Option<Vec<u8>>, Error>
where
    R: AsyncRead + Unpin + ?Sized,
{
    let mut header = [0; HEADER];
    let mut have = 0;
    while have < HEADER {
        match from.read(&mut header[have..]).await? {
            0 if have == 0 => return Ok(None),
            0 => return Err(Error::Io(io::ErrorKind::UnexpectedEof.into())),
            n => have += n,
        }
    }
    let mut payload = vec![0; payload_len(header, max)?];
    from.read_exact(&mut payload).await?;
    Ok(Some(payload))
}

/// Writes one frame and flushes it. Not cancel safe: a dropped future may leave half a frame.
///
/// # Errors
/// As [`write()`].
pub async fn write_async<W>(to: &mut W, payload: &[u8], max: usize) -> Result<(), Error>
where
    W: AsyncWrite + Unpin + ?Sized,
{
    to.write_all(&encode(payload, max)?).await?;
    Ok(to.flush().await?)
}

fn payload_len(header: [u8; HEADER], max: usize) -> Result<usize, Error> {
    let len = usize::try_from(u32::from_be_bytes(header)).unwrap_or(usize::MAX);
    if len > max {
        return Err(Error::TooLong { len, max });
    }
    Ok(len)
}

/// Header and payload in one buffer, so that a frame is one write and one packet.
fn encode(payload: &[u8], max: usize) -> Result<Vec<u8>, Error> {
    let len = payload.len();
    let header = u32::try_from(len).ok().filter(|_| len <= max).ok_or(Error::TooLong { len, max })?;
    let mut frame = Vec::with_capacity(HEADER + len);
    frame.extend_from_slice(&header.to_be_bytes());
    frame.extend_from_slice(payload);
    Ok(frame)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        write(&mut out, payload, usize::MAX).unwrap();
        out
    }

    #[test]
    fn a_frame_is_length_and_payload() {
        assert_eq!(frame(b"abc"), b"\0\0\0\x03abc");
        assert_eq!(frame(b""), b"\0\0\0\0");
    }

    #[test]
    fn a_long_frame_is_refused_before_it_is_allocated() {
        let mut input: &[u8] = &[0xff, 0xff, 0xff, 0xff, 1, 2, 3];
        assert!(matches!(read(&mut input, 3), Err(Error::TooLong { len: 0xffff_ffff, max: 3 })));
        assert!(matches!(write(&mut Vec::new(), b"abcd", 3), Err(Error::TooLong { len: 4, max: 3 })));
    }

    #[test]
    fn the_maximum_itself_is_taken() {
        let bytes = frame(b"abc");
        assert_eq!(read(&mut bytes.as_slice(), 3).unwrap().as_deref(), Some(&b"abc"[..]));
    }

    #[test]
    fn every_truncation_is_rejected() {
        let whole = frame(b"payload");
        for len in 1..whole.len() {
            let error = read(&mut &whole[..len], 16).expect_err("accepted a prefix");
            assert!(matches!(error, Error::Io(e) if e.kind() == io::ErrorKind::UnexpectedEof), "at {len}");
        }
        assert!(read(&mut &whole[..0], 16).unwrap().is_none());
    }

    #[tokio::test]
    async fn both_flavours_agree_on_every_truncation() {
        let whole = frame(b"payload");
        for len in 0..=whole.len() {
            let sync = read(&mut &whole[..len], 16).map_err(|e| io::Error::from(e).kind());
            let tokio = read_async(&mut &whole[..len], 16).await.map_err(|e| io::Error::from(e).kind());
            assert_eq!(sync, tokio, "at {len}");
        }
    }

    #[tokio::test]
    async fn frames_follow_each_other() {
        let (mut a, mut b) = tokio::io::duplex(8);
        let writer = async {
            write_async(&mut a, b"first", 64).await.unwrap();
            write_async(&mut a, b"", 64).await.unwrap();
            write_async(&mut a, &[7; 40], 64).await.unwrap();
            drop(a);
        };
        let reader = async {
            assert_eq!(read_async(&mut b, 64).await.unwrap().as_deref(), Some(&b"first"[..]));
            assert_eq!(read_async(&mut b, 64).await.unwrap().as_deref(), Some(&b""[..]));
            assert_eq!(read_async(&mut b, 64).await.unwrap().as_deref(), Some(&[7; 40][..]));
            assert!(read_async(&mut b, 64).await.unwrap().is_none());
        };
        tokio::join!(writer, reader);
    }

    proptest! {
        #[test]
        fn round_trip(payload in proptest::collection::vec(any::<u8>(), 0..300)) {
            let bytes = frame(&payload);
            prop_assert_eq!(read(&mut bytes.as_slice(), 300).unwrap(), Some(payload));
        }
    }
}
