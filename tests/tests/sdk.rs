//! Published dstack SDKs, unmodified, against the agent's guest API; what they got is verified up to the roots.
//!
//! `scripts/sdk-tools.sh` installs them.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a set-up that fails is a failed test, and one that is missing is named"
)]

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use attestation::{AttestationDocument, Pcr, PcrIndex, TrustAnchor, UnixMillis, Verifier, os_image_hash};
use e2e::{APP_ID, Agent, IMAGE, Trip, Variation, finish};
use kms_protocol::AppId;
use kms_protocol::attestation_encoding::VersionedAttestation;
use kms_protocol::derive::{K256PublicKey, Signature, verify_path_key};
use kms_protocol::report_data;
use ratls::client::PinnedRoot;
use ratls::issue::KeyPair;
use ratls::{UnixTime, verify_app_chain};
use serde_json::Value;

/// Nothing here takes this long; it only keeps a hang from holding everything up.
const DEADLINE: Duration = Duration::from_secs(300);
/// What both apps bind.
const REPORT_DATA: &[u8] = b"report data of the app";

#[test]
fn the_python_sdk_gets_what_verifies() {
    let Some(sdk) = installed("python-") else { return };
    let mut command = Command::new("python3");
    command.arg(script("app.py")).env("PYTHONPATH", sdk).env("PYTHONDONTWRITEBYTECODE", "1");
    check(command, "python-app");
}

#[test]
fn the_node_sdk_gets_what_verifies() {
    let Some(sdk) = installed("node-") else { return };
    let mut command = Command::new("node");
    command.arg(script("app.cjs")).env("NODE_PATH", sdk.join("node_modules"));
    check(command, "node-app");
}

/// Runs an app beside an agent and judges what it got.
fn check(mut app: Command, event: &str) {
    let trip = Trip::start(&image(), Variation::default());
    let guest = Agent::start(&trip, &[]);
    for (name, socket) in
        [("DSTACK_SIMULATOR_ENDPOINT", "dstack.sock"), ("TAPPD_SIMULATOR_ENDPOINT", "tappd.sock")]
    {
        app.env(name, trip.path(socket));
    }
    let finished = finish(app, DEADLINE);
    assert_eq!(finished.code, Some(0), "{finished:?}\n{}", guest.log());
    let got: Value = serde_json::from_str(&finished.stdout).unwrap();
    let judge = Judge::new(&trip);

    assert_eq!(got["app_id"], APP_ID);
    assert_eq!((&got["os_image_hash"], &got["compose_hash"]), (&image().into(), &image().into()));
    let secret = hex::decode(text(&got["key"]["key"])).unwrap();
    let secp256k1 = k256::SecretKey::from_slice(&secret).unwrap().public_key().to_sec1_bytes();
    judge.chain("payment", &secp256k1, &got["key"]["chain"]);
    let seed = hex::decode(text(&got["key_ed25519"]["key"])).unwrap();
    judge.chain("payment", &ed25519_public(&seed), &got["key_ed25519"]["chain"]);
    for algorithm in ["ed25519", "secp256k1", "secp256k1_prehashed"] {
        let signed = &got["signatures"][algorithm];
        let chain = signed["chain"].as_array().unwrap();
        assert_eq!(chain.len(), 3);
        let public = hex::decode(text(&signed["public_key"])).unwrap();
        judge.chain("signing", &public, &chain[1..].to_vec().into());
    }
    judge.certificate(&got["tls"]);
    judge.certificate(&got["old_tls"]);

    let mut padded = [0; 64];
    padded[..REPORT_DATA.len()].copy_from_slice(REPORT_DATA);
    let document = judge.document(&hex::decode(text(&got["quote"])).unwrap(), padded);
    let log = got["event_log"].as_array().unwrap();
    assert_eq!((log.len(), &log[0]["event"], &log[0]["imr"]), (1, &event.into(), &16.into()));
    assert!(document.pcr(PcrIndex::new(16).unwrap()).is_some_and(|pcr| *pcr != Pcr::ZERO), "the event shows");
    let attestation = hex::decode(text(&got["attestation"])).unwrap();
    let attestation = VersionedAttestation::decode(&attestation).unwrap().into_attestation();
    assert_eq!(attestation.app_id(), hex::decode(APP_ID).unwrap());
    assert_eq!(attestation.claimed(event), b"started");
    judge.document(attestation.platform.nsm_quote().unwrap(), padded);
    let old = report_data::app_data(b"old report data");
    judge.document(&hex::decode(text(&got["old_quote"])).unwrap(), old);
}

/// Verifies by the roots of the trip, as anybody outside would.
struct Judge {
    app: AppId,
    k256: K256PublicKey,
    root: PinnedRoot,
    verifier: Verifier,
}

impl Judge {
    fn new(trip: &Trip) -> Self {
        let read = |path: PathBuf| fs::read_to_string(path).unwrap();
        let k256 = fs::read(trip.kms_keys().join("root-k256.key")).unwrap();
        let k256 = k256::SecretKey::from_slice(&k256).unwrap().public_key().to_sec1_bytes();
        let anchor = TrustAnchor::from_pem(&read(trip.path("nsm-root.pem"))).unwrap();
        Self {
            app: APP_ID.parse().unwrap(),
            k256: K256PublicKey::from_sec1(&k256).unwrap(),
            root: PinnedRoot::from_pem(&read(trip.kms_keys().join("root-ca.crt"))).unwrap(),
            verifier: Verifier::new(anchor),
        }
    }

    fn chain(&self, purpose: &str, public_key: &[u8], chain: &Value) {
        let [app, root] = chain.as_array().unwrap().as_slice() else { panic!("{chain}") };
        let chain = [app, root].map(|it| Signature::from_slice(&hex::decode(text(it)).unwrap()).unwrap());
        verify_path_key(&self.k256, &self.app, purpose, public_key, &chain).unwrap();
    }

    fn certificate(&self, tls: &Value) {
        let key = KeyPair::from_pem("the app's key", text(&tls["key"])).unwrap();
        let chain: Vec<String> = tls["chain"].as_array().unwrap().iter().map(|it| text(it).into()).collect();
        verify_app_chain(&chain, &self.root, &self.app, &key.spki_der(), UnixTime::now()).unwrap();
    }

    fn document(&self, evidence: &[u8], user_data: [u8; 64]) -> AttestationDocument {
        let now = UnixMillis::from_secs(UnixTime::now().as_secs());
        let verified = self.verifier.verify(evidence, now).unwrap();
        assert_eq!(verified.user_data(), Some(&user_data[..]));
        assert_eq!(verified.os_image_hash().to_string(), image());
        AttestationDocument::decode(evidence).unwrap()
    }
}

fn ed25519_public(seed: &[u8]) -> Vec<u8> {
    use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
    Ed25519KeyPair::from_seed_unchecked(seed).unwrap().public_key().as_ref().to_vec()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text"))
}

fn image() -> String {
    let [pcr0, pcr1, pcr2] = IMAGE.map(Pcr::new);
    os_image_hash(&pcr0, &pcr1, &pcr2).to_string()
}

fn script(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "sdk", name].iter().collect()
}

/// Where `scripts/sdk-tools.sh` put an SDK.
fn installed(prefix: &str) -> Option<PathBuf> {
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache")))?;
    let found = fs::read_dir(cache.join("keyferry/sdk")).ok().and_then(|entries| {
        let mut names: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        names.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)));
        names.into_iter().max()
    });
    if found.is_none() {
        println!("skipped: no SDK {prefix}* is installed; scripts/sdk-tools.sh does that");
    }
    found
}
