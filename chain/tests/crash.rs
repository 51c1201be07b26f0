//! The command is killed at every request it makes, before and after the chain sees it. The next run must finish the
//! work with exactly one transaction per operation.

#![allow(clippy::unwrap_used, reason = "a test stops where something is wrong, and says what it skips")]

mod support;

use std::sync::atomic::{AtomicUsize, Ordering};

use alloy::primitives::B256;
use serde_json::json;
use support::{Act, Chain, Proxy};

/// Runs `arguments` behind a proxy that kills the command at request number `at`. Says whether it got that far.
fn killed_at(chain: &Chain, arguments: &[&str], at: usize, after: bool) -> bool {
    let proxy = Proxy::start(&chain.url, move |number, _, _| match (number == at, after) {
        (false, _) => Act::Forward,
        (true, false) => Act::KillBefore,
        (true, true) => Act::KillAfter,
    });
    // The script can only run once the command does, and the command is started with the lock held.
    let mut victim = proxy.victim.lock().unwrap();
    let child = chain.command(&proxy.url, arguments).spawn().unwrap();
    let pid = child.id();
    *victim = Some(child);
    drop(victim);
    // Either the proxy takes the child and kills it, or it ends by itself and is collected here.
    loop {
        let mut victim = proxy.victim.lock().unwrap();
        match victim.as_mut() {
            None => return true,
            Some(child) => {
                if let Some(status) = child.try_wait().unwrap() {
                    assert!(status.success(), "process {pid} failed by itself");
                    return false;
                }
            }
        }
        drop(victim);
        std::thread::yield_now();
    }
}

/// Kills at every step until the command is through before it can be killed; `check` judges each second run.
fn at_every_step(after: bool, transactions: u64, arguments: impl Fn(usize) -> Vec<String>, chain: &Chain) {
    for step in 0..200 {
        let before = chain.nonce();
        let arguments = arguments(step);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let was_killed = killed_at(chain, &arguments, step, after);
        chain.run(&arguments).expect(0);
        assert_eq!(chain.nonce(), before + transactions, "killed at request {step}, after: {after}");
        chain.run(&arguments).expect(0);
        assert_eq!(chain.nonce(), before + transactions, "a third run sent again after request {step}");
        if !was_killed {
            assert!(step > 5, "the command asked only {step} times");
            return;
        }
    }
    panic!("the command never ends");
}

fn add_image(after: bool) {
    let Some(chain) = Chain::start() else { return };
    let hash = |step: usize| B256::with_last_byte(u8::try_from(step + 1).unwrap()).to_string();
    at_every_step(after, 1, |step| vec!["add-image".into(), hash(step), "--yes".into()], &chain);
}

fn create_app(after: bool) {
    let Some(chain) = Chain::start() else { return };
    let runs = AtomicUsize::new(0);
    at_every_step(
        after,
        1,
        |step| {
            runs.fetch_add(1, Ordering::Relaxed);
            ["create-app", "--yes", "--label", &format!("app {step}")].map(str::to_owned).to_vec()
        },
        &chain,
    );
    // One application per label, and the one the chain was seeded with.
    let apps = chain.run(&["status", "--json"]).expect(0).json()["kms"]["apps"].as_array().unwrap().len();
    assert_eq!(apps, runs.into_inner() + 1);
}

fn deploy(after: bool) {
    let Some(chain) = Chain::start() else { return };
    let label = |step: usize| format!("deployment {step}");
    at_every_step(
        after,
        3,
        |step| ["deploy", "--stand-ins", "--yes", "--label", &label(step)].map(str::to_owned).to_vec(),
        &chain,
    );
}

/// Every other write goes the same way; here each is killed once at every request that the chain has seen, and once just
/// before its transaction is sent.
#[track_caller]
fn survives(write: impl Fn(&Chain) -> Vec<String>) {
    let Some(chain) = Chain::start() else { return };
    let write = write(&chain);
    let arguments: Vec<&str> = write.iter().map(String::as_str).chain(["--yes"]).collect();
    // What the command asks, and where among it the transaction is.
    let mut start = chain.ask("evm_snapshot", json!([]));
    let whole = Proxy::start(&chain.url, |_, _, _| Act::Forward);
    chain.run_at(&whole.url, &arguments).expect(0).says("done in block");
    let asked = whole.seen.lock().unwrap().clone();
    let sent = asked.iter().position(|it| it == "eth_sendRawTransaction").unwrap();
    for (step, after) in (0..asked.len()).map(|step| (step, true)).chain([(sent, false)]) {
        // The chain goes back to where the write was not done, and the journal with it.
        assert_eq!(chain.ask("evm_revert", json!([start])), true);
        start = chain.ask("evm_snapshot", json!([]));
        let journal = tempfile::tempdir().unwrap();
        let arguments: Vec<&str> =
            arguments.iter().copied().chain(["--journal", journal.path().to_str().unwrap()]).collect();
        let before = chain.nonce();
        killed_at(&chain, &arguments, step, after);
        chain.run(&arguments).expect(0);
        assert_eq!(chain.nonce(), before + 1, "killed at request {step} ({}), after: {after}", asked[step]);
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|it| (*it).to_owned()).collect()
}

