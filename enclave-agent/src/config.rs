//! [`AgentConfig`]: the measured configuration of an enclave, `/etc/keyferry/agent.toml`.
//!
//! It is part of the image, so the registers vouch for it; it holds no secret, because anyone can read an image. The
//! image's builder writes it from a project. Unknown keys are refused: a misspelt security option must not pass for a
//! missing one, and an older agent must not leave out what a newer builder asked for.
//!
//! ```toml
//! # Where the keys come from.
//! kms_url = "https://kms.example.com:12001"
//! kms_replicas = []                  # more addresses of the same KMS, tried in this order
//! app_id = "…40 hex digits…"
//!
//! # What makes a server the KMS: at least one, and all that are given must hold.
//! kms_ca = """-----BEGIN CERTIFICATE-----…"""
//! kms_k256_pubkey = "…66 hex digits…"
//! kms_policy = """mrtd = …"""        # text of a policy file for TDX evidence, with its collateral
//! kms_collateral = """{…}"""
//!
//! # How they come.
//! require_sealed = false             # insist on the exchange that binds the keys to one connection
//! refresh = "24h"                    # fetch them again as often; without it only on request
//! timeout = "120s"                   # for one fetch in all, retries included
//! attempts = 20
//! max_clock_skew = "5s"              # how far the clock may be from the NSM's signed time
//!
//! # Where they go.
//! delivery = ["guest-api", "files"]  # also "descriptor"; [] hands the app nothing
//! recipients = ["age1…"]             # exports the keys, encrypted to these
//! export_port = 9999                 # vsock port of the parent that takes the export
//!
//! # The app's network.
//! proxy_port = 3128                  # vsock port of the parent's CONNECT proxy
//! local_proxy_port = 3128            # where the app finds it on 127.0.0.1; 0 offers none
//! allowed_ports = [8080]             # the parent reaches these of the app, under the same vsock port
//! forwards = [{ local = 5432, parent = 5432 }]  # 127.0.0.1:local leads to the parent's vsock port
//!
//! # When the app ends.
//! restart = "never"                  # "on-failure", "always"
//! max_restarts = 5
//!
//! # Each turns a check off.
//! danger_accept_any_kms = false      # instead of an anchor: whoever answers can choose the keys
//! danger_allow_debug = false         # fetch keys in debug mode, where the parent can read them
//! danger_export_plaintext = false    # hand the keys to the parent in plain
//! ```

use std::collections::BTreeSet;
use std::fmt::Display;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use kms_protocol::AppId;
use kms_protocol::derive::K256PublicKey;
use ratls::client::PinnedRoot;
use ratls::evidence::EvidencePolicy;
use serde::{Deserialize, Deserializer};
use transport::VsockPort;

use crate::policy::{PolicyFileError, TdxPolicy};
use crate::{DebugMode, DurationArg, KmsTrust, KmsUrl, NoTrustAnchor};

/// Where the configuration is in the image.
pub const PATH: &str = "/etc/keyferry/agent.toml";
/// Largest configuration read.
pub const MAX_LEN: u64 = 1 << 20;
/// Most attempts, restarts, replicas, recipients, ports and forwards that can be asked for.
const MAX_COUNT: usize = 100;
/// Port of the parent's proxy: squid's, which upstream's example uses too.
const PROXY_PORT: u32 = 3128;

/// What an enclave was built to do, checked as a whole.
#[derive(Debug)]
pub struct AgentConfig {
    /// Replicas of one KMS, tried in this order; at least one.
    pub kms_urls: Vec<KmsUrl>,
    /// The app whose keys are fetched.
    pub app_id: AppId,
    /// Which KMS to believe.
    pub trust: KmsTrust,
    /// How the keys come.
    pub fetch: Fetch,
    /// Ways in which the app gets its keys, each once; may be empty when they are exported.
    pub delivery: BTreeSet<Delivery>,
    /// How the keys leave the enclave, if at all.
    pub export: Option<Export>,
    /// The app's network.
    pub network: Network,
    /// What happens when the app ends.
    pub restart: RestartPolicy,
}

