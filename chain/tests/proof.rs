//! Decisions from proven storage: the contract's own answers, and nothing a lying endpoint can change.

#![allow(clippy::unwrap_used, reason = "a test stops where something is wrong, and says what it skips")]

mod support;

use alloy::primitives::{Address, B256, keccak256};
use chain::abi::AppBootInfo;
use chain::contracts::Reader;
use chain::proof::{KnownCode, ProvenReader};
use chain::rpc::{Endpoint, Endpoints, Limits, View};
use chain::{Error, Result};
use serde_json::{Value, json};
use support::{Act, Chain, Proxy};

const ONE: B256 = B256::repeat_byte(0x11);
const TWO: B256 = B256::repeat_byte(0x22);

struct Trusted {
    endpoints: Endpoints,
    view: View,
    code: KnownCode,
    kms: Address,
}

impl Trusted {
    async fn look(chain: &Chain) -> Self {
        let endpoints =
            Endpoints::new(std::slice::from_ref(&chain.url), 1, Limits::default(), support::clock).unwrap();
        let view = endpoints.view().await.unwrap();
        let contracts = chain.seeded.contracts;
        let code = async |at| keccak256(endpoints.each()[0].code(at, view.block()).await.unwrap());
        let code = KnownCode {
            kms: code(contracts.kms_implementation).await,
            app: code(contracts.app_implementation).await,
        };
        Self { endpoints, view, code, kms: contracts.kms }
    }

    fn proven<'a>(&'a self, endpoint: &'a Endpoint) -> ProvenReader<'a> {
        ProvenReader::new(endpoint, &self.view.head, self.kms, self.code)
    }

    async fn proven_by(&self, url: &str, who: &AppBootInfo) -> Result<(bool, &'static str)> {
        let endpoint = Endpoint::new(url, Limits::default()).unwrap();
        self.proven(&endpoint).is_app_allowed(who).await
    }
}

fn boot_info(app: Address, image: B256, compose: B256, device: B256, tcb: &str) -> AppBootInfo {
    AppBootInfo {
        appId: app,
        composeHash: compose,
        instanceId: Address::ZERO,
        deviceId: device,
        mrAggregated: image,
        mrSystem: image,
        osImageHash: image,
        tcbStatus: tcb.to_owned(),
        advisoryIds: Vec::new(),
    }
}

/// Two of everything: registered and not.
fn all_boot_infos(apps: &[Address]) -> Vec<AppBootInfo> {
    let mut all = Vec::new();
    for app in apps {
        for (image, compose) in [(ONE, ONE), (ONE, TWO), (TWO, ONE)] {
            for (device, tcb) in [(ONE, "UpToDate"), (ONE, ""), (TWO, "UpToDate"), (TWO, "OutOfDate")] {
                all.push(boot_info(*app, image, compose, device, tcb));
            }
        }
    }
    all
}

fn prepared() -> Option<(Chain, Vec<Address>)> {
    let chain = Chain::start()?;
    let one = ONE.to_string();
    let nowhere = Address::repeat_byte(0xab);
    for write in [
        &["add-image", &one][..],
        &["add-kms", &one],
        &["add-device", &one],
        &["register-app", &nowhere.to_string()],
    ] {
        chain.run(&[write, &["--yes"]].concat()).expect(0);
    }
    let mut apps = vec![nowhere, Address::repeat_byte(0xcd)];
    let cases: [&[&str]; 3] =
        [&["--allow-any-device", "--danger"], &["--device", &one], &["--require-tcb-up-to-date"]];
    for case in cases {
        let ran = chain.run(&[&["create-app", "--hash", &one, "--yes", "--json"], case].concat()).expect(0);
        apps.push(ran.json()["appId"].as_str().unwrap().parse().unwrap());
    }
    Some((chain, apps))
}

