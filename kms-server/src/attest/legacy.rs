//! Evidence in the form of generation A: a TDX quote and its event log as JSON, side by side.

use kms_protocol::attestation_encoding::{
    Attestation, PlatformEvidence, RuntimeEvent, Stack, TdxEvent, TdxEvidence,
};
use serde::Deserialize;

use super::error::Error;

/// The type of the events that the stack records at run time.
const RUNTIME_EVENT: u32 = 0x0800_0001;
/// Longest log, and most events: real ones have a few hundred.
const MAX_LOG: usize = 1 << 20;
const MAX_EVENTS: usize = 4096;

#[derive(Deserialize)]
struct Event {
    imr: u32,
    event_type: u32,
    #[serde(default)]
    digest: String,
    #[serde(default)]
    event: String,
    #[serde(default)]
    event_payload: String,
}

/// The same evidence in today's form. Report data is the quote's own.
pub(super) fn attestation(quote: Vec<u8>, event_log: &[u8]) -> Result<Attestation, Error> {
    let refused = |what: &str| Error::EventLog(what.to_owned());
    if event_log.len() > MAX_LOG {
        return Err(refused("it is too long"));
    }
    let events: Vec<Event> =
        serde_json::from_slice(event_log).map_err(|error| Error::EventLog(error.to_string()))?;
    if events.len() > MAX_EVENTS {
        return Err(refused("it has too many events"));
    }
    let mut log = Vec::with_capacity(events.len());
    let mut runtime_events = Vec::new();
    for Event { imr, event_type, digest, event, event_payload } in events {
        let unhex = |text: &str| hex::decode(text.trim_start_matches("0x")).map_err(|_| refused("not hex"));
        let event_payload = unhex(&event_payload)?;
        if event_type == RUNTIME_EVENT {
            runtime_events.push(RuntimeEvent::new(event.clone(), event_payload.clone()));
        }
        log.push(TdxEvent { imr, event_type, digest: unhex(&digest)?, event, event_payload });
    }
    let report_data = attestation::tdx::report_data(&quote).map_err(Error::Tdx)?;
    Ok(Attestation {
        platform: PlatformEvidence::Tdx(TdxEvidence { quote, event_log: log }),
        runtime_events,
        report_data: report_data.0,
        config: String::new(),
        stack: Stack::Dstack,
    })
}
