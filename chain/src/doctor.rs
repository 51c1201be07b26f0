//! What an endpoint can do, and what it costs when it cannot.

use alloy::primitives::{Address, B256, U64, U256};
use futures_util::future::join_all;
use serde::Serialize;
use serde_json::{Value, json};

use crate::rpc::{Endpoint, Endpoints, Head};
use crate::{Error, LOCAL_CHAIN_ID, Result};

/// Requests sent at once to feel for a rate limit: what a busy `status` sends in a second.
const BURST: usize = 24;

/// The result of one probe.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// What was tried.
    pub probe: &'static str,
    /// Whether it works.
    pub ok: bool,
    /// What came back.
    pub detail: String,
    /// What does not work without it.
    pub cost: &'static str,
    /// Whether reads and writes work without it.
    pub optional: bool,
}

/// All findings about one endpoint.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Diagnosis {
    /// Scheme, host and port.
    pub endpoint: String,
    /// In the order tried.
    pub findings: Vec<Finding>,
    #[serde(skip)]
    head: Option<Head>,
}

impl Diagnosis {
    /// Whether everything needed works.
    pub fn is_usable(&self) -> bool {
        self.findings.iter().all(|it| it.ok || it.optional)
    }
}

/// What the check is to compare with.
#[derive(Clone, Copy, Debug, Default)]
pub struct Expected {
    /// Chain id.
    pub chain_id: Option<u64>,
    /// A contract that must be there.
    pub contract: Option<Address>,
    /// Now, seconds since 1970.
    pub now: u64,
    /// Age of the newest block that is accepted, seconds.
    pub max_head_age: u64,
}

/// Probes every endpoint, then compares them with each other.
pub async fn diagnose(endpoints: &Endpoints, expected: Expected) -> Vec<Diagnosis> {
    let mut all = join_all(endpoints.each().iter().map(|it| probe(it, expected))).await;
    let heads = all.iter().filter_map(|it| it.head.as_ref().map(|head| head.number));
    let Some(common) = heads.min().filter(|_| all.len() > 1) else {
        return all;
    };
    let number = format!("{common:#x}");
    let hashes = join_all(endpoints.each().iter().map(|it| it.block(&number))).await;
    let hashes: Vec<Option<B256>> = hashes.into_iter().map(|it| it.ok().map(|head| head.hash)).collect();
    let most_common =
        hashes.iter().flatten().max_by_key(|hash| hashes.iter().flatten().filter(|it| it == hash).count());
    for (diagnosis, hash) in all.iter_mut().zip(&hashes) {
        let finding = match hash {
            Some(hash) if Some(hash) == most_common => Ok(format!("block {common} is {hash}")),
            Some(hash) => Err(format!("block {common} is {hash}, for most it is another")),
            None => Err(format!("no block {common}")),
        };
        diagnosis.add("agreement", false, "reads with --agree", finding);
    }
    all
}

impl Diagnosis {
    fn add(
        &mut self,
        probe: &'static str,
        optional: bool,
        cost: &'static str,
        result: Result<String, String>,
    ) {
        let (ok, detail) = match result {
            Ok(detail) => (true, detail),
            Err(detail) => (false, detail),
        };
        self.findings.push(Finding { probe, ok, detail, cost, optional });
    }
}

async fn probe(endpoint: &Endpoint, expected: Expected) -> Diagnosis {
    let mut found = Diagnosis { endpoint: endpoint.name().to_owned(), findings: Vec::new(), head: None };
    found.add("eth_chainId", false, "everything", chain_id(endpoint, expected).await);
    match endpoint.head().await {
        Err(error) => {
            found.add("newest block", false, "everything", Err(error.to_string()));
            return found;
        }
        Ok(head) => {
            let local = endpoint.chain_id().await.is_ok_and(|it| it == LOCAL_CHAIN_ID);
            let age = expected.now.saturating_sub(head.timestamp.to());
            let told = format!("block {} is {age} s old", head.number);
            let fresh = local || age <= expected.max_head_age;
            found.add(
                "newest block",
                false,
                "everything: stale state is not believed",
                if fresh { Ok(told) } else { Err(told) },
            );
            let fee = head.base_fee_per_gas.map(|it| format!("base fee {it} wei"));
            found.add(
                "base fee",
                false,
                "writes",
                fee.ok_or_else(|| "none: not an EIP-1559 chain".to_owned()),
            );
            more_probes(endpoint, &mut found, &head, expected).await;
            found.head = Some(head);
        }
    }
    found
}

async fn chain_id(endpoint: &Endpoint, expected: Expected) -> Result<String, String> {
    let actual = endpoint.chain_id().await.map_err(|error| error.to_string())?;
    match expected.chain_id {
        Some(wanted) if wanted != actual => Err(format!("{actual}, expected {wanted}")),
        _ => Ok(actual.to_string()),
    }
}

