//! Who gets keys, which keys, and everybody who does not.

#![expect(clippy::unwrap_used, reason = "a test stops where something is wrong")]

mod common;

use std::sync::Arc;

use attestation::UnixMillis;
use common::{APP, Ask, World, ask_kms};
use kms_protocol::attestation_encoding::{Attestation, PlatformEvidence, RuntimeEvent, TdxEvidence};
use kms_protocol::derive::P256Scalar;
use kms_protocol::report_data;
use kms_protocol::wire::AppKeyResponse;
use kms_server::{Config, Server};
use nsm_emulator::{Config as EmulatorConfig, Emulator, system_clock};
use prost::Message as _;
use ratls::issue::{self, KeyPair};

/// Root keys of the frozen vectors (reference §13).
const ROOT_SCALAR: &str = "f57527cea4ab7ffb49af99b158cdc0e3ec06398f528349ea236b7d2afe19cec1";

/// A world whose KMS has the root keys of the frozen vectors, and answers at `seconds` if given.
async fn frozen(seconds: Option<u64>) -> World {
    let directory = tempfile::tempdir().unwrap();
    let certs = directory.path().join("certs");
    std::fs::create_dir(&certs).unwrap();
    let scalar = P256Scalar::from_slice(&hex::decode(ROOT_SCALAR).unwrap()).unwrap();
    let der = scalar.to_pkcs8().unwrap();
    let pem = pem_rfc7468::encode_string("PRIVATE KEY", pem_rfc7468::LineEnding::LF, der.as_slice()).unwrap();
    std::fs::write(certs.join("root-ca.key"), pem).unwrap();
    std::fs::write(certs.join("root-k256.key"), [0x42; 32]).unwrap();
    let more = common::policy(&directory);
    match seconds {
        None => World::with(directory, &more).await,
        Some(seconds) => {
            let emulator = Emulator::new(EmulatorConfig::default()).unwrap();
            let config: Config = common::settings(&directory, &emulator, &more);
            let clock = Arc::new(move || UnixMillis::from_secs(seconds));
            let kms = Server::start_at(config, clock).await.unwrap();
            World { kms, emulator, directory }
        }
    }
}

/// Frozen (reference §13.1): fix the code, not the vector.
#[tokio::test]
async fn keys_are_the_frozen_ones() {
    let world = frozen(None).await;
    assert_eq!(
        hex::encode(world.kms.k256_public_key()),
        "0324653eac434488002cc06bbfb7f10fe18991e35f9fe4302dbea6d2353dc0ab1c"
    );
    let certificate = world.certificate().await;
    let told = world.app_key(&certificate).await;
    assert_eq!(told.status, 200, "{told:?}");
    let keys = told.json();
    for (name, expected) in [
        ("disk_crypt_key", "14de7a7fd8bddf8e641a55ca97f043cac4344d175419f743940840f3a348f049"),
        ("env_crypt_key", "a7470db8cfdd0fe24134b461d60766afa7c078abe6dce9f2c8a5c44034ca400e"),
        ("k256_key", "dae157edc7e9c0c5494a68c940bd24790d019fb47cd0bb22dc828409a0d47579"),
        ("os_image_hash", &hex::encode(common::image())),
        ("ca_cert", world.kms.root_ca_pem()),
        ("gateway_app_id", ""),
        ("tproxy_app_id", ""),
    ] {
        assert_eq!(keys[name], expected, "{name}");
    }
    assert_eq!(keys["k256_signature"].as_str().unwrap().len(), 130);

    let ask = Ask {
        verb: "POST",
        path: "/prpc/GetAppKey",
        headers: &[],
        body: b"\x08\x01",
        certificate: Some(&certificate),
    };
    let told = world.ask(ask).await.unwrap();
    let protobuf = AppKeyResponse::decode(told.body.as_slice()).unwrap();
    assert_eq!(hex::encode(&protobuf.disk_crypt_key), keys["disk_crypt_key"].as_str().unwrap());

    let instance = |mut attestation: Attestation| {
        attestation.runtime_events.push(RuntimeEvent::new("instance-id", [0x33; 20]));
        attestation
    };
    let keys = world.app_key(&world.certificate_with(&world.emulator, instance).await).await.json();
    let disk = "1fef665a1667042d9d3e16305ac19dff2082d4fa6b0d27505bb9e6b7379bb58d";
    assert_eq!(keys["disk_crypt_key"], disk);
}

