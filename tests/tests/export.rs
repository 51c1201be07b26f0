//! What the parent sees: every byte between an agent and its parent is recorded and searched for the app's keys.

#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use age::secrecy::ExposeSecret;
use attestation::{Pcr, os_image_hash};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use e2e::{APP_ID, Agent, Daemon, Finished, IMAGE, Recorder, Trip, Variation, run};
use kms_protocol::InstanceId;
use kms_protocol::app_keys::AppKeys;
use kms_protocol::derive::{K256Root, P256Scalar, RootKeys};

const DEADLINE: Duration = Duration::from_secs(120);

/// A trip whose every byte between agent and parent is recorded.
struct Recorded {
    trip: Trip,
    network: Recorder,
    export: Recorder,
    _receiver: Daemon,
}

impl Recorded {
    fn start() -> Self {
        let trip = Trip::start(&image(), Variation::default());
        let proxy = PathBuf::from(trip.proxy.endpoint().strip_prefix("unix:").unwrap());
        let network = Recorder::start(&trip.path("network.sock"), &proxy);
        let receiving = trip.path("receiving.sock");
        let receive = format!("unix:{}={}", receiving.display(), trip.path("received").display());
        let receiver = Daemon::start("host-proxy", &["--receive", &receive]);
        let export = Recorder::start(&trip.path("export.sock"), &receiving);
        Self { trip, network, export, _receiver: receiver }
    }

    /// Runs an agent that exports, until the parent has the export.
    fn export(&self, form: &[&str]) -> Agent {
        let (proxy, export) = (self.network.endpoint(), self.export.endpoint());
        let arguments = [&["--proxy", &proxy, "--export", &export], form].concat();
        Agent::start(&self.trip, &arguments)
    }

    fn recording(&self) -> Vec<u8> {
        [self.network.recording(), self.export.recording()].concat()
    }

    fn received(&self) -> PathBuf {
        self.trip.path("received")
    }
}

