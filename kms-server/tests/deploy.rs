//! The files for deployments say what the server understands.

#![expect(clippy::unwrap_used, reason = "a test stops where something is wrong")]

use std::path::Path;

use kms_server::Config;
use kms_server::authorise::policy::Policy;

/// What operators set, in the form the settings need.
const VALUES: [(&str, &str); 7] = [
    ("ETH_RPC_URL", "https://rpc.example.com/key"),
    ("ETH_RPC_URL_1", "https://one.example.com"),
    ("ETH_RPC_URL_2", "https://two.example.com"),
    ("CHAIN_ID", "84532"),
    ("KMS_CONTRACT_ADDR", "0x1111111111111111111111111111111111111111"),
    ("KMS_IMAGE", "keyferry-kms"),
    ("HELIOS_IMAGE", "helios"),
];

fn file(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy").join(name)).unwrap()
}

/// Settings without a surprise: every key is known, and nothing is off.
fn check(name: &str, text: &str) {
    let (_, warnings) = Config::from_toml(text).unwrap_or_else(|error| panic!("{name}: {error}\n{text}"));
    let surprises: Vec<_> = warnings
        .iter()
        .filter(|warning| {
            warning.contains("ignored") || warning.contains("no effect") || warning.contains("DANGER")
        })
        .collect();
    assert!(surprises.is_empty(), "{name}: {surprises:?}");
}

/// The settings inside of a compose file, with the variables replaced.
fn embedded(compose: &str) -> String {
    let mut lines = compose.lines().skip_while(|line| line.trim() != "content: |").skip(1);
    let mut text = String::new();
    while let Some(line) = lines.next().filter(|line| line.is_empty() || line.starts_with("      ")) {
        text.push_str(line.trim_start());
        text.push('\n');
    }
    while let Some(start) = text.find("${") {
        let end = start + text[start..].find('}').unwrap();
        let name = text[start + 2..end].split(':').next().unwrap();
        let value = VALUES.iter().find(|(known, _)| *known == name);
        let value = value.unwrap_or_else(|| panic!("nobody knows {name}")).1;
        text.replace_range(start..=end, value);
    }
    text
}

#[test]
fn the_settings_in_the_compose_files_are_understood() {
    for name in ["compose.direct.yaml", "compose.light.yaml", "compose.auth-api.yaml"] {
        let text = embedded(&file(name));
        assert!(text.contains("type = \"chain\""), "{name}: {text}");
        check(name, &text);
    }
}

#[test]
fn the_settings_for_a_host_are_understood() {
    check("kms.toml", &file("kms.toml"));
    Policy::from_toml(&file("policy.toml")).unwrap();
}

#[test]
fn images_are_named_by_digest_and_run_with_little() {
    for name in ["compose.direct.yaml", "compose.light.yaml", "compose.auth-api.yaml"] {
        let text = file(name);
        for line in text.lines().filter(|line| line.trim().starts_with("image:")) {
            assert!(line.contains(":?the image by digest"), "{name}: {line}");
        }
        let services = text.matches("image:").count();
        for wanted in ["read_only: true", "cap_drop: [ALL]", "no-new-privileges:true"] {
            assert_eq!(text.matches(wanted).count(), services, "{name}: {wanted}");
        }
    }
}
