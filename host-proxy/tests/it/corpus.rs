//! The fuzz target's corpus, on the stable compiler.

use std::fs;

use host_proxy::{http, policy, tls};

include!("../../fuzz/replay.rs");

#[test]
fn the_fuzz_corpus_holds() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/connect_head");
    let mut replayed = 0;
    for entry in fs::read_dir(folder).unwrap() {
        replay(&fs::read(entry.unwrap().path()).unwrap());
        replayed += 1;
    }
    assert!(replayed >= 20, "{replayed} files in the corpus");
}
