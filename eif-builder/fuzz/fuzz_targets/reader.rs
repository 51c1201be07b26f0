//! Any bytes as an enclave image: strict reading refuses or agrees with lenient reading, and nothing panics.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| eif_builder::replay::reader(bytes));
