//! The demo's telling: who proved what to whom, and when.

use std::io::{self, Write};
use std::time::Instant;

use command_line::{Exit, Failure};
use enclave_agent::{Keys, Step};

/// Writes the steps as they happen.
pub(super) struct Story {
    started: Instant,
    stdout_is_taken: bool,
    out: Box<dyn Write + Send>,
}

impl Story {
    /// Steps go to standard output, or to standard error when that is kept for the answer.
    pub(super) fn new(stdout_is_taken: bool) -> Self {
        let out: Box<dyn Write + Send> =
            if stdout_is_taken { Box::new(io::stderr()) } else { Box::new(io::stdout()) };
        Self { started: Instant::now(), stdout_is_taken, out }
    }

    /// The same story for somebody who tells a part of it, with the same clock.
    pub(super) fn another(&self) -> Self {
        let out: Box<dyn Write + Send> =
            if self.stdout_is_taken { Box::new(io::stderr()) } else { Box::new(io::stdout()) };
        Self { out, ..*self }
    }

    /// A list of facts.
    pub(super) fn facts(&mut self, facts: &[(&str, &str)]) {
        self.chapter("Summary");
        for (what, value) in facts {
            self.line(&format!("  {what:<23} {value}"));
        }
    }

    /// The keys themselves.
    pub(super) fn reveal(&mut self, json: &[u8]) {
        // A reader that left does not want the rest.
        let _reader_left = self.out.write_all(json).and_then(|()| self.out.write_all(b"\n"));
    }

    pub(super) fn chapter(&mut self, title: &str) {
        self.line(&format!("\n{title}"));
    }

    pub(super) fn attempt(&mut self, title: &str) {
        self.line(&format!("  {title}"));
    }

    pub(super) fn refused(&mut self, reason: &str) {
        self.said("agent", &format!("no keys: {reason}"));
    }

    /// One step by `actor`, with the time since the start.
    pub(super) fn said(&mut self, actor: &str, text: &str) {
        let millis = self.started.elapsed().as_millis();
        self.line(&format!("{millis:>7} ms  {actor:<6} {text}"));
    }

    /// What the agent did.
    pub(super) fn step(&mut self, step: Step<'_>) {
        match step {
            Step::Connecting { url, via } => {
                self.said("agent", &format!("wants keys from {url} through {via}"))
            }
            Step::Attested { document } => {
                let hash = document.os_image_hash();
                self.said("nsm", &format!("signed a document for the agent's fresh key, image 0x{hash}"));
            }
            Step::Connected { connection: 1, certificate_sha256 } => {
                let certificate = short(&certificate_sha256);
                self.said(
                    "kms",
                    &format!("proved itself: certificate {certificate}, usage kms:rpc, by the pinned root"),
                );
            }
            Step::Connected { certificate_sha256, .. } => {
                let certificate = short(&certificate_sha256);
                self.said(
                    "kms",
                    &format!("proved itself again: certificate {certificate}; the agent showed its document"),
                );
            }
            Step::TempCa { root_spki_sha256 } => {
                let root = short(&root_spki_sha256);
                self.said("kms", &format!("lent its temporary CA; its root is the pinned one, key {root}"));
            }
            Step::Released { keys } => {
                let image = hex::encode(keys.os_image_hash());
                self.said(
                    "kms",
                    &format!("verified the document up to its root, authorised image 0x{image}"),
                );
                self.said(
                    "agent",
                    "checked the answer: same root, same image, app key signed by the KMS's k256 root",
                );
            }
            Step::Retrying { error, pause } => {
                self.said("agent", &format!("{error}; trying again in {pause:?}"))
            }
            // Steps that a later agent may add are no part of this story.
            _ => {}
        }
    }

    /// The end: what was fetched. With `reveal` as the agent would write it.
    pub(super) fn summary(&mut self, keys: &Keys, refusals: usize, reveal: bool) -> Result<(), Failure> {
        let summary = keys.summary();
        self.facts(&[
            ("app id", &summary.app_id),
            ("OS_IMAGE_HASH", &summary.os_image_hash),
            ("KMS", &summary.kms_url),
            ("root CA key, SHA-256", &summary.root_ca_spki_sha256),
            ("disk key fingerprint", &summary.disk_crypt_key_fingerprint),
            ("environment public key", &summary.env_public_key),
            ("app k256 public key", &summary.k256_public_key),
            (&format!("{refusals} refusals"), "as they must be"),
        ]);
        if reveal {
            let json = keys.to_json().map_err(|error| Failure::new(Exit::Internal, error))?;
            self.reveal(&json);
        }
        Ok(())
    }

    fn line(&mut self, line: &str) {
        // A reader that left does not want the rest; the trip goes on.
        let _reader_left = writeln!(self.out, "{line}").and_then(|()| self.out.flush());
    }
}

/// Enough of a digest to tell two apart by eye.
pub(super) fn short(digest: &[u8; 32]) -> String {
    format!("{}…", hex::encode(&digest[..8]))
}
