//! `keyferry attestation`, as people and scripts see it.
//!
//! `documents/enclave.bin` was made for 2026-01-15T12:00:00Z under `documents/root.pem`, whose keys exist no more.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test")]

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;

const AT: [&str; 2] = ["--at", "2026-01-15T12:00:00Z"];
const ROOT: [&str; 2] = ["--root", "root.pem"];

fn keyferry(arguments: &[&[&str]], stdin: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_keyferry"))
        .arg("attestation")
        .args(arguments.concat())
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/documents"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It may have refused its arguments already and read nothing.
    drop(child.stdin.take().unwrap().write_all(stdin));
    child.wait_with_output().unwrap()
}

/// Everything that is seen of a run.
fn told(output: &Output) -> String {
    let [out, err] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    format!("exit {}\n--- stdout\n{out}--- stderr\n{err}", output.status.code().unwrap())
}

fn verify(arguments: &[&[&str]]) -> String {
    told(&keyferry(&[&[&["verify"][..]], arguments].concat(), b""))
}

fn document() -> Vec<u8> {
    std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/documents/enclave.bin")).unwrap()
}

#[test]
fn an_accepted_document() {
    insta::assert_snapshot!("accepted", verify(&[&AT, &ROOT, &["enclave.bin"]]));
    insta::assert_snapshot!("accepted_json", verify(&[&AT, &ROOT, &["--json", "enclave.bin"]]));
}

#[test]
fn refused_documents_say_why_and_what_to_do() {
    insta::assert_snapshot!("stale", verify(&[&["--at", "@1768482000.001"], &ROOT, &["enclave.bin"]]));
    insta::assert_snapshot!("untrusted_root", verify(&[&AT, &["enclave.bin"]]));
    insta::assert_snapshot!("untrusted_root_json", verify(&[&AT, &["--json", "enclave.bin"]]));
    let pcr = format!("0={}", "00".repeat(48));
    insta::assert_snapshot!("pcr_mismatch", verify(&[&AT, &ROOT, &["--pcr", &pcr, "enclave.bin"]]));
    insta::assert_snapshot!("no_document", verify(&[&AT, &ROOT, &["root.pem", "missing.bin", "."]]));
}

#[test]
fn inspecting_says_that_nothing_is_verified() {
    insta::assert_snapshot!("inspect", told(&keyferry(&[&["inspect", "enclave.bin"]], b"")));
    insta::assert_snapshot!(
        "inspect_json",
        told(&keyferry(&[&["inspect", "--json", "enclave.bin", "root.pem"]], b""))
    );
}

#[test]
fn wrong_arguments() {
    let short = format!("0={}", "00".repeat(47));
    let twice = format!("8={}", "00".repeat(48));
    insta::assert_snapshot!(
        "usage",
        [
            verify(&[]),
            verify(&[&["--at", "yesterday", "enclave.bin"]]),
            verify(&[&["--max-age", "1w", "enclave.bin"]]),
            verify(&[&["--pcr", &short, "enclave.bin"]]),
            verify(&[&["--pcr", "32=00", "enclave.bin"]]),
            verify(&[&["--pcr", &twice, "--pcr", &twice, "enclave.bin"]]),
            verify(&[&["--nonce", "0", "enclave.bin"]]),
            verify(&[&["--root", "missing.pem", "enclave.bin"]]),
            verify(&[&["--root", "enclave.bin", "enclave.bin"]]),
        ]
        .join("\n")
    );
}

#[test]
fn every_form_and_standard_input() {
    let raw = document();
    let hex = hex::encode(&raw);
    let wrapped: Vec<u8> = hex.as_bytes().chunks(60).flat_map(|line| [line, b"\r\n"].concat()).collect();
    let forms = [
        raw.clone(),
        hex.clone().into(),
        format!("0x{hex}\n").into(),
        wrapped,
        BASE64_STANDARD.encode(&raw).into(),
    ];
    for form in forms {
        let output = keyferry(&[&["verify"], &AT, &ROOT, &["-"]], &form);
        assert!(output.status.success(), "{}", told(&output));
    }
    let huge = keyferry(&[&["verify", "--json"], &AT, &ROOT, &["-"]], &vec![0x84; 1 << 20]);
    assert_eq!(huge.status.code(), Some(3));
    assert!(told(&huge).contains(r#""error":"evidence-too-large""#), "{}", told(&huge));
}

#[test]
fn the_options_bind_the_document() {
    let passes = |arguments: &[&str]| {
        keyferry(&[&["verify"], &AT, &ROOT, arguments, &["enclave.bin"]], b"").status.code()
    };
    let pcrs: Vec<_> = (0..9).map(|index| format!("{index}={}", hex::encode([index + 1; 48]))).collect();
    let all: Vec<_> = pcrs.iter().flat_map(|pcr| ["--pcr", pcr]).collect();
    assert_eq!(passes(&all), Some(0));
    assert_eq!(passes(&["--user-data", &hex::encode("data"), "--public-key", &hex::encode("key")]), Some(0));
    assert_eq!(passes(&["--user-data", "00"]), Some(3));
    assert_eq!(passes(&["--public-key", ""]), Some(3));
    assert_eq!(passes(&["--nonce", ""]), Some(3), "null is not empty");
    let absent = format!("16={}", "00".repeat(48));
    assert_eq!(passes(&["--pcr", &absent]), Some(3), "absent is not zero");
    assert_eq!(passes(&["--max-age", "0", "--max-skew", "0s"]), Some(0));
}

#[test]
fn thousands_of_files_in_one_run_are_told_line_by_line() {
    let files = vec!["enclave.bin"; 1500];
    let output = keyferry(&[&["verify", "--json"], &AT, &ROOT, &files, &["root.pem"], &files], b"");
    assert_eq!(output.status.code(), Some(3));
    let lines: Vec<serde_json::Value> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 3001);
    let refused: Vec<_> = lines.iter().filter(|line| line["verdict"] != "accepted").collect();
    assert_eq!(refused.len(), 1);
    assert_eq!((&refused[0]["file"], &refused[0]["error"]), (&"root.pem".into(), &"cbor-wrong-type".into()));
}

#[test]
fn real_documents_at_their_own_time() {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/fixtures/nitro"));
    let Ok(manifest) = std::fs::read(folder.join("manifest.json")) else {
        eprintln!("skipped: no {}", folder.display());
        return;
    };
    let rows: Vec<serde_json::Value> = serde_json::from_slice(&manifest).unwrap();
    for row in rows {
        let file = folder.join(row["file"].as_str().unwrap());
        let millis = row["timestamp_ms"].as_u64().unwrap();
        let at = format!("@{}.{:03}", millis / 1000, millis % 1000);
        let run = |options: &[&str]| {
            keyferry(&[&["verify", "--at", &at], options, &[file.to_str().unwrap()]], b"").status.code()
        };
        let honest = row["negative"].is_null();
        let debug = row["debug"].as_bool().unwrap_or_default();
        assert_eq!(run(&[]), Some(if honest && !debug { 0 } else { 3 }), "{row}");
        assert_eq!(run(&["--danger-allow-debug"]), Some(if honest { 0 } else { 3 }), "{row}");
    }
}
