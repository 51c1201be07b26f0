//! Endpoints that are slow, wrong, behind or limited: the right result, or a clear error with a hint.

#![allow(clippy::unwrap_used, reason = "a test stops where something is wrong, and says what it skips")]

mod support;

use serde_json::{Value, json};
use support::{Act, Chain, Proxy};

const ONE: &str = "0x1111111111111111111111111111111111111111111111111111111111111111";
const TWO: &str = "0x2222222222222222222222222222222222222222222222222222222222222222";

/// The head stands still for a while after the transaction is sent, as behind a load balancer.
#[test]
fn stale_reads_after_a_write_are_waited_out() {
    let Some(chain) = Chain::start() else { return };
    let head = chain.ask("eth_getBlockByNumber", json!(["latest", false]));
    let mut stale_left = 6;
    let proxy = Proxy::start(&chain.url, move |_, method, params| match method {
        "eth_getBlockByNumber" if params[0] == "latest" && stale_left > 0 => {
            stale_left -= 1;
            Act::Result(head.clone())
        }
        _ => Act::Forward,
    });
    chain.run_at(&proxy.url, &["add-image", ONE, "--yes"]).expect(0).says("done in block");
}

/// The state of the newest block is not there yet: `header not found`, then it is.
#[test]
fn state_that_is_not_there_yet_is_asked_for_again() {
    let Some(chain) = Chain::start() else { return };
    let mut missing = 2;
    let proxy = Proxy::start(&chain.url, move |_, method, _| match method {
        "eth_call" if missing > 0 => {
            missing -= 1;
            Act::Error(json!({ "code": -32000, "message": "header not found" }))
        }
        _ => Act::Forward,
    });
    chain.run_at(&proxy.url, &["add-image", ONE, "--yes"]).expect(0);
}

/// The nonce is stale after our own transaction: the journal knows better.
#[test]
fn a_stale_nonce_does_not_reuse_one() {
    let Some(chain) = Chain::start() else { return };
    let old = chain.ask("eth_getTransactionCount", json!([chain.seeded.owner, "latest"]));
    chain.run(&["add-image", ONE, "--yes"]).expect(0);
    let proxy = Proxy::start(&chain.url, move |_, method, _| match method {
        "eth_getTransactionCount" => Act::Result(old.clone()),
        _ => Act::Forward,
    });
    let before = chain.nonce();
    chain.run_at(&proxy.url, &["add-image", TWO, "--yes"]).expect(0);
    assert_eq!(chain.nonce(), before + 1);
}

#[test]
fn a_missing_tip_suggestion_is_done_without() {
    let Some(chain) = Chain::start() else { return };
    let proxy = Proxy::start(&chain.url, |_, method, _| match method {
        "eth_maxPriorityFeePerGas" | "web3_clientVersion" => {
            Act::Error(json!({ "code": -32601, "message": "Method not found" }))
        }
        _ => Act::Forward,
    });
    chain.run_at(&proxy.url, &["add-image", ONE, "--yes"]).expect(0);
    chain
        .run_at(&proxy.url, &["doctor"])
        .expect(0)
        .says("NO web3_clientVersion")
        .says("Hardhat aborts without it");
}

#[test]
fn a_missing_method_is_named_with_a_hint() {
    let Some(chain) = Chain::start() else { return };
    let proxy = Proxy::start(&chain.url, |_, method, _| match method {
        "eth_estimateGas" => {
            Act::Error(json!({ "code": -32601, "message": "the method does not exist/is not available" }))
        }
        _ => Act::Forward,
    });
    let ran = chain.run_at(&proxy.url, &["add-image", ONE, "--yes"]).expect(1);
    ran.says("does not offer eth_estimateGas").says("hint: run `keyferry chain doctor`");
}

#[test]
fn a_rate_limit_is_waited_out_or_told() {
    let Some(chain) = Chain::start() else { return };
    let limited = |_: usize| Act::Http(429, b"slow down".to_vec());
    let proxy = Proxy::start(
        &chain.url,
        move |number, _, _| if number % 3 == 0 { limited(number) } else { Act::Forward },
    );
    chain.run_at(&proxy.url, &["add-image", ONE, "--yes"]).expect(0);
    let proxy = Proxy::start(&chain.url, move |number, _, _| limited(number));
    let ran = chain.run_at(&proxy.url, &["add-image", TWO, "--yes"]).expect(4);
    ran.says("limits the rate of requests").says("hint: wait and run again");
}

#[test]
fn another_chain_is_refused_before_anything_is_signed() {
    let Some(chain) = Chain::start() else { return };
    let proxy = Proxy::start(&chain.url, |_, method, _| match method {
        "eth_chainId" => Act::Result(json!("0x1")),
        _ => Act::Forward,
    });
    let ran = chain.run_at(&proxy.url, &["add-image", ONE, "--yes", "--chain-id", "31337"]).expect(3);
    ran.says("is on chain 1, expected chain 31337").says("hint: check --rpc-url and --chain-id");
}