#[tokio::test(flavor = "multi_thread")]
async fn proven_decisions_are_the_contracts_own() {
    let Some((chain, apps)) = tokio::task::spawn_blocking(prepared).await.unwrap() else { return };
    let trusted = Trusted::look(&chain).await;
    let contract = Reader::new(&trusted.endpoints, &trusted.view, trusted.kms);
    let proven = trusted.proven(&trusted.endpoints.each()[0]);
    for who in all_boot_infos(&apps) {
        let (allowed, reason) = contract.is_app_allowed(who.clone()).await.unwrap();
        assert_eq!(proven.is_app_allowed(&who).await.unwrap(), (allowed, reason.as_str()), "{who:?}");
        let (allowed, reason) = contract.is_kms_allowed(who.clone()).await.unwrap();
        assert_eq!(proven.is_kms_allowed(&who).await.unwrap(), (allowed, reason.as_str()), "{who:?}");
    }
    tokio::task::spawn_blocking(move || drop(chain)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn gateway_ids_of_every_length_are_proven() {
    let Some(chain) = tokio::task::spawn_blocking(Chain::start).await.unwrap() else { return };
    for length in [0, 1, 31, 32, 33, 64, 100] {
        let id = "g".repeat(length);
        tokio::task::block_in_place(|| chain.run(&["set-gateway", &id, "--yes"]).expect(0));
        let trusted = Trusted::look(&chain).await;
        let proven = trusted.proven(&trusted.endpoints.each()[0]).gateway_app_id().await.unwrap();
        assert_eq!(proven, id);
    }
    tokio::task::spawn_blocking(move || drop(chain)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lying_endpoint_cannot_prove_anything_else() {
    let Some((chain, apps)) = tokio::task::spawn_blocking(prepared).await.unwrap() else { return };
    let trusted = Trusted::look(&chain).await;
    let denied = boot_info(apps[2], TWO, ONE, ONE, "");
    assert_eq!(trusted.proven_by(&chain.url, &denied).await.unwrap(), (false, "OS image is not allowed"));
    let lies: [fn(&mut Value); 6] = [
        |proof| {
            proof["storageProof"].as_array_mut().unwrap().iter_mut().for_each(|it| it["value"] = json!("0x1"))
        },
        |proof| proof["storageHash"] = json!(B256::ZERO),
        |proof| proof["codeHash"] = json!(B256::repeat_byte(1)),
        |proof| proof["accountProof"] = json!([]),
        |proof| proof["storageProof"] = json!([]),
        |proof| {
            let storage = proof["storageProof"].as_array_mut().unwrap();
            storage.iter_mut().for_each(|it| it["proof"] = json!([]));
        },
    ];
    for (number, lie) in lies.into_iter().enumerate() {
        let upstream = chain.url.clone();
        let proxy = Proxy::start(&chain.url, move |_, method, params| {
            assert_eq!(method, "eth_getProof");
            let mut proof = support::ask(&upstream, method, params.clone());
            lie(&mut proof);
            Act::Result(proof)
        });
        let answer = trusted.proven_by(&proxy.url, &denied).await;
        assert!(matches!(answer, Err(Error::Proof { .. })), "lie {number}: {answer:?}");
    }
    tokio::task::spawn_blocking(move || drop(chain)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_logic_is_not_judged() {
    let Some(chain) = tokio::task::spawn_blocking(Chain::start).await.unwrap() else { return };
    let mut trusted = Trusted::look(&chain).await;
    trusted.code.kms = B256::ZERO;
    let who = boot_info(chain.seeded.app, ONE, ONE, ONE, "");
    let error = trusted.proven_by(&chain.url, &who).await.unwrap_err();
    assert!(error.to_string().contains("expected 0x0000"), "{error}");
    tokio::task::spawn_blocking(move || drop(chain)).await.unwrap();
}

/// A registered image, and the hashes of the code that `status` shows.
fn registered() -> Option<(Chain, [String; 4])> {
    let chain = Chain::start()?;
    let image = ONE.to_string();
    chain.run(&["add-image", &image, "--yes"]).expect(0);
    chain.run(&["add-hash", "--app-id", &chain.app(), &image, "--yes"]).expect(0);
    let kms = &chain.run(&["status", "--json"]).expect(0).json()["kms"];
    let code = |name: &str| kms[name].as_str().unwrap().to_owned();
    let code = (code("implementationCode"), code("appImplementationCode"));
    Some((chain, ["--kms-code".to_owned(), code.0, "--app-code".to_owned(), code.1]))
}

fn boot_info_file(chain: &Chain) -> String {
    let path = chain.folder.path().join("boot-info.json");
    let text = json!({
        "mrAggregated": ONE, "osImageHash": ONE, "composeHash": ONE, "appId": chain.app(), "instanceId": "", "deviceId": "",
    });
    std::fs::write(&path, text.to_string()).unwrap();
    path.to_str().unwrap().to_owned()
}

fn with_code<'a>(arguments: &[&'a str], code: &'a [String; 4]) -> Vec<&'a str> {
    arguments.iter().copied().chain(["--prove"]).chain(code.iter().map(String::as_str)).collect()
}

#[test]
fn status_and_explain_are_proven_on_request() {
    let Some((chain, code)) = registered() else { return };
    let info = boot_info_file(&chain);
    let status = chain.run(&with_code(&["status", "--app-id", &chain.app()], &code)).expect(0);
    // One image and one app, gateway and application logic; one compose hash and two flags.
    status.says("7 entries proven by the storage of block 0x");
    chain.run(&with_code(&["explain", &info], &code)).expect(0).says("proven by the storage of block 0x");
    chain.run(&["explain", &info, "--prove"]).expect(2).says("--kms-code");
    let wrong = [code[0].clone(), TWO.to_string(), code[2].clone(), code[3].clone()];
    let ran = chain.run(&with_code(&["explain", &info], &wrong)).expect(3);
    ran.says(&format!("expected {TWO}")).says("hint: the endpoint lies");
}

/// Contract calls say that another image is registered and that the app may run; the storage does not.
#[test]
fn an_endpoint_that_lies_about_calls_is_caught_by_proofs() {
    let Some((chain, code)) = registered() else { return };
    let info = boot_info_file(&chain);
    chain.run(&["remove-image", &ONE.to_string(), "--yes"]).expect(0);
    let yes = format!("0x{:0>64}", 1);
    let allowed = format!("0x{:0>64}{:0>64}{:0>64}", 1, 40, 0);
    let liar = Proxy::start(&chain.url, move |_, method, params| {
        let asked = params[0]["data"].as_str().unwrap_or_default();
        match method {
            "eth_call" if asked.starts_with("0x9a4e1d18") => Act::Result(json!(yes)),
            "eth_call" if asked.starts_with("0x1e079198") => Act::Result(json!(allowed)),
            _ => Act::Forward,
        }
    });
    chain.run_at(&liar.url, &["explain", &info]).expect(0).says("allowed at block");
    let ran = chain.run_at(&liar.url, &with_code(&["explain", &info], &code)).expect(3);
    ran.says("the decision is not proven").says("OS image is not allowed");
    chain.run_at(&liar.url, &["status"]).expect(0).says(&ONE.to_string());
    let ran = chain.run_at(&liar.url, &with_code(&["status"], &code)).expect(3);
    ran.says(&format!("its storage does not hold {ONE}"));
}

#[test]
fn a_given_block_is_read_and_its_header_proven() {
    let Some((chain, code)) = registered() else { return };
    let info = boot_info_file(&chain);
    let block = chain.ask("eth_getBlockByNumber", json!(["latest", false]));
    let hash = block["hash"].as_str().unwrap().to_owned();
    chain.run(&["remove-image", &ONE.to_string(), "--yes"]).expect(0);
    let at = ["explain", &info, "--block-hash", &hash];
    chain.run(&with_code(&at, &code)).expect(0).says(&format!("proven by the storage of block {hash}"));
    chain.run(&with_code(&["explain", &info], &code)).expect(3).says("OS image is not allowed");
    // Another header in its place: the same state root, another time.
    let liar = Proxy::start(&chain.url, move |_, method, _| match method {
        "eth_getBlockByHash" => {
            let mut other = block.clone();
            other["timestamp"] = json!("0x1");
            Act::Result(other)
        }
        _ => Act::Forward,
    });
    let ran = chain.run_at(&liar.url, &with_code(&at, &code)).expect(3);
    ran.says(&format!("the header of block {hash} is not proven")).says("the header that came has the hash");
    let unknown = ["explain", &info, "--block-hash", &TWO.to_string()].map(str::to_owned);
    let unknown: Vec<&str> = unknown.iter().map(String::as_str).collect();
    chain.run(&with_code(&unknown, &code)).expect(4).says("no block");
}
