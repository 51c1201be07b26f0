//! How a KMS gets its keys: Bootstrap, Onboard, Finish, and everybody who must not.

#![expect(clippy::unwrap_used, reason = "a test stops where something is wrong")]

mod common;

use common::machine::{Machine, clock, finish, policy, post};
use common::{Told, ask_plain, get, image};
use kms_protocol::report_data;
use kms_server::store::inspect::State;
use kms_server::{Config, OnboardHandle, ServerHandle};

fn source_url(source: &ServerHandle) -> String {
    format!("https://localhost:{}", source.address().port())
}

async fn onboard_from(url: &str, onboarding: &OnboardHandle) -> Told {
    post(onboarding, "Onboard.Onboard", &format!(r#"{{"source_url":"{url}/","domain":"localhost"}}"#)).await
}

#[tokio::test]
async fn bootstrap_makes_keys_that_the_evidence_speaks_of() {
    let machine = Machine::start(None, "").await;
    let opened = machine.open().await;
    assert!(opened.needs_onboarding().unwrap());
    let onboarding = opened.onboard().await.unwrap();

    // What needs no keys.
    let health = ask_plain(onboarding.address(), "GET", "/health", b"").await;
    assert_eq!(health.body, b"OK");
    let info = post(&onboarding, "GetAttestationInfo", "null").await.json();
    assert_eq!(info["mr_aggregated"], hex::encode(image()));
    assert_eq!(info["tee_variant"], "dstack-nitro-enclave");
    assert_eq!(info["device_id"], "de7d1b721a1e0632b7cf04edf5032c8ecffa9f9a08492152b926f1a5a7e765d7");
    assert_eq!(info["ppid"], hex::encode("i"));

    // What must not happen first.
    let told = ask_plain(onboarding.address(), "GET", "/finish", b"").await;
    assert_eq!(told.status, 400);
    assert!(post(&onboarding, "Finish", "null").await.error().contains("no keys yet"));
    assert_eq!(
        post(&onboarding, "Bootstrap", r#"{"domain":"a_b"}"#).await.error(),
        "domain contains an invalid DNS label"
    );
    assert_eq!(post(&onboarding, "GetMeta", "null").await.error(), "Service not found: GetMeta");
    assert_eq!(machine.state(), State::Empty);

    let made = post(&onboarding, "Onboard.Bootstrap", r#"{"domain":"localhost"}"#).await.json();
    let again = post(&onboarding, "Bootstrap", r#"{"domain":"other"}"#).await;
    assert_eq!((again.status, again.error().as_str()), (400, "KMS has already been bootstrapped"));
    assert_eq!(
        onboard_from("https://localhost:1", &onboarding).await.error(),
        "KMS has already been onboarded"
    );
    assert_eq!(machine.state(), State::Ready);

    let server = finish(opened, onboarding).await;
    let meta = common::ask_kms(&server, get("/prpc/GetMeta")).await.unwrap().json();
    assert_eq!(meta["bootstrap_info"], made);
    assert_eq!(meta["k256_pubkey"], made["k256_pubkey"]);
    let (ca, k256) = (unhex(&made["ca_pubkey"]), unhex(&made["k256_pubkey"]));
    let binding = report_data::bootstrap(&ca, &k256.try_into().unwrap());
    let evidence =
        kms_protocol::attestation_encoding::VersionedAttestation::decode(&unhex(&made["attestation"]));
    assert_eq!(evidence.unwrap().into_attestation().report_data, binding);
}

fn unhex(value: &serde_json::Value) -> Vec<u8> {
    hex::decode(value.as_str().unwrap()).unwrap()
}

#[tokio::test]
async fn a_second_kms_takes_over_the_keys_of_the_first() {
    let first = Machine::start(None, "").await;
    let source = first.bootstrapped().await;
    let second = Machine::start(Some(&first), "").await;
    let opened = second.open().await;
    let onboarding = opened.onboard().await.unwrap();
    let told = onboard_from(&source_url(&source), &onboarding).await;
    assert_eq!(told.status, 200, "{told:?}");
    assert_eq!(told.json()["k256_pubkey"], hex::encode(source.k256_public_key()));
    let server = finish(opened, onboarding).await;
    assert_eq!(server.k256_public_key(), source.k256_public_key());
    for (name, same) in [
        ("root-ca.key", true),
        ("root-k256.key", true),
        ("tmp-ca.key", true),
        ("rpc.key", false),
        ("bootstrap-info.json", false),
    ] {
        let read = |machine: &Machine| std::fs::read(machine.directory.path().join("certs").join(name)).ok();
        assert_eq!(read(&first) == read(&second), same, "{name}");
    }
    // And the second is a source for a third.
    let third = Machine::start(Some(&first), "").await;
    let opened = third.open().await;
    let onboarding = opened.onboard().await.unwrap();
    let told = onboard_from(&(source_url(&server) + "/prpc"), &onboarding).await;
    assert_eq!(told.json()["k256_pubkey"], hex::encode(source.k256_public_key()));
}

/// Every refusal leaves the directory as it was, and a later attempt works.
#[tokio::test]
async fn nothing_is_taken_from_or_given_to_the_wrong_ones() {
    let other_image = hex::encode([7; 32]);
    let first = Machine::start(None, "").await;
    let source = first.bootstrapped().await;

    // The new KMS does not know the source's image.
    let doubtful =
        Machine::with_policy(Some(&first), &other_image, "core.enforce_self_authorization = false\n").await;
    refused(&doubtful, &source_url(&source), "Source KMS is not allowed for onboarding: Boot denied").await;

    // The source does not know the new KMS's image.
    let stranger = Machine::start(Some(&first), "").await;
    let source_of_few =
        Machine::with_policy(Some(&first), &other_image, "core.enforce_self_authorization = false\n").await;
    let few = source_of_few.bootstrapped().await;
    let text = "the source KMS refused GetKmsKey: Boot denied";
    refused(&stranger, &source_url(&few), text).await;

    // The source shows no evidence.
    let bare = Machine::start(Some(&first), "core.attest_rpc_cert = false\n").await;
    let bare_server = bare.bootstrapped().await;
    refused(&stranger, &source_url(&bare_server), "does not contain attestation").await;

    // The source's evidence is under another root.
    let foreign = Machine::start(None, "").await;
    let foreign_server = foreign.bootstrapped().await;
    refused(&stranger, &source_url(&foreign_server), "Source KMS attestation: invalid quote").await;

    // There is nobody, or no TLS, or no URL.
    refused(&stranger, "https://localhost:1", "cannot be reached").await;
    refused(&stranger, &format!("http://{}", source.address()), "expected an https:// URL").await;
    refused(&stranger, "nonsense", "source_url is not usable").await;

    let opened = stranger.open().await;
    let onboarding = opened.onboard().await.unwrap();
    let told = onboard_from(&source_url(&source), &onboarding).await;
    assert_eq!(told.status, 200, "{told:?}");
}

async fn refused(machine: &Machine, url: &str, expected: &str) {
    let opened = machine.open().await;
    let onboarding = opened.onboard().await.unwrap();
    let told = onboard_from(url, &onboarding).await;
    assert_eq!(told.status, 400);
    let text = told.error();
    assert!(text.starts_with("Failed to onboard: ") && text.contains(expected), "{expected:?} in {text:?}");
    // The directory is free again when everything that uses it has ended.
    onboarding.shutdown().await;
    drop(opened);
    assert_eq!(machine.state(), State::Empty);
}

/// An agent that is wrong or gone leaves no keys behind.
#[tokio::test]
async fn without_evidence_there_are_no_keys() {
    let machine = Machine::start(None, "").await;
    let opened = machine.open().await;
    let onboarding = opened.onboard().await.unwrap();
    let other = hex::encode(common::agent::evidence(&machine.emulator, [1; 64]));
    for (answer, expected) in [
        ("{}".to_owned(), "unexpected answer"),
        ("{\"attestation\":\"zz\"}".to_owned(), "not hex"),
        ("{\"attestation\":\"00\"}".to_owned(), "cannot be read"),
        (format!("{{\"attestation\":\"{other}\"}}"), "other report data"),
    ] {
        *machine.agent.instead.lock().unwrap() = Some(answer);
        let text = post(&onboarding, "Bootstrap", r#"{"domain":"localhost"}"#).await.error();
        assert!(text.contains("guest agent") && text.contains(expected), "{text}");
        assert_eq!(machine.state(), State::Empty);
    }
    *machine.agent.instead.lock().unwrap() = None;
    assert_eq!(post(&onboarding, "Bootstrap", r#"{"domain":"localhost"}"#).await.status, 200);
    // A start without evidence is refused as long as the settings ask for it.
    onboarding.shutdown().await;
    *machine.agent.instead.lock().unwrap() = Some("{}".into());
    let error = opened.serve().await.err().unwrap();
    assert_eq!(error.to_string(), "no evidence for the RPC certificate");
    assert_eq!(machine.state(), State::Ready);
}

/// What the authoriser thinks of this KMS counts at every release, not only at the start.
#[tokio::test]
async fn a_kms_that_is_not_allowed_releases_nothing() {
    let machine = Machine::start(None, "core.auth_api.policy.reload = \"10ms\"\n").await;
    let server = machine.bootstrapped().await;
    let temp_ca = || common::ask_kms(&server, get("/prpc/GetTempCaCert"));
    assert_eq!(temp_ca().await.unwrap().status, 200);
    policy(machine.directory.path(), &hex::encode([7; 32]));
    // The policy is followed within its interval.
    let told = tokio::time::timeout(common::DEADLINE, async {
        loop {
            let told = temp_ca().await.unwrap();
            if told.status != 200 {
                return told;
            }
        }
    });
    let text = told.await.unwrap().error();
    assert!(text.starts_with("KMS self authorization failed: KMS is not allowed: "), "{text}");
    for path in
        ["/prpc/GetAppEnvEncryptPubKey?app_id=1111111111111111111111111111111111111111", "/prpc/SignCert"]
    {
        let told = common::ask_kms(&server, get(path)).await.unwrap();
        assert!(told.error().starts_with("KMS self authorization failed: "), "{path}");
    }
    assert_eq!(common::ask_kms(&server, get("/prpc/GetMeta")).await.unwrap().status, 200);
    drop(server);
    // A machine that is not allowed makes no keys either.
    let denied = Machine::with_policy(
        Some(&machine),
        &hex::encode([7; 32]),
        "core.onboard.auto_bootstrap_domain = \"localhost\"\n",
    )
    .await;
    let error = denied.open().await.serve().await.err().unwrap();
    assert_eq!(error.to_string(), "KMS is not allowed to auto-bootstrap");
    assert_eq!(denied.state(), State::Empty);
}

#[tokio::test]
async fn a_restart_issues_a_new_certificate_for_the_same_keys() {
    let machine = Machine::start(None, "").await;
    let server = machine.bootstrapped().await;
    let read = |name: &str| std::fs::read(machine.directory.path().join("certs").join(name)).unwrap();
    let before =
        ["root-ca.key", "root-ca.crt", "tmp-ca.key", "tmp-ca.crt", "rpc.key", "root-k256.key"].map(read);
    let certificate = read("rpc.crt");
    server.shutdown().await;
    drop(server);
    let opened = machine.open().await;
    assert!(!opened.needs_onboarding().unwrap());
    let _server = opened.serve().await.unwrap();
    let after =
        ["root-ca.key", "root-ca.crt", "tmp-ca.key", "tmp-ca.crt", "rpc.key", "root-k256.key"].map(read);
    assert!(before == after && certificate != read("rpc.crt"));
}

#[tokio::test]
async fn the_outside_can_check_all_of_it() {
    use kms_server::verify::{Expectations, Outcome, verify};
    let machine = Machine::start(None, "").await;
    let server = machine.bootstrapped().await;
    let config = Config::from_toml(&machine.settings).unwrap().0;
    let expect = |root_ca: &str, trust: &kms_server::attest::Trust| Expectations {
        trust: trust.clone(),
        root_ca: Some(root_ca.to_owned()),
        k256: None,
        timeout: common::DEADLINE,
    };
    let report =
        verify(&source_url(&server), expect(server.root_ca_pem(), &config.trust), clock()).await.unwrap();
    assert!(report.is_good(), "{report:#?}");
    assert_eq!(report.checks.iter().filter(|check| check.result == Outcome::Good).count(), 5, "{report:#?}");

    let other = Machine::start(None, "").await;
    let other_server = other.bootstrapped().await;
    let report = verify(&source_url(&server), expect(other_server.root_ca_pem(), &config.trust), clock())
        .await
        .unwrap();
    assert!(!report.is_good());
    let foreign = Config::from_toml(&other.settings).unwrap().0;
    let report =
        verify(&source_url(&server), expect(server.root_ca_pem(), &foreign.trust), clock()).await.unwrap();
    let bad: Vec<_> =
        report.checks.iter().filter(|check| check.result == Outcome::Bad).map(|check| check.what).collect();
    assert_eq!(bad, ["certificate evidence", "bootstrap evidence"]);
}
