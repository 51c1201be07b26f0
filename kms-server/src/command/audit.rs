//! `audit verify`: whether an audit log holds together.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use command_line::{Exit, Failure, print_line};
use serde::Serialize;

use crate::audit::{AuditError, Summary, verify};

/// What to do with an audit log.
#[derive(Debug, Subcommand)]
pub enum Audit {
    /// Checks every line against the one before
    #[command(after_help = "Examples:
  kms-server audit verify /var/log/keyferry/audit.jsonl
  kms-server audit verify audit.jsonl --head 9f86d0…  # and that its end was not cut off")]
    Verify(Verify),
}

/// Arguments of `audit verify`.
#[derive(Debug, Args)]
pub struct Verify {
    /// The log (core.audit.file)
    pub file: PathBuf,
    /// The hash that the last line must have, as an earlier run printed it
    #[arg(long, value_name = "HEX")]
    pub head: Option<String>,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct Answer {
    version: u8,
    lines: u64,
    head: String,
    unfinished: u64,
}

/// Carries out the command.
///
/// # Errors
///
/// 3 when the log does not hold together or has another head, 2 when it cannot be read.
pub(super) fn run(command: Audit) -> Result<(), Failure> {
    let Audit::Verify(Verify { file, head, json }) = command;
    let Summary { lines, head: actual, unfinished } = verify(&file).map_err(failure)?;
    let actual = hex::encode(actual);
    if json {
        let answer = Answer { version: 1, lines, head: actual.clone(), unfinished };
        print_line(&serde_json::to_string(&answer).map_err(|error| Failure::new(Exit::Internal, error))?);
    } else {
        print_line(&format!("{lines} lines hold together; head {actual}"));
        if unfinished > 0 {
            print_line(&format!("{unfinished} bytes after the last line were never finished"));
        }
    }
    match head {
        Some(expected) if !expected.eq_ignore_ascii_case(&actual) => {
            Err(Failure::new(Exit::Refused, Head { expected: expected.to_ascii_lowercase(), actual })
                .with_hint(
                    "a log that went on has another head; compare it with the hash of the line it had then",
                ))
        }
        _ => Ok(()),
    }
}

/// The log ends elsewhere.
#[derive(Debug, thiserror::Error)]
#[error("the head is {actual}, expected {expected}")]
struct Head {
    expected: String,
    actual: String,
}

fn failure(error: AuditError) -> Failure {
    let exit = match &error {
        AuditError::Read { .. } => Exit::Usage,
        AuditError::TooLong { .. }
        | AuditError::Form { .. }
        | AuditError::Changed { .. }
        | AuditError::Order { .. } => Exit::Refused,
    };
    Failure::new(exit, error)
}
