//! The arrows of ARCHITECTURE.md, checked on what `cargo metadata` reports.

#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// Crate and layer, as ARCHITECTURE.md lists them.
const LAYERS: &[(&str, u8)] = &[
    ("attestation", 0),
    ("kms-protocol", 0),
    ("chain", 1),
    ("command-line", 1),
    ("nsm-emulator", 1),
    ("ratls", 1),
    ("transport", 1),
    ("cloud-provisioners", 2),
    ("eif-builder", 2),
    ("enclave-agent", 2),
    ("enclave-vm", 2),
    ("host-proxy", 2),
    ("kms-server", 2),
    ("cli", 3),
    ("e2e", 3),
];

/// What a layer 0 crate may never depend on, directly or through others: they would bring I/O of their own.
const NEVER_IN_LAYER_0: &[&str] = &["hyper", "reqwest", "rustls", "socket2", "tokio", "tokio-vsock"];

#[test]
fn every_workspace_crate_has_a_layer() {
    let metadata = Metadata::load();
    let listed: BTreeSet<&str> = LAYERS.iter().map(|(name, _)| *name).collect();
    let members: BTreeSet<&str> = metadata.members.keys().map(String::as_str).collect();
    assert_eq!(members, listed, "add new crates to LAYERS and to ARCHITECTURE.md");
}

#[test]
fn dependencies_point_downwards() {
    let metadata = Metadata::load();
    for (name, dependencies) in &metadata.members {
        for dependency in dependencies.iter().filter(|it| metadata.members.contains_key(*it)) {
            let (from, to) = (layer(name), layer(dependency));
            // Layer 1 is the shelf of shared parts, so its crates may build on each other; siblings elsewhere never meet.
            assert!(to < from || (from == 1 && to == 1), "{name} (L{from}) depends on {dependency} (L{to})");
        }
    }
}

#[test]
fn layer_0_reaches_no_runtime_and_no_socket() {
    let metadata = Metadata::load();
    for (name, _) in LAYERS.iter().filter(|(_, layer)| *layer == 0) {
        let reached = metadata.reachable_from(name);
        for forbidden in NEVER_IN_LAYER_0 {
            assert!(!reached.contains(*forbidden), "{name} reaches {forbidden}");
        }
    }
}

/// A KMS only reads contracts: nothing that signs, deploys or asks a cloud belongs into its program.
#[test]
fn the_kms_is_built_without_signing_services() {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--locked", "--package", "kms-server", "--edges", "normal", "--prefix", "none"])
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let tree = String::from_utf8(output.stdout).unwrap();
    assert!(tree.lines().any(|line| line.starts_with("chain ")), "{tree}");
    for forbidden in ["alloy-signer-local ", "aws-config ", "aws-sdk-kms ", "gcp_auth "] {
        assert!(!tree.lines().any(|line| line.starts_with(forbidden)), "kms-server reaches {forbidden}");
    }
}

fn layer(name: &str) -> u8 {
    LAYERS.iter().find(|(listed, _)| *listed == name).map(|(_, layer)| *layer).unwrap()
}

struct Metadata {
    /// Workspace crate to the names of its dependencies: normal and build ones for the graph of what ships, and
    /// dev-dependencies too, since a test that crosses siblings belongs to `tests/`.
    members: BTreeMap<String, BTreeSet<String>>,
    /// Package id to the ids it links in the resolved graph, dev-dependencies left out.
    resolved: BTreeMap<String, Vec<String>>,
    names: BTreeMap<String, String>,
}

impl Metadata {
    fn load() -> Self {
        let output = Command::new(env!("CARGO"))
            .args(["metadata", "--format-version", "1", "--filter-platform", "x86_64-unknown-linux-gnu"])
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let json: Value = serde_json::from_slice(&output.stdout).unwrap();

        let workspace: BTreeSet<&str> = texts(&json["workspace_members"]).collect();
        let mut members = BTreeMap::new();
        let mut names = BTreeMap::new();
        for package in json["packages"].as_array().unwrap() {
            let (id, name) = (package["id"].as_str().unwrap(), package["name"].as_str().unwrap());
            names.insert(id.to_owned(), name.to_owned());
            if workspace.contains(id) {
                let dependencies = package["dependencies"].as_array().unwrap().iter();
                let dependencies = dependencies.map(|it| it["name"].as_str().unwrap().to_owned()).collect();
                members.insert(name.to_owned(), dependencies);
            }
        }
        let nodes = json["resolve"]["nodes"].as_array().unwrap().iter();
        let resolved = nodes.map(|node| (node["id"].as_str().unwrap().to_owned(), linked(node))).collect();
        Self { members, resolved, names }
    }

    fn reachable_from(&self, name: &str) -> BTreeSet<&str> {
        let start = self.names.iter().find(|(id, it)| *it == name && id.contains("path+file")).unwrap().0;
        let mut seen = BTreeSet::new();
        let mut open = vec![start];
        while let Some(id) = open.pop() {
            if seen.insert(id) {
                open.extend(&self.resolved[id]);
            }
        }
        seen.into_iter().map(|id| self.names[id].as_str()).collect()
    }
}

/// The packages a node of the resolved graph links into what ships.
fn linked(node: &Value) -> Vec<String> {
    let dependencies = node["deps"].as_array().unwrap().iter();
    dependencies
        .filter(|it| it["dep_kinds"].as_array().unwrap().iter().any(|kind| kind["kind"].is_null()))
        .map(|it| it["pkg"].as_str().unwrap().to_owned())
        .collect()
}

fn texts(array: &Value) -> impl Iterator<Item = &str> {
    array.as_array().unwrap().iter().map(|it| it.as_str().unwrap())
}
