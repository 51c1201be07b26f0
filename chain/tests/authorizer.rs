//! What a KMS asks, and that it gets no yes from silence or from a contract that misbehaves.

#![allow(clippy::unwrap_used, reason = "a test stops where something is wrong, and says what it skips")]

mod support;

use std::time::Duration;

use alloy::primitives::Address;
use chain::rpc::{Endpoints, Limits};
use chain::{Authorizer, Error, LOCAL_CHAIN_ID};
use kms_protocol::wire::webhook::BootInfo;
use serde_json::json;
use support::{Act, Chain, Proxy};

const ONE: &str = "1111111111111111111111111111111111111111111111111111111111111111";

fn authorizer(chain: &Chain, url: &str, deadline: Duration) -> Authorizer {
    let endpoints = Endpoints::new(&[url.to_owned()], 1, Limits::default(), support::clock).unwrap();
    Authorizer::new(endpoints.on_chain(LOCAL_CHAIN_ID), chain.seeded.contracts.kms, deadline)
}

fn boot_info(app: Address) -> BootInfo {
    BootInfo {
        os_image_hash: vec![0x11; 32],
        compose_hash: vec![0x11; 32],
        mr_aggregated: vec![0x11; 32],
        app_id: app.to_vec(),
        ..BootInfo::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registered_image_is_allowed_until_it_is_taken_back() {
    let Some(chain) = tokio::task::spawn_blocking(Chain::start).await.unwrap() else { return };
    let run = |arguments: &[&str]| {
        tokio::task::block_in_place(|| chain.run(&[arguments, &["--yes"]].concat()).expect(0));
    };
    let authorizer = authorizer(&chain, &chain.url, Duration::from_secs(10));
    let who = boot_info(chain.seeded.app);
    let denied = authorizer.is_app_allowed(&who).await.unwrap();
    assert_eq!((denied.is_allowed, denied.reason.as_str()), (false, "OS image is not allowed"));
    run(&["add-image", ONE]);
    run(&["add-hash", "--app-id", &chain.app(), ONE]);
    run(&["set-gateway", "gateway.example"]);
    let allowed = authorizer.is_app_allowed(&who).await.unwrap();
    assert_eq!((allowed.is_allowed, allowed.reason.as_str()), (true, ""));
    assert_eq!(allowed.gateway_app_id, "gateway.example");
    assert!(allowed.block > denied.block);
    let kms = authorizer.is_kms_allowed(&who).await.unwrap();
    assert_eq!((kms.is_allowed, kms.reason.as_str()), (false, "TCB status is not up to date"));
    run(&["remove-image", ONE]);
    assert!(!authorizer.is_app_allowed(&who).await.unwrap().is_allowed);
    let info = authorizer.contract_info().await.unwrap();
    assert_eq!((info.chain_id, info.kms_contract), (LOCAL_CHAIN_ID, chain.seeded.contracts.kms));
    assert_eq!(info.app_implementation, chain.seeded.contracts.app_implementation);
    tokio::task::spawn_blocking(move || drop(chain)).await.unwrap();
}

/// What is not buried deep enough does not count yet, neither as a permission nor as its end.
#[tokio::test(flavor = "multi_thread")]
async fn decisions_behind_the_head_follow_later() {
    let Some(chain) = tokio::task::spawn_blocking(Chain::start).await.unwrap() else { return };
    let mine = |blocks: u64| tokio::task::block_in_place(|| chain.ask("anvil_mine", json!([blocks])));
    let run = |arguments: &[&str]| {
        tokio::task::block_in_place(|| chain.run(&[arguments, &["--yes"]].concat()).expect(0));
    };
    run(&["add-hash", "--app-id", &chain.app(), ONE]);
    mine(2);
    let endpoints =
        Endpoints::new(std::slice::from_ref(&chain.url), 1, Limits::default(), support::clock).unwrap();
    let endpoints = endpoints.on_chain(LOCAL_CHAIN_ID).behind_head(2);
    let authorizer = Authorizer::new(endpoints, chain.seeded.contracts.kms, Duration::from_secs(10));
    let who = boot_info(chain.seeded.app);
    for (write, before) in [("add-image", false), ("remove-image", true)] {
        run(&[write, ONE]);
        for blocks in [0, 1] {
            mine(blocks);
            let decision = authorizer.is_app_allowed(&who).await.unwrap();
            assert_eq!(decision.is_allowed, before, "{write}, {blocks} blocks later");
        }
        mine(1);
        assert_eq!(authorizer.is_app_allowed(&who).await.unwrap().is_allowed, !before, "{write}");
    }
    tokio::task::spawn_blocking(move || drop(chain)).await.unwrap();
}

/// A stalled backend must not hold up the KMS, and nothing is released meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn silence_is_no_decision() {
    let Some(chain) = tokio::task::spawn_blocking(Chain::start).await.unwrap() else { return };
    let proxy =
        Proxy::start(&chain.url, |_, method, _| if method == "eth_call" { Act::Hang } else { Act::Forward });
    let authorizer = authorizer(&chain, &proxy.url, Duration::from_millis(300));
    let error = authorizer.is_app_allowed(&boot_info(chain.seeded.app)).await.unwrap_err();
    assert!(matches!(error, Error::NoAnswer { .. }), "{error}");
    tokio::task::spawn_blocking(move || drop(chain)).await.unwrap();
}

/// An application contract can answer its registry with anything: a reason that is not text, a revert, nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_contract_that_answers_nonsense_is_no_decision() {
    let Some(chain) = tokio::task::spawn_blocking(Chain::start).await.unwrap() else { return };
    let word = |hex: &str| format!("{hex:0>64}");
    let cases = [
        format!("0x{}", word("1")),
        format!("0x{}{}{}", word("2"), word("40"), word("0")),
        format!("0x{}{}{}ff{}", word("1"), word("40"), word("1"), "00".repeat(31)),
        format!("0x{}{}{}", word("1"), "f".repeat(64), word("0")),
        format!("0x{}{}{}", word("1"), word("40"), word("ffffffff")),
    ];
    for nonsense in cases {
        let told = nonsense.clone();
        let proxy = Proxy::start(&chain.url, move |_, method, params| {
            let asked = params[0]["data"].as_str().unwrap_or_default();
            match method == "eth_call" && asked.starts_with("0x1e079198") {
                true => Act::Result(json!(nonsense)),
                false => Act::Forward,
            }
        });
        let authorizer = authorizer(&chain, &proxy.url, Duration::from_secs(10));
        let answer = authorizer.is_app_allowed(&boot_info(chain.seeded.app)).await;
        assert!(matches!(answer, Err(Error::ReturnValue { .. })), "{told}: {answer:?}");
    }
    tokio::task::spawn_blocking(move || drop(chain)).await.unwrap();
}
