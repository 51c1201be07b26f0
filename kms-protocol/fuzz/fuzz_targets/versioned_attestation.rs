//! Decodes anything; what decodes must survive being written and read again.
#![no_main]

use kms_protocol::attestation_encoding::{Stack, Version, VersionedAttestation};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(decoded) = VersionedAttestation::decode(bytes) else { return };
    let attestation = decoded.attestation();
    let v1 = attestation.encode_v1().expect("no longer than the input allows");
    assert_eq!(VersionedAttestation::decode(&v1).expect("reads its own V1").attestation(), attestation);
    let plain = attestation.stack == Stack::Dstack && attestation.runtime_events.iter().all(|event| event.version == 1);
    assert_eq!(attestation.encode_v0().is_ok(), plain);
    if decoded.version() == Version::V0 {
        // V0 has one encoding for each value.
        assert_eq!(attestation.encode_v0().expect("came from V0"), bytes);
    }
});
