//! A project deployed to a stand-in of Google's APIs: what it asks for, what a fault at any call does to it, and that
//! nothing is left behind.

#![expect(clippy::unwrap_used, reason = "a test may stop at once")]

use std::path::Path;

use cloud_provisioners::gcp::{Client, Credentials, Endpoints};
use cloud_provisioners::gcp_tdx::firewall::{self, Action};
use cloud_provisioners::gcp_tdx::{Deployment, Observer, Replace, Step};
use cloud_provisioners::project::{App, GcpConfig, KeyProvider, Project, Settings};
use e2e::google::{Fault, Google};
use tempfile::TempDir;

/// A test gives up after this.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(120);
const NOW: &str = "2026-11-21T08:00:00";

/// A project, its OS image and a client.
struct Site {
    directory: TempDir,
    settings: Settings,
    client: Client,
}

struct Silent;

impl Observer for Silent {
    fn step(&mut self, _number: usize, _total: usize, _step: &Step) {}
    fn made(&mut self, _kind: &str, _name: &str) {}
    fn uploaded(&mut self, _name: &str, _stored: u64, _total: u64) {}
}

impl Site {
    fn new(google: &Google, key_provider: KeyProvider) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("images/dstack-cloud-0.6.0");
        std::fs::create_dir_all(&image).unwrap();
        std::fs::write(image.join("disk.raw"), vec![5; 600 << 10]).unwrap();
        std::fs::write(image.join("auth_hash.txt"), "ab".repeat(32)).unwrap();
        let mut settings = Settings { image_search_paths: vec!["../images".into()], ..Settings::default() };
        settings.services.kms_urls = vec!["https://kms.example.com:12001".into()];
        let app = App {
            name: "kms".into(),
            key_provider,
            gateway_enabled: false,
            gcp_config: GcpConfig {
                project: "demo-proj".into(),
                instance_name: "dstack-kms".into(),
                bucket: "gs://demo-bucket".into(),
                ..GcpConfig::default()
            },
            ..App::default()
        };
        Project::create(&directory.path().join("kms"), &app, "services: {}\n", "#!/bin/sh\n", "{}").unwrap();
        let environment = google.environment();
        let at = |name: &str| environment.iter().find(|(key, _)| *key == name).unwrap().1.clone();
        let endpoints = Endpoints {
            compute: at("CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE").parse().unwrap(),
            storage: at("CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE")
                .trim_end_matches("storage/v1/")
                .parse()
                .unwrap(),
            ..Endpoints::default()
        };
        let credentials = Credentials::token(at("CLOUDSDK_AUTH_ACCESS_TOKEN"));
        let client = Client::new("demo-proj", endpoints, credentials).unwrap();
        Self { directory, settings, client }
    }

    fn open(&self) -> Deployment {
        let project = Project::open(&self.directory.path().join("kms")).unwrap();
        Deployment::open(project, &self.settings).unwrap()
    }

    /// One run of `deploy`; how many steps it took.
    async fn deploy(&self, replace: &Replace) -> Result<usize, cloud_provisioners::Error> {
        let mut deployment = self.open();
        let prepared = deployment.prepare(&self.settings, Path::new("/nonexistent"), None)?;
        let plan = deployment.plan(&self.client, &prepared, replace, false).await?;
        deployment.apply(&self.client, &prepared, &plan, &mut Silent, NOW).await?;
        Ok(plan.steps().len())
    }
}

const DEPLOYED: [&str; 7] = [
    "bucket demo-bucket",
    "disk us-central1-a/dstack-kms",
    "disk us-central1-a/dstack-kms-data",
    "disk us-central1-a/dstack-kms-shared",
    "image dstack-cloud-0-6-0",
    "image dstack-data-disk",
    "image dstack-kms-shared",
];

fn deployed() -> Vec<String> {
    let mut lines: Vec<String> = DEPLOYED.map(str::to_owned).into();
    lines.push("instance us-central1-a/dstack-kms".to_owned());
    lines
}