/// How the keys come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetch {
    /// Refuses a KMS that cannot do the sealed exchange.
    pub require_sealed: bool,
    /// Fetches them again as often.
    pub refresh: Option<Duration>,
    /// For one fetch in all.
    pub timeout: Duration,
    /// Attempts in all, at least one.
    pub attempts: u32,
    /// How far the clock may be from the NSM's signed time.
    pub max_clock_skew: Duration,
    /// Whether keys are fetched in debug mode.
    pub debug_mode: DebugMode,
}

/// One way in which the app gets its keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Delivery {
    /// Files on a tmpfs, mode 0600, of the app's user.
    Files,
    /// A descriptor that the app inherits.
    Descriptor,
    /// The dstack guest API on `/var/run/dstack.sock`.
    GuestApi,
}

/// How the keys leave the enclave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// In which form.
    pub form: ExportForm,
    /// vsock port of the parent that takes it.
    pub port: VsockPort,
}

/// In which form the keys leave the enclave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExportForm {
    /// Encrypted to these age X25519 recipients (`age1…`), at least one. Whether each is a key is seen when it is used.
    Sealed(Vec<String>),
    /// In plain, to the parent: what the upstream demo does.
    DangerPlaintext,
}

/// The app's network. It has no interface but the loopback.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// vsock port of the parent's CONNECT proxy, for the agent and the app.
    pub proxy_port: VsockPort,
    /// Port on 127.0.0.1 under which the app finds that proxy.
    pub local_proxy_port: Option<u16>,
    /// Ports of the app on 127.0.0.1 that the parent reaches under the same vsock port.
    pub allowed_ports: Vec<u16>,
    /// Ports on 127.0.0.1 that lead to services of the parent.
    pub forwards: Vec<Forward>,
}

/// A port on 127.0.0.1 that leads to a vsock port of the parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Forward {
    /// The port on 127.0.0.1.
    pub local: u16,
    /// The parent's vsock port.
    #[serde(deserialize_with = "vsock_port")]
    pub parent: VsockPort,
}

/// What happens when the app ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestartPolicy {
    /// After which ends it is started again.
    pub when: Restart,
    /// How often at most.
    pub max: u32,
}

/// After which ends the app is started again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// None: the enclave ends with its app.
    #[default]
    Never,
    /// An exit code other than 0, or a signal.
    OnFailure,
    /// All.
    Always,
}

