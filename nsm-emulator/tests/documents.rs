//! Documents under the production verifier, with the emulator's root in the place of AWS's.

#![expect(clippy::unwrap_used, reason = "a test stops where something is wrong")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use attestation::{Pcr, PcrIndex, Policy, TrustAnchor, UnixMillis, VerifiedDocument, Verifier};
use nsm_emulator::{Config, Emulator};

/// 2026-01-01T00:00:00Z in milliseconds.
const NEW_YEAR: u64 = 1_767_225_600_000;
const HOUR: u64 = 3_600_000;

/// An emulator whose clock the test moves.
fn clocked(config: Config) -> (Emulator, Arc<AtomicU64>) {
    let now = Arc::new(AtomicU64::new(NEW_YEAR));
    let read = Arc::clone(&now);
    let clock = Arc::new(move || read.load(Ordering::SeqCst));
    (Emulator::new(Config { clock, ..config }).unwrap(), now)
}

/// A document with 64 bytes of user data, no nonce and no key.
fn document(emulator: &Emulator) -> Vec<u8> {
    let mut request = b"\xa1\x6bAttestation\xa3\x69user_data\x58\x40".to_vec();
    request.extend([0xaa; 64]);
    request.extend(b"\x65nonce\xf6\x6apublic_key\xf6");
    let response = emulator.process(&request);
    let head = b"\xa1\x6bAttestation\xa1\x68document\x59";
    assert!(response.starts_with(head), "{response:02x?}");
    response[head.len() + 2..].to_vec()
}

fn verify(emulator: &Emulator, document: &[u8], now: u64) -> Result<VerifiedDocument, attestation::Error> {
    let root = TrustAnchor::from_pem(&emulator.root_pem()).unwrap();
    assert_eq!(root.as_der(), emulator.root_der());
    Verifier::new(root).verify(document, UnixMillis(now))
}

#[test]
fn documents_verify_under_the_emulators_root() {
    let (emulator, _) = clocked(Config::default());
    let verified = verify(&emulator, &document(&emulator), NEW_YEAR).unwrap();
    assert_eq!(verified.module_id(), emulator.module_id());
    assert_eq!(verified.timestamp(), UnixMillis(NEW_YEAR));
    assert_eq!(
        (verified.user_data(), verified.nonce(), verified.public_key()),
        (Some([0xaa; 64].as_slice()), None, None)
    );
    let indices: Vec<u8> = verified.pcrs().map(|(index, _)| index.get()).collect();
    assert_eq!(indices, (0..16).collect::<Vec<_>>());
    let [zero, one, two] = [0xa0, 0xa1, 0xa2].map(|byte| Pcr::new([byte; 48]));
    verified.appraise(&Policy::for_image(zero, one, two).with_user_data(&[0xaa; 64])).unwrap();
}

#[test]
fn documents_verify_under_a_root_that_was_kept() {
    let directory = tempfile::tempdir().unwrap();
    let anchor = nsm_emulator::LocalRoot::open(directory.path()).unwrap().pem();
    let found = nsm_emulator::LocalRoot::open(directory.path()).unwrap();
    let emulator = Emulator::with_root(&found, Config { clock: Arc::new(|| NEW_YEAR), ..Config::default() });
    let document = document(&emulator.unwrap());
    let verifier = Verifier::new(TrustAnchor::from_pem(&anchor).unwrap());
    verifier.verify(&document, UnixMillis(NEW_YEAR)).unwrap();
}

#[test]
fn documents_do_not_verify_under_another_root() {
    let (emulator, _) = clocked(Config::default());
    let document = document(&emulator);
    let aws = Verifier::new(TrustAnchor::aws_nitro_g1()).verify(&document, UnixMillis(NEW_YEAR));
    assert!(aws.is_err());
    let (other, _) = clocked(Config::default());
    assert!(verify(&other, &document, NEW_YEAR).is_err());
}

#[test]
fn documents_have_the_shape_of_real_ones() {
    let (emulator, _) = clocked(Config::default());
    let document = document(&emulator);
    // Untagged, ES384 in the protected header, empty unprotected header, a payload with an indefinite-length map.
    assert!(document.starts_with(b"\x84\x44\xa1\x01\x38\x22\xa0\x59"));
    assert!(document[10..].starts_with(b"\xbf\x69module_id\x78\x27i-"), "{:02x?}", &document[..30]);
    let keys: [&[u8]; 9] = [
        b"\x69module_id",
        b"\x66digest\x66SHA384",
        b"\x69timestamp\x1b",
        b"\x64pcrs\xb0\x00\x58\x30",
        b"\x6bcertificate\x59",
        b"\x68cabundle\x84\x59",
        b"\x6apublic_key\xf6",
        b"\x69user_data\x58\x40",
        b"\x65nonce\xf6\xff\x58\x60",
    ];
    let positions = keys.map(|key| document.windows(key.len()).position(|window| window == key).unwrap());
    assert!(positions.is_sorted(), "{positions:?}");
    assert_eq!(document.len(), positions[8] + keys[8].len() + 96);
}

#[test]
fn a_leaf_is_renewed_before_it_ends_and_when_the_clock_goes_back() {
    let (emulator, clock) = clocked(Config::default());
    let leaf = |now: u64| {
        clock.store(now, Ordering::SeqCst);
        verify(&emulator, &document(&emulator), now).unwrap().certificate().to_vec()
    };
    let first = leaf(NEW_YEAR);
    assert_eq!(leaf(NEW_YEAR + 2 * HOUR), first);
    let second = leaf(NEW_YEAR + 3 * HOUR);
    assert_ne!(second, first);
    // A month later nothing below the root is valid any more.
    let third = leaf(NEW_YEAR + 30 * 24 * HOUR);
    assert_ne!(third, second);
    assert_ne!(leaf(NEW_YEAR), third);
}

#[test]
fn documents_grow_stale() {
    let (emulator, _) = clocked(Config::default());
    let document = document(&emulator);
    verify(&emulator, &document, NEW_YEAR + HOUR).unwrap();
    assert!(verify(&emulator, &document, NEW_YEAR + HOUR + 1000).is_err());
    assert!(verify(&emulator, &document, NEW_YEAR - 301_000).is_err());
}

#[test]
fn registers_locked_later_appear_in_documents() {
    let (emulator, _) = clocked(Config::default());
    assert!(
        emulator
            .process(b"\xa1\x69ExtendPCR\xa2\x65index\x10\x64data\x41x")
            .starts_with(b"\xa1\x69ExtendPCR")
    );
    let sixteen = PcrIndex::new(16).unwrap();
    assert!(verify(&emulator, &document(&emulator), NEW_YEAR).unwrap().pcr(sixteen).is_none());
    assert_eq!(emulator.process(b"\xa1\x67LockPCR\xa1\x65index\x10"), b"\x67LockPCR");
    assert!(!verify(&emulator, &document(&emulator), NEW_YEAR).unwrap().pcr(sixteen).unwrap().is_zero());
}

#[test]
fn zero_measurements_are_a_debug_enclave() {
    let (emulator, _) = clocked(Config { pcrs: [].into(), ..Config::default() });
    let verified = verify(&emulator, &document(&emulator), NEW_YEAR).unwrap();
    assert!(verified.is_debug());
    assert!(verified.appraise(&Policy::any_image_that_caller_authorises()).is_err());
}
