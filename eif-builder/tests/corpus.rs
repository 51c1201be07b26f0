//! Replays the kept fuzz corpus, so that what fuzzing found stays found without a fuzzer.
#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]

use std::path::Path;

fn replay(target: &str, check: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut seen = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        check(&std::fs::read(entry.unwrap().path()).unwrap());
        seen += 1;
    }
    assert!(seen > 0, "{} is empty", folder.display());
}

#[test]
fn reader_corpus() {
    replay("reader", eif_builder::replay::reader);
}

#[test]
fn layer_corpus() {
    replay("layer", eif_builder::replay::layer);
}