/// Frozen (reference §13.1): fix the code, not the vector.
#[tokio::test]
async fn the_environment_key_is_the_frozen_one() {
    let world = frozen(Some(1_700_000_000)).await;
    let answer = world.get(&format!("/prpc/GetAppEnvEncryptPubKey?app_id={APP}")).await.json();
    assert_eq!(answer["public_key"], "93cf259f68b24775d54290a8ea57cf93efc994d3ff28a7b8ba7a39e9f512302f");
    assert_eq!(answer["timestamp"], 1_700_000_000);
    let signatures = [
        (
            "signature",
            "cb1dfadae72b96ccd640f57c930c69957fc4e0efe38eb3e75c83e37ccf75634a3bf271f7eaf3c623eec729ca62c81f61ad309138dd5b0fe8988a7c818aa661df00",
        ),
        (
            "signature_v1",
            "63a9043a1f3fdf4c76a0a8c84f257c833f0a07c064084b063c2d04ea80d09d112a783a52b3c70a13bdf5571fcea501a1a387930c4cf16d1db2b966e5514d516e01",
        ),
    ];
    for (name, expected) in signatures {
        assert_eq!(answer[name], expected, "{name}");
    }
}

#[tokio::test]
async fn both_encodings_of_evidence_are_read() {
    let world = World::with_policy("").await;
    let key = KeyPair::generate().unwrap();
    let report_data = report_data::ratls_cert(&key.spki_der());
    let document = common::document(&world.emulator, &report_data);
    let attestation = Attestation::nitro(document, Some(&APP), report_data, &common::image());
    let encoded = attestation.encode_v1().unwrap();
    let certificate =
        issue::client_certificate(&key, &encoded, Some(&world.temp_ca().await), common::now()).unwrap();
    assert_eq!(world.app_key(&(certificate, key)).await.status, 200);
}

/// The evidence is bad in itself, so every method refuses it.
#[tokio::test]
async fn evidence_that_does_not_hold_is_refused_before_any_method() {
    let world = World::with_policy("").await;
    let emulator = |pcrs: bool, offset: i64| {
        let mut config = EmulatorConfig { clock: system_clock(offset), ..EmulatorConfig::default() };
        if !pcrs {
            config.pcrs.clear();
        }
        Emulator::new(config).unwrap()
    };
    let same = |attestation: Attestation| attestation;
    let stranger = emulator(true, 0);
    let verification = "invalid quote: NSM attestation verification failed: ";
    let other_data = |mut attestation: Attestation| {
        attestation.report_data = [7; 64];
        attestation
    };
    let other_document = {
        let document = common::document(&world.emulator, &[7; 64]);
        move |mut attestation: Attestation| {
            attestation.platform = PlatformEvidence::NitroEnclave { nsm_quote: document };
            attestation
        }
    };
    let broken = |mut attestation: Attestation| {
        if let PlatformEvidence::NitroEnclave { nsm_quote } = &mut attestation.platform {
            let last = nsm_quote.len() - 1;
            nsm_quote[last] ^= 1;
        }
        attestation
    };
    let tdx = |mut attestation: Attestation| {
        attestation.platform = PlatformEvidence::Tdx(TdxEvidence::default());
        attestation
    };
    let nitro_tpm = |mut attestation: Attestation| {
        attestation.platform = PlatformEvidence::AwsNitroTpm { attestation_doc: Vec::new() };
        attestation
    };
    for (name, certificate, expected) in [
        ("another root", world.certificate_with(&stranger, same).await, verification),
        (
            "report data of another key",
            world.certificate_with(&world.emulator, other_data).await,
            "invalid quote: report data mismatch",
        ),
        (
            "a document for another key",
            world.certificate_with(&world.emulator, other_document).await,
            "invalid quote: NSM user_data does not match report_data",
        ),
        ("a broken signature", world.certificate_with(&world.emulator, broken).await, verification),
        (
            "no TDX quote",
            world.certificate_with(&world.emulator, tdx).await,
            "invalid quote: failed to verify TDX quote: ",
        ),
        (
            "another platform",
            world.certificate_with(&world.emulator, nitro_tpm).await,
            "invalid quote: evidence of platform aws-nitro-tpm is not supported by this KMS",
        ),
    ] {
        for path in ["/prpc/GetAppKey?json", "/prpc/GetMeta?json"] {
            let ask = Ask { verb: "POST", path, headers: &[], body: b"", certificate: Some(&certificate) };
            let told = world.ask(ask).await.unwrap();
            assert_eq!(told.status, 400, "{name}: {told:?}");
            assert!(told.error().starts_with(expected), "{name}: {}", told.error());
        }
    }
    // These need the emulator that the KMS trusts, in another mood.
    for (name, debug, offset, expected) in [
        ("stale", false, -3700, verification),
        ("from the future", false, 400, verification),
        (
            "debug",
            true,
            0,
            "invalid quote: nitro enclave is in debug mode (PCR0/1/2 are zeroed); refusing to verify",
        ),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let emulator = emulator(!debug, offset);
        let more = common::policy(&directory);
        let kms = Server::start(common::settings(&directory, &emulator, &more)).await.unwrap();
        let world = World { kms, emulator, directory };
        let told = world.app_key(&world.certificate().await).await;
        assert_eq!(told.status, 400, "{name}");
        assert!(told.error().starts_with(expected), "{name}: {}", told.error());
    }
}

