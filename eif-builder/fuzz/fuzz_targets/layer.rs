//! Any bytes as container layers: what comes out is a ramdisk that reads back, whatever went in.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| eif_builder::replay::layer(bytes));
