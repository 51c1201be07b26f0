//! Compose file, script and unmeasured configuration of a project that runs a KMS.
//!
//! What decides who gets keys is measured: image, contract, chain, and in direct mode the endpoints, for a host that
//! could replace them could lie about the contract. A light client checks what its endpoint says, so there the endpoint
//! may come from outside of the measurement, and with it the key that is often part of its address.

use reqwest::Url;
use serde_json::json;

use crate::Error;

const DIRECT: &str = include_str!("../../../kms-server/deploy/compose.direct.yaml");
const LIGHT: &str = include_str!("../../../kms-server/deploy/compose.light.yaml");

/// Longest part of an endpoint's path that is taken for a name; providers put keys of 32 characters there.
const LONGEST_PATH_PART: usize = 19;

/// How the KMS reads its contract.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chain {
    /// From endpoints that must agree.
    Direct {
        /// Two of different operators.
        endpoints: [String; 2],
    },
    /// Through a light client beside it.
    Light {
        /// Its image, by digest.
        image: String,
        /// Its name of the network, such as `base-sepolia`.
        network: String,
        /// A finalised beacon block root from a source that is trusted: `0x` and 64 digits.
        checkpoint: String,
    },
}

/// What a KMS project is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KmsTemplate {
    /// The KMS's image, by digest.
    pub image: String,
    /// Address of the KMS contract.
    pub contract: String,
    /// Chain it is on.
    pub chain_id: u64,
    /// Port of the KMS on the machine.
    pub port: u16,
    /// How the contract is read.
    pub chain: Chain,
}

impl KmsTemplate {
    /// The compose file.
    #[must_use]
    pub fn compose(&self) -> &'static str {
        match self.chain {
            Chain::Direct { .. } => DIRECT,
            Chain::Light { .. } => LIGHT,
        }
    }

    /// The script that writes the compose file's variables.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] for a value that cannot be, or that must not be public.
    pub fn prelaunch(&self) -> Result<String, Error> {
        let Self { image, contract, chain_id, port, chain } = self;
        by_digest("--kms-image", image)?;
        hex_value("--kms-contract", contract, 40)?;
        let mut variables = vec![
            ("KMS_IMAGE", image.clone()),
            ("KMS_HTTPS_PORT", port.to_string()),
            ("KMS_CONTRACT_ADDR", contract.clone()),
            ("CHAIN_ID", chain_id.to_string()),
        ];
        match chain {
            Chain::Direct { endpoints: [first, second] } => {
                for endpoint in [first, second] {
                    public_endpoint(endpoint)?;
                }
                if first == second {
                    let problem = "is given twice; two operators must agree".to_owned();
                    return Err(Error::Setting { setting: "--rpc-url", problem });
                }
                variables.push(("ETH_RPC_URL_1", first.clone()));
                variables.push(("ETH_RPC_URL_2", second.clone()));
            }
            Chain::Light { image, network, checkpoint } => {
                by_digest("--helios-image", image)?;
                hex_value("--checkpoint", checkpoint, 64)?;
                if network.is_empty() || !network.bytes().all(|it| it.is_ascii_lowercase() || it == b'-') {
                    let problem = format!("{network:?} is no network of Helios, such as base-sepolia");
                    return Err(Error::Setting { setting: "--network", problem });
                }
                variables.push(("HELIOS_IMAGE", image.clone()));
                variables.push(("HELIOS_NETWORK", network.clone()));
                variables.push(("ETHEREUM_CHECKPOINT", checkpoint.clone()));
            }
        }
        let mut script = "#!/bin/sh\n# Runs before the containers start. Its text is measured and public: no secrets here.\n\
             cat > .env <<'END'\n"
            .to_owned();
        for (name, value) in variables {
            script.push_str(&format!("{name}={value}\n"));
        }
        script.push_str("END\n");
        let secret = self.outside_names();
        if !secret.is_empty() {
            script.push_str(&format!(
                "# The host can change .user-config, so nothing but these names is taken from it.\n\
                 for key in {}; do\n  \
                 value=$(jq -r --arg key \"$key\" '.[$key] // empty' /dstack/.host-shared/.user-config | tr -d '\\n\\r')\n  \
                 if [ -n \"$value\" ]; then printf '%s=%s\\n' \"$key\" \"$value\" >> .env; fi\n\
                 done\n",
                secret.join(" ")
            ));
        }
        Ok(script)
    }

    /// A first `.user-config`, whose values are for the operator to fill in.
    #[must_use]
    pub fn user_config(&self) -> String {
        let empty: serde_json::Map<_, _> =
            self.outside_names().iter().map(|name| ((*name).to_owned(), json!(""))).collect();
        format!("{:#}\n", serde_json::Value::Object(empty))
    }

    fn outside_names(&self) -> &'static [&'static str] {
        match self.chain {
            Chain::Direct { .. } => &[],
            Chain::Light { .. } => &["EXECUTION_RPC"],
        }
    }
}

