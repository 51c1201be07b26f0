//! Transactions that are stuck, dropped or overtaken.

#![allow(clippy::unwrap_used, reason = "a test stops where something is wrong, and says what it skips")]

mod support;

use serde_json::{Value, json};
use support::Chain;

const ONE: &str = "0x1111111111111111111111111111111111111111111111111111111111111111";

/// A chain with one transaction of the owner in its pool, and no block for it. Gives that transaction.
fn stuck() -> Option<(Chain, Value)> {
    let chain = Chain::start()?;
    chain.ask("evm_setAutomine", json!([false]));
    let ran = chain.run(&["add-image", ONE, "--yes", "--deadline", "1"]).expect(4);
    ran.says("was not confirmed within 1 s").says("hint: run the same command again");
    let mut pool = pool(&chain);
    assert_eq!(pool.len(), 1);
    let transaction = pool.swap_remove(0);
    Some((chain, transaction))
}

/// The owner's transactions that wait for a block.
fn pool(chain: &Chain) -> Vec<Value> {
    let content = chain.ask("txpool_content", json!([]));
    let all = content["pending"].as_object().unwrap().values();
    all.flat_map(|it| it.as_object().unwrap().values().cloned()).collect()
}

fn fee(transaction: &Value, name: &str) -> u128 {
    u128::from_str_radix(transaction[name].as_str().unwrap().trim_start_matches("0x"), 16).unwrap()
}

#[test]
fn a_stuck_transaction_is_replaced_by_one_with_higher_fees() {
    let Some((chain, low)) = stuck() else { return };
    let before = chain.nonce();
    chain.run(&["settle", "--raise-fees", "--yes", "--deadline", "1"]).expect(4);
    let pool = pool(&chain);
    assert_eq!(pool.len(), 1, "{pool:?}");
    let high = &pool[0];
    assert_eq!(high["nonce"], low["nonce"]);
    assert_eq!((&high["to"], &high["input"]), (&low["to"], &low["input"]));
    for name in ["maxFeePerGas", "maxPriorityFeePerGas"] {
        assert!(fee(high, name) * 10 >= fee(&low, name) * 11, "{name}: {high} after {low}");
    }
    chain.ask("evm_setAutomine", json!([true]));
    chain.ask("evm_mine", json!([]));
    let settled = chain.run(&["settle", "--json"]).expect(0).json();
    assert_eq!(settled["ended"], json!([high["hash"]]));
    assert_eq!(chain.nonce(), before + 1);
    chain.run(&["add-image", ONE, "--yes"]).expect(0).says("already done");
    chain.run(&["settle"]).expect(0).says("nothing was open");
    assert_eq!(chain.nonce(), before + 1);
}

#[test]
fn fees_are_not_raised_above_the_cap() {
    let Some((chain, low)) = stuck() else { return };
    let ran = chain.run(&["settle", "--raise-fees", "--max-fee-gwei", "1"]).expect(3);
    ran.says("the cap is 1000000000 wei").says("hint: wait for lower fees, or raise --max-fee-gwei");
    assert_eq!(pool(&chain), [low]);
}

#[test]
fn a_dropped_transaction_is_offered_again_with_the_same_bytes() {
    let Some((chain, dropped)) = stuck() else { return };
    let before = chain.nonce();
    chain.ask("anvil_dropTransaction", json!([dropped["hash"]]));
    assert!(pool(&chain).is_empty());
    chain.ask("evm_setAutomine", json!([true]));
    chain.run(&["add-image", ONE, "--yes"]).expect(0).says("already done");
    assert_eq!(chain.nonce(), before + 1);
    let receipt = chain.ask("eth_getTransactionReceipt", json!([dropped["hash"]]));
    assert_eq!(receipt["status"], "0x1");
}

/// Somebody else with the same key was faster. The command notices, and decides anew when it is run again.
#[test]
fn a_transaction_that_lost_its_nonce_is_given_up() {
    let Some((chain, lost)) = stuck() else { return };
    let before = chain.nonce();
    chain.ask("anvil_dropTransaction", json!([lost["hash"]]));
    let other = json!({ "from": chain.seeded.owner, "to": chain.seeded.owner, "value": "0x0" });
    chain.ask("eth_sendTransaction", json!([other]));
    // Mined by a call that ends when the block is there; by itself anvil mines after it has answered.
    chain.ask("evm_mine", json!([]));
    chain.ask("evm_setAutomine", json!([true]));
    assert_eq!(chain.nonce(), before + 1);
    chain.run(&["settle"]).expect(0).says(lost["hash"].as_str().unwrap());
    assert!(chain.ask("eth_getTransactionReceipt", json!([lost["hash"]])).is_null());
    chain.run(&["add-image", ONE, "--yes"]).expect(0).says("done in block");
    assert_eq!(chain.nonce(), before + 2);
}

/// A transaction that this journal did not send is not fought with.
#[test]
fn somebody_elses_transaction_in_flight_stops_the_command() {
    let Some(chain) = Chain::start() else { return };
    chain.ask("evm_setAutomine", json!([false]));
    let other = json!({ "from": chain.seeded.owner, "to": chain.seeded.owner, "value": "0x0" });
    chain.ask("eth_sendTransaction", json!([other]));
    let ran = chain.run(&["add-image", ONE, "--yes"]).expect(3);
    ran.says("in flight that this journal did not send").says("hint: let them be mined");
    assert_eq!(pool(&chain).len(), 1);
}