/// The evidence holds, but does not say what the client says.
#[tokio::test]
async fn claims_are_held_against_the_evidence() {
    type Change = fn(Attestation) -> Attestation;
    let world = World::with_policy("").await;
    let cases: [(&str, Change, &str); 7] = [
        (
            "another image",
            |attestation| Attestation {
                config: format!("{{\"os_image_hash\":\"{}\"}}", "00".repeat(32)),
                ..attestation
            },
            "App not allowed: Failed to verify os image hash: Failed to verify os image hash: os_image_hash mismatch: expected=0000",
        ),
        (
            "no image",
            |attestation| Attestation { config: String::new(), ..attestation },
            "App not allowed: Failed to verify os image hash: Failed to verify os image hash: os_image_hash mismatch: expected=, computed=",
        ),
        (
            "no configuration",
            |attestation| Attestation { config: "[".into(), ..attestation },
            "App not allowed: ",
        ),
        (
            "no app",
            |attestation| Attestation { runtime_events: vec![], ..attestation },
            "App not allowed: app_id must be 20 bytes",
        ),
        (
            "a short app",
            |attestation| Attestation {
                runtime_events: vec![RuntimeEvent::new("app-id", [1; 19])],
                ..attestation
            },
            "App not allowed: app_id must be 20 bytes",
        ),
        (
            "an app after the system is ready",
            |mut attestation| {
                attestation.runtime_events.insert(0, RuntimeEvent::new("system-ready", []));
                attestation
            },
            "App not allowed: app_id must be 20 bytes",
        ),
        (
            "a short instance",
            |mut attestation| {
                attestation.runtime_events.push(RuntimeEvent::new("instance-id", [1; 19]));
                attestation
            },
            "App not allowed: instance_id must be 0 or 20 bytes",
        ),
    ];
    for (name, change, expected) in cases {
        let told = world.app_key(&world.certificate_with(&world.emulator, change).await).await;
        assert_eq!(told.status, 400, "{name}");
        assert!(told.error().starts_with(expected), "{name}: {}", told.error());
    }
}

#[tokio::test]
async fn the_policy_decides() {
    let world = World::with_policy("").await;
    let other_app = |mut attestation: Attestation| {
        attestation.runtime_events = vec![RuntimeEvent::new("app-id", [0x22; 20])];
        attestation
    };
    let told = world.app_key(&world.certificate_with(&world.emulator, other_app).await).await;
    assert_eq!(told.error(), "App not allowed: Boot denied: app not registered");

    let directory = tempfile::tempdir().unwrap();
    let pcrs = (0u8..3).map(|index| (index, [0xb0 + index; 48])).collect();
    let emulator = Emulator::new(EmulatorConfig { pcrs, ..EmulatorConfig::default() }).unwrap();
    let more = common::policy(&directory);
    let kms = Server::start(common::settings(&directory, &emulator, &more)).await.unwrap();
    let changed = World { kms, emulator, directory };
    let told = changed.app_key(&changed.certificate().await).await;
    assert_eq!(told.error(), "App not allowed: Boot denied: compose hash not allowed");

    let closed = World::with_policy("core.nitro_enclave_key_release = false\n").await;
    let told = closed.app_key(&closed.certificate().await).await;
    assert!(told.error().contains("core.nitro_enclave_key_release"), "{told:?}");
}

#[tokio::test]
async fn certificates_of_other_authorities_do_not_pass_the_handshake() {
    let (world, other) = (World::with_policy("").await, World::with_policy("").await);
    let key = KeyPair::generate().unwrap();
    let report_data = report_data::ratls_cert(&key.spki_der());
    let document = common::document(&world.emulator, &report_data);
    let attestation = Attestation::nitro(document, Some(&APP), report_data, &common::image());
    let encoded = attestation.encode_v0().unwrap();
    let foreign =
        issue::client_certificate(&key, &encoded, Some(&other.temp_ca().await), common::now()).unwrap();
    let own = issue::client_certificate(&key, &encoded, None, common::now()).unwrap();
    let key = Arc::new(key);
    for (name, certificate) in [("another KMS's temporary CA", foreign), ("its own", own)] {
        let pair = (certificate, KeyPair::from_pem("client", &key.to_pem()).unwrap());
        let ask = Ask {
            verb: "POST",
            path: "/prpc/GetMeta?json",
            headers: &[],
            body: b"",
            certificate: Some(&pair),
        };
        assert!(ask_kms(&world.kms, ask).await.is_err(), "{name}");
    }
}

#[tokio::test]
async fn the_development_authoriser_is_shown_to_every_client() {
    let directory = tempfile::tempdir().unwrap();
    let more = "core.auth_api.type = \"dev\"\ncore.auth_api.danger_allow_dev = true\n\
                core.nitro_enclave_key_release = true\n";
    let world = World::with(directory, more).await;
    let meta = world.get("/prpc/GetMeta").await.json();
    assert_eq!((&meta["is_dev"], &meta["allow_any_upgrade"]), (&true.into(), &true.into()));
    let keys = world.app_key(&world.certificate().await).await.json();
    assert_eq!((&keys["gateway_app_id"], &keys["tproxy_app_id"]), (&"any".into(), &"any".into()));
}