fn by_digest(setting: &'static str, image: &str) -> Result<(), Error> {
    let digest = image.split_once("@sha256:").filter(|(name, _)| !name.is_empty()).map(|(_, digest)| digest);
    let good = digest.is_some_and(|it| it.len() == 64 && it.bytes().all(|byte| byte.is_ascii_hexdigit()))
        && !image.contains(|it: char| it.is_whitespace() || it == '$');
    match good {
        true => Ok(()),
        false => {
            let problem = format!(
                "is {image:?}, expected NAME@sha256:DIGEST: what a tag stands for can change, and the measurement would not"
            );
            Err(Error::Setting { setting, problem })
        }
    }
}

fn hex_value(setting: &'static str, value: &str, digits: usize) -> Result<(), Error> {
    let good = value
        .strip_prefix("0x")
        .is_some_and(|it| it.len() == digits && it.bytes().all(|byte| byte.is_ascii_hexdigit()));
    match good {
        true => Ok(()),
        false => {
            let problem = format!("is {value:?}, expected 0x and {digits} hex digits");
            Err(Error::Setting { setting, problem })
        }
    }
}

/// An endpoint that everybody may know: its address holds no key.
fn public_endpoint(address: &str) -> Result<(), Error> {
    let fail = |problem: &str| Err(Error::Setting { setting: "--rpc-url", problem: problem.to_owned() });
    let Ok(url) = Url::parse(address) else { return fail("is no URL") };
    if !matches!(url.scheme(), "https" | "http")
        || address.contains(|it: char| it.is_whitespace() || it == '$')
    {
        return fail("is no http:// or https:// URL");
    }
    let parts = url.path_segments().into_iter().flatten();
    let has_key = !url.username().is_empty()
        || url.password().is_some()
        || url.query().is_some()
        || parts.into_iter().any(|part| part.len() > LONGEST_PATH_PART);
    match has_key {
        false => Ok(()),
        // The address itself is not repeated: it may hold a key.
        true => fail(
            "seems to hold a key, and the script it would be in is public: give one without a key, or use --kms light, \
             whose endpoint is in .user-config",
        ),
    }
}

