//! Vectors, round trips, truncations and refusals of both encodings.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::AppId;
use crate::vectors::{NITRO_V0, NITRO_V1, bytes};

fn example() -> Attestation {
    let mut report_data = [0_u8; 64];
    for (byte, index) in report_data.iter_mut().zip(0_u8..) {
        *byte = index.wrapping_mul(3);
    }
    Attestation {
        platform: PlatformEvidence::NitroEnclave { nsm_quote: bytes("8444a1007f80ff") },
        runtime_events: vec![RuntimeEvent::new("app-id", vec![0x11; 20])],
        report_data,
        config: r#"{"os_image_hash":"00"}"#.into(),
        stack: Stack::Dstack,
    }
}

fn decode(input: &[u8]) -> Result<Attestation, Error> {
    VersionedAttestation::decode(input).map(VersionedAttestation::into_attestation)
}

/// Frozen (§13.3): fix the code, not the vector.
#[test]
fn encodings_are_frozen() {
    assert_eq!(example().encode_v0().unwrap(), bytes(NITRO_V0));
    assert_eq!(example().encode_v1().unwrap(), bytes(NITRO_V1));
    for (vector, version) in [(NITRO_V0, Version::V0), (NITRO_V1, Version::V1)] {
        let decoded = VersionedAttestation::decode(&bytes(vector)).unwrap();
        assert_eq!((decoded.version(), decoded.attestation()), (version, &example()));
    }
}

/// Frozen (§13.3): fix the code, not the vector.
#[test]
fn minimal_encodings_are_frozen() {
    let minimal = Attestation {
        platform: PlatformEvidence::NitroEnclave { nsm_quote: vec![1, 2, 3] },
        runtime_events: vec![],
        report_data: [0; 64],
        config: String::new(),
        stack: Stack::Dstack,
    };
    let zeros = "00".repeat(64);
    let v0 = bytes(&format!("00020c01020300{zeros}00"));
    assert_eq!(v0.len(), 72);
    let v1 = bytes(&format!(
        "83a776657273696f6e01a8706c6174666f726d82a46b696e64ad6e6974726f2d656e636c617665a46461746181a96e736d5f71756f7465\
         93010203a5737461636b82a46b696e64a664737461636ba46461746183ab7265706f72745f64617461dc0040{zeros}\
         ae72756e74696d655f6576656e747390a6636f6e666967a0"
    ));
    assert_eq!(minimal.encode_v0().unwrap(), v0);
    assert_eq!(minimal.encode_v1().unwrap(), v1);
    assert_eq!((decode(&v0).unwrap(), decode(&v1).unwrap()), (minimal.clone(), minimal));
}

#[test]
fn every_truncation_is_rejected() {
    for whole in [bytes(NITRO_V0), bytes(NITRO_V1)] {
        assert_eq!(decode(&[]), Err(Error::Empty));
        for len in 1..whole.len() {
            let error = decode(&whole[..len]).unwrap_err();
            assert!(matches!(error, Error::Truncated { .. }), "a prefix of {len} bytes: {error}");
        }
        assert_eq!(decode(&[whole, vec![0]].concat()), Err(Error::TrailingBytes { left: 1 }));
    }
}

#[test]
fn first_bytes_of_no_version_are_refused() {
    for first in [0x01, 0x7F, 0x90, 0xA0, 0xC0, 0xDC, 0xE0, 0xFF] {
        assert_eq!(decode(&[first, 0, 0]), Err(Error::UnknownVersion(first)));
    }
    assert_eq!(decode(&vec![0; MAX_LEN + 1]), Err(Error::TooLong(MAX_LEN + 1)));
}

#[test]
fn lengths_beyond_the_input_are_refused_before_allocation() {
    let zeros = [0; 200];
    let cases: [(&str, &[u8]); 8] = [
        ("V0 quote of 1 GiB", &[0, 2, 0xFE, 0xFF, 0xFF, 0xFF]),
        ("V0 quote in the big form", &[0, 2, 0x03, 0, 0, 0, 0x40]),
        ("V0 with 2^30-1 events", &[0, 2, 0, 0xFE, 0xFF, 0xFF, 0xFF]),
        ("V0 with 2^30-1 TDX events", &[0, 0, 0, 0xFE, 0xFF, 0xFF, 0xFF]),
        ("V1 of 2^32-1 pairs", &[0xDF, 0xFF, 0xFF, 0xFF, 0xFF]),
        ("V1 unknown array of 2^32-1", &[0x81, 0xA1, b'x', 0xDD, 0xFF, 0xFF, 0xFF, 0xFF]),
        ("V1 unknown map of 2^32-1", &[0x81, 0xA1, b'x', 0xDF, 0xFF, 0xFF, 0xFF, 0xFF]),
        ("V1 unknown extension of 4 GiB", &[0x81, 0xA1, b'x', 0xC9, 0xFF, 0xFF, 0xFF, 0xFF, 0]),
    ];
    for (what, head) in cases {
        let error = decode(&[head, &zeros].concat()).unwrap_err();
        assert!(matches!(error, Error::Truncated { .. }), "{what}: {error}");
    }
}

