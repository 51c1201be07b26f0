//! One message from an enclave to its parent, whole or not at all.
//!
//! The sender connects, sends a header and the message, and waits for the answer. A message, numbers big endian:
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
//! | 8 | 32 | SHA-256 of the message as received; zero when none was |
//!
//! The length says where the message ends, so neither side needs a half-close: not every vsock device passes one on.
//! The digest finds damage and says which message an answer is about. It authenticates nobody: who may send is for the
//! receiver to decide by the peer's context id, and what may be sent in the clear is for the sender.
//!
//! ```
//! use transport::delivery::{Answer, Header, Status};
//!
//! let header = Header::of(b"{\"app_key\":...}");
//! assert_eq!(Header::decode(&header.encode(), 1 << 20)?, header);
//! let answer = Answer { status: Status::Stored, digest: header.digest };
//! assert_eq!(answer.encode().len(), Answer::LEN);
//! # Ok::<(), transport::delivery::Error>(())
//! ```

use std::io;

use sha2::{Digest, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

const MESSAGE_MAGIC: [u8; 4] = *b"KFMS";
const ANSWER_MAGIC: [u8; 4] = *b"KFAK";
const VERSION: u8 = 1;

/// Why a header or an answer was not taken, or a message not delivered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Not the fixed part of a message of this version.
    #[error("not the header of a message of version 1")]
    BadHeader,
    /// An empty message, or one that is longer than the receiver takes.
    #[error("a message of {len} bytes, expected 1 to {max}")]
    BadLength {
        /// Announced or given length in bytes.
        len: u64,
        /// The receiver's maximum in bytes.
        max: u64,
    },
    /// Not an answer of this version.
    #[error("not an answer of version 1 to a message")]
    BadAnswer,
    /// The receiver did not take the message.
    #[error("the receiver answered: {0}")]
    Refused(Status),
    /// The receiver says that it stored something else.
    #[error("the receiver stored another message than the one that was sent")]
    OtherStored,
    /// The connection failed or ended before the answer: whether the message was stored is not known.
    #[error("no whole answer to the message")]
    Io(#[from] io::Error),
}

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

impl Status {
    const ALL: [Self; 5] =
        [Self::Stored, Self::BadHeader, Self::BadLength, Self::DigestDiffers, Self::NotStored];

    fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|status| *status as u8 == byte)
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Stored => "stored",
            Self::BadHeader => "not a message it understands",
            Self::BadLength => "a length it does not take",
            Self::DigestDiffers => "damaged on the way",
            Self::NotStored => "could not be written",
        })
    }
}

/// What stands in front of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Length of the message in bytes.
    pub len: u64,
    /// SHA-256 of the message.
    pub digest: [u8; 32],
}

impl Header {
    /// Bytes of an encoded header.
    pub const LEN: usize = 48;

    /// The header for this message.
    pub fn of(message: &[u8]) -> Self {
        Self { len: message.len() as u64, digest: Sha256::digest(message).into() }
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..4].copy_from_slice(&MESSAGE_MAGIC);
        bytes[4] = VERSION;
        bytes[8..16].copy_from_slice(&self.len.to_be_bytes());
        bytes[16..].copy_from_slice(&self.digest);
        bytes
    }

    /// Reads a header; nothing may follow it in `bytes`.
    ///
    /// # Errors
    /// [`Error::BadHeader`], or [`Error::BadLength`] when the length is zero or above `max`.
    pub fn decode(bytes: &[u8], max: u64) -> Result<Self, Error> {
        let (start, rest) = bytes.split_first_chunk().ok_or(Error::BadHeader)?;
        let (len, digest) = rest.split_first_chunk().ok_or(Error::BadHeader)?;
        let digest = digest.try_into().map_err(|_| Error::BadHeader)?;
        if *start != prefix(MESSAGE_MAGIC, 0) {
            return Err(Error::BadHeader);
        }
        let len = u64::from_be_bytes(*len);
        if len == 0 || len > max {
            return Err(Error::BadLength { len, max });
        }
        Ok(Self { len, digest })
    }
}

/// The receiver's last word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// What became of the message.
    pub status: Status,
    /// SHA-256 of the message as received; zero when none was.
    pub digest: [u8; 32],
}

impl Answer {
    /// Bytes of an encoded answer.
    pub const LEN: usize = 40;

