//! Checks an audit log from its first line to its last.

use std::io::{BufRead, Read as _};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{Hash, MAX_LINE, NO_HASH, sha256};

/// What follows the hashed bytes of a line: `,"hash":"` + 64 digits + `"}`.
const SUFFIX: usize = 9 + 64 + 2;

/// An audit log that holds together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Lines.
    pub lines: u64,
    /// Hash of the last line; zeros when there is none. Whoever kept it elsewhere sees whether the end was cut off.
    pub head: [u8; 32],
    /// Bytes after the last line feed: a line that was never finished, so nothing it speaks of has happened.
    pub unfinished: u64,
}

/// Why a log does not hold together.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuditError {
    /// It cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A line is longer than any line is.
    #[error("line {line} is longer than {MAX_LINE} bytes")]
    TooLong {
        /// From 1.
        line: u64,
    },
    /// A line is not one of a log.
    #[error("line {line} is no line of an audit log: {reason}")]
    Form {
        /// From 1.
        line: u64,
        /// Why.
        reason: String,
    },
    /// A line is not what was written.
    #[error("line {line} was changed: it hashes to {actual}, and says {expected}")]
    Changed {
        /// From 1.
        line: u64,
        /// What it says.
        expected: String,
        /// What it is.
        actual: String,
    },
    /// A line does not follow the one before.
    #[error("line {line} does not follow the one before: {what} is {actual}, expected {expected}")]
    Order {
        /// From 1.
        line: u64,
        /// `seq` or `prev`.
        what: &'static str,
        /// What would follow.
        expected: String,
        /// What is there.
        actual: String,
    },
}

#[derive(Deserialize)]
struct Link {
    seq: u64,
    prev: String,
    hash: String,
}

/// Reads the whole log, in memory for one line.
///
/// # Errors
///
/// [`AuditError`] names the first line that is wrong.
pub fn verify(path: &Path) -> Result<Summary, AuditError> {
    let read = |source| AuditError::Read { path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(read)?;
    walk(std::io::BufReader::new(file), read)
}

pub(super) fn walk(
    mut file: impl BufRead,
    read: impl Fn(std::io::Error) -> AuditError,
) -> Result<Summary, AuditError> {
    let mut summary = Summary { lines: 0, head: NO_HASH, unfinished: 0 };
    let mut buffer = Vec::new();
    loop {
        buffer.clear();
        let number = summary.lines + 1;
        let length = file.by_ref().take(MAX_LINE as u64 + 1).read_until(b'\n', &mut buffer).map_err(&read)?;
        if buffer.last() != Some(&b'\n') {
            if length > MAX_LINE {
                return Err(AuditError::TooLong { line: number });
            }
            summary.unfinished = length as u64;
            return Ok(summary);
        }
        buffer.pop();
        summary.head = follow(&buffer, number, &summary.head)?;
        summary.lines = number;
    }
}

/// The hash of a line, which must follow `prev` as line `number`.
fn follow(line: &[u8], number: u64, prev: &Hash) -> Result<Hash, AuditError> {
    let form = |reason: String| AuditError::Form { line: number, reason };
    let link: Link = serde_json::from_slice(line).map_err(|error| form(error.to_string()))?;
    let hashed = line.len().checked_sub(SUFFIX).ok_or_else(|| form("it is too short".into()))?;
    let (hashed, suffix) = line.split_at(hashed);
    if suffix != format!(",\"hash\":\"{}\"}}", link.hash).as_bytes() {
        return Err(form("it does not end with its hash".into()));
    }
    let hash = sha256(hashed);
    let actual = hex::encode(hash);
    if actual != link.hash {
        return Err(AuditError::Changed { line: number, expected: link.hash, actual });
    }
    let expected = hex::encode(prev);
    if link.prev != expected {
        return Err(AuditError::Order { line: number, what: "prev", expected, actual: link.prev });
    }
    if link.seq != number {
        let (expected, actual) = (number.to_string(), link.seq.to_string());
        return Err(AuditError::Order { line: number, what: "seq", expected, actual });
    }
    Ok(hash)
}