/// What is likely wrong with a project's measured texts, in words. None of it is certain.
pub(super) fn doubts(compose: &str, script: &str) -> Vec<String> {
    let mut doubts = Vec::new();
    let assigned = |name: &str| {
        let lines = script.lines().filter_map(|line| line.trim().strip_prefix(name)?.strip_prefix('='));
        lines.map(str::to_owned).next()
    };
    for image in compose.lines().filter_map(|line| line.trim().strip_prefix("image:")).map(str::trim) {
        let variable = image.trim_matches('"').strip_prefix("${").and_then(|rest| {
            let end = rest.find([':', '}', '-'])?;
            Some(&rest[..end])
        });
        let named = match variable {
            Some(name) => assigned(name).unwrap_or_else(|| image.to_owned()),
            None => image.to_owned(),
        };
        let unknown = variable.is_some() && named == image;
        if !unknown && !named.contains("@sha256:") {
            doubts.push(format!(
                "the image {named} is not named by digest: what its tag stands for is not measured"
            ));
        }
    }
    let commands = script.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let mut last: Vec<&str> = commands.collect();
    // What a loop or a condition ends with is what its last command says.
    while last.last().is_some_and(|line| matches!(*line, "done" | "fi" | "esac" | "}")) {
        last.pop();
    }
    if let Some(line) = last.last().filter(|line| line.contains("&&") && !line.starts_with("if ")) {
        doubts.push(format!(
            "the pre-launch script ends with {line:?}: when its first part is false, later guests start no container; \
             write it with if"
        ));
    }
    for line in script.lines().map(str::trim) {
        let Some((name, value)) = line.split_once('=') else { continue };
        let name = name.rsplit(' ').next().unwrap_or(name).to_ascii_uppercase();
        let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        let secret =
            ["PASSWORD", "SECRET", "TOKEN", "PRIVATE_KEY", "API_KEY"].iter().any(|it| name.contains(it));
        if plain && secret && !value.is_empty() && !value.starts_with("$(") && !value.starts_with("\"$(") {
            doubts.push(format!(
                "the pre-launch script sets {name}, and its text is measured and public: secrets belong into .user-config"
            ));
        }
    }
    doubts
}