#[test]
fn overlong_compact_lengths_are_refused() {
    for quote in [vec![0x05, 0x00, 0xAA], vec![0x06, 0x00, 0x00, 0x00, 0xAA]] {
        let input = [vec![0, 2], quote, vec![0; 66]].concat();
        assert_eq!(decode(&input), Err(Error::Invalid { what: "nsm_quote" }));
    }
}

/// A V1 encoding with parts replaced.
struct V1Parts {
    version: Vec<u8>,
    kind: &'static str,
    data: Vec<u8>,
    stack_kind: &'static str,
    stack_data: Vec<u8>,
}

impl V1Parts {
    fn good() -> Self {
        let mut data = MsgpackWriter::default();
        data.map(1);
        data.str("nsm_quote");
        data.bin(&[1, 2, 3]);
        Self {
            version: vec![1],
            kind: "nitro-enclave",
            data: data.out,
            stack_kind: "dstack",
            stack_data: Self::stack(64, "config"),
        }
    }

    /// Stack data in another order than upstream's, with an unknown key.
    fn stack(report_data: usize, config_key: &str) -> Vec<u8> {
        let mut stack = MsgpackWriter::default();
        stack.map(4);
        stack.str("unknown");
        stack.array(2);
        stack.nil();
        stack.bin(&[1]);
        stack.str(config_key);
        stack.str("{}");
        stack.str("runtime_events");
        stack.array(0);
        stack.str("report_data");
        stack.bin(&vec![7; report_data]);
        stack.out
    }

    fn decode(&self) -> Result<Attestation, Error> {
        let mut writer = MsgpackWriter::default();
        writer.map(3);
        for (key, kind, data) in
            [("stack", self.stack_kind, &self.stack_data), ("platform", self.kind, &self.data)]
        {
            writer.str(key);
            writer.map(2);
            writer.str("data");
            writer.out.extend(data);
            writer.str("kind");
            writer.str(kind);
        }
        writer.str("version");
        writer.out.extend(&self.version);
        decode(&writer.out)
    }
}

#[test]
fn v1_takes_any_key_order_bin_for_numbers_and_unknown_keys() {
    let attestation = V1Parts::good().decode().unwrap();
    assert_eq!(attestation.platform.nsm_quote(), Some([1, 2, 3].as_slice()));
    assert_eq!((attestation.report_data, attestation.config.as_str()), ([7; 64], "{}"));
}

#[test]
fn v1_refusals_are_named() {
    let good = V1Parts::good;
    let mut twice = MsgpackWriter::default();
    twice.map(2);
    for _ in 0..2 {
        twice.str("nsm_quote");
        twice.bin(&[1]);
    }
    let mut text_quote = MsgpackWriter::default();
    text_quote.map(1);
    text_quote.str("nsm_quote");
    text_quote.str("AQID");
    let mut wide_numbers = MsgpackWriter::default();
    wide_numbers.map(1);
    wide_numbers.str("nsm_quote");
    wide_numbers.array(1);
    wide_numbers.u32(256);
    let mut deep = MsgpackWriter::default();
    deep.map(1);
    deep.str("x");
    deep.out.extend([0x91; 40]);
    deep.nil();
    let cases = [
        (V1Parts { version: vec![2], ..good() }, Error::UnsupportedVersion { what: "version", actual: 2 }),
        (V1Parts { version: vec![0xFF], ..good() }, Error::WrongType { what: "version", marker: 0xFF }),
        (V1Parts { kind: "sgx", ..good() }, Error::UnknownName { what: "platform.kind" }),
        (V1Parts { kind: "tdx", ..good() }, Error::MissingKey { key: "quote" }),
        (V1Parts { stack_kind: "other", ..good() }, Error::UnknownName { what: "stack.kind" }),
        (V1Parts { stack_kind: "dstack-pod", ..good() }, Error::MissingKey { key: "report_data_payload" }),
        (V1Parts { stack_data: V1Parts::stack(63, "config"), ..good() }, Error::ReportDataLength(63)),
        (V1Parts { stack_data: V1Parts::stack(64, "konfig"), ..good() }, Error::MissingKey { key: "config" }),
        (V1Parts { data: twice.out, ..good() }, Error::DuplicateKey { key: "nsm_quote" }),
        (V1Parts { data: text_quote.out, ..good() }, Error::WrongType { what: "nsm_quote", marker: 0xA4 }),
        (V1Parts { data: wide_numbers.out, ..good() }, Error::Invalid { what: "nsm_quote" }),
        (V1Parts { data: deep.out, ..good() }, Error::TooDeep(16)),
    ];
    for (parts, expected) in cases {
        assert_eq!(parts.decode(), Err(expected));
    }
}

