//! The program itself: exit codes, hints, what is left on disk.

#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]

use std::path::Path;
use std::process::{Command, Output};

/// Runs the program with these arguments, split at blanks, in an empty environment.
fn run(arguments: &str, directory: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_enclave-agent"))
        .args(arguments.split_whitespace())
        .env_clear()
        .current_dir(directory)
        .output()
        .expect("the program starts")
}

fn ends(arguments: &str, code: i32, words: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let output = run(arguments, dir.path());
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{arguments}: {stderr}");
    for word in words {
        assert!(stderr.contains(word), "{arguments}: no {word:?} in {stderr:?}");
    }
    assert!(output.stdout.is_empty(), "{arguments}: wrote to standard output");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "{arguments}: left a file");
}

const APP: &str = "--app-id 1111111111111111111111111111111111111111";

#[test]
fn without_an_anchor_it_refuses_and_says_what_to_do() {
    let arguments = format!("get-keys -k https://127.0.0.1:1 {APP} -o keys --nsm unix:none");
    ends(&arguments, 3, &["error: nothing says which KMS to trust", "hint: give --root-ca FILE"]);
}

#[test]
fn danger_does_not_mix_with_an_anchor() {
    let arguments =
        format!("get-keys -k https://127.0.0.1:1 {APP} -o keys --danger-accept-any-kms --root-ca x.pem");
    ends(&arguments, 2, &["cannot be used with"]);
}

#[test]
fn a_wrong_url_or_app_is_a_usage_error() {
    for url in ["http://h", "kms", "https://h:99999", "https://u@h"] {
        ends(&format!("get-keys -k {url} {APP} -o keys --danger-accept-any-kms"), 2, &["--kms-url"]);
    }
    ends("get-keys -k https://h --app-id 11 -o keys --danger-accept-any-kms", 2, &["app_id is 1 bytes"]);
}

#[test]
fn an_anchor_that_cannot_be_read_ends_the_command() {
    for anchor in ["--root-ca none.pem", "--kms-policy none.toml"] {
        ends(&format!("get-keys -k https://127.0.0.1:1 {APP} -o keys {anchor}"), 2, &["none."]);
    }
}

#[test]
fn a_missing_module_is_named_with_a_hint() {
    let arguments =
        format!("get-keys -k https://127.0.0.1:1 {APP} -o keys --danger-accept-any-kms --nsm unix:none");
    ends(&arguments, 1, &["cannot open the NSM at unix:none", "hint: "]);
    ends("attest --report-data 00 --nsm unix:none", 1, &["cannot open the NSM at unix:none", "hint: "]);
}

#[test]
fn an_output_that_cannot_be_written_is_found_before_keys_are_asked_for() {
    let common = format!("get-keys -k https://127.0.0.1:1 {APP} --danger-accept-any-kms --nsm unix:none");
    ends(&format!("{common} -o no/such/directory/keys"), 2, &["not the name of a file", "hint: "]);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("keys"), "precious").unwrap();
    let output = run(&format!("{common} -o keys"), dir.path());
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8(output.stderr).unwrap().contains("--force"));
    assert_eq!(std::fs::read(dir.path().join("keys")).unwrap(), b"precious");
}

#[test]
fn report_data_has_a_limit() {
    let long = "00".repeat(65);
    ends(&format!("attest --report-data {long} --nsm unix:none"), 2, &["at most 64"]);
    let longer = "00".repeat(513);
    ends(&format!("attest --format document --report-data {longer} --nsm unix:none"), 2, &["at most 512"]);
}