/// Why a configuration cannot be used; there is no default to fall back to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Not TOML, a key that does not exist, or a value of another kind.
    #[error("not an agent's configuration")]
    Syntax(#[source] Box<toml::de::Error>),
    /// Nothing says which KMS to trust.
    #[error(transparent)]
    Trust(#[from] NoTrustAnchor),
    /// An anchor beside `danger_accept_any_kms`: one of the two is a mistake.
    #[error("danger_accept_any_kms beside {anchor}: expected one or the other")]
    TrustTwice {
        /// The anchor's key.
        anchor: &'static str,
    },
    /// The pinned CA cannot be read.
    #[error("kms_ca")]
    RootCa(#[source] ratls::Error),
    /// The policy for TDX evidence cannot be used.
    #[error(transparent)]
    Policy(#[from] PolicyFileError),
    /// A policy and its collateral come together.
    #[error("kms_policy and kms_collateral: one is missing")]
    PolicyHalf,
    /// Two ways of exporting.
    #[error("danger_export_plaintext beside recipients: expected one or the other")]
    ExportTwice,
    /// The keys would go nowhere.
    #[error("delivery is empty and nothing is exported: the keys would go nowhere")]
    NoDelivery,
    /// A value out of its range.
    #[error("{key}: {actual}, expected {expected}")]
    Value {
        /// The key.
        key: &'static str,
        /// What it is.
        actual: String,
        /// What it should be.
        expected: &'static str,
    },
    /// Two services on one local port.
    #[error("{key}: port {port} of 127.0.0.1 is taken twice")]
    PortTwice {
        /// The key of the second.
        key: &'static str,
        /// The port.
        port: u16,
    },
}

/// The file, key by key.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(deserialize_with = "from_text")]
    kms_url: KmsUrl,
    #[serde(default)]
    kms_replicas: Vec<FromText<KmsUrl>>,
    #[serde(deserialize_with = "from_text")]
    app_id: AppId,
    kms_ca: Option<String>,
    kms_k256_pubkey: Option<FromText<K256PublicKey>>,
    kms_policy: Option<String>,
    kms_collateral: Option<String>,
    #[serde(default)]
    require_sealed: bool,
    refresh: Option<FromText<DurationArg>>,
    #[serde(default = "default_timeout")]
    timeout: FromText<DurationArg>,
    #[serde(default = "default_attempts")]
    attempts: u32,
    #[serde(default = "default_clock_skew")]
    max_clock_skew: FromText<DurationArg>,
    #[serde(default = "default_delivery")]
    delivery: Vec<Delivery>,
    #[serde(default)]
    recipients: Vec<String>,
    #[serde(default = "default_export_port", deserialize_with = "vsock_port")]
    export_port: VsockPort,
    #[serde(default = "default_proxy_port", deserialize_with = "vsock_port")]
    proxy_port: VsockPort,
    #[serde(default = "default_local_proxy_port")]
    local_proxy_port: u16,
    #[serde(default)]
    allowed_ports: Vec<u16>,
    #[serde(default)]
    forwards: Vec<Forward>,
    #[serde(default)]
    restart: Restart,
    #[serde(default = "default_max_restarts")]
    max_restarts: u32,
    #[serde(default)]
    danger_accept_any_kms: bool,
    #[serde(default)]
    danger_allow_debug: bool,
    #[serde(default)]
    danger_export_plaintext: bool,
}

impl AgentConfig {
    /// Reads and checks a configuration. Decodes certificates, so it blocks for a moment.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn from_toml(text: &str) -> Result<Self, ConfigError> {
        let file: File = toml::from_str(text).map_err(|error| ConfigError::Syntax(Box::new(error)))?;
        let trust = file.trust()?;
        let export = file.export()?;
        let network = file.network()?;
        let File {
            kms_url,
            kms_replicas,
            app_id,
            require_sealed,
            refresh,
            timeout,
            attempts,
            max_clock_skew,
            delivery,
            restart,
            max_restarts,
            danger_allow_debug,
            ..
        } = file;
        bounded("kms_replicas", kms_replicas.len())?;
        if delivery.is_empty() && export.is_none() {
            return Err(ConfigError::NoDelivery);
        }
        let fetch = Fetch {
            require_sealed,
            refresh: refresh.map(|refresh| refresh.0.into()),
            timeout: timeout.0.into(),
            attempts: count("attempts", attempts, 1)?,
            max_clock_skew: max_clock_skew.0.into(),
            debug_mode: if danger_allow_debug { DebugMode::DangerAllow } else { DebugMode::Refuse },
        };
        let restart = RestartPolicy { when: restart, max: count("max_restarts", max_restarts, 0)? };
        let kms_urls = std::iter::once(kms_url).chain(kms_replicas.into_iter().map(|url| url.0)).collect();
        let delivery = delivery.into_iter().collect();
        Ok(Self { kms_urls, app_id, trust, fetch, delivery, export, network, restart })
    }

    /// Which checks are turned off, for the console: whoever reads an enclave's console should see them.
    pub fn dangers(&self) -> Vec<&'static str> {
        let plaintext = self.export.as_ref().is_some_and(|export| export.form == ExportForm::DangerPlaintext);
        [
            (self.trust.is_danger(), "danger_accept_any_kms"),
            (self.fetch.debug_mode == DebugMode::DangerAllow, "danger_allow_debug"),
            (plaintext, "danger_export_plaintext"),
        ]
        .into_iter()
        .filter_map(|(on, name)| on.then_some(name))
        .collect()
    }
}

impl File {
    fn trust(&self) -> Result<KmsTrust, ConfigError> {
        if self.danger_accept_any_kms {
            let anchors = [
                ("kms_ca", self.kms_ca.is_some()),
                ("kms_k256_pubkey", self.kms_k256_pubkey.is_some()),
                ("kms_policy", self.kms_policy.is_some()),
            ];
            return match anchors.iter().find(|(_, given)| *given) {
                Some((anchor, _)) => Err(ConfigError::TrustTwice { anchor }),
                None => Ok(KmsTrust::danger_accept_any_kms()),
            };
        }
        let root = self.kms_ca.as_deref().map(PinnedRoot::from_pem).transpose();
        let policy = match (&self.kms_policy, &self.kms_collateral) {
            (Some(policy), Some(collateral)) => Some(TdxPolicy::from_texts(policy, collateral)?),
            (None, None) => None,
            _ => return Err(ConfigError::PolicyHalf),
        };
        Ok(KmsTrust::anchored(
            root.map_err(ConfigError::RootCa)?,
            policy.map(|policy| Arc::new(policy) as Arc<dyn EvidencePolicy>),
            self.kms_k256_pubkey.as_ref().map(|key| key.0),
        )?)
    }