#[test]
fn an_old_head_is_refused() {
    let Some(chain) = Chain::start() else { return };
    // On any chain but the local one, whose blocks come on demand.
    let mut head = chain.ask("eth_getBlockByNumber", json!(["latest", false]));
    head["timestamp"] = json!("0x60000000");
    let proxy = Proxy::start(&chain.url, move |_, method, _| match method {
        "eth_chainId" => Act::Result(json!("0x14a34")),
        "eth_getBlockByNumber" => Act::Result(head.clone()),
        _ => Act::Forward,
    });
    chain.run_at(&proxy.url, &["status"]).expect(3).says("is stale: its newest block");
}

#[test]
fn a_revert_is_told_in_the_contracts_words() {
    let Some(chain) = Chain::start() else { return };
    // OpenZeppelin's OwnableUnauthorizedAccount(0x…22), as geth sends it: code 3, the data beside the message.
    let data = format!("0x118cdaa7{:0>64}", "22".repeat(20));
    let proxy = Proxy::start(&chain.url, move |_, method, params| match method {
        "eth_call" if params[0]["data"].as_str().is_some_and(|it| it.starts_with("0x06a3ae96")) => {
            Act::Error(json!({ "code": 3, "message": "execution reverted", "data": data }))
        }
        _ => Act::Forward,
    });
    let ran = chain.run_at(&proxy.url, &["add-image", ONE, "--yes"]).expect(3);
    ran.says("0x2222222222222222222222222222222222222222 is not the owner").says("--calldata");
}

#[test]
fn silence_ends_at_the_deadline() {
    let Some(chain) = Chain::start() else { return };
    let proxy = Proxy::start(&chain.url, |_, _, _| Act::Hang);
    let ran = chain.run_at(&proxy.url, &["status", "--timeout", "1"]).expect(4);
    ran.says("gave no answer to eth_chainId within 1 s").says("hint: ");
}

#[test]
fn an_endless_answer_is_cut_off() {
    let Some(chain) = Chain::start() else { return };
    let proxy = Proxy::start(&chain.url, |_, _, _| Act::Http(200, vec![b' '; 9 << 20]));
    chain.run_at(&proxy.url, &["status"]).expect(1).says("with more than 8388608 bytes");
}

#[test]
fn a_page_instead_of_json_is_told() {
    let Some(chain) = Chain::start() else { return };
    let proxy = Proxy::start(&chain.url, |_, _, _| Act::Http(200, b"<html>".to_vec()));
    chain.run_at(&proxy.url, &["status"]).expect(1).says("not JSON-RPC");
}

/// Allowed according to a liar, denied according to the chain.
fn liar(chain: &Chain) -> Proxy {
    let allowed = format!("0x{:0>64}{:0>64}{:0>64}", "1", "40", "0");
    Proxy::start(&chain.url, move |_, method, params: &Value| match method {
        "eth_call" if params[0]["data"].as_str().is_some_and(|it| it.starts_with("0x1e079198")) => {
            Act::Result(json!(allowed))
        }
        _ => Act::Forward,
    })
}

#[test]
fn one_liar_among_three_is_outvoted_and_among_two_noticed() {
    let Some(chain) = Chain::start() else { return };
    let info = chain.folder.path().join("info.json");
    let text = json!({
        "mrAggregated": ONE, "osImageHash": ONE, "composeHash": ONE, "appId": chain.app(), "instanceId": "", "deviceId": "",
    });
    std::fs::write(&info, text.to_string()).unwrap();
    let liar = liar(&chain);
    let honest = Proxy::start(&chain.url, |_, _, _| Act::Forward);
    let explain = |urls: &[&str]| chain.run_at(&urls.join(","), &["explain", info.to_str().unwrap()]);
    explain(&[&liar.url]).expect(0).says("rules of its own");
    explain(&[&liar.url, &chain.url])
        .expect(3)
        .says("endpoints disagree on isAppAllowed")
        .says("hint: find the one");
    explain(&[&liar.url, &chain.url, &honest.url])
        .expect(3)
        .says("denied at block")
        .says("OS image is not allowed");
}

#[test]
fn a_dead_endpoint_does_not_matter_when_enough_others_answer() {
    let Some(chain) = Chain::start() else { return };
    let second = Proxy::start(&chain.url, |_, _, _| Act::Forward);
    let urls = format!("http://127.0.0.1:1,{},{}", chain.url, second.url);
    chain.run_at(&urls, &["add-image", ONE, "--yes"]).expect(0);
    let ran = chain.run_at(&urls, &["status", "--agree", "3"]).expect(4);
    ran.says("2 of the 3 needed endpoints answered").says("127.0.0.1:1 cannot be reached");
}

/// Endpoint addresses often carry an access key in the path.
#[test]
fn access_keys_in_addresses_are_not_shown() {
    let Some(chain) = Chain::start() else { return };
    let ran = chain.run_at("http://127.0.0.1:1/v2/SECRET?key=SECRET", &["status"]).expect(4);
    assert!(!ran.err.contains("SECRET"), "{}", ran.err);
    let ran = chain.run_at("ftp://user:SECRET@example.org/", &["status"]).expect(2);
    assert!(!ran.err.contains("SECRET"), "{}", ran.err);
}