#[tokio::test]
async fn a_project_is_deployed_opened_and_removed() {
    let google = Google::start();
    let site = Site::new(&google, KeyProvider::Tpm);
    assert_eq!(site.deploy(&Replace::No).await.unwrap(), 6);
    assert_eq!(google.inventory(), deployed());
    let machine = google.resource("instance us-central1-a/dstack-kms").unwrap();
    assert_eq!(machine["deletionProtection"], true);
    let state = site.open().project().state().unwrap().unwrap();
    assert_eq!((state.external_ip.as_str(), state.status.as_str()), ("203.0.113.10", "RUNNING"));

    google.forget_calls();
    assert_eq!(site.deploy(&Replace::No).await.unwrap(), 0, "the same configuration is deployed already");
    assert!(google.calls().iter().all(|call| call.line.starts_with("GET ")), "nothing was changed");

    let config = site.open().config().clone();
    let sources = ["198.51.100.7/32".to_owned()];
    let port = "12001".parse().unwrap();
    let set =
        async |sources: &[String]| firewall::set(&site.client, &config, Action::Allow, port, sources).await;
    assert_eq!(set(&sources).await.unwrap(), firewall::Outcome::Made);
    assert_eq!(set(&sources).await.unwrap(), firewall::Outcome::Unchanged);
    assert_eq!(set(&["0.0.0.0/0".to_owned()]).await.unwrap(), firewall::Outcome::Changed);
    firewall::set(&site.client, &config, Action::Deny, port, &sources).await.unwrap();
    assert_eq!(firewall::list(&site.client, &config).await.unwrap().len(), 2);

    let mut deployment = site.open();
    let stopped = deployment.stop(&site.client, NOW).await.unwrap().unwrap();
    assert_eq!(stopped.status, "TERMINATED");
    assert_eq!(deployment.start(&site.client, NOW).await.unwrap().unwrap().status, "RUNNING");

    deployment.remove(&site.client, false, NOW).await.unwrap();
    let left = ["bucket demo-bucket", "image dstack-cloud-0-6-0", "image dstack-data-disk"];
    assert_eq!(google.inventory(), left, "what other machines share stays");
    assert_eq!(deployment.remove(&site.client, false, NOW).await.unwrap(), Vec::<String>::new());
    assert_eq!(deployment.project().state().unwrap().unwrap().status, "REMOVED");
}

#[tokio::test]
async fn a_machine_with_keys_of_its_own_is_replaced_only_by_name() {
    let google = Google::start();
    let site = Site::new(&google, KeyProvider::Tpm);
    site.deploy(&Replace::No).await.unwrap();
    google.forget_calls();
    let refused = site.deploy(&Replace::Yes).await.unwrap_err();
    assert!(refused.to_string().contains("holds keys that exist nowhere else"), "{refused}");
    assert!(google.calls().iter().all(|call| call.line.starts_with("GET ")), "nothing was changed");
    site.deploy(&Replace::LosingKeysOf("dstack-kms".into())).await.unwrap();
    assert_eq!(google.inventory(), deployed());
}

/// Whatever goes wrong at whatever call, running again ends in the same place.
async fn a_second_run_mends(fault: Fault) {
    let calls = {
        let google = Google::start();
        Site::new(&google, KeyProvider::Kms).deploy(&Replace::No).await.unwrap();
        google.calls()
    };
    assert!(calls.len() > 20, "a deployment makes {} calls", calls.len());
    let hit = |line: &str| match fault {
        Fault::Refused(403, ..) => true,
        // What only reads has no effect to lose.
        _ => !line.starts_with("GET "),
    };
    for (at, _) in calls.iter().enumerate().filter(|(_, call)| hit(&call.line)) {
        let google = Google::start();
        let site = Site::new(&google, KeyProvider::Kms);
        google.fail(at, fault.clone());
        let first = site.deploy(&Replace::No).await;
        if matches!(fault, Fault::Refused(403, ..)) {
            assert!(first.is_err(), "call {at}: a refusal was overlooked");
        }
        let second = site.deploy(&Replace::No).await;
        assert!(second.is_ok(), "call {at}, {fault:?}: first {first:?}, then {second:?}");
        assert_eq!(google.inventory(), deployed(), "call {at}, {fault:?}");
    }
}

