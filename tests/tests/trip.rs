//! The whole trip with real programs: keys that arrive, and trips that must end without any.

#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use attestation::{OsImageHash, Pcr, os_image_hash};
use e2e::{APP_ID, Finished, IMAGE, Trip, Variation, finish, program, run};
use kms_protocol::InstanceId;
use kms_protocol::derive::{K256Root, P256Scalar, RootKeys};
use serde_json::Value;

/// No command of these tests takes this long; it only keeps a hang from holding everything up.
const DEADLINE: Duration = Duration::from_secs(120);

#[test]
fn keys_arrive_and_are_the_ones_the_roots_derive() {
    let trip = Trip::start(&image().to_string(), Variation::default());
    let finished = run("enclave-agent", &trip.agent_arguments(), DEADLINE);
    assert_eq!(finished.code, Some(0), "{finished:?}");

    let mode = fs::metadata(trip.output()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let keys = read_json(&trip.output());
    let roots = root_keys(&trip.kms_keys());
    let app = APP_ID.parse().unwrap();
    let expected = [
        ("disk_crypt_key", hex::encode(roots.disk_crypt_key(&app, &InstanceId::NONE).unwrap().expose())),
        ("env_crypt_key", hex::encode(roots.env_crypt_key(&app).unwrap().expose())),
        ("k256_key", hex::encode(roots.app_k256_key(&app).unwrap().expose())),
    ];
    for (name, value) in &expected {
        assert_eq!(keys[*name], **value, "{name}");
    }

    let summary: Value = serde_json::from_str(&finished.stdout).unwrap();
    assert_eq!(summary["os_image_hash"], image().to_string());
    let told =
        [finished.stdout, finished.stderr, trip.kms.log(), trip.proxy.log(), trip.module.log()].concat();
    for (name, value) in &expected {
        assert!(!told.contains(value), "{name} is in a log");
    }
}

#[test]
fn the_file_is_what_upstream_writes() {
    let trip = Trip::start(&image().to_string(), Variation::default());
    let finished = run("enclave-agent", &trip.agent_arguments(), DEADLINE);
    assert_eq!(finished.code, Some(0), "{finished:?}");
    let text = fs::read_to_string(trip.output()).unwrap();
    let at =
        |key: &str| text.find(&format!("\n  \"{key}\": ")).unwrap_or_else(|| panic!("no {key} in the file"));
    let keys = ["disk_crypt_key", "env_crypt_key", "k256_key", "k256_signature", "gateway_app_id", "ca_cert"];
    let places = keys.map(at);
    assert!(places.is_sorted() && places[5] < at("key_provider"), "{places:?}");
}

#[test]
fn an_existing_file_is_kept() {
    let trip = Trip::start(&image().to_string(), Variation::default());
    fs::write(trip.output(), "precious").unwrap();
    let finished = run("enclave-agent", &trip.agent_arguments(), DEADLINE);
    assert_eq!(finished.code, Some(2), "{finished:?}");
    assert_eq!(fs::read_to_string(trip.output()).unwrap(), "precious");
}

#[test]
fn a_changed_image_gets_no_keys() {
    let changed = format!("2={}", hex::encode([0xff; 48]));
    let trip =
        Trip::start(&image().to_string(), Variation { module: &["--pcr", &changed], ..Variation::default() });
    let finished = run("enclave-agent", &trip.agent_arguments(), DEADLINE);
    expect_refusal(&trip, &finished, 3, "compose hash not allowed");
}

#[test]
fn an_unknown_app_gets_no_keys() {
    let trip = Trip::start(&image().to_string(), Variation::default());
    let arguments = replaced(&trip, "--app-id", &"22".repeat(20));
    let finished = run("enclave-agent", &arguments, DEADLINE);
    expect_refusal(&trip, &finished, 3, "app not registered");
}

#[test]
fn a_debug_enclave_gets_no_keys_even_when_it_asks() {
    let trip =
        Trip::start(&image().to_string(), Variation { module: &["--debug-mode"], ..Variation::default() });
    expect_refusal(&trip, &run("enclave-agent", &trip.agent_arguments(), DEADLINE), 3, "debug mode");
    let insisting = [trip.agent_arguments(), vec!["--danger-allow-debug".to_owned()]].concat();
    expect_refusal(&trip, &run("enclave-agent", &insisting, DEADLINE), 3, "debug");
}

#[test]
fn a_stale_document_gets_no_keys() {
    let variation = Variation { module: &["--clock-offset", "-7200"], ..Variation::default() };
    let trip = Trip::start(&image().to_string(), variation);
    let arguments =
        [trip.agent_arguments(), ["--max-clock-skew", "9000s"].map(str::to_owned).to_vec()].concat();
    expect_refusal(&trip, &run("enclave-agent", &arguments, DEADLINE), 3, "expected at most 3600 s");
}

#[test]
fn a_kms_under_another_root_is_not_asked_for_keys() {
    let trip = Trip::start(&image().to_string(), Variation::default());
    let other = Trip::start(&image().to_string(), Variation::default());
    let root_ca = other.kms_keys().join("root-ca.crt").display().to_string();
    let finished = run("enclave-agent", &replaced(&trip, "--root-ca", &root_ca), DEADLINE);
    expect_refusal(&trip, &finished, 3, "not the trusted KMS");
    assert!(!trip.kms.log().contains("GetAppKey"));
}

#[test]
fn a_kms_by_another_name_is_refused() {
    let trip = Trip::start(&image().to_string(), Variation::default());
    let url = format!("https://127.0.0.1:{}", trip.kms.port());
    expect_refusal(
        &trip,
        &run("enclave-agent", &replaced(&trip, "--kms-url", &url), DEADLINE),
        3,
        "is not for 127.0.0.1",
    );
}

#[test]
fn without_a_trust_anchor_nothing_is_sent() {
    let trip = Trip::start(&image().to_string(), Variation::default());
    let mut arguments = trip.agent_arguments();
    let at = arguments.iter().position(|it| it == "--root-ca").unwrap();
    arguments.drain(at..at + 2);
    let finished = run("enclave-agent", &arguments, DEADLINE);
    expect_refusal(&trip, &finished, 3, "which KMS to trust");
    assert!(finished.stderr.contains("--danger-accept-any-kms"), "{finished:?}");
}

#[test]
fn like_upstream_any_kms_is_accepted_only_when_asked_to() {
    let trip = Trip::start(&image().to_string(), Variation::default());
    let mut arguments = trip.agent_arguments();
    let at = arguments.iter().position(|it| it == "--root-ca").unwrap();
    arguments.splice(at..at + 2, ["--danger-accept-any-kms".to_owned()]);
    let finished = run("enclave-agent", &arguments, DEADLINE);
    assert_eq!(finished.code, Some(0), "{finished:?}");
    assert!(finished.stderr.contains("not authenticated"), "{finished:?}");
}

#[test]
fn the_proxy_opens_nothing_that_no_rule_names() {
    let variation = Variation { proxy_opens: Some("kms.example.com:443"), ..Variation::default() };
    let trip = Trip::start(&image().to_string(), variation);
    expect_refusal(&trip, &run("enclave-agent", &trip.agent_arguments(), DEADLINE), 3, "403");
}

#[test]
fn a_kms_that_hangs_ends_in_no_answer() {
    let trip = Trip::start(&image().to_string(), Variation::default());
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://localhost:{}", silent.local_addr().unwrap().port());
    let mut arguments = replaced(&trip, "--kms-url", &url);
    let at = arguments.iter().position(|it| it == "--proxy").unwrap();
    arguments.drain(at..at + 2);
    arguments.extend(["--handshake-timeout", "500ms", "--timeout", "2s"].map(str::to_owned));
    let mut command = Command::new(program("enclave-agent"));
    command.args(&arguments).env("NO_PROXY", "*");
    expect_refusal(&trip, &finish(command, DEADLINE), 4, "");
}

#[test]
fn a_full_disk_leaves_no_partial_file() {
    let trip = Trip::start(&image().to_string(), Variation::default());
    let full = trip.path("full");
    fs::create_dir(&full).unwrap();
    let output = full.join("app_keys.json").display().to_string();
    // A file system of one page, in a mount namespace of its own; the names go in as arguments, not as text.
    let script = r#"mount -t tmpfs -o size=4k tmpfs "$1" && head -c 4096 /dev/zero > "$1/filler" && shift && "$@"
        code=$?; ls "$0"; exit $code"#;
    let full = full.display().to_string();
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", script, &full, &full]);
    command.arg(program("enclave-agent")).args(replaced(&trip, "--output", &output));
    if !Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "true"])
        .status()
        .is_ok_and(|it| it.success())
    {
        println!("skipped: this system makes no namespaces for its users");
        return;
    }
    let finished = finish(command, DEADLINE);
    assert_eq!(finished.code, Some(1), "{finished:?}");
    assert_eq!(finished.stdout, "filler\n", "{finished:?}");
    assert!(finished.stderr.contains("hint: free some space"), "{finished:?}");
}