    fn export(&self) -> Result<Option<Export>, ConfigError> {
        bounded("recipients", self.recipients.len())?;
        let form = match (self.danger_export_plaintext, self.recipients.as_slice()) {
            (true, []) => ExportForm::DangerPlaintext,
            (true, _) => return Err(ConfigError::ExportTwice),
            (false, []) => return Ok(None),
            (false, recipients) => ExportForm::Sealed(recipients.to_vec()),
        };
        Ok(Some(Export { form, port: self.export_port }))
    }

    fn network(&self) -> Result<Network, ConfigError> {
        bounded("allowed_ports", self.allowed_ports.len())?;
        bounded("forwards", self.forwards.len())?;
        let local_proxy_port = (self.local_proxy_port != 0).then_some(self.local_proxy_port);
        // The app listens on its own ports, the agent on the others; the same port twice is a bind that fails later.
        let mut taken = BTreeSet::new();
        let ports = (self.allowed_ports.iter().map(|port| ("allowed_ports", *port)))
            .chain(local_proxy_port.map(|port| ("local_proxy_port", port)))
            .chain(self.forwards.iter().map(|forward| ("forwards", forward.local)));
        for (key, port) in ports {
            if port == 0 {
                return Err(ConfigError::Value { key, actual: "port 0".into(), expected: "1 to 65535" });
            }
            if !taken.insert(port) {
                return Err(ConfigError::PortTwice { key, port });
            }
        }
        Ok(Network {
            proxy_port: self.proxy_port,
            local_proxy_port,
            allowed_ports: self.allowed_ports.clone(),
            forwards: self.forwards.clone(),
        })
    }
}

fn bounded(key: &'static str, len: usize) -> Result<(), ConfigError> {
    if len <= MAX_COUNT {
        return Ok(());
    }
    Err(ConfigError::Value { key, actual: format!("{len} entries"), expected: "at most 100" })
}

fn count(key: &'static str, value: u32, least: u32) -> Result<u32, ConfigError> {
    if value >= least && usize::try_from(value).is_ok_and(|value| value <= MAX_COUNT) {
        return Ok(value);
    }
    let expected = if least == 0 { "0 to 100" } else { "1 to 100" };
    Err(ConfigError::Value { key, actual: value.to_string(), expected })
}

/// A value that a file holds as text.
struct FromText<T>(T);

impl<'de, T: FromStr<Err: Display>> Deserialize<'de> for FromText<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        from_text(deserializer).map(Self)
    }
}

fn from_text<'de, T: FromStr<Err: Display>, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
}

fn vsock_port<'de, D: Deserializer<'de>>(deserializer: D) -> Result<VsockPort, D::Error> {
    match u32::deserialize(deserializer)? {
        port @ (0 | u32::MAX) => Err(serde::de::Error::custom(format!("{port} is not a vsock port"))),
        port => Ok(VsockPort::new(port)),
    }
}

fn seconds(seconds: u64) -> FromText<DurationArg> {
    FromText(DurationArg(Duration::from_secs(seconds)))
}

fn default_timeout() -> FromText<DurationArg> {
    seconds(120)
}

fn default_clock_skew() -> FromText<DurationArg> {
    seconds(5)
}

/// Enough to wait for a proxy that is started after the enclave, within the usual time.
fn default_attempts() -> u32 {
    20
}

fn default_delivery() -> Vec<Delivery> {
    vec![Delivery::GuestApi, Delivery::Files]
}

fn default_export_port() -> VsockPort {
    VsockPort::new(9999)
}

fn default_proxy_port() -> VsockPort {
    VsockPort::new(PROXY_PORT)
}

fn default_local_proxy_port() -> u16 {
    3128
}

fn default_max_restarts() -> u32 {
    5
}

#[cfg(test)]
mod tests;
