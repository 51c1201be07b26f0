//! Any bytes as evidence: decoded, and verified under AWS's root and under whatever root they bring along.
//!
//! `cargo +nightly fuzz run document` in `attestation/`; `tests/corpus.rs` replays the corpus on stable.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|evidence: &[u8]| {
    replay(evidence);
});

include!("../replay.rs");