#[test]
fn the_demo_shows_the_trip_and_three_refusals() {
    let finished = run("keyferry", &["demo", "--json"], DEADLINE);
    assert_eq!(finished.code, Some(0), "{finished:?}");
    let report: Value = serde_json::from_str(&finished.stdout).unwrap();
    let refusals = report["refusals"].as_array().unwrap();
    assert_eq!(refusals.len(), 3);
    assert!(refusals.iter().all(|refusal| refusal["exit_code"] == 3), "{refusals:?}");
    assert_eq!(report["keys"]["app_id"], APP_ID);
}

fn image() -> OsImageHash {
    let [pcr0, pcr1, pcr2] = IMAGE.map(Pcr::new);
    os_image_hash(&pcr0, &pcr1, &pcr2)
}

/// The agent ended with `code` and said `reason` in one line with a hint where one is known; no file was left.
fn expect_refusal(trip: &Trip, finished: &Finished, code: i32, reason: &str) {
    assert_eq!(finished.code, Some(code), "{finished:?}");
    let error = finished.stderr.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
    assert!(error.contains(reason), "expected {reason:?} in {finished:?}");
    assert!(!trip.output().exists(), "a file was left behind");
}

/// The agent's arguments with another value for one flag.
fn replaced(trip: &Trip, flag: &str, value: &str) -> Vec<String> {
    let mut arguments = trip.agent_arguments();
    let at = arguments.iter().position(|it| it == flag).unwrap();
    value.clone_into(&mut arguments[at + 1]);
    arguments
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The roots as the KMS keeps them.
fn root_keys(directory: &Path) -> RootKeys {
    let pem = fs::read(directory.join("root-ca.key")).unwrap();
    let (_, der) = pem_rfc7468::decode_vec(&pem).unwrap();
    let k256 = fs::read(directory.join("root-k256.key")).unwrap();
    RootKeys::new(P256Scalar::from_pkcs8(&der).unwrap(), K256Root::from_slice(&k256).unwrap()).unwrap()
}
