//! Every command on a local chain, each twice: the second time nothing is sent.

#![allow(clippy::unwrap_used, reason = "a test stops where something is wrong, and says what it skips")]

mod support;

use serde_json::json;
use support::Chain;

const ONE: &str = "0x1111111111111111111111111111111111111111111111111111111111111111";
const TWO: &str = "2222222222222222222222222222222222222222222222222222222222222222";
const ZERO: &str = "0x0000000000000000000000000000000000000000000000000000000000000000";
const SOMEBODY: &str = "0x00000000000000000000000000000000000000Aa";

#[test]
fn every_write_is_done_once_and_then_already_done() {
    let Some(chain) = Chain::start() else { return };
    let app = chain.app();
    let info = chain.folder.path().join("info.json");
    let text = json!({ "k256_pubkey": "02ab", "ca_pubkey": "3059", "quote": "", "eventlog": "0xff" });
    std::fs::write(&info, text.to_string()).unwrap();
    let implementation = chain.seeded.contracts.kms_implementation.to_string();
    let writes: &[&[&str]] = &[
        &["add-image", ONE],
        &["add-image", TWO],
        &["remove-image", ONE],
        &["add-hash", "--app-id", &app, ONE],
        &["remove-hash", "--app-id", &app, ONE],
        &["add-kms", ONE],
        &["remove-kms", ONE],
        &["add-device", ONE],
        &["remove-device", ONE],
        &["add-device", "--app-id", &app, TWO],
        &["remove-device", "--app-id", &app, TWO],
        &["set-gateway", "gateway.example"],
        &["set-kms-info", info.to_str().unwrap()],
        &["allow-any-device", "--app-id", &app, "--off"],
        &["allow-any-device", "--app-id", &app, "--danger"],
        &["require-tcb", "--app-id", &app],
        &["require-tcb", "--app-id", &app, "--off"],
        &["register-app", SOMEBODY],
        &["set-app-implementation", &implementation],
        &["transfer-owner", "--app-id", &app, SOMEBODY],
        &["transfer-owner", SOMEBODY],
    ];
    for write in writes {
        let arguments = [write, &["--yes", "--json"][..]].concat();
        let before = chain.nonce();
        let first = chain.run(&arguments).expect(0);
        assert_eq!(first.json()["outcome"], "done", "{write:?}");
        assert_eq!(chain.nonce(), before + 1, "{write:?}");
        let second = chain.run(&arguments).expect(0);
        assert_eq!(second.json()["outcome"], "already-done", "{write:?}");
        assert_eq!(chain.nonce(), before + 1, "{write:?} sent twice");
    }
}

#[test]
fn creating_and_deploying_are_done_once_unless_another_is_asked_for() {
    let Some(chain) = Chain::start() else { return };
    let artifacts = concat!(env!("CARGO_MANIFEST_DIR"), "/contracts/artifacts");
    let create: &[&str] = &["create-app", "--hash", ONE, "--device", TWO];
    let deploy: &[&str] = &["deploy", "--artifacts", artifacts];
    for (arguments, key, transactions) in [(create, "appId", 1), (deploy, "kms", 3)] {
        let before = chain.nonce();
        let run = |label: &str| {
            chain.run(&[arguments, &["--label", label, "--yes", "--json"]].concat()).expect(0).json()
        };
        let first = run("first");
        assert_eq!(chain.nonce(), before + transactions);
        assert_eq!(run("first")[key], first[key]);
        assert_eq!(chain.nonce(), before + transactions, "sent again");
        assert_ne!(run("another")[key], first[key]);
    }
}

#[test]
fn first_generation_factories_are_served() {
    let Some(chain) = Chain::start() else { return };
    let ran = chain.run(&["create-app", "--hash", ONE, "--first-generation", "--yes"]).expect(0);
    assert!(ran.out.contains("APP_ID="), "{}", ran.out);
}

#[test]
fn the_ownership_is_taken_by_the_one_it_was_offered_to() {
    let Some(chain) = Chain::start() else { return };
    // The second account of every development chain, as public as the first.
    let key = "59c6995e998f97a5a0044966f0945389dc9e86dae88c7a8412f4603b6b78690d";
    let second = "0x70997970C51812dc3A010C7d01b50e0d17dc79C8";
    let accept = || {
        let mut command = chain.command(&chain.url, &["accept-owner", "--yes"]);
        support::Ran::from(command.env("PRIVATE_KEY", key).output().unwrap())
    };
    accept().expect(3).says("is not the owner");
    chain.run(&["transfer-owner", second, "--yes"]).expect(0).says("done in block");
    chain.run(&["status"]).expect(0).says(&format!("offered to {second}"));
    accept().expect(0).says("done in block");
    accept().expect(0).says("already done");
    chain
        .run(&["add-image", ONE, "--yes"])
        .expect(3)
        .says("is not the owner")
        .says("hint: sign with the owner's key");
}

