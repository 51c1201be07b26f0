//! Any bytes as the start of a connection: as a request head, as a target judged by an allow-list, as a ClientHello.
//!
//! `cargo +nightly fuzz run connect_head` in `host-proxy/`; `tests/it/corpus.rs` replays the corpus on stable.

#![no_main]
#![allow(dead_code, reason = "the modules are the proxy's own; the target uses a part of them")]

use libfuzzer_sys::fuzz_target;

// The pure modules alone: without the runtime and the resolver the target builds in seconds.
#[path = "../../src/http/mod.rs"]
mod http;
#[path = "../../src/policy/mod.rs"]
mod policy;
#[path = "../../src/tls.rs"]
mod tls;

fuzz_target!(|bytes: &[u8]| {
    replay(bytes);
});

include!("../replay.rs");
