//! Replays the fuzz corpus with the compiler that everybody has.

#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]

use std::fs;
use std::path::Path;

include!("../fuzz/replay.rs");

#[test]
fn the_fuzz_corpus_replays() {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/document"));
    let mut seeds = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let (decoded, verified) = replay(&fs::read(&path).unwrap());
        // Named seeds say what they are; those the fuzzer found only must not panic.
        if name.starts_with("good_") {
            assert!(decoded && verified, "{name}: decoded {decoded}, verified {verified}");
        }
        if name.starts_with("refused_") {
            assert!(!verified, "{name}: accepted");
        }
        seeds += 1;
    }
    assert!(seeds >= 10, "{seeds} seeds");
}