#[test]
fn with_recipients_no_key_crosses_in_plain_and_the_operator_opens_the_export() {
    let recorded = Recorded::start();
    let identity = age::x25519::Identity::generate();
    let guest = recorded.export(&["--recipient", &identity.to_public().to_string()]);
    // More bytes that could hold keys: the app asks, and the keys are fetched again.
    let answer = ask(&recorded.trip, "RefreshKeys");
    assert!(answer.ends_with(r#"{"changed":false}"#), "{answer}\n{}", guest.log());
    let recording = recorded.recording();
    assert!(recording.len() > 10_000, "{} bytes are no two trips and an export", recording.len());
    for (name, key) in keys(&recorded.trip) {
        assert_eq!(found(&recording, &key), None, "{name} crossed in plain");
        assert_eq!(found(guest.log().as_bytes(), &key), None, "{name} is in the log");
    }

    let file = recorded.trip.path("identity.txt");
    fs::write(&file, format!("# operator\n{}\n", identity.to_string().expose_secret())).unwrap();
    let opened = recorded.trip.path("opened.json");
    let open = |more: &[&str]| -> Finished {
        let path = |path: &PathBuf| path.display().to_string();
        let fixed = ["keys".into(), "open".into(), path(&recorded.received()), "-i".into(), path(&file)];
        let arguments: Vec<String> =
            fixed.into_iter().chain(more.iter().map(|it| (*it).to_owned())).collect();
        run("keyferry", &arguments, DEADLINE)
    };
    let (root, output) = (recorded.trip.path("nsm-root.pem"), opened.display().to_string());
    let root = root.display().to_string();
    let finished = open(&["--image", &image(), "--root", &root, "-o", &output, "--json"]);
    assert_eq!(finished.code, Some(0), "{finished:?}");
    assert!(finished.stdout.contains(&image()), "{finished:?}");
    assert_eq!(fs::metadata(&opened).unwrap().permissions().mode() & 0o7777, 0o600);
    let got = AppKeys::from_json(&fs::read(&opened).unwrap()).unwrap();
    for (name, key) in keys(&recorded.trip) {
        assert!(found(&fs::read(&opened).unwrap(), &key).is_some(), "{name} is not in the opened file");
        assert_eq!(found(finished.stdout.as_bytes(), &key), None, "{name} is in the summary");
    }
    drop(got);

    // Each refusal has its reason, and no file is written.
    let other = "00".repeat(32);
    let elsewhere = recorded.trip.path("elsewhere.json").display().to_string();
    let refusals: [(&[&str], i32, &str); 3] = [
        (&["--image", &other, "--root", &root, "-o", &elsewhere], 3, "not by an expected one"),
        (&["--image", &image(), "-o", &elsewhere], 3, "evidence of the export"),
        (&["-o", &elsewhere], 2, "--image"),
    ];
    for (arguments, code, reason) in refusals {
        let finished = open(arguments);
        assert_eq!(finished.code, Some(code), "{finished:?}");
        assert!(finished.stderr.contains(reason), "expected {reason:?} in {finished:?}");
    }
    assert!(!recorded.trip.path("elsewhere.json").exists());
}

#[test]
fn with_the_danger_option_the_parent_has_the_keys() {
    let recorded = Recorded::start();
    let guest = recorded.export(&["--danger-export-plaintext"]);
    assert!(guest.log().contains("warning: the keys leave this enclave in plain"), "{}", guest.log());
    let recording = recorded.recording();
    for (name, key) in keys(&recorded.trip) {
        assert_eq!(found(&recording, &key), Some("hex"), "the search does not find {name}");
    }
    // What upstream's client writes, and from whom it is understood.
    AppKeys::from_json(&fs::read(recorded.received()).unwrap()).unwrap();
}

#[test]
fn the_search_finds_keys_in_every_form() {
    let key = [0xfb, 0xef, 0xbe, 0x3e, 0x3f, 0x01].repeat(6)[..32].to_vec();
    for before in ["", "a", "ab", "abc"] {
        let shifted = [before.as_bytes(), &key, b"after"].concat();
        assert_eq!(found(&shifted, &key), Some("raw"));
        assert_eq!(found(hex::encode(&shifted).as_bytes(), &key), Some("hex"));
        assert_eq!(found(hex::encode_upper(&shifted).as_bytes(), &key), Some("hex"));
        assert_eq!(found(STANDARD_NO_PAD.encode(&shifted).as_bytes(), &key), Some("base64"));
        assert_eq!(found(URL_SAFE_NO_PAD.encode(&shifted).as_bytes(), &key), Some("base64"));
    }
    assert_eq!(found(&[0; 100], &key), None);
}

/// In which form a key is in these bytes.
fn found(bytes: &[u8], key: &[u8]) -> Option<&'static str> {
    let holds = |needle: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
    let lower = bytes.to_ascii_lowercase();
    let digits = hex::encode(key);
    if holds(key) {
        return Some("raw");
    }
    if lower.windows(digits.len()).any(|window| window == digits.as_bytes()) {
        return Some("hex");
    }
    // Base64 of something that holds the key at any of three offsets: the characters that only the key decides.
    let base64 = (0..3).any(|offset| {
        let shifted = [&vec![0; offset], key].concat();
        [STANDARD_NO_PAD.encode(&shifted), URL_SAFE_NO_PAD.encode(&shifted)]
            .iter()
            .any(|text| holds(&text.as_bytes()[(offset * 8).div_ceil(6)..key.len() * 8 / 6]))
    });
    base64.then_some("base64")
}

/// The app's keys, derived from the roots that the KMS keeps.
fn keys(trip: &Trip) -> [(&'static str, Vec<u8>); 3] {
    let pem = fs::read(trip.kms_keys().join("root-ca.key")).unwrap();
    let (_, der) = pem_rfc7468::decode_vec(&pem).unwrap();
    let k256 = fs::read(trip.kms_keys().join("root-k256.key")).unwrap();
    let roots =
        RootKeys::new(P256Scalar::from_pkcs8(&der).unwrap(), K256Root::from_slice(&k256).unwrap()).unwrap();
    let app = APP_ID.parse().unwrap();
    [
        ("disk_crypt_key", roots.disk_crypt_key(&app, &InstanceId::NONE).unwrap().expose().to_vec()),
        ("env_crypt_key", roots.env_crypt_key(&app).unwrap().expose().to_vec()),
        ("k256_key", roots.app_k256_key(&app).unwrap().expose().to_vec()),
    ]
}

/// Asks the agent as an app would; the whole answer.
fn ask(trip: &Trip, method: &str) -> String {
    use std::io::{Read, Write};
    let mut stream = std::os::unix::net::UnixStream::connect(trip.path("dstack.sock")).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let request = format!(
        "POST /{method}?json HTTP/1.1\r\nHost: app\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn image() -> String {
    let [pcr0, pcr1, pcr2] = IMAGE.map(Pcr::new);
    os_image_hash(&pcr0, &pcr1, &pcr2).to_string()
}