#[test]
fn v0_has_no_place_for_pods_and_new_events() {
    let pod = Attestation { stack: Stack::DstackPod { report_data_payload: "x".into() }, ..example() };
    assert_eq!(pod.encode_v0(), Err(Error::NotInV0 { what: "the payload of a pod" }));
    let mut new_event = example();
    new_event.runtime_events[0].version = 2;
    assert_eq!(new_event.encode_v0(), Err(Error::NotInV0 { what: "events of version 2" }));
}

#[test]
fn the_first_app_id_before_system_ready_counts() {
    let event = |name: &str, byte| RuntimeEvent::new(name, vec![byte; 20]);
    let with = |runtime_events| Attestation { runtime_events, ..example() };
    let two =
        with(vec![event("app-id", 1), event("app-id", 2), event("instance-id", 3), event("key-provider", 4)]);
    assert_eq!(two.app_id(), [1; 20]);
    assert_eq!((two.instance_id(), two.key_provider()), ([3; 20].as_slice(), [4; 20].as_slice()));
    let late = with(vec![event("system-ready", 0), event("app-id", 1)]);
    assert_eq!(late.app_id(), b"");
}

#[test]
fn a_nitro_clients_attestation_is_upstreams() {
    let hash = [0xAB; 32];
    let app = AppId::new([0x11; 20]);
    let attestation = Attestation::nitro(vec![1], Some(&app), [2; 64], &hash);
    assert_eq!(attestation.config, format!(r#"{{"os_image_hash":"{}"}}"#, "ab".repeat(32)));
    assert_eq!(attestation.app_id(), app.as_bytes());
    assert_eq!(Config::effective("", &attestation.config).unwrap().os_image_hash, hash);
    assert!(Attestation::nitro(vec![1], None, [2; 64], &hash).runtime_events.is_empty());
}

#[test]
fn the_requests_configuration_comes_first_and_0x_is_refused() {
    let embedded = r#"{"os_image_hash":"aa"}"#;
    assert_eq!(Config::effective(r#"{"os_image_hash":"bb"}"#, embedded).unwrap().os_image_hash, [0xBB]);
    assert_eq!(Config::effective("", embedded).unwrap().os_image_hash, [0xAA]);
    assert_eq!(Config::effective("", "").unwrap(), Config::default());
    // A wrapper is not unwrapped: the hash inside it is not seen.
    assert_eq!(Config::effective(r#"{"vm_config":"{}"}"#, embedded).unwrap(), Config::default());
    for refused in [r#"{"os_image_hash":"0xaa"}"#, "{", "7"] {
        let error = Config::effective(refused, embedded).unwrap_err();
        assert_eq!(error.to_string(), "VM configuration does not parse", "{refused}");
    }
}

/// The corpus of the fuzz target, so that stable builds replay it.
#[test]
fn the_fuzz_corpus_decodes_as_named() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/versioned_attestation");
    let mut seen = 0;
    for entry in std::fs::read_dir(corpus).unwrap() {
        let path = entry.unwrap().path();
        let input = std::fs::read(&path).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        let decoded = VersionedAttestation::decode(&input);
        match name.split('_').next() {
            Some("v0") => assert_eq!(decoded.unwrap().attestation().encode_v0().unwrap(), input, "{name}"),
            Some("v1") => {
                let attestation = decoded.unwrap().into_attestation();
                assert_eq!(decode(&attestation.encode_v1().unwrap()).unwrap(), attestation, "{name}");
            }
            Some("bad") => assert!(decoded.is_err(), "{name}"),
            _ => panic!("{name} says neither v0, v1 nor bad"),
        }
        seen += 1;
    }
    assert!(seen >= 11, "only {seen} files in the corpus");
}

/// A real document inside, from the fixtures kept beside the project.
#[test]
fn real_documents_survive_both_encodings() {
    let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/fixtures/nitro");
    let Ok(entries) = std::fs::read_dir(fixtures) else {
        println!("skipped: {fixtures} is not there");
        return;
    };
    for entry in entries {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "bin") {
            continue;
        }
        let attestation = Attestation::nitro(std::fs::read(&path).unwrap(), None, [9; 64], &[1; 32]);
        assert_eq!(decode(&attestation.encode_v0().unwrap()).unwrap(), attestation);
        assert_eq!(decode(&attestation.encode_v1().unwrap()).unwrap(), attestation);
    }
}

fn blob() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..300)
}

fn tdx() -> impl Strategy<Value = TdxEvidence> {
    let event = (any::<u32>(), any::<u32>(), blob(), ".{0,20}", blob()).prop_map(
        |(imr, event_type, digest, event, event_payload)| TdxEvent {
            imr,
            event_type,
            digest,
            event,
            event_payload,
        },
    );
    (blob(), vec(event, 0..20)).prop_map(|(quote, event_log)| TdxEvidence { quote, event_log })
}

fn tpm_quote() -> impl Strategy<Value = TpmQuote> {
    let platform = prop_oneof![
        Just(TpmPlatform::Dstack),
        Just(TpmPlatform::Gcp),
        Just(TpmPlatform::NitroEnclave),
        Just(TpmPlatform::AwsEc2)
    ];
    let pcr = (any::<u32>(), "[a-z0-9]{0,8}", blob()).prop_map(|(index, algorithm, value)| PcrValue {
        index,
        algorithm,
        value,
    });
    let event = (any::<u32>(), blob()).prop_map(|(pcr_index, digest)| TpmEvent { pcr_index, digest });
    (blob(), blob(), vec(pcr, 0..5), blob(), platform, vec(event, 0..5)).prop_map(
        |(message, signature, pcr_values, ak_cert, platform, event_log)| TpmQuote {
            message,
            signature,
            pcr_values,
            ak_cert,
            platform,
            event_log,
        },
    )
}

fn platform() -> impl Strategy<Value = PlatformEvidence> {
    prop_oneof![
        blob().prop_map(|nsm_quote| PlatformEvidence::NitroEnclave { nsm_quote }),
        blob().prop_map(|attestation_doc| PlatformEvidence::AwsNitroTpm { attestation_doc }),
        tdx().prop_map(PlatformEvidence::Tdx),
        (tdx(), tpm_quote()).prop_map(|(tdx, tpm)| PlatformEvidence::GcpTdx(tdx, tpm)),
        (blob(), vec(blob(), 0..4), ".{0,40}").prop_map(|(report, cert_chain, mr_config)| {
            PlatformEvidence::SevSnp { report, cert_chain, mr_config }
        }),
    ]
}

prop_compose! {
    fn attestations()(
        platform in platform(),
        events in vec((".{0,20}", blob(), 1_u8..=2), 0..20),
        report_data in vec(any::<u8>(), 64),
        config in ".{0,80}",
        payload in proptest::option::of(".{0,20}"),
    ) -> Attestation {
        Attestation {
            platform,
            runtime_events: events
                .into_iter()
                .map(|(event, payload, version)| RuntimeEvent { event, payload, version })
                .collect(),
            report_data: report_data.try_into().unwrap(),
            config,
            stack: payload.map_or(Stack::Dstack, |report_data_payload| Stack::DstackPod { report_data_payload }),
        }
    }
}

proptest! {
    #[test]
    fn v1_round_trips(attestation in attestations()) {
        prop_assert_eq!(decode(&attestation.encode_v1().unwrap()).unwrap(), attestation);
    }

    #[test]
    fn v0_round_trips(mut attestation in attestations()) {
        attestation.stack = Stack::Dstack;
        attestation.runtime_events.iter_mut().for_each(|event| event.version = 1);
        let encoded = attestation.encode_v0().unwrap();
        prop_assert_eq!(decode(&encoded).unwrap(), attestation);
    }

    #[test]
    fn arbitrary_bytes_never_panic(input in vec(any::<u8>(), 0..2000), first in prop_oneof![Just(0_u8), 0x80..0x90_u8]) {
        let _ = decode(&[vec![first], input].concat());
    }
}
