//! The commands as the driver's own crate writes and reads them, and every way they are refused.

#![expect(clippy::unwrap_used, reason = "a test stops where something is wrong")]

use aws_nitro_enclaves_nsm_api::api::{Digest, ErrorCode, Request, Response};
use nsm_emulator::{Config, Emulator, MAX_REQUEST, MAX_RESPONSE};
use serde_bytes::ByteBuf;
use sha2::{Digest as _, Sha384};
use std::sync::Arc;

fn emulator() -> Emulator {
    Emulator::new(Config::default()).unwrap()
}

fn encode(request: &Request) -> Vec<u8> {
    let mut bytes = Vec::new();
    ciborium::into_writer(request, &mut bytes).unwrap();
    bytes
}

fn ask(emulator: &Emulator, request: &Request) -> Response {
    let response = emulator.process(&encode(request));
    assert!(response.len() <= MAX_RESPONSE);
    ciborium::from_reader(response.as_slice()).unwrap()
}

/// The error code's name in the answer to raw bytes; panics on any other answer.
fn refusal(emulator: &Emulator, request: &[u8]) -> String {
    error_name(&emulator.process(request))
}

fn error_name(response: &[u8]) -> String {
    match ciborium::from_reader(response).unwrap() {
        Response::Error(code) => format!("{code:?}"),
        other => panic!("expected an error, got {other:?}"),
    }
}

fn attestation(user_data: Option<&[u8]>, nonce: Option<&[u8]>, public_key: Option<&[u8]>) -> Request {
    let owned = |bytes: Option<&[u8]>| bytes.map(|bytes| ByteBuf::from(bytes.to_vec()));
    Request::Attestation { user_data: owned(user_data), nonce: owned(nonce), public_key: owned(public_key) }
}

#[test]
fn describes_itself() {
    let emulator = emulator();
    let Response::DescribeNSM { version_major, module_id, max_pcrs, locked_pcrs, digest, .. } =
        ask(&emulator, &Request::DescribeNSM)
    else {
        panic!("not a description");
    };
    assert_eq!((version_major, max_pcrs, digest), (1, 32, Digest::SHA384));
    assert_eq!(module_id, emulator.module_id());
    assert_eq!(locked_pcrs.into_iter().collect::<Vec<_>>(), (0..16).collect::<Vec<_>>());
}

