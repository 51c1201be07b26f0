//! The part of kms.toml about evidence, the guest agent, and the services beside the main one.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;

use super::{ConfigError, duration, file};
use crate::admin::{AdminAuth, TokenHash};
use crate::agent::{AgentAddress, GuestAgent};
use crate::attest::Trust;
use crate::attest::references::References;
use crate::client::Url;

/// Where to onboard, if there are no keys.
#[derive(Debug, Clone)]
pub struct OnboardConfig {
    /// Whether to wait for an operator at all.
    pub enabled: bool,
    /// Where to listen meanwhile.
    pub address: (IpAddr, u16),
    /// The networks that setting up is allowed from; from anywhere without a list.
    pub allow_from: Option<Vec<IpNet>>,
    /// Whether it takes the token that is printed on the console.
    pub token: bool,
}

/// The administration service.
#[derive(Debug, Clone)]
pub struct AdminConfig {
    /// Where to listen.
    pub address: (IpAddr, u16),
    /// Who may call it.
    pub auth: AdminAuth,
}

/// Settings that come from the environment, as upstream has them.
pub(super) fn environment(table: &mut toml::Table, variable: impl Fn(&str) -> Option<String>) {
    if let Some(address) = variable("DSTACK_AGENT_ADDRESS") {
        set(table, &["core", "agent", "address"], address);
    }
    let admin = variable("DSTACK_KMS_ADMIN_TOKEN").or_else(|| variable("ADMIN_API_TOKEN"));
    let is_set = table.get("core").and_then(|core| core.get("admin")?.get("auth_token")).is_some();
    if let Some(token) = admin.filter(|_| !is_set) {
        set(table, &["core", "admin", "auth_token"], token);
    }
}

/// Puts a text at a path, unless something on the way is no table: then the shape is refused later.
fn set(table: &mut toml::Table, path: &[&str], value: String) {
    let Some((last, way)) = path.split_last() else { return };
    let mut table = table;
    for name in way {
        let next = table.entry(*name).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        let toml::Value::Table(next) = next else { return };
        table = next;
    }
    table.insert((*last).to_owned(), toml::Value::String(value));
}

pub(super) fn trust(core: &file::Core) -> Result<Trust, ConfigError> {
    let settings = &core.attestation;
    let root = |key, path: &Option<PathBuf>| match path {
        None => Ok(None),
        Some(_) if !settings.insecure_allow_external_trust_anchors => Err(ConfigError::Unsupported {
            key,
            value: "a file",
            reason: "another root than the vendor's also needs core.attestation.insecure_allow_external_trust_anchors = true",
        }),
        Some(path) => read(path).map(|bytes| Some((path.clone(), bytes))),
    };
    let nitro_root =
        match root("core.attestation.root_ca.aws_nitro_enclave", &settings.root_ca.aws_nitro_enclave)? {
            None => None,
            Some((path, bytes)) => {
                let syntax = |reason: String| ConfigError::Syntax { path: path.clone(), reason };
                let pem = String::from_utf8(bytes).map_err(|_| syntax("it is not text".into()))?;
                attestation::TrustAnchor::from_pem(&pem).map_err(|error| syntax(error.to_string()))?;
                Some(pem)
            }
        };
    let der =
        |found: Option<(PathBuf, Vec<u8>)>| found.map(|(path, bytes)| certificate(&path, bytes)).transpose();
    Ok(Trust {
        nitro_root,
        tdx_root: der(root("core.attestation.root_ca.tdx", &settings.root_ca.tdx)?)?,
        gcp_tpm_root: der(root("core.attestation.root_ca.gcp_tpm", &settings.root_ca.gcp_tpm)?)?,
        pccs: url("core.attestation.urls.pccs", &settings.urls.pccs)?,
        gcp_places: settings.urls.gcp_pki_hosts.clone(),
        fetch_timeout: duration("core.attestation.fetch_timeout", &settings.fetch_timeout)?,
        references: match &core.image.tdx_measurements {
            None => References::default(),
            Some(path) => References::load(path).map_err(|error| ConfigError::Syntax {
                path: path.clone(),
                reason: command_line::chain(&error),
            })?,
        },
    })
}

fn read(path: &Path) -> Result<Vec<u8>, ConfigError> {
    std::fs::read(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })
}

/// A root in PEM or DER.
fn certificate(path: &Path, bytes: Vec<u8>) -> Result<Vec<u8>, ConfigError> {
    if !bytes.starts_with(b"-----") {
        return Ok(bytes);
    }
    match pem_rfc7468::decode_vec(&bytes) {
        Ok(("CERTIFICATE", der)) => Ok(der),
        Ok((label, _)) => Err(ConfigError::Syntax {
            path: path.to_owned(),
            reason: format!("it is a {label}, expected a CERTIFICATE"),
        }),
        Err(error) => Err(ConfigError::Syntax { path: path.to_owned(), reason: error.to_string() }),
    }
}