#[test]
fn status_explain_and_watch_follow_what_was_registered() {
    let Some(chain) = Chain::start() else { return };
    let app = chain.app();
    let info = chain.folder.path().join("boot-info.json");
    let text = json!({
        "teeVariant": "dstack-nitro-enclave", "mrAggregated": ONE, "mrSystem": ONE, "osImageHash": ONE,
        "composeHash": ONE, "appId": app, "instanceId": "", "deviceId": TWO, "tcbStatus": "", "advisoryIds": [],
    });
    std::fs::write(&info, text.to_string()).unwrap();
    let explain = |code: i32| chain.run(&["explain", info.to_str().unwrap()]).expect(code);
    explain(3)
        .says("denied")
        .says("OS image is not allowed")
        .says(&format!("keyferry chain add-image {ONE}"));
    chain.run(&["add-image", ONE, "--yes"]).expect(0);
    explain(3).says("Compose hash not allowed");
    chain.run(&["add-hash", "--app-id", &app, ONE, "--yes"]).expect(0);
    explain(0).says("allowed at block");
    chain
        .run(&["explain", info.to_str().unwrap(), "--as-kms"])
        .expect(3)
        .says("TCB status is not up to date");

    // An image alone says enough about a Nitro enclave: here the app allows any device.
    chain.run(&["explain", "--image", ONE, "--app-id", &app]).expect(0).says("allowed at block");
    chain.run(&["explain", "--image", TWO, "--app-id", &app]).expect(3).says("OS image is not allowed");

    let status = chain.run(&["status", "--app-id", &app, "--json"]).expect(0).json();
    assert_eq!(status["kms"]["images"], json!([ONE]));
    assert_eq!(status["apps"][0]["composeHashes"], json!([ONE]));
    assert_eq!(status["kms"]["apps"].as_array().unwrap().len(), 1);
    let watched = chain.run(&["watch", "--app-id", &app, "--from-block", "0", "--count", "3"]).expect(0);
    assert!(watched.out.contains("AppImplementationSet"), "{}", watched.out);
    chain.run(&["remove-image", ONE, "--yes"]).expect(0);
    explain(3).says("OS image is not allowed");
    let status = chain.run(&["status", "--json"]).expect(0).json();
    assert_eq!(status["kms"]["images"], json!([]));
}

#[test]
fn what_opens_a_door_needs_danger() {
    let Some(chain) = Chain::start() else { return };
    let before = chain.nonce();
    chain.run(&["add-image", ZERO, "--yes"]).expect(2).says("debug mode measures zero");
    chain.run(&["add-hash", "--app-id", &chain.app(), ZERO, "--yes"]).expect(2).says("needs --danger");
    chain.run(&["allow-any-device", "--app-id", &chain.app(), "--yes"]).expect(2).says("needs --danger");
    chain.run(&["create-app", "--allow-any-device", "--yes"]).expect(2).says("needs --danger");
    assert_eq!(chain.nonce(), before);
}

#[test]
fn nothing_is_sent_unasked() {
    let Some(chain) = Chain::start() else { return };
    let before = chain.nonce();
    chain
        .run(&["add-image", ONE])
        .expect(2)
        .says("plan: addOsImageHash")
        .says("hint: read the plan and give --yes");
    assert_eq!(chain.nonce(), before);
}

#[test]
fn calldata_asks_nobody() {
    let Some(chain) = Chain::start() else { return };
    let ran = chain.run_at("http://127.0.0.1:1", &["add-image", ONE, "--calldata", "--json"]).expect(0);
    assert_eq!(ran.json()["data"], format!("0x06a3ae96{}", "11".repeat(32)));
    assert_eq!(ran.json()["to"].as_str().unwrap().to_lowercase(), chain.kms().to_lowercase());
}

#[test]
fn without_an_endpoint_the_command_says_how_to_name_one() {
    let Some(chain) = Chain::start() else { return };
    for arguments in [&["status"][..], &["add-image", ONE, "--yes"]] {
        let mut command = chain.command(&chain.url, arguments);
        support::Ran::from(command.env_remove("RPC_URL").output().unwrap()).expect(2).says("give --rpc-url");
    }
}

#[test]
fn the_key_is_never_shown_and_a_missing_one_is_explained() {
    let Some(chain) = Chain::start() else { return };
    let mut command = chain.command(&chain.url, &["add-image", ONE, "--yes"]);
    command.env_remove("PRIVATE_KEY");
    let ran = support::Ran::from(command.output().unwrap()).expect(2);
    ran.says("environment variable PRIVATE_KEY: not set").says("hint: give --keystore");
    let bad = "ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ffzz";
    let mut command = chain.command(&chain.url, &["add-image", ONE, "--yes"]);
    let ran = support::Ran::from(command.env("PRIVATE_KEY", bad).output().unwrap()).expect(2);
    assert!(!ran.err.contains("ac0974") && !ran.out.contains("ac0974"));
}

#[test]
fn a_healthy_endpoint_passes_the_doctor() {
    let Some(chain) = Chain::start() else { return };
    chain.run(&["doctor"]).expect(0).says("is usable").says("eth_getProof");
    let ran = chain.run(&["doctor", "--json", "--chain-id", "1"]).expect(3);
    assert_eq!(ran.json()["usable"], 0);
}