#[test]
fn extending_hashes_the_old_value_and_the_data() {
    let emulator = emulator();
    let mut expected = vec![0; 48];
    for data in [b"first".as_slice(), b"", &[7; 3000]] {
        expected = Sha384::new().chain_update(&expected).chain_update(data).finalize().to_vec();
        match ask(&emulator, &Request::ExtendPCR { index: 16, data: data.to_vec() }) {
            Response::ExtendPCR { data } => assert_eq!(data, expected),
            other => panic!("{other:?}"),
        }
    }
    match ask(&emulator, &Request::DescribePCR { index: 16 }) {
        Response::DescribePCR { lock, data } => assert_eq!((lock, data), (false, expected)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn locking_is_final() {
    let emulator = emulator();
    assert!(matches!(ask(&emulator, &Request::LockPCR { index: 20 }), Response::LockPCR));
    for request in [Request::LockPCR { index: 20 }, Request::ExtendPCR { index: 20, data: vec![1] }] {
        assert!(matches!(ask(&emulator, &request), Response::Error(ErrorCode::ReadOnlyIndex)), "{request:?}");
    }
    // A range may cover registers that are locked already; it does not include its end.
    assert!(matches!(ask(&emulator, &Request::LockPCRs { range: 22 }), Response::LockPCRs));
    let locked = |index| match ask(&emulator, &Request::DescribePCR { index }) {
        Response::DescribePCR { lock, .. } => lock,
        other => panic!("{other:?}"),
    };
    assert!(locked(21));
    assert!(!locked(22));
    assert!(matches!(ask(&emulator, &Request::LockPCRs { range: 32 }), Response::LockPCRs));
    assert!(locked(31));
}

#[test]
fn the_measured_registers_cannot_be_extended() {
    let emulator = emulator();
    for index in 0..16 {
        let answer = ask(&emulator, &Request::ExtendPCR { index, data: vec![1] });
        assert!(matches!(answer, Response::Error(ErrorCode::ReadOnlyIndex)), "PCR{index}: {answer:?}");
    }
}

#[test]
fn random_bytes_differ() {
    let emulator = emulator();
    let random = || match ask(&emulator, &Request::GetRandom) {
        Response::GetRandom { random } => random,
        other => panic!("{other:?}"),
    };
    let first = random();
    assert_eq!(first.len(), 256);
    assert_ne!(first, random());
}

#[test]
fn registers_outside_the_bank_are_refused() {
    let emulator = emulator();
    for request in [
        Request::DescribePCR { index: 32 },
        Request::ExtendPCR { index: u16::MAX, data: vec![] },
        Request::LockPCR { index: 32 },
        Request::LockPCRs { range: 33 },
    ] {
        assert!(matches!(ask(&emulator, &request), Response::Error(ErrorCode::InvalidIndex)), "{request:?}");
    }
    // Wider than the driver's own type.
    let wide = b"\xa1\x6bDescribePCR\xa1\x65index\x1b\xff\xff\xff\xff\xff\xff\xff\xff";
    assert_eq!(refusal(&emulator, wide), "InvalidIndex");
}

#[test]
fn lengths_are_limited() {
    let emulator = emulator();
    let longest = attestation(Some(&[1; 512]), Some(&[2; 512]), Some(&[3; 1024]));
    assert!(matches!(ask(&emulator, &longest), Response::Attestation { .. }));
    for request in [
        attestation(Some(&[1; 513]), None, None),
        attestation(None, Some(&[1; 513]), None),
        attestation(None, None, Some(&[1; 1025])),
    ] {
        assert!(matches!(ask(&emulator, &request), Response::Error(ErrorCode::InputTooLarge)), "{request:?}");
    }
    let empty_key = attestation(None, None, Some(&[]));
    assert!(matches!(ask(&emulator, &empty_key), Response::Error(ErrorCode::InvalidArgument)));
    assert_eq!(refusal(&emulator, &vec![0; MAX_REQUEST + 1]), "InputTooLarge");
}

#[test]
fn an_answer_larger_than_the_buffer_is_refused() {
    let emulator = emulator();
    let request = encode(&attestation(None, None, None));
    assert_eq!(error_name(&emulator.process_within(&request, 100)), "BufferTooSmall");
}

#[test]
fn malformed_requests_are_refused_by_name() {
    let cases: &[(&str, &[u8], &str)] = &[
        ("nothing", b"", "InvalidArgument"),
        ("a number", b"\x01", "InvalidArgument"),
        ("an unknown command", b"\x66Reboot", "InvalidOperation"),
        ("an unknown command with arguments", b"\xa1\x66Reboot\xa0", "InvalidOperation"),
        ("a command in lower case", b"\x6bdescribensm", "InvalidOperation"),
        ("arguments where none belong", b"\xa1\x6bDescribeNSM\xa0", "InvalidArgument"),
        ("no arguments where some belong", b"\x6bDescribePCR", "InvalidArgument"),
        ("a missing argument", b"\xa1\x6bDescribePCR\xa0", "InvalidArgument"),
        ("an unknown argument", b"\xa1\x6bDescribePCR\xa1\x65indox\x00", "InvalidArgument"),
        ("another command's argument", b"\xa1\x6bDescribePCR\xa1\x65range\x00", "InvalidArgument"),
        ("an argument twice", b"\xa1\x69ExtendPCR\xa2\x65index\x10\x65index\x10", "InvalidArgument"),
        ("a negative index", b"\xa1\x6bDescribePCR\xa1\x65index\x20", "InvalidArgument"),
        ("an index as text", b"\xa1\x6bDescribePCR\xa1\x65index\x610", "InvalidArgument"),
        ("data as text", b"\xa1\x69ExtendPCR\xa2\x65index\x10\x64data\x61x", "InvalidArgument"),
        ("data as an array", b"\xa1\x69ExtendPCR\xa2\x65index\x10\x64data\x81\x01", "InvalidArgument"),
        ("data in pieces", b"\xa1\x69ExtendPCR\xa2\x65index\x10\x64data\x5f\x41x\xff", "InvalidArgument"),
        ("two commands", b"\xa2\x67LockPCR\xa1\x65index\x10\x67LockPCR\xa1\x65index\x11", "InvalidArgument"),
        ("a map without end", b"\xbf\x67LockPCR\xa1\x65index\x10\xff", "InvalidArgument"),
        ("bytes after the end", b"\x6bDescribeNSM\x00", "InvalidArgument"),
        ("a string longer than the request", b"\x7b\x7f\xff\xff\xff\xff\xff\xff\xffx", "InvalidArgument"),
        ("2^63 arguments", b"\xa1\x67LockPCR\xbb\x80\x00\x00\x00\x00\x00\x00\x00", "InvalidArgument"),
        ("text that is not UTF-8", b"\x62\xff\xfe", "InvalidArgument"),
        ("a tag", b"\xc0\x6bDescribeNSM", "InvalidArgument"),
    ];
    let emulator = emulator();
    for (name, request, expected) in cases {
        assert_eq!(refusal(&emulator, request), *expected, "{name}");
    }
}

#[test]
fn every_truncation_is_rejected() {
    let emulator = emulator();
    for request in [
        Request::ExtendPCR { index: 16, data: vec![1, 2, 3] },
        Request::LockPCRs { range: 20 },
        attestation(Some(b"user data"), None, Some(b"key")),
    ] {
        let whole = encode(&request);
        for length in 0..whole.len() {
            let name = refusal(&emulator, &whole[..length]);
            assert!(name == "InvalidArgument" || name == "InvalidOperation", "{length} bytes: {name}");
        }
    }
}

#[test]
fn impossible_configurations_are_refused() {
    let with_pcr = |index| Emulator::new(Config { pcrs: [(index, [1; 48])].into(), ..Config::default() });
    assert!(with_pcr(31).is_ok());
    assert!(matches!(with_pcr(32), Err(nsm_emulator::Error::PcrIndex { index: 32 })));
    for module_id in ["", "i-", "i-12", "i-12-enc", "x-12-enc34", "i-12-enc34z", &format!("i-{:064}-enc1", 0)]
    {
        let config = Config { module_id: Some(module_id.to_owned()), ..Config::default() };
        assert!(matches!(Emulator::new(config), Err(nsm_emulator::Error::ModuleId { .. })), "{module_id:?}");
    }
    for millis in [0, 1_577_836_799_000, 2_524_521_600_000, u64::MAX] {
        let config = Config { clock: Arc::new(move || millis), ..Config::default() };
        assert!(matches!(Emulator::new(config), Err(nsm_emulator::Error::Clock { .. })), "{millis}");
    }
}

proptest::proptest! {
    #[test]
    fn any_bytes_have_an_answer(mut request in proptest::collection::vec(proptest::num::u8::ANY, 0..200), at: usize) {
        let emulator = EMULATOR.get_or_init(emulator);
        let answer: Response = ciborium::from_reader(emulator.process(&request).as_slice()).unwrap();
        proptest::prop_assert!(matches!(answer, Response::Error(_)));
        // Bytes near a good request reach further into the decoder.
        let good = encode(&attestation(Some(b"user data"), None, Some(b"key")));
        let at = at % good.len();
        request.truncate(4);
        let mutant = [&good[..at], &request, &good[at..]].concat();
        let _answer: Response = ciborium::from_reader(emulator.process(&mutant).as_slice()).unwrap();
    }
}

/// Making a chain of certificates for every case would take most of the time.
static EMULATOR: std::sync::OnceLock<Emulator> = std::sync::OnceLock::new();