#[tokio::test]
async fn a_second_run_mends_a_refusal_at_any_call() {
    let message = "Required 'compute.instances.create' permission";
    a_second_run_mends(Fault::Refused(403, "forbidden", message)).await;
}

#[tokio::test]
async fn a_second_run_mends_a_server_error_at_any_call() {
    a_second_run_mends(Fault::Refused(503, "backendError", "Backend Error")).await;
}

#[tokio::test]
async fn a_second_run_mends_a_connection_cut_before_any_call_is_carried_out() {
    a_second_run_mends(Fault::Unanswered).await;
}

#[tokio::test]
async fn a_second_run_mends_a_connection_cut_after_any_call_was_carried_out() {
    a_second_run_mends(Fault::AnswerLost).await;
}

/// What Google says no to a machine with, what the operator is told, and that a second run is enough afterwards.
#[tokio::test]
async fn every_refusal_of_a_machine_has_a_next_step() {
    let at = {
        let google = Google::start();
        Site::new(&google, KeyProvider::Kms).deploy(&Replace::No).await.unwrap();
        let is_it = |line: &str| line.starts_with("POST ") && line.ends_with("/instances");
        google.calls().iter().position(|call| is_it(&call.line)).unwrap()
    };
    for (fault, hint) in [
        (Fault::OperationFails("ZONE_RESOURCE_POOL_EXHAUSTED", "no capacity"), "try another zone"),
        (Fault::OperationFails("QUOTA_EXCEEDED", "Quota 'C3_CPUS' exceeded. Limit: 0.0"), "raise the quota"),
        (
            Fault::Refused(403, "forbidden", "Required 'compute.instances.create' permission"),
            "the permission compute.instances.create",
        ),
        (
            Fault::Refused(403, "accessNotConfigured", "Compute Engine API has not been used"),
            "compute.googleapis.com",
        ),
        (
            Fault::Refused(
                412,
                "conditionNotMet",
                "Constraint constraints/compute.vmExternalIpAccess violated",
            ),
            "an organisation policy forbids this",
        ),
        (
            Fault::Refused(400, "invalid", "Confidential Instance Config can only be set with a TDX image"),
            "TDX needs a c3-standard machine type",
        ),
        (Fault::Refused(401, "authError", "Invalid Credentials"), "log in again"),
    ] {
        let google = Google::start();
        let site = Site::new(&google, KeyProvider::Kms);
        google.fail(at, fault.clone());
        let error = site.deploy(&Replace::No).await.unwrap_err();
        let told = error.hint().unwrap_or_default();
        assert!(told.contains(hint), "{fault:?}: {error}, hint {told:?}");
        site.deploy(&Replace::No).await.unwrap();
        assert_eq!(google.inventory(), deployed(), "{fault:?}");
    }
}

/// What `kill -9` leaves: the call was carried out, and nothing was done or noted after it.
#[tokio::test]
async fn a_second_run_mends_a_kill_at_any_call() {
    let calls = {
        let google = Google::start();
        Site::new(&google, KeyProvider::Tpm).deploy(&Replace::No).await.unwrap();
        google.calls()
    };
    for (at, call) in calls.iter().enumerate().filter(|(_, call)| !call.line.starts_with("GET ")) {
        let google = Google::start();
        let site = Site::new(&google, KeyProvider::Tpm);
        google.fail(at, Fault::HangsAfter);
        let hangs = google.hangs();
        let watch = tokio::task::spawn_blocking(move || hangs.wait(PATIENCE));
        tokio::select! {
            done = site.deploy(&Replace::No) => panic!("call {at} ({}): {done:?}", call.line),
            hung = watch => assert!(hung.unwrap(), "call {at} ({})", call.line),
        }
        let second = site.deploy(&Replace::No).await;
        assert!(second.is_ok(), "call {at} ({}): {second:?}", call.line);
        assert_eq!(google.inventory(), deployed(), "call {at} ({})", call.line);
    }
}