    /// The answer's bytes.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..8].copy_from_slice(&prefix(ANSWER_MAGIC, self.status as u8));
        bytes[8..].copy_from_slice(&self.digest);
        bytes
    }

    /// Reads an answer; nothing may follow it in `bytes`.
    ///
    /// # Errors
    /// [`Error::BadAnswer`].
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let (start, digest) = bytes.split_first_chunk::<8>().ok_or(Error::BadAnswer)?;
        let digest = digest.try_into().map_err(|_| Error::BadAnswer)?;
        let status = Status::from_byte(start[5]).ok_or(Error::BadAnswer)?;
        if *start != prefix(ANSWER_MAGIC, status as u8) {
            return Err(Error::BadAnswer);
        }
        Ok(Self { status, digest })
    }
}

/// Sends a message and waits until the receiver says that exactly this one is stored. The caller holds the deadline.
/// Not cancel safe: a dropped future leaves half a message, which the receiver throws away.
///
/// # Errors
/// [`Error::BadLength`] for an empty message (nothing is sent), [`Error::Refused`], [`Error::OtherStored`],
/// [`Error::BadAnswer`], or [`Error::Io`] when the connection fails or ends early.
pub async fn send<S>(stream: &mut S, message: &[u8]) -> Result<(), Error>
where
    S: AsyncRead + AsyncWrite + Unpin + ?Sized,
{
    let header = Header::of(message);
    if header.len == 0 {
        return Err(Error::BadLength { len: 0, max: u64::MAX });
    }
    let sent = async {
        // Two writes: a copy of the message in one buffer would be a copy of what may be secret.
        stream.write_all(&header.encode()).await?;
        stream.write_all(message).await?;
        stream.flush().await
    };
    let sent = sent.await;
    let mut answer = [0; Answer::LEN];
    // A receiver that refuses the header answers and closes while the message is still being written; its reason
    // says more than the broken pipe.
    match (stream.read_exact(&mut answer).await, sent) {
        (Ok(_), _) => {}
        (Err(_), Err(error)) | (Err(error), Ok(())) => return Err(Error::Io(error)),
    }
    match Answer::decode(&answer)? {
        Answer { status: Status::Stored, digest } if digest == header.digest => Ok(()),
        Answer { status: Status::Stored, .. } => Err(Error::OtherStored),
        Answer { status, .. } => Err(Error::Refused(status)),
    }
}

