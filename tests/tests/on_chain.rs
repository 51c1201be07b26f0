//! The trip with contracts that decide: real programs, and a real chain on this machine.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a set-up that fails is a failed test, and one that cannot be made says so"
)]

use std::fs;
use std::process::Command;
use std::time::Duration;

use attestation::{Pcr, os_image_hash};
use e2e::{Contracts, Finished, IMAGE, Trip, Variation, anvil, finish, program, run};
use serde_json::Value;

/// No command of these tests takes this long; it only keeps a hang from holding everything up.
const DEADLINE: Duration = Duration::from_secs(120);

/// The contracts, and what a trip needs of them.
struct Registry {
    contracts: Contracts,
    /// Which chain the KMS is told that it is.
    chain_id: Value,
}

impl Registry {
    fn start() -> Option<Self> {
        let contracts = Contracts::start()?;
        let chain_id = contracts.chain_id().clone();
        Some(Self { contracts, chain_id })
    }

    fn fact(&self, name: &str) -> &str {
        self.contracts.fact(name)
    }

    fn run(&self, arguments: &[&str]) -> Finished {
        self.contracts.run(arguments)
    }

    /// A trip to a KMS that asks these contracts.
    fn trip(&self, more_settings: &str) -> Trip {
        let settings = format!(
            "type = \"chain\"\n[core.auth_api.chain]\nrpc_urls = [{:?}]\nchain_id = {}\nkms_contract = {:?}\n{more_settings}",
            self.fact("rpcUrl"),
            self.chain_id,
            self.fact("kmsContract"),
        );
        let variation = Variation { authoriser: Some(&settings), ..Variation::default() };
        Trip::start(&image(), variation)
    }

    fn fetch(&self, trip: &Trip) -> Finished {
        let mut arguments = trip.agent_arguments();
        let at = arguments.iter().position(|it| it == "--app-id").unwrap();
        self.fact("appId").clone_into(&mut arguments[at + 1]);
        run("enclave-agent", &arguments, DEADLINE)
    }

    /// Registers, takes back and registers again; the KMS must follow at once.
    fn register_and_take_back(&self, trip: &Trip) {
        let image = image();
        expect_refusal(&self.fetch(trip), "OS image is not allowed");
        self.run(&["add-image", &image, "--yes"]);
        expect_refusal(&self.fetch(trip), "Compose hash not allowed");
        self.run(&["add-hash", "--app-id", self.fact("appId"), &image, "--yes"]);
        expect_keys(trip, &self.fetch(trip));
        self.run(&["remove-image", &image, "--yes"]);
        expect_refusal(&self.fetch(trip), "OS image is not allowed");
        self.run(&["add-image", &image, "--yes"]);
        expect_keys(trip, &self.fetch(trip));
    }
}

#[test]
fn an_image_gets_keys_from_its_registration_to_its_removal() {
    let Some(registry) = Registry::start() else { return };
    registry.register_and_take_back(&registry.trip(""));
}

/// The same from storage proven against the block, which must lead to the same decisions.
#[test]
fn a_kms_that_wants_proofs_decides_the_same() {
    let Some(registry) = Registry::start() else { return };
    let status: Value = serde_json::from_str(&registry.run(&["status", "--json"]).stdout).unwrap();
    let code = format!(
        "kms_code = {}\napp_code = {}\n",
        status["kms"]["implementationCode"], status["kms"]["appImplementationCode"]
    );
    registry.register_and_take_back(&registry.trip(&code));
}

/// Code that nobody vouched for decides nothing, even when the image is registered.
#[test]
fn a_kms_that_wants_proofs_does_not_believe_unknown_code() {
    let Some(registry) = Registry::start() else { return };
    registry.run(&["add-image", &image(), "--yes"]);
    registry.run(&["add-hash", "--app-id", registry.fact("appId"), &image(), "--yes"]);
    let other = "11".repeat(32);
    let trip = registry.trip(&format!("kms_code = \"{other}\"\napp_code = \"{other}\"\n"));
    let finished = registry.fetch(&trip);
    assert_ne!(finished.code, Some(0), "{finished:?}");
    assert!(!trip.output().exists());
    assert!(trip.kms.log().contains("is not proven by"), "{}", trip.kms.log());
}

/// An endpoint of another chain is silence, and silence releases nothing.
#[test]
fn another_chain_releases_nothing() {
    let Some(mut registry) = Registry::start() else { return };
    registry.run(&["add-image", &image(), "--yes"]);
    registry.run(&["add-hash", "--app-id", registry.fact("appId"), &image(), "--yes"]);
    registry.chain_id = 1.into();
    let trip = registry.trip("");
    let finished = registry.fetch(&trip);
    assert_ne!(finished.code, Some(0), "{finished:?}");
    assert!(!trip.output().exists());
    assert!(trip.kms.log().contains("is on chain 31337, expected chain 1"), "{}", trip.kms.log());
}

#[test]
fn the_demo_shows_registration_keys_and_removal() {
    let Some(anvil) = anvil() else { return };
    let mut command = Command::new(program("keyferry"));
    command.args(["demo", "--chain", "--json"]).env("KEYFERRY_ANVIL", anvil);
    let finished = finish(command, DEADLINE);
    assert_eq!(finished.code, Some(0), "{finished:?}");
    let report: Value = serde_json::from_str(&finished.stdout).unwrap();
    let refusals = report["refusals"].as_array().unwrap();
    assert_eq!(refusals.len(), 2);
    for refusal in refusals {
        assert_eq!(refusal["exit_code"], 3);
        assert!(refusal["reason"].as_str().unwrap().contains("OS image is not allowed"), "{refusal}");
    }
    assert_eq!(report["keys"]["os_image_hash"].as_str().unwrap().len(), 64);
}

fn expect_keys(trip: &Trip, finished: &Finished) {
    assert_eq!(finished.code, Some(0), "{finished:?}");
    fs::remove_file(trip.output()).unwrap();
}

fn expect_refusal(finished: &Finished, reason: &str) {
    assert_eq!(finished.code, Some(3), "{finished:?}");
    assert!(finished.stderr.contains(reason), "expected {reason:?} in {finished:?}");
}

/// The hash of the measured image, in hex.
fn image() -> String {
    let [pcr0, pcr1, pcr2] = IMAGE.map(Pcr::new);
    os_image_hash(&pcr0, &pcr1, &pcr2).to_string()
}
