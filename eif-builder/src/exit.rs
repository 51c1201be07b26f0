//! How a command ends.

use std::error::Error as _;
use std::io::{self, Write};

use crate::Error;

/// Prints an error, its causes and, when one is known, the next step.
///
/// # Errors
/// When the stream cannot be written.
pub fn explain(error: &Error, stream: &mut dyn Write) -> io::Result<()> {
    write!(stream, "error: {error}")?;
    let mut source = error.source();
    while let Some(cause) = source {
        write!(stream, ": {cause}")?;
        source = cause.source();
    }
    writeln!(stream)?;
    match error.hint() {
        Some(hint) => writeln!(stream, "hint: {hint}"),
        None => Ok(()),
    }
}

/// The error for an answer that could not be written.
pub fn answer_not_taken(source: io::Error) -> Error {
    Error::Io { action: "write", object: "the answer".into(), source }
}
