//! The audit log: one JSON object a line, each with the hash of the one before, so that no line can be changed, taken
//! out or put in without the rest showing it.
//!
//! ```json
//! {"seq":2,"time":"2026-01-02T03:04:05.678Z","prev":"9f…","event":"decision","purpose":"app","app_id":"11…",…,"hash":"c4…"}
//! ```
//!
//! `hash` is SHA-256 over the bytes of the line before `,"hash"`; `prev` is the hash of the line before, zeros in the
//! first. A line is on disk before the keys it speaks of leave the server; when it cannot be written, they do not
//! leave. Whoever can write the file can still cut its end off: keep the head that `audit verify` prints elsewhere.
//!
//! No line holds a secret: what is recorded is who asked, what its evidence was, and what was decided.

mod record;
mod verify;
mod writer;

pub(crate) use self::record::{Event, Outcome};
pub use self::verify::{AuditError, Summary, verify};
pub(crate) use self::writer::Audit;
pub use self::writer::OpenError;

/// A SHA-256 hash.
pub(crate) type Hash = [u8; 32];

/// `prev` of the first line.
const NO_HASH: Hash = [0; 32];
/// Longest line; ours stay far below.
const MAX_LINE: usize = 16 << 10;

pub(crate) fn sha256(bytes: &[u8]) -> Hash {
    let mut hash = NO_HASH;
    hash.copy_from_slice(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes).as_ref());
    hash
}

#[cfg(test)]
mod tests;
