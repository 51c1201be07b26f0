//! What a document costs in memory, honest or hostile.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a set-up that fails is a failed test"
)]

mod support;

use allocation_counter::{AllocationInfo, measure};
use attestation::{TrustAnchor, UnixMillis, Verifier};
use support::cbor::{array, bytes, head, indefinite_array, map, text, uint};
use support::{Evidence, NOW, World};

/// Nothing that is refused may take more.
const MIB: u64 = 1024 * 1024;

fn cost(verifier: &Verifier, evidence: &Evidence) -> (AllocationInfo, bool) {
    let mut accepted = false;
    let info = measure(|| {
        accepted = verifier.verify(&evidence.bytes, UnixMillis::from_secs(NOW)).is_ok();
    });
    (info, accepted)
}

#[test]
fn a_verification_takes_at_most_20_allocations() {
    let world = World::new();
    let evidence = world.document().sign();
    let anchor = TrustAnchor::from_der(&evidence.root).unwrap();
    let plain = Verifier::new(anchor.clone());
    let cached = Verifier::new(anchor).with_chain_cache(8.try_into().unwrap());
    for (what, verifier) in [("full", &plain), ("into the cache", &cached), ("from the cache", &cached)] {
        let (info, accepted) = cost(verifier, &evidence);
        assert!(accepted);
        assert!(info.count_total <= 20, "{what}: {} allocations", info.count_total);
        assert!(info.bytes_total <= 32 * 1024, "{what}: {} bytes", info.bytes_total);
    }
}

#[test]
fn hostile_evidence_takes_less_than_a_mebibyte() {
    let world = World::new();
    let document = world.document();
    let raw = |bytes: Vec<u8>| Evidence { bytes, root: document.root.clone() };
    let bombs = [
        raw(vec![0x9f; 17 * 1024]),
        raw(vec![0xd2; 17 * 1024]),
        raw(vec![0x84; 1 << 24]),
        raw(head(4, u64::MAX)),
        raw([vec![0x84], head(2, u64::MAX)].concat()),
        raw([vec![0x84, 0x40], head(5, u64::MAX)].concat()),
        raw([vec![0x84, 0x40, 0xa0], head(2, u64::MAX - 1)].concat()),
        document.sign_payload(&head(5, u64::MAX)),
        document.sign_payload(&[0xbf; 16_000]),
        document.clone().add(text("new"), vec![0x81; 10_000]).sign(),
        document.clone().add(text("new"), indefinite_array(&vec![uint(0); 10_000])).sign(),
        document.clone().add(text("new"), head(4, u64::MAX)).sign(),
        document.clone().set("cabundle", head(4, u64::MAX)).sign(),
        document.clone().set("cabundle", array(&vec![bytes(&[0x30; 1024]); 8])).sign(),
        document.clone().set("pcrs", head(5, u64::MAX)).sign(),
        document.clone().set("certificate", head(2, u64::MAX)).sign(),
        document.clone().set("certificate", bytes(&[0x30; 1024])).sign(),
        document.clone().set("certificate", bytes(&[0x30, 0x82, 0xff, 0xff])).sign(),
        document.clone().set("pcrs", map(&[(uint(0), head(2, u64::MAX))])).sign(),
    ];
    for (number, evidence) in bombs.iter().enumerate() {
        let verifier = Verifier::new(TrustAnchor::from_der(&evidence.root).unwrap());
        let (info, accepted) = cost(&verifier, evidence);
        assert!(!accepted, "bomb {number}");
        assert!(info.bytes_max < MIB, "bomb {number}: {} bytes at once", info.bytes_max);
        assert!(info.count_total <= 20, "bomb {number}: {} allocations", info.count_total);
    }
}
