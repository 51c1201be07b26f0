//! What the image's builder writes for the agent is what the agent reads.

#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]

use std::fs;
use std::path::Path;

use eif_builder::project::Project;
use enclave_agent::config::{AgentConfig, Delivery, ExportForm, Restart};
use kms_protocol::kms_file::{self, KmsFile};
use ratls::issue::{self, KeyPair};

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

/// A `kms.json` with the certificate of a root that the test made.
fn kms_file() -> KmsFile {
    let key = KeyPair::generate().unwrap();
    let hash = "01".repeat(32);
    KmsFile {
        version: kms_file::VERSION,
        url: "https://kms-a.example.com:12001".into(),
        replicas: vec!["https://kms-b.example.com:12001".into()],
        ca_pubkey: hex::encode(key.spki_der()),
        ca_cert: issue::root_ca(&key, ratls::UnixTime::now()).unwrap().pem(),
        k256_pubkey: K256.into(),
        node: kms_file::Node {
            tee_variant: "dstack-gcp-tdx".into(),
            os_image_hash: hash.clone(),
            mr_aggregated: hash.clone(),
            device_id: hash.clone(),
            compose_hash: hash,
        },
    }
}

#[test]
fn a_kms_file_pins_the_address_and_both_keys() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("kms.json"), kms_file().encode().unwrap()).unwrap();
    let read = |lines: &str| {
        let without_url = LEAST.replace("url = \"https://kms.example.com:12001\"\n", "");
        fs::write(folder.path().join("keyferry.toml"), format!("{without_url}{lines}")).unwrap();
        Project::read(folder.path()).and_then(|project| project.agent_config())
    };
    let text = read("file = \"kms.json\"\n").unwrap();
    let config = AgentConfig::from_toml(&text).unwrap_or_else(|error| panic!("{error:?}\n{text}"));
    let urls: Vec<_> = config.kms_urls.iter().map(ToString::to_string).collect();
    assert_eq!(urls, ["https://kms-a.example.com:12001/prpc", "https://kms-b.example.com:12001/prpc"]);
    assert_eq!(config.trust.names(), ["root-ca", "k256-pubkey"]);
    assert_eq!(text, read("file = \"kms.json\"\n").unwrap(), "the same file gives the same measurement");
    // Another node of the same KMS may come first.
    let text = read("file = \"kms.json\"\nurl = \"https://kms-b.example.com:12001\"\n").unwrap();
    let config = AgentConfig::from_toml(&text).unwrap();
    assert_eq!(config.kms_urls[0].to_string(), "https://kms-b.example.com:12001/prpc");

    for (lines, expected) in [
        ("file = \"none.json\"\n", "none.json"),
        (
            "file = \"kms.json\"\nurl = \"https://other.example.com\"\n",
            "[kms] url: is https://other.example.com",
        ),
        (
            "file = \"kms.json\"\nk256_pubkey = \"0324653eac434488002cc06bbfb7f10fe18991e35f9fe4302dbea6d2353dc0ab1c\"\n",
            "[kms] k256_pubkey: is 0324653e",
        ),
        ("file = \"kms.json\"\nkms_ca = \"fetch\"\n", "[kms] kms_ca: beside file"),
        ("file = \"kms.json\"\ndanger_accept_any_kms = true\n", "danger_accept_any_kms"),
        ("k256_pubkey = \"02\"\n", "needs url"),
    ] {
        let error = read(lines).expect_err(lines).to_string();
        assert!(error.contains(expected), "{lines}: {error}");
    }
    let mut other = kms_file();
    other.ca_pubkey = "00".into();
    fs::write(folder.path().join("kms.json"), serde_json::to_vec(&other).unwrap()).unwrap();
    let error = read("file = \"kms.json\"\n").unwrap_err().to_string();
    assert!(error.contains("ca_pubkey: expected the key of the certificate"), "{error}");
}
