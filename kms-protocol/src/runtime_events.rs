//! Digests and replay of the events a stack records at run time (kms-protocol §6.4).
//!
//! On TDX they extend RTMR3, on Google's TDX machines also PCR14 of the virtual TPM, so a replay that meets the quoted
//! register proves the list. On Nitro Enclaves nothing proves it.

use sha2::digest::Output;
use sha2::{Digest, Sha256, Sha384};

use crate::attestation_encoding::RuntimeEvent;

/// The type of every runtime event.
const EVENT_TYPE: u32 = 0x0800_0001;
/// The event after which a register holds only what was measured during boot.
const BOOT_DONE: &str = "boot-mr-done";

/// How much of the list is replayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Moment {
    /// All of it: what the register holds when the quote is made.
    #[default]
    Now,
    /// Up to and including `boot-mr-done`: what it held at the end of the boot.
    Boot,
}

/// RTMR3 after these events.
#[must_use]
pub fn rtmr3(events: &[RuntimeEvent], moment: Moment) -> [u8; 48] {
    replay::<Sha384>(events, moment).into()
}

/// PCR14 after these events, in the SHA-256 bank.
#[must_use]
pub fn pcr14(events: &[RuntimeEvent], moment: Moment) -> [u8; 32] {
    replay::<Sha256>(events, moment).into()
}

fn replay<D: Digest>(events: &[RuntimeEvent], moment: Moment) -> Output<D> {
    let mut register = Output::<D>::default();
    for event in events {
        register = D::new().chain_update(&register).chain_update(digest::<D>(event)).finalize();
        if moment == Moment::Boot && event.event == BOOT_DONE {
            break;
        }
    }
    register
}

/// What an event extends a register with. Version 2 hashes canonical JSON (RFC 8785): keys sorted, no white space.
fn digest<D: Digest>(event: &RuntimeEvent) -> Output<D> {
    if event.version == 2 {
        // serde_json escapes strings as RFC 8785 asks for; a string cannot fail to serialise.
        let name = serde_json::to_string(&event.event).unwrap_or_default();
        let payload = hex::encode(&event.payload);
        return D::digest(format!("{{\"name\":{name},\"payload\":\"{payload}\",\"type\":{EVENT_TYPE}}}"));
    }
    D::new()
        .chain_update(EVENT_TYPE.to_le_bytes())
        .chain_update(":")
        .chain_update(&event.event)
        .chain_update(":")
        .chain_update(&event.payload)
        .finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events() -> Vec<RuntimeEvent> {
        vec![
            RuntimeEvent::new("app-id", [0x11; 20]),
            RuntimeEvent::new("boot-mr-done", []),
            RuntimeEvent::new("system-ready", []),
        ]
    }

    #[test]
    fn nothing_leaves_the_register_zero() {
        assert_eq!(rtmr3(&[], Moment::Now), [0; 48]);
        assert_eq!(pcr14(&[], Moment::Boot), [0; 32]);
    }

    /// Computed with another implementation of the formula; fix the code, not the vector.
    #[test]
    fn digests_are_frozen() {
        let mut event = RuntimeEvent::new("app-id", [0xde, 0xad, 0xbe, 0xef]);
        assert_eq!(hex::encode(digest::<Sha256>(&event)), V1_DIGEST);
        event.version = 2;
        assert_eq!(hex::encode(digest::<Sha256>(&event)), V2_DIGEST);
        assert_eq!(hex::encode(pcr14(&events(), Moment::Now)), PCR14_NOW);
    }

    #[test]
    fn the_boot_ends_with_its_event() {
        let all = events();
        assert_eq!(rtmr3(&all, Moment::Boot), rtmr3(&all[..2], Moment::Now));
        assert_ne!(rtmr3(&all, Moment::Boot), rtmr3(&all, Moment::Now));
    }

    const V1_DIGEST: &str = "1e37acb63ad67dd7c04be2f1b4d1cb875bef39447fe4196ab0b8296829fad651";
    const V2_DIGEST: &str = "d370ccca56b54385ecede56064eec8dda527de6e046aea9b8ad7fe6baed02ada";
    const PCR14_NOW: &str = "4172b0b52147e93c00381f7e049d68c5b90408573215182e9f2f8f46992f78a3";
}