async fn more_probes(endpoint: &Endpoint, found: &mut Diagnosis, head: &Head, expected: Expected) {
    let number: u64 = head.number.to();
    let zero = Address::ZERO;
    let contract = expected.contract.unwrap_or(zero);
    if let Some(address) = expected.contract {
        let code = match endpoint.code(address, number).await {
            Ok(code) if code.is_empty() => Err(format!("no contract at {address}")),
            other => {
                other.map(|code| format!("{} bytes at {address}", code.len())).map_err(|it| it.to_string())
            }
        };
        found.add("contract", false, "reads of this contract", code);
    }
    let latest = U64::from(number);
    let depth = |back: u64| U64::from(number.saturating_sub(back));
    let from = depth(9_999);
    let probes: [(&'static str, &'static str, &'static str, Value); 11] = [
        ("eth_call", "eth_call", "reads", json!([{ "to": contract, "data": "0x8da5cb5b" }, latest])),
        (
            "eth_getStorageAt",
            "eth_getStorageAt",
            "the logic behind a proxy in `status`",
            json!([contract, B256::ZERO, latest]),
        ),
        ("eth_estimateGas", "eth_estimateGas", "writes", json!([{ "from": zero, "to": zero }])),
        (
            "eth_maxPriorityFeePerGas",
            "eth_maxPriorityFeePerGas",
            "a suggested tip; writes then offer none",
            json!([]),
        ),
        (
            "eth_getLogs over 10,000 blocks",
            "eth_getLogs",
            "`status` and `watch` ask in smaller steps, or not at all",
            json!([{ "address": contract, "fromBlock": from, "toBlock": latest }]),
        ),
        (
            "eth_getProof",
            "eth_getProof",
            "verified reads; light clients such as helios",
            json!([contract, [B256::ZERO], latest]),
        ),
        (
            "state 128 blocks ago",
            "eth_getBalance",
            "reads while endpoints differ in age",
            json!([zero, depth(128)]),
        ),
        (
            "state 100,000 blocks ago",
            "eth_getBalance",
            "finding a contract's first block: give --from-block",
            json!([zero, depth(100_000)]),
        ),
        (
            "block tag finalized",
            "eth_getBlockByNumber",
            "reads of finalized state only",
            json!(["finalized", false]),
        ),
        ("web3_clientVersion", "web3_clientVersion", "nothing here; Hardhat aborts without it", json!([])),
        (
            "debug_traceCall",
            "debug_traceCall",
            "nothing here; helps to look into a revert",
            json!([{ "to": zero }, latest, {}]),
        ),
    ];
    for (name, method, cost, parameters) in probes {
        let answer: Result<Value> = endpoint.request(method, parameters).await;
        let result = match answer {
            // The owner function of whatever lives there may well revert: the method itself works.
            Ok(_) | Err(Error::Reverted { .. }) => Ok(summary(method, answer.ok())),
            Err(error) => Err(error.to_string()),
        };
        let optional = !matches!(method, "eth_call" | "eth_estimateGas");
        found.add(name, optional, cost, result);
    }
    found.add("rate limit", true, "`status` of a large contract is slow", burst(endpoint).await);
    let plain = endpoint.name().starts_with("http://") && !is_here(endpoint.name());
    let secure =
        if plain { Err("plain http: anybody on the way can lie".to_owned()) } else { Ok("ok".to_owned()) };
    found.add("transport", true, "trust in the answers, unless they are verified or agreed on", secure);
}

fn is_here(name: &str) -> bool {
    ["http://127.", "http://localhost", "http://[::1]"].iter().any(|it| name.starts_with(it))
}

fn summary(method: &str, answer: Option<Value>) -> String {
    match (method, answer) {
        ("web3_clientVersion", Some(Value::String(version))) => {
            kms_protocol::wire::webhook::bounded_reason(&version).chars().take(60).collect()
        }
        ("eth_maxPriorityFeePerGas", Some(tip)) => match serde_json::from_value::<U256>(tip) {
            Ok(tip) => format!("{tip} wei"),
            Err(_) => "not a number".to_owned(),
        },
        ("eth_getLogs", Some(Value::Array(logs))) => format!("{} events", logs.len()),
        _ => "ok".to_owned(),
    }
}

async fn burst(endpoint: &Endpoint) -> Result<String, String> {
    let asked = (0..BURST).map(|_| endpoint.request::<U64>("eth_blockNumber", json!([])));
    let failures: Vec<Error> = join_all(asked).await.into_iter().filter_map(Result::err).collect();
    match failures.first() {
        None => Ok(format!("{BURST} requests at once are answered")),
        Some(first) => Err(format!("{} of {BURST} requests at once fail: {first}", failures.len())),
    }
}