/// Removing goes on too, and opening and closing a port, whatever call is refused, cut or killed.
#[tokio::test]
async fn a_second_run_mends_a_removal_that_was_cut_at_any_call() {
    let begin = async || {
        let google = Google::start();
        let site = Site::new(&google, KeyProvider::Kms);
        site.deploy(&Replace::No).await.unwrap();
        google.forget_calls();
        (google, site)
    };
    let port = "12001".parse().unwrap();
    let everything = async |site: &Site| {
        let mut deployment = site.open();
        let config = deployment.config().clone();
        let sources = ["198.51.100.7/32".to_owned()];
        firewall::set(&site.client, &config, Action::Allow, port, &sources).await?;
        firewall::close(&site.client, &config, port).await?;
        firewall::set(&site.client, &config, Action::Deny, port, &sources).await?;
        deployment.remove(&site.client, false, NOW).await
    };
    let calls = {
        let (google, site) = begin().await;
        everything(&site).await.unwrap();
        google.calls()
    };
    assert!(calls.len() > 15, "{calls:?}");
    let changes: Vec<usize> = (0..calls.len()).filter(|at| !calls[*at].line.starts_with("GET ")).collect();
    let message = "Required 'compute.firewalls.delete' permission";
    for fault in [Fault::Refused(403, "forbidden", message), Fault::AnswerLost] {
        for &at in &changes {
            let (google, site) = begin().await;
            google.fail(at, fault.clone());
            let first = everything(&site).await;
            if first.is_err() {
                let second = site.open().remove(&site.client, false, NOW).await;
                assert!(second.is_ok(), "call {at}, {fault:?}: first {first:?}, then {second:?}");
            }
            let left = ["bucket demo-bucket", "image dstack-cloud-0-6-0", "image dstack-data-disk"];
            assert_eq!(google.inventory(), left, "call {at}, {fault:?}: first {first:?}");
        }
    }
}

/// An upload of several parts goes on with what has arrived.
#[tokio::test]
async fn an_upload_that_was_killed_is_not_begun_again() {
    let google = Google::start();
    let site = Site::new(&google, KeyProvider::Kms);
    // Bytes that do not compress, from a generator: three parts of 8 MiB.
    let mut word = 1_u64;
    let disk = std::iter::repeat_with(|| {
        word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        word.to_be_bytes()[0]
    });
    let disk: Vec<u8> = disk.take(20 << 20).collect();
    std::fs::write(site.directory.path().join("images/dstack-cloud-0.6.0/disk.raw"), disk).unwrap();
    let parts = || -> Vec<String> {
        let lines = google.calls().into_iter().map(|call| call.line);
        lines.filter(|line| line.starts_with("PUT /upload/session/")).collect()
    };
    // Nine questions what is there, one more about the bucket and its making, the upload's beginning, and a question how
    // much of it has arrived.
    let first_part = 9 + 2 + 1 + 1;
    google.fail(first_part, Fault::HangsAfter);
    let hangs = google.hangs();
    let watch = tokio::task::spawn_blocking(move || hangs.wait(PATIENCE));
    tokio::select! {
        done = site.deploy(&Replace::No) => panic!("{done:?}"),
        hung = watch => assert!(hung.unwrap()),
    }
    let [session, again] = &parts()[..] else { panic!("{:#?}", google.calls()) };
    assert_eq!(session, again);
    google.forget_calls();
    site.deploy(&Replace::No).await.unwrap();
    assert_eq!(google.inventory(), deployed());
    let more = parts().iter().filter(|line| *line == session).count();
    assert_eq!(more, 3, "a question how much has arrived, and the two parts that had not: {:?}", parts());
}

#[tokio::test]
async fn a_second_run_mends_any_operation_that_fails() {
    a_second_run_mends(Fault::OperationFails("ZONE_RESOURCE_POOL_EXHAUSTED", "no capacity")).await;
}
