//! What a line says, and how it becomes one.

use attestation::UnixMillis;
use kms_protocol::wire::webhook::BootInfo;
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{Hash, sha256};
use crate::authorise::{Grant, Question, Refusal};

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
#[expect(
    clippy::large_enum_variant,
    reason = "nearly every event is a decision, and lives only until it is written"
)]
pub(crate) enum Event {
    /// The server began to write.
    Start {
        version: &'static str,
        /// Bytes of a line that was never finished, and was cut off.
        #[serde(skip_serializing_if = "Option::is_none")]
        cut: Option<u64>,
    },
    /// An authoriser decided, or did not answer.
    Decision {
        purpose: &'static str,
        authoriser: &'static str,
        #[serde(flatten)]
        outcome: Outcome,
        #[serde(skip_serializing_if = "Option::is_none")]
        peer: Option<String>,
        /// SHA-256 over the evidence as it came.
        #[serde(skip_serializing_if = "Option::is_none")]
        evidence: Option<String>,
        tee: String,
        app_id: String,
        instance_id: String,
        device_id: String,
        os_image_hash: String,
        compose_hash: String,
        mr_aggregated: String,
        tcb_status: String,
    },
    /// Somebody was refused before any authoriser was asked.
    Refused {
        /// A stable name.
        reason: &'static str,
        text: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        peer: Option<String>,
        /// Refusals of this kind that found no room since the last one.
        suppressed: u64,
    },
    /// The server was told to stop.
    Stop,
}

/// What was decided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "decision", rename_all = "kebab-case")]
pub(crate) enum Outcome {
    Allowed { gateway_app_id: String },
    Denied { reason: String },
    Unavailable { reason: String },
}

impl From<&Result<Grant, Refusal>> for Outcome {
    fn from(answer: &Result<Grant, Refusal>) -> Self {
        match answer {
            Ok(Grant { gateway_app_id }) => Self::Allowed { gateway_app_id: gateway_app_id.clone() },
            Err(Refusal::Denied { reason }) => Self::Denied { reason: reason.clone() },
            Err(Refusal::Unavailable(reason)) => Self::Unavailable { reason: reason.clone() },
        }
    }
}

impl Event {
    pub(crate) fn decision(
        question: &Question,
        authoriser: &'static str,
        outcome: Outcome,
        peer: Option<String>,
    ) -> Self {
        let Question { purpose, boot_info, registers: _, evidence } = question;
        let BootInfo {
            tee_variant,
            mr_aggregated,
            os_image_hash,
            mr_system: _,
            app_id,
            compose_hash,
            instance_id,
            device_id,
            key_provider_info: _,
            tcb_status,
            advisory_ids: _,
        } = boot_info;
        Self::Decision {
            purpose: purpose.name(),
            authoriser,
            outcome,
            peer,
            evidence: evidence.map(hex::encode),
            tee: tee_variant.clone(),
            app_id: hex::encode(app_id),
            instance_id: hex::encode(instance_id),
            device_id: hex::encode(device_id),
            os_image_hash: hex::encode(os_image_hash),
            compose_hash: hex::encode(compose_hash),
            mr_aggregated: hex::encode(mr_aggregated),
            tcb_status: tcb_status.clone(),
        }
    }
}

#[derive(Serialize)]
struct Head<'a> {
    seq: u64,
    time: String,
    prev: String,
    #[serde(flatten)]
    event: &'a Event,
}

/// The line, with its line feed, and its hash.
pub(super) fn line(seq: u64, prev: &Hash, time: UnixMillis, event: &Event) -> (Vec<u8>, Hash) {
    let head = Head { seq, time: rfc3339(time), prev: hex::encode(prev), event };
    // Strings and numbers only, so serialisation cannot fail.
    let mut line = serde_json::to_vec(&head).unwrap_or_default();
    line.pop();
    let hash = sha256(&line);
    line.extend_from_slice(format!(",\"hash\":\"{}\"}}\n", hex::encode(hash)).as_bytes());
    (line, hash)
}

fn rfc3339(time: UnixMillis) -> String {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(time.0) * 1_000_000)
        .ok()
        .and_then(|time| time.format(&Rfc3339).ok())
        .unwrap_or_else(|| time.0.to_string())
}