/// The names that a script made here takes from `.user-config`.
pub(super) fn user_config_names(script: &str) -> Vec<&str> {
    if !script.contains("/.user-config") {
        return Vec::new();
    }
    let list = script.lines().find_map(|line| line.trim().strip_prefix("for key in ")?.strip_suffix("; do"));
    list.into_iter().flat_map(str::split_whitespace).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(name: &str) -> String {
        format!("registry.example.com/{name}@sha256:{}", "ab".repeat(32))
    }

    fn direct() -> KmsTemplate {
        KmsTemplate {
            image: image("keyferry-kms"),
            contract: format!("0x{}", "11".repeat(20)),
            chain_id: 84532,
            port: 12001,
            chain: Chain::Direct {
                endpoints: ["https://one.example.com".into(), "https://two.example.com/v1".into()],
            },
        }
    }

    fn light() -> KmsTemplate {
        let chain = Chain::Light {
            image: image("helios"),
            network: "base-sepolia".into(),
            checkpoint: format!("0x{}", "22".repeat(32)),
        };
        KmsTemplate { chain, ..direct() }
    }

    /// What a shell makes of the script: the variables that the compose file needs, and nothing else.
    #[test]
    fn the_scripts_give_every_variable_that_the_compose_files_need() {
        for (template, from_outside) in [(direct(), &[][..]), (light(), &["EXECUTION_RPC"])] {
            let directory = tempfile::tempdir().unwrap();
            let script = template.prelaunch().unwrap();
            // Without jq and the guest's path the loop takes nothing; the guest has both.
            let status = std::process::Command::new("bash")
                .args(["-euo", "pipefail", "-c", &format!("jq() {{ printf ''; }}\n{script}")])
                .current_dir(directory.path())
                .status()
                .unwrap();
            assert!(status.success(), "{script}");
            let written = std::fs::read_to_string(directory.path().join(".env")).unwrap();
            let mut given: Vec<&str> = written.lines().map(|line| line.split_once('=').unwrap().0).collect();
            given.extend(from_outside);
            let needed = template.compose().split("${").skip(1).filter_map(|rest| {
                let (name, rest) = rest.split_at(rest.find([':', '}'])?);
                rest.starts_with(":?").then_some(name)
            });
            for name in needed {
                assert!(given.contains(&name), "{name}: {written}");
            }
            assert_eq!(user_config_names(&script), from_outside);
            assert_eq!(doubts(template.compose(), &script), [""; 0]);
        }
    }

    #[test]
    fn what_is_taken_from_outside_is_what_the_guest_has_there() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(
            directory.path().join(".user-config"),
            r#"{"EXECUTION_RPC": "https://rpc.example.com/k\nCHAIN_ID=1", "KMS_IMAGE": "evil"}"#,
        )
        .unwrap();
        let Ok(jq) = std::process::Command::new("jq").arg("--version").output() else {
            println!("skipped: no jq");
            return;
        };
        assert!(jq.status.success());
        let script = light().prelaunch().unwrap();
        let script = script.replace("/dstack/.host-shared/.user-config", ".user-config");
        let status = std::process::Command::new("bash")
            .args(["-euo", "pipefail", "-c", &script])
            .current_dir(directory.path())
            .status()
            .unwrap();
        assert!(status.success());
        let written = std::fs::read_to_string(directory.path().join(".env")).unwrap();
        assert_eq!(written.matches("KMS_IMAGE=").count(), 1, "{written}");
        assert!(written.ends_with("EXECUTION_RPC=https://rpc.example.com/kCHAIN_ID=1\n"), "{written}");
    }

    #[test]
    fn what_must_not_be_measured_or_public_is_refused() {
        type Change = fn(&mut KmsTemplate);
        let endpoint = |address: &'static str| {
            let chain = Chain::Direct { endpoints: [address.into(), "https://two.example.com".into()] };
            KmsTemplate { chain, ..direct() }.prelaunch()
        };
        for address in [
            "https://user:secret@rpc.example.com",
            "https://rpc.example.com/v2/0123456789abcdef0123456789abcdef",
            "https://rpc.example.com?apikey=x",
            "https://rpc.example.com/$(id)",
            "wss://rpc.example.com",
            "https://two.example.com",
            "rpc",
        ] {
            let error = endpoint(address).unwrap_err().to_string();
            assert!(error.starts_with("--rpc-url: "), "{address}: {error}");
            assert!(!error.contains("0123456789abcdef") && !error.contains("secret"), "{error}");
        }
        let cases: [(&str, Change); 4] = [
            ("--kms-image", |it| it.image = "registry.example.com/kms:latest".into()),
            ("--kms-contract", |it| it.contract = "0x11".into()),
            ("--checkpoint", |it| {
                if let Chain::Light { checkpoint, .. } = &mut it.chain {
                    checkpoint.clear();
                }
            }),
            ("--network", |it| {
                if let Chain::Light { network, .. } = &mut it.chain {
                    *network = "a\nEXECUTION_RPC=x".into();
                }
            }),
        ];
        for (setting, change) in cases {
            let mut template = light();
            change(&mut template);
            let error = template.prelaunch().expect_err(setting).to_string();
            assert!(error.starts_with(setting), "{setting}: {error}");
        }
    }

    #[test]
    fn doubts_are_told() {
        let compose = "services:\n  a:\n    image: nginx:alpine\n  b:\n    image: ${KMS_IMAGE:?needed}\n  c:\n    image: ${OTHER}\n";
        let script = "#!/bin/sh\nKMS_IMAGE=cr.example.com/kms:latest\nexport API_KEY=abc\nTOKEN=$(jq x)\n\
                      for key in A; do\n  [ -n \"$val\" ] && printf x\ndone\n";
        let doubts = doubts(compose, script);
        let expected = [
            "the image nginx:alpine is not named by digest",
            "the image cr.example.com/kms:latest is not named by digest",
            "the pre-launch script ends with",
            "the pre-launch script sets API_KEY",
        ];
        assert_eq!(doubts.len(), expected.len(), "{doubts:#?}");
        for (doubt, expected) in doubts.iter().zip(expected) {
            assert!(doubt.starts_with(expected), "{doubt}");
        }
    }
}
