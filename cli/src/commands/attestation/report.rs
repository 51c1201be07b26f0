//! How a verdict is told: one JSON object per line, or text.
//!
//! Fields of a document are told as facts only if it was verified. File names and the module id are escaped in text,
//! since both can hold anything.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use attestation::{AppraisedDocument, AttestationDocument, Error, VerifiedDocument};
use command_line::Exit;
use serde::Serialize;

use super::units::rfc3339;

/// The format of the JSON lines; grows when a field changes its meaning or goes.
const FORMAT: u32 = 1;

/// What became of one file.
pub(super) enum Verdict {
    Accepted(Box<AppraisedDocument>),
    /// With the document, if it was verified and only the policy refused it.
    Refused(Refusal, Option<Box<VerifiedDocument>>),
    Unverified(Box<AttestationDocument>),
    Unreadable(io::Error),
}

/// Why a document was refused.
pub(super) struct Refusal {
    name: &'static str,
    message: String,
    hint: Option<&'static str>,
}

impl Refusal {
    pub(super) fn of(error: &Error) -> Self {
        let hint = match error {
            Error::Stale { .. } | Error::FromFuture { .. } => {
                Some("--at verifies as of another time, --max-age and --max-skew widen the window")
            }
            Error::UntrustedRoot => Some("--root names the root of an emulator or of another partition"),
            Error::Debug { .. } => Some("--danger-allow-debug accepts debug enclaves"),
            _ => None,
        };
        Self { name: error.name(), message: error.to_string(), hint }
    }
}

impl Verdict {
    /// How a run ends that saw only this.
    pub(super) fn exit(&self) -> Exit {
        match self {
            Self::Accepted(_) | Self::Unverified(_) => Exit::Done,
            Self::Refused(..) => Exit::Refused,
            Self::Unreadable(_) => Exit::Internal,
        }
    }

    fn word(&self) -> &'static str {
        match self {
            Self::Accepted(_) => "accepted",
            Self::Refused(..) => "refused",
            Self::Unverified(_) => "unverified",
            Self::Unreadable(_) => "unreadable",
        }
    }

    fn document(&self) -> Option<&AttestationDocument> {
        match self {
            Self::Accepted(document) => Some(document),
            Self::Refused(_, document) => document.as_deref().map(|document| &**document),
            Self::Unverified(document) => Some(document),
            Self::Unreadable(_) => None,
        }
    }

    /// Name, message and hint of what went wrong.
    fn problem(&self) -> Option<(&'static str, String, Option<&'static str>)> {
        match self {
            Self::Accepted(_) | Self::Unverified(_) => None,
            Self::Refused(refusal, _) => Some((refusal.name, refusal.message.clone(), refusal.hint)),
            Self::Unreadable(error) => Some(("unreadable-file", error.to_string(), None)),
        }
    }
}

/// A file and what became of it.
pub(super) struct Report<'a> {
    pub(super) path: &'a Path,
    pub(super) verdict: Verdict,
}

impl Report<'_> {
    pub(super) fn write(&self, json: bool, out: &mut dyn Write) -> io::Result<()> {
        if json { self.write_json(out) } else { self.write_text(out) }
    }

    fn write_json(&self, out: &mut dyn Write) -> io::Result<()> {
        let (error, message, hint) = match self.verdict.problem() {
            Some((error, message, hint)) => (Some(error), Some(message), hint),
            None => (None, None, None),
        };
        let line = Line {
            format: FORMAT,
            file: self.path.to_string_lossy().into(),
            verdict: self.verdict.word(),
            error,
            message,
            hint,
            document: self.verdict.document().map(Facts::of).unwrap_or_default(),
        };
        serde_json::to_writer(&mut *out, &line)?;
        writeln!(out)
    }

    fn write_text(&self, out: &mut dyn Write) -> io::Result<()> {
        let file = self.path.to_string_lossy();
        writeln!(out, "{}: {}", file.escape_debug(), self.verdict.word().to_uppercase())?;
        if let Some((error, message, hint)) = self.verdict.problem() {
            writeln!(out, "  error: {error}: {message}")?;
            if let Some(hint) = hint {
                writeln!(out, "  hint: {hint}")?;
            }
        }
        match self.verdict.document().map(Facts::of) {
            Some(facts) => facts.write_text(out),
            None => Ok(()),
        }
    }
}

/// One line of JSON. Fields of the document are null when it is not known, that is neither verified nor inspected.
#[derive(Serialize)]
struct Line {
    format: u32,
    file: String,
    verdict: &'static str,
    error: Option<&'static str>,
    message: Option<String>,
    hint: Option<&'static str>,
    #[serde(flatten)]
    document: Facts,
}

#[derive(Default, Serialize)]
struct Facts {
    module_id: Option<String>,
    timestamp: Option<String>,
    timestamp_ms: Option<u64>,
    debug: Option<bool>,
    os_image_hash: Option<String>,
    pcrs: Option<BTreeMap<u8, String>>,
    user_data: Option<String>,
    nonce: Option<String>,
    public_key: Option<String>,
}

impl Facts {
    fn of(document: &AttestationDocument) -> Self {
        Self {
            module_id: Some(document.module_id().into()),
            timestamp: rfc3339(document.timestamp()),
            timestamp_ms: Some(document.timestamp().0),
            debug: Some(document.is_debug()),
            os_image_hash: Some(document.os_image_hash().to_string()),
            pcrs: Some(document.pcrs().map(|(index, pcr)| (index.get(), pcr.to_string())).collect()),
            user_data: document.user_data().map(hex::encode),
            nonce: document.nonce().map(hex::encode),
            public_key: document.public_key().map(hex::encode),
        }
    }

    /// Registers that are zero are left out, except for those that name the image.
    fn write_text(&self, out: &mut dyn Write) -> io::Result<()> {
        let module_id = self.module_id.as_deref().unwrap_or_default();
        writeln!(out, "  module_id      {}", module_id.escape_debug())?;
        match (&self.timestamp, self.timestamp_ms) {
            (Some(date), _) => writeln!(out, "  timestamp      {date}")?,
            (None, millis) => writeln!(out, "  timestamp      {} ms", millis.unwrap_or_default())?,
        }
        if self.debug == Some(true) {
            writeln!(out, "  debug          yes: its parent can read everything in this enclave")?;
        }
        writeln!(out, "  os_image_hash  {}", self.os_image_hash.as_deref().unwrap_or_default())?;
        for (index, pcr) in self.pcrs.iter().flatten() {
            if *index <= 2 || pcr.bytes().any(|digit| digit != b'0') {
                writeln!(out, "  {:<14} {pcr}", format!("PCR{index}"))?;
            }
        }
        let fields =
            [("user_data", &self.user_data), ("nonce", &self.nonce), ("public_key", &self.public_key)];
        for (name, value) in fields {
            match value.as_deref() {
                None => {}
                Some("") => writeln!(out, "  {name:<14} (empty)")?,
                Some(value) => writeln!(out, "  {name:<14} {value}")?,
            }
        }
        Ok(())
    }
}
