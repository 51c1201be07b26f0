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
