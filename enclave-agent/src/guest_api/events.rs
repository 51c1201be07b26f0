//! Events of the app in registers of the NSM.
//!
//! A document shows locked registers only, and a locked one takes no more. So each event gets a register of its own,
//! from PCR16 on: it is extended with the event's digest and locked, and every later document shows it. There are 16,
//! and what an app locks itself is missing from them.
//!
//! ```text
//! digest = SHA-384(u32le(0x08000001) ":" name ":" payload)       upstream's digest of an event
//! PCR    = SHA-384(48 zero bytes || digest)                      what a register starts from, extended once
//! ```

use attestation::{PCR_COUNT, Pcr, PcrIndex};
use aws_lc_rs::digest;
use kms_protocol::attestation_encoding::RuntimeEvent;
use kms_protocol::wire::guest::EmitEventArgs;
use serde::Serialize;

use super::GuestApi;
use super::http::Failure;
use crate::nsm::{self, Nsm, NsmError};

/// The first register that is the enclave's own to extend.
const FIRST: u8 = 16;
/// Type of an event that software records while it runs.
const EVENT_TYPE: u32 = 0x0800_0001;
/// Longest name and payload: all events together go into every attestation.
const MAX_NAME: usize = 128;
const MAX_PAYLOAD: usize = 1024;
/// Names that mean something to who reads an attestation, so that no app may write them.
const RESERVED: [&str; 8] = [
    "app-id",
    "instance-id",
    "compose-hash",
    "key-provider",
    "os-image-hash",
    "boot-mr-done",
    "system-preparing",
    "system-ready",
];

/// The app's events, in the order in which they were recorded.
#[derive(Debug, Default)]
pub(super) struct Log(Vec<Entry>);

/// One event; in JSON as the SDKs know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Entry {
    /// The register.
    imr: u8,
    event_type: u32,
    /// Hex.
    digest: String,
    event: String,
    /// Hex.
    event_payload: String,
}

impl Log {
    /// A JSON array.
    pub(super) fn to_json(&self) -> String {
        serde_json::to_string(&self.0).unwrap_or_default()
    }

    pub(super) fn entries(&self) -> &[Entry] {
        &self.0
    }

    pub(super) fn runtime_events(&self) -> impl Iterator<Item = RuntimeEvent> {
        let payload = |entry: &Entry| hex::decode(&entry.event_payload).unwrap_or_default();
        self.0.iter().map(move |entry| RuntimeEvent::new(entry.event.clone(), payload(entry)))
    }
}

impl GuestApi {
    pub(super) async fn emit_event(&self, args: EmitEventArgs) -> Result<(), Failure> {
        let EmitEventArgs { event, payload } = args;
        check(&event, &payload)?;
        let digest = event_digest(&event, &payload);
        // Held over the module's work: two events must not share a register.
        let mut log = self.events.lock().await;
        let recorded = nsm::call(&self.nsm, self.nsm_deadline(), move |nsm| record(nsm, &digest)).await;
        let index = match recorded {
            Ok(Some(index)) => index,
            Ok(None) => {
                let last = PCR_COUNT - 1;
                return Err(Failure::conflict(format!("PCR{FIRST} to PCR{last} are all locked or in use")));
            }
            Err(error) => return Err(Failure::upstream(&error)),
        };
        log.0.push(Entry {
            imr: index.get(),
            event_type: EVENT_TYPE,
            digest: hex::encode(digest),
            event,
            event_payload: hex::encode(payload),
        });
        Ok(())
    }
}

fn check(event: &str, payload: &[u8]) -> Result<(), Failure> {
    if event.is_empty() || event.len() > MAX_NAME {
        return Err(Failure::bad(format!("event name has {} bytes, expected 1 to {MAX_NAME}", event.len())));
    }
    if RESERVED.contains(&event) {
        return Err(Failure::bad(format!("event name {event} is reserved")));
    }
    if payload.len() > MAX_PAYLOAD {
        let len = payload.len();
        return Err(Failure::bad(format!("event payload has {len} bytes, expected at most {MAX_PAYLOAD}")));
    }
    Ok(())
}

fn event_digest(event: &str, payload: &[u8]) -> [u8; Pcr::LEN] {
    let mut context = digest::Context::new(&digest::SHA384);
    for part in [&EVENT_TYPE.to_le_bytes()[..], b":", event.as_bytes(), b":", payload] {
        context.update(part);
    }
    let mut digest = [0; Pcr::LEN];
    digest.copy_from_slice(context.finish().as_ref());
    digest
}

/// Extends and locks the first register that is still untouched; `None` when there is none.
fn record(nsm: &dyn Nsm, digest: &[u8; Pcr::LEN]) -> Result<Option<PcrIndex>, NsmError> {
    for index in (FIRST..).map_while(PcrIndex::new) {
        let register = nsm.describe_pcr(index)?;
        if register.locked || register.value != Pcr::ZERO {
            continue;
        }
        match nsm.extend_pcr(index, digest.to_vec()) {
            Ok(_value) => {}
            // Somebody else in the enclave was faster.
            Err(error) if error.is_locked_register() => continue,
            Err(error) => return Err(error),
        }
        nsm.lock_pcr(index)?;
        return Ok(Some(index));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_sizes_are_limited() {
        check("event", &[0; MAX_PAYLOAD]).unwrap();
        check(&"n".repeat(MAX_NAME), b"").unwrap();
        for (event, payload) in
            [("", 0), (&*"n".repeat(MAX_NAME + 1), 0), ("event", MAX_PAYLOAD + 1), ("instance-id", 0)]
        {
            let failure = check(event, &vec![0; payload]).unwrap_err();
            assert_eq!(failure.status, hyper::StatusCode::BAD_REQUEST, "{event} {payload}");
        }
    }
}