const ONE: &str = "0x1111111111111111111111111111111111111111111111111111111111111111";
const SOMEBODY: &str = "0x00000000000000000000000000000000000000Aa";

/// The write, after another one has prepared what it takes back.
fn prepared(chain: &Chain, first: &[&str], then: &[&str]) -> Vec<String> {
    chain.run(&[first, &["--yes"]].concat()).expect(0);
    words(then)
}

#[test]
fn removing_an_image_survives_kills() {
    survives(|chain| prepared(chain, &["add-image", ONE], &["remove-image", ONE]));
}

#[test]
fn adding_a_hash_survives_kills() {
    survives(|chain| words(&["add-hash", "--app-id", &chain.app(), ONE]));
}

#[test]
fn removing_a_hash_survives_kills() {
    survives(|chain| {
        let app = chain.app();
        prepared(chain, &["add-hash", "--app-id", &app, ONE], &["remove-hash", "--app-id", &app, ONE])
    });
}

#[test]
fn adding_a_kms_survives_kills() {
    survives(|_| words(&["add-kms", ONE]));
}

#[test]
fn removing_a_kms_survives_kills() {
    survives(|chain| prepared(chain, &["add-kms", ONE], &["remove-kms", ONE]));
}

#[test]
fn adding_a_device_survives_kills() {
    survives(|_| words(&["add-device", ONE]));
    survives(|chain| words(&["add-device", "--app-id", &chain.app(), ONE]));
}

#[test]
fn removing_a_device_survives_kills() {
    survives(|chain| prepared(chain, &["add-device", ONE], &["remove-device", ONE]));
}

#[test]
fn setting_the_gateway_survives_kills() {
    survives(|_| words(&["set-gateway", "gateway.example"]));
}

#[test]
fn setting_the_kms_info_survives_kills() {
    survives(|chain| {
        let info = chain.folder.path().join("info.json");
        let text = json!({ "k256_pubkey": "02ab", "ca_pubkey": "3059", "quote": "", "eventlog": "0xff" });
        std::fs::write(&info, text.to_string()).unwrap();
        words(&["set-kms-info", info.to_str().unwrap()])
    });
}

#[test]
fn setting_the_app_implementation_survives_kills() {
    survives(|chain| {
        words(&["set-app-implementation", &chain.seeded.contracts.kms_implementation.to_string()])
    });
}

#[test]
fn registering_an_app_survives_kills() {
    survives(|_| words(&["register-app", SOMEBODY]));
}

#[test]
fn allowing_any_device_survives_kills() {
    survives(|chain| words(&["allow-any-device", "--app-id", &chain.app(), "--off"]));
}

#[test]
fn requiring_a_tcb_status_survives_kills() {
    survives(|chain| words(&["require-tcb", "--app-id", &chain.app()]));
}

#[test]
fn transferring_the_ownership_survives_kills() {
    survives(|_| words(&["transfer-owner", SOMEBODY]));
    survives(|chain| words(&["transfer-owner", "--app-id", &chain.app(), SOMEBODY]));
}

#[test]
fn adding_an_image_survives_a_kill_before_each_request() {
    add_image(false);
}

#[test]
fn adding_an_image_survives_a_kill_after_each_request() {
    add_image(true);
}

#[test]
fn creating_an_app_survives_a_kill_before_each_request() {
    create_app(false);
}

#[test]
fn creating_an_app_survives_a_kill_after_each_request() {
    create_app(true);
}

#[test]
fn a_deployment_survives_a_kill_before_each_request() {
    deploy(false);
}

#[test]
fn a_deployment_survives_a_kill_after_each_request() {
    deploy(true);
}
