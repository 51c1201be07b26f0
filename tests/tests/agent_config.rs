//! What the image's builder writes for the agent is what the agent reads.

#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]

use std::fs;
use std::path::Path;

use eif_builder::project::Project;
use enclave_agent::config::{AgentConfig, Delivery, ExportForm, Restart};

const LEAST: &str = "[image]\nbinary = \"app\"\n[boot]\nkernel = \"bzImage\"\ninit = \"agent\"\nagent = \"agent\"\n\
                     [kms]\nurl = \"https://kms.example.com:12001\"\n\
                     app_id = \"0x1111111111111111111111111111111111111111\"\n";
const K256: &str = "0279be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798";

fn built(folder: &Path, lines: &str) -> String {
    fs::write(folder.join("keyferry.toml"), format!("{LEAST}{lines}")).unwrap();
    Project::read(folder).unwrap().agent_config().unwrap()
}

#[test]
fn a_project_with_everything_is_read_by_the_agent() {
    let folder = tempfile::tempdir().unwrap();
    let text = built(
        folder.path(),
        &format!(
            "replicas = [\"https://b.example.com\"]\nk256_pubkey = \"{K256}\"\nrequire_sealed = true\n\
             danger_allow_debug = true\ndelivery = [\"guest-api\", \"files\", \"descriptor\"]\n\
             recipients = [\"age1x\"]\nallowed_ports = [8080]\n\
             [agent]\nrefresh = \"24h\"\ntimeout = \"30s\"\nattempts = 3\nmax_clock_skew = \"2s\"\n\
             export_port = 9000\nproxy_port = 3129\nlocal_proxy_port = 3130\nrestart = \"always\"\n\
             max_restarts = 7\nforwards = [{{ local = 5432, parent = 5433 }}]\n"
        ),
    );
    let config = AgentConfig::from_toml(&text).unwrap_or_else(|error| panic!("{error:?}\n{text}"));
    let urls: Vec<_> = config.kms_urls.iter().map(ToString::to_string).collect();
    assert_eq!(urls, ["https://kms.example.com:12001/prpc", "https://b.example.com/prpc"]);
    assert_eq!(config.trust.names(), ["k256-pubkey"]);
    assert!(config.fetch.require_sealed);
    assert_eq!(config.fetch.attempts, 3);
    assert_eq!(config.delivery.len(), 3);
    assert_eq!(config.export.as_ref().unwrap().form, ExportForm::Sealed(vec!["age1x".into()]));
    assert_eq!(config.export.as_ref().unwrap().port.get(), 9000);
    assert_eq!(config.network.proxy_port.get(), 3129);
    assert_eq!(config.network.local_proxy_port, Some(3130));
    assert_eq!(config.network.allowed_ports, [8080]);
    assert_eq!((config.network.forwards[0].local, config.network.forwards[0].parent.get()), (5432, 5433));
    assert_eq!((config.restart.when, config.restart.max), (Restart::Always, 7));
    assert_eq!(config.dangers(), ["danger_allow_debug"]);
}

#[test]
fn the_dangers_arrive_and_nothing_else_does() {
    let folder = tempfile::tempdir().unwrap();
    let config =
        AgentConfig::from_toml(&built(folder.path(), &format!("k256_pubkey = \"{K256}\"\n"))).unwrap();
    assert_eq!(config.dangers(), [""; 0]);
    assert_eq!(config.delivery, [Delivery::Files, Delivery::GuestApi].into());
    let text = built(folder.path(), "danger_accept_any_kms = true\ndanger_export_plaintext = true\n");
    let config = AgentConfig::from_toml(&text).unwrap();
    assert_eq!(config.dangers(), ["danger_accept_any_kms", "danger_export_plaintext"]);
}