/// The first eight bytes of either form.
fn prefix(magic: [u8; 4], status: u8) -> [u8; 8] {
    let [a, b, c, d] = magic;
    [a, b, c, d, VERSION, status, 0, 0]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAX: u64 = 1 << 20;

    #[test]
    fn the_bytes_are_the_documented_ones() {
        let header = Header::of(b"keys").encode();
        assert_eq!(&header[..16], b"KFMS\x01\0\0\0\0\0\0\0\0\0\0\x04");
        assert_eq!(header[16..], *Sha256::digest(b"keys"));
        let answer = Answer { status: Status::DigestDiffers, digest: [7; 32] }.encode();
        assert_eq!(&answer[..8], b"KFAK\x01\x03\0\0");
        assert_eq!(answer[8..], [7; 32]);
    }

    #[test]
    fn wrong_headers_are_named() {
        let with = |at: usize, byte: u8| {
            let mut header = Header::of(b"keys").encode();
            header[at] = byte;
            Header::decode(&header, MAX).unwrap_err()
        };
        for (at, byte) in [(0, b'X'), (3, 0), (4, 0), (4, 2), (5, 1), (6, 1), (7, 1)] {
            assert!(matches!(with(at, byte), Error::BadHeader), "byte {at} is {byte}");
        }
        assert!(matches!(with(15, 0), Error::BadLength { len: 0, max: MAX }));
        assert!(matches!(with(8, 1), Error::BadLength { len: 0x0100_0000_0000_0004, .. }));
        let header = Header::of(b"keys").encode();
        assert!(matches!(Header::decode(&header, 3), Err(Error::BadLength { len: 4, max: 3 })));
        assert!(Header::decode(&header, 4).is_ok());
    }

    #[test]
    fn wrong_answers_are_refused() {
        let good = Answer { status: Status::Stored, digest: [7; 32] }.encode();
        for (at, byte) in [(0, b'X'), (4, 0), (4, 2), (5, 5), (5, 0xff), (6, 1), (7, 1)] {
            let mut answer = good;
            answer[at] = byte;
            assert!(matches!(Answer::decode(&answer), Err(Error::BadAnswer)), "byte {at} is {byte}");
        }
    }

    #[test]
    fn every_truncation_is_rejected_and_so_is_a_byte_more() {
        let mut header = Header::of(b"keys").encode().to_vec();
        let mut answer = Answer { status: Status::Stored, digest: [7; 32] }.encode().to_vec();
        for len in 0..header.len() {
            assert!(matches!(Header::decode(&header[..len], MAX), Err(Error::BadHeader)), "{len} bytes");
        }
        for len in 0..answer.len() {
            assert!(matches!(Answer::decode(&answer[..len]), Err(Error::BadAnswer)), "{len} bytes");
        }
        header.push(0);
        answer.push(0);
        assert!(matches!(Header::decode(&header, MAX), Err(Error::BadHeader)));
        assert!(matches!(Answer::decode(&answer), Err(Error::BadAnswer)));
    }

    /// What `send` makes of a receiver that takes `take` bytes, says `answer` and leaves.
    async fn told(message: &[u8], take: usize, answer: &[u8]) -> Result<(), Error> {
        let (mut sender, mut receiver) = tokio::io::duplex(16);
        let receiving = async move {
            let mut taken = vec![0; take];
            receiver.read_exact(&mut taken).await.unwrap();
            receiver.write_all(answer).await.unwrap();
            drop(receiver);
            taken
        };
        let (sent, taken) = tokio::join!(send(&mut sender, message), receiving);
        assert!([&Header::of(message).encode()[..], message].concat().starts_with(&taken));
        sent
    }

    #[tokio::test]
    async fn only_the_same_message_stored_is_delivered() {
        let answer = |status, digest| Answer { status, digest }.encode();
        let whole = Header::LEN + 4;
        let digest = Header::of(b"keys").digest;
        told(b"keys", whole, &answer(Status::Stored, digest)).await.unwrap();
        let other = told(b"keys", whole, &answer(Status::Stored, [0; 32])).await;
        assert!(matches!(other, Err(Error::OtherStored)));
        let refused = told(b"keys", whole, &answer(Status::NotStored, digest)).await;
        assert!(matches!(refused, Err(Error::Refused(Status::NotStored))));
        assert!(matches!(told(b"keys", whole, &[0; Answer::LEN]).await, Err(Error::BadAnswer)));
    }

    #[tokio::test]
    async fn every_truncation_of_the_answer_is_rejected() {
        let answer = Answer { status: Status::Stored, digest: Header::of(b"keys").digest }.encode();
        for len in 0..answer.len() {
            let cut = told(b"keys", Header::LEN + 4, &answer[..len]).await;
            assert!(matches!(cut, Err(Error::Io(_))), "delivered with {len} bytes of an answer");
        }
    }

    #[tokio::test]
    async fn a_refusal_of_the_header_is_heard_although_the_message_was_not_taken() {
        let message = [7; 300];
        let answer = Answer { status: Status::BadLength, digest: [0; 32] }.encode();
        // The pipe holds 16 bytes, so the answer arrives while the message is being written.
        let (mut sender, receiver) = tokio::io::duplex(64);
        let (mut read, mut write) = tokio::io::split(receiver);
        let receiving = async move {
            read.read_exact(&mut [0; Header::LEN]).await.unwrap();
            write.write_all(&answer).await.unwrap();
            drop((read, write));
        };
        let (sent, ()) = tokio::join!(send(&mut sender, &message), receiving);
        assert!(matches!(sent, Err(Error::Refused(Status::BadLength))), "{sent:?}");
    }

    #[tokio::test]
    async fn an_empty_message_is_not_sent() {
        let (mut sender, mut receiver) = tokio::io::duplex(16);
        assert!(matches!(send(&mut sender, b"").await, Err(Error::BadLength { len: 0, .. })));
        drop(sender);
        assert_eq!(receiver.read(&mut [0]).await.unwrap(), 0);
    }

    proptest! {
        #[test]
        fn headers_round_trip(len in 1..=MAX, digest: [u8; 32]) {
            let header = Header { len, digest };
            prop_assert_eq!(Header::decode(&header.encode(), MAX).unwrap(), header);
        }

        #[test]
        fn answers_round_trip(status in prop::sample::select(&Status::ALL), digest: [u8; 32]) {
            let answer = Answer { status, digest };
            prop_assert_eq!(Answer::decode(&answer.encode()).unwrap(), answer);
        }

        #[test]
        fn what_decodes_encodes_to_the_same_bytes(bytes in prop::collection::vec(any::<u8>(), Header::LEN)) {
            if let Ok(header) = Header::decode(&bytes, u64::MAX) {
                prop_assert_eq!(&header.encode()[..], &bytes[..]);
            }
            if let Ok(answer) = Answer::decode(&bytes[..Answer::LEN]) {
                prop_assert_eq!(&answer.encode()[..], &bytes[..Answer::LEN]);
            }
        }
    }
}