fn url(key: &'static str, text: &str) -> Result<Url, ConfigError> {
    Url::parse(text).map_err(|expected| ConfigError::Value { key, actual: text.to_owned(), expected })
}

pub(super) fn agent(settings: &file::Agent) -> Result<GuestAgent, ConfigError> {
    let address = settings.address.parse::<AgentAddress>().map_err(|expected| ConfigError::Value {
        key: "core.agent.address",
        actual: settings.address.clone(),
        expected,
    })?;
    let timeout: Duration = duration("core.agent.timeout", &settings.timeout)?;
    Ok(GuestAgent::new(address, timeout))
}

/// An empty list would let nobody in, which is not what anybody writes it for.
fn networks(list: &[String]) -> Result<Vec<IpNet>, ConfigError> {
    let refused = |actual: &str| ConfigError::Value {
        key: "core.onboard.allow_from",
        actual: actual.to_owned(),
        expected: "networks such as \"10.0.0.0/8\", or addresses",
    };
    if list.is_empty() {
        return Err(refused("[]"));
    }
    let network = |text: &String| {
        let address = text.parse::<IpAddr>().map(IpNet::from);
        text.parse().or(address).map_err(|_| refused(text))
    };
    list.iter().map(network).collect()
}

pub(super) fn onboard(settings: &file::Onboard, main: (IpAddr, u16)) -> Result<OnboardConfig, ConfigError> {
    let ip = match &settings.address {
        None => main.0,
        Some(text) => address("core.onboard.address", text)?,
    };
    Ok(OnboardConfig {
        enabled: settings.enabled,
        address: (ip, settings.port.unwrap_or(main.1)),
        allow_from: settings.allow_from.as_deref().map(networks).transpose()?,
        token: settings.token,
    })
}

pub(super) fn admin(
    settings: &file::Admin,
    warnings: &mut Vec<String>,
) -> Result<Option<AdminConfig>, ConfigError> {
    if !settings.enabled {
        return Ok(None);
    }
    if settings.htpasswd_file.as_deref().is_some_and(|file| !file.is_empty()) {
        return Err(ConfigError::Unsupported {
            key: "core.admin.htpasswd_file",
            value: "a file",
            reason: "only tokens are accepted; set core.admin.auth_token or DSTACK_KMS_ADMIN_TOKEN",
        });
    }
    let token = settings.auth_token.as_deref().filter(|token| !token.is_empty());
    let auth = match token {
        Some(token) => AdminAuth::Token(TokenHash::of(token)),
        None if settings.insecure_no_auth => {
            warnings
                .push("DANGER: core.admin.insecure_no_auth: whoever reaches the listener administers".into());
            AdminAuth::DangerNobodyAsked
        }
        None => {
            return Err(ConfigError::Value {
                key: "core.admin.auth_token",
                actual: String::new(),
                expected: "a token, here or in DSTACK_KMS_ADMIN_TOKEN (or core.admin.insecure_no_auth = true)",
            });
        }
    };
    let ip = address("core.admin.address", settings.address.as_deref().unwrap_or("127.0.0.1"))?;
    Ok(Some(AdminConfig { address: (ip, settings.port.unwrap_or(8001)), auth }))
}

/// The token of generations A and B, as the hash that their settings hold.
pub(super) fn legacy_admin_token(text: &str) -> Result<Option<TokenHash>, ConfigError> {
    if text.is_empty() {
        return Ok(None);
    }
    // Not the value: somebody may have put the token itself there.
    TokenHash::from_hex(text).map(Some).ok_or_else(|| ConfigError::Value {
        key: "core.admin_token_hash",
        actual: format!("{} characters", text.len()),
        expected: "the token's SHA-256, 64 hexadecimal digits",
    })
}

pub(super) fn address(key: &'static str, text: &str) -> Result<IpAddr, ConfigError> {
    text.parse().map_err(|_| ConfigError::Value { key, actual: text.to_owned(), expected: "an IP address" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_names_the_agent_and_the_token() {
        let given = |name: &str| match name {
            "DSTACK_AGENT_ADDRESS" => Some("unix:/x".to_owned()),
            "ADMIN_API_TOKEN" => Some("second".to_owned()),
            _ => None,
        };
        let mut table: toml::Table = "core.agent.address = \"unix:/y\"".parse().unwrap();
        environment(&mut table, given);
        assert_eq!(table["core"]["agent"]["address"].as_str(), Some("unix:/x"));
        assert_eq!(table["core"]["admin"]["auth_token"].as_str(), Some("second"));
        let mut table: toml::Table = "core.admin.auth_token = \"file\"".parse().unwrap();
        environment(&mut table, given);
        assert_eq!(table["core"]["admin"]["auth_token"].as_str(), Some("file"));
    }
}
