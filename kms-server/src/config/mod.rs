//! kms.toml: where it is read from, and the checked [`Config`] that comes out.
//!
//! Layers, later ones win key by key: built-in defaults, `/etc/kms/kms.{toml,json}`, `./kms.{toml,json}` and the file
//! given with `--config`. Keys of older generations and misspelt ones are named in a warning; in `[core.attestation]`
//! and `[core.server]` they are errors. A setting that asks for a check which this version cannot make is an error
//! too: silence would look like the check.

mod chain;
mod file;
mod platform;
mod units;

pub use platform::{AdminConfig, OnboardConfig};

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ratls::server::SelfIssued;

use crate::SealedRelease;
use crate::admin::TokenHash;
use crate::agent::GuestAgent;
use crate::attest::Trust;
use crate::authorise::chain::ChainConfig;
use crate::authorise::webhook::{WebhookConfig, WebhookUrl};
use crate::store::Domain;
use crate::text::one_line;

/// A body may have this many bytes unless `[rpc.limits]` says otherwise.
pub const DEFAULT_BODY_LIMIT: usize = 10 << 20;
/// Longest file of settings; a longer one is not settings.
const MAX_FILE: u64 = 1 << 20;

/// Everything the server needs to know, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where to listen; port 0 lets the system choose.
    pub address: (IpAddr, u16),
    /// The directory of keys and certificates.
    pub cert_dir: PathBuf,
    /// Creates keys at the first start, for this domain; also the name of later RPC certificates.
    pub auto_bootstrap_domain: Option<Domain>,
    /// Shown in attestation information.
    pub site_name: String,
    /// What evidence is verified against.
    pub trust: Trust,
    /// Where this machine's own evidence comes from.
    pub agent: GuestAgent,
    /// Whether the authoriser has to agree to this KMS before it releases anything.
    pub enforce_self_authorization: bool,
    /// Whether the RPC certificate shows evidence of this machine.
    pub attest_rpc_cert: bool,
    /// Whether clients may sign their certificates themselves.
    pub self_issued: SelfIssued,
    /// Onboarding.
    pub onboard: OnboardConfig,
    /// The administration service, when there is one.
    pub admin: Option<AdminConfig>,
    /// `ClearImageCache` in the main service, as generations A and B have it, behind this token.
    pub legacy_admin_token: Option<TokenHash>,
    /// What `ClearImageCache` clears.
    pub image_cache: PathBuf,
    /// Whether Nitro Enclaves may receive keys.
    pub nitro_enclave_key_release: bool,
    /// Whether app keys are released sealed.
    pub sealed_release: SealedRelease,
    /// Who decides.
    pub authoriser: AuthoriserConfig,
    /// How long an allowance of an authoriser elsewhere is remembered; zero asks every time.
    pub decision_cache: Duration,
    /// Where decisions are recorded.
    pub audit_file: Option<PathBuf>,
    /// Whether `/metrics` answers.
    pub metrics: bool,
    /// Longest body per method, in bytes; others have [`DEFAULT_BODY_LIMIT`].
    pub body_limits: BTreeMap<String, usize>,
    /// How long to wait and how much to take.
    pub limits: Limits,
}

/// Who decides which application gets its keys.
#[derive(Debug, Clone)]
pub enum AuthoriserConfig {
    /// The service at this address, by the webhook contract.
    Webhook(WebhookConfig),
    /// The contracts on a chain.
    Chain(ChainConfig),
    /// A file of rules.
    Policy {
        /// Where it is.
        file: PathBuf,
        /// How often it is looked at for a change.
        reload: Duration,
    },
    /// Nobody: every application is allowed. For development only, and shown to every client.
    DangerAllowAll {
        /// Handed to applications.
        gateway_app_id: String,
    },
}

/// Deadlines and bounds.
#[derive(Debug, Clone)]
pub struct Limits {
    /// From the accepted connection to the end of the TLS handshake.
    pub handshake: Duration,
    /// For the head of a request.
    pub header: Duration,
    /// For the body of a request, in all.
    pub body: Duration,
    /// For the answer, once the request is there; includes waiting for the authoriser.
    pub request: Duration,
    /// A connection without a request is closed after this.
    pub idle: Duration,
    /// How long open requests may take when the server stops.
    pub shutdown_grace: Duration,
    /// Open connections; further ones are closed at once.
    pub max_connections: usize,
    /// Those of one peer: an IPv4 address, or a /64 network.
    pub max_connections_per_peer: usize,
    /// Requests that may wait at the same time; further ones are answered 503. `GetMeta` has as many of its own.
    pub max_requests: usize,
    /// Attestations verified at the same time.
    pub max_verifications: usize,
    /// Requests that may wait for that; further ones are answered 503.
    pub verification_queue: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            header: Duration::from_secs(10),
            body: Duration::from_secs(20),
            request: Duration::from_secs(30),
            idle: Duration::from_secs(60),
            shutdown_grace: Duration::from_secs(10),
            max_connections: 2048,
            max_connections_per_peer: 1536,
            max_requests: 1024,
            max_verifications: default_verifications(),
            verification_queue: 256,
        }
    }
}

fn default_verifications() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Why there is no usable configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is too long.
    #[error("{} is longer than {MAX_FILE} bytes", path.display())]
    TooLong {
        /// Which.
        path: PathBuf,
    },
    /// A file is not TOML or not JSON.
    #[error("{} is not valid: {reason}", path.display())]
    Syntax {
        /// Which.
        path: PathBuf,
        /// Where and why.
        reason: String,
    },
    /// A key has a wrong type, or is not known where unknown keys are not allowed.
    #[error("the settings do not fit together: {0}")]
    Shape(String),
    /// A value is not acceptable.
    #[error("{key} is {actual:?}, expected {expected}")]
    Value {
        /// The key's full name.
        key: &'static str,
        /// What it is.
        actual: String,
        /// What it should be.
        expected: &'static str,
    },
    /// A setting asks for something this version does not do.
    #[error("{key} = {value} is not supported: {reason}")]
    Unsupported {
        /// The key's full name.
        key: &'static str,
        /// Its value.
        value: &'static str,
        /// Why, and what to do.
        reason: &'static str,
    },
}

/// A configuration and what its author should know about it.
#[derive(Debug)]
pub struct Loaded {
    /// The settings.
    pub config: Config,
    /// Sentences for the log: ignored keys, replaced keys, checks that are off.
    pub warnings: Vec<String>,
    /// The files that were read, in order.
    pub files: Vec<PathBuf>,
}

impl Config {
    /// Reads all layers. `explicit` must exist; the others may.
    ///
    /// # Errors
    ///
    /// When a file cannot be read or understood, or a setting is not acceptable.
    pub fn load(explicit: Option<&Path>) -> Result<Loaded, ConfigError> {
        let fixed = ["/etc/kms/kms.toml", "/etc/kms/kms.json", "kms.toml", "kms.json"];
        let mut merged = toml::Table::new();
        let mut files = Vec::new();
        for path in fixed.iter().map(Path::new) {
            if let Some(layer) = read_layer(path)? {
                merge(&mut merged, layer);
                files.push(path.to_owned());
            }
        }
        if let Some(path) = explicit {
            let missing = || std::io::Error::from(std::io::ErrorKind::NotFound);
            let layer = read_layer(path)?
                .ok_or_else(|| ConfigError::Read { path: path.to_owned(), source: missing() })?;
            merge(&mut merged, layer);
            files.push(path.to_owned());
        }
        platform::environment(&mut merged, |name| std::env::var(name).ok().filter(|value| !value.is_empty()));
        let (config, warnings) = Self::from_table(merged)?;
        Ok(Loaded { config, warnings, files })
    }

    /// Reads one text of settings over the defaults, without looking at any file but those it names.
    ///
    /// # Errors
    ///
    /// As [`load`](Self::load).
    pub fn from_toml(text: &str) -> Result<(Self, Vec<String>), ConfigError> {
        let table = text.parse().map_err(|error: toml::de::Error| ConfigError::Syntax {
            path: "the given text".into(),
            reason: one_line(error),
        })?;
        Self::from_table(table)
    }

    fn from_table(table: toml::Table) -> Result<(Self, Vec<String>), ConfigError> {
        let mut ignored = Vec::new();
        let file: file::File =
            serde_ignored::deserialize(toml::Value::Table(table), |path| ignored.push(path.to_string()))
                .map_err(|error| ConfigError::Shape(one_line(error)))?;
        let mut warnings: Vec<String> = ignored.iter().map(|key| ignored_key(key)).collect();
        let config = check(file, &mut warnings)?;
        Ok((config, warnings))
    }
}

fn read_layer(path: &Path) -> Result<Option<toml::Table>, ConfigError> {
    let read = |source| ConfigError::Read { path: path.to_owned(), source };
    let length = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(read(error)),
    };
    if length > MAX_FILE {
        return Err(ConfigError::TooLong { path: path.to_owned() });
    }
    let text = std::fs::read_to_string(path).map_err(read)?;
    let syntax = |reason: String| ConfigError::Syntax { path: path.to_owned(), reason };
    // As upstream does it: what is not named .toml is JSON.
    if path.extension().is_some_and(|extension| extension == "toml") {
        text.parse().map(Some).map_err(|error: toml::de::Error| syntax(one_line(error)))
    } else {
        serde_json::from_str(&text).map(Some).map_err(|error| syntax(one_line(error)))
    }
}

/// Lays `layer` over `base`, table by table.
fn merge(base: &mut toml::Table, layer: toml::Table) {
    for (key, value) in layer {
        match (base.get_mut(&key), value) {
            (Some(toml::Value::Table(below)), toml::Value::Table(above)) => merge(below, above),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

/// What to tell about a key that nothing reads.
fn ignored_key(key: &str) -> String {
    let instead = match key {
        "core.pccs_url" => "it has moved to core.attestation.urls.pccs",
        "core.onboard.quote_enabled" => {
            "core.attest_rpc_cert and core.enforce_self_authorization have replaced it"
        }
        _ if key == "default" || key.starts_with("default.") => "the table [default] has never had an effect",
        _ => "there is no such setting",
    };
    format!("{key} is ignored: {instead}")
}

fn check(file: file::File, warnings: &mut Vec<String>) -> Result<Config, ConfigError> {
    let file::File { rpc, core } = file;
    refuse_unsupported(&rpc, &core)?;
    note_without_effect(&core, warnings);
    let address = platform::address("rpc.address", &rpc.address)?;
    let trust = platform::trust(&core)?;
    check_tls_paths(&rpc.tls, &core.cert_dir)?;
    let auto_bootstrap_domain = match core.onboard.auto_bootstrap_domain.as_str() {
        "" => None,
        text if core.onboard.enabled => Some(Domain::parse(text).map_err(|_| ConfigError::Value {
            key: "core.onboard.auto_bootstrap_domain",
            actual: text.to_owned(),
            expected: "a host name (letters, digits and hyphens between dots) or an IPv4 address",
        })?),
        _ => {
            warnings
                .push("core.onboard.auto_bootstrap_domain is ignored: core.onboard.enabled is false".into());
            None
        }
    };
    let authoriser = authoriser(&core.auth_api, warnings)?;
    let development = matches!(authoriser, AuthoriserConfig::DangerAllowAll { .. });
    Ok(Config {
        address: (address, rpc.port),
        cert_dir: core.cert_dir,
        auto_bootstrap_domain,
        site_name: core.site_name,
        trust,
        agent: platform::agent(&core.agent)?,
        enforce_self_authorization: core.enforce_self_authorization,
        attest_rpc_cert: core.attest_rpc_cert,
        self_issued: if core.accept_self_issued_certs { SelfIssued::Accept } else { SelfIssued::Refuse },
        onboard: platform::onboard(&core.onboard, (address, rpc.port))?,
        admin: platform::admin(&core.admin, warnings)?,
        legacy_admin_token: platform::legacy_admin_token(&core.admin_token_hash)?,
        image_cache: core.image.cache_dir,
        // An authoriser that restricts no image must be told explicitly that enclaves may have keys.
        nitro_enclave_key_release: core.nitro_enclave_key_release.unwrap_or(!development),
        sealed_release: sealed_release(&core.sealed_release)?,
        authoriser,
        decision_cache: duration_or_zero("core.auth_api.decision_cache", &core.auth_api.decision_cache)?,
        audit_file: core.audit.file,
        metrics: core.metrics.enabled,
        body_limits: body_limits(&rpc.limits)?,
        limits: limits(&core.server)?,
    })
}

/// Settings that ask for something which would silently be missing.
fn refuse_unsupported(rpc: &file::Rpc, core: &file::Core) -> Result<(), ConfigError> {
    let cases = [
        (
            rpc.tls.mutual.mandatory,
            "rpc.tls.mutual.mandatory",
            "a client needs the temporary CA before it can have a certificate",
        ),
        (core.sev_snp_key_release, "core.sev_snp_key_release", "SEV-SNP evidence is not verified here"),
        (
            core.aws_nitro_tpm_key_release,
            "core.aws_nitro_tpm_key_release",
            "NitroTPM evidence is not verified here",
        ),
    ];
    for (asked, key, reason) in cases {
        if asked {
            return Err(ConfigError::Unsupported { key, value: "true", reason });
        }
    }
    Ok(())
}

fn note_without_effect(core: &file::Core, warnings: &mut Vec<String>) {
    if !core.enforce_self_authorization {
        warnings.push(
            "core.enforce_self_authorization = false: nobody is asked whether this machine may be a KMS"
                .into(),
        );
    }
    if !core.image.verify {
        warnings.push(
            "core.image.verify = false has no effect: image hashes always have to follow from what was measured".into(),
        );
    }
    let root_ca = &core.attestation.root_ca;
    let unused = [
        (core.subject_postfix.is_some(), "core.subject_postfix"),
        (core.image.download_url.is_some(), "core.image.download_url"),
        (core.image.download_timeout.is_some(), "core.image.download_timeout"),
        (core.attestation.urls.amd_kds.is_some(), "core.attestation.urls.amd_kds"),
        (root_ca.aws_nitro_tpm.is_some(), "core.attestation.root_ca.aws_nitro_tpm"),
        (root_ca.sev_snp_milan.is_some(), "core.attestation.root_ca.sev_snp_milan"),
        (root_ca.sev_snp_genoa.is_some(), "core.attestation.root_ca.sev_snp_genoa"),
        (root_ca.sev_snp_turin.is_some(), "core.attestation.root_ca.sev_snp_turin"),
    ];
    for (_, key) in unused.into_iter().filter(|(set, _)| *set) {
        warnings.push(format!("{key} has no effect in this version"));
    }
}

/// Key and certificate always are the ones of `cert_dir`; other paths would name files that nobody reads.
fn check_tls_paths(tls: &file::Tls, cert_dir: &Path) -> Result<(), ConfigError> {
    let paths = [
        ("rpc.tls.key", &tls.key, "rpc.key"),
        ("rpc.tls.certs", &tls.certs, "rpc.crt"),
        ("rpc.tls.mutual.ca_certs", &tls.mutual.ca_certs, "tmp-ca.crt"),
    ];
    for (key, path, name) in paths {
        if let Some(path) = path
            && *path != cert_dir.join(name)
        {
            return Err(ConfigError::Value {
                key,
                actual: path.display().to_string(),
                expected: "the file of that name in core.cert_dir, or no such key",
            });
        }
    }
    Ok(())
}

fn authoriser(settings: &file::AuthApi, warnings: &mut Vec<String>) -> Result<AuthoriserConfig, ConfigError> {
    match settings.kind.as_str() {
        "webhook" => {
            let url = WebhookUrl::parse(&settings.webhook.url).map_err(|reason| ConfigError::Value {
                key: "core.auth_api.webhook.url",
                actual: settings.webhook.url.clone(),
                expected: reason,
            })?;
            let timeout = duration("core.auth_api.webhook.timeout", &settings.webhook.timeout)?;
            let root_ca = settings.webhook.root_ca.clone();
            if root_ca.is_some() && !url.is_https() {
                // The writer thinks that this connection is protected.
                return Err(ConfigError::Value {
                    key: "core.auth_api.webhook.root_ca",
                    actual: url.name(),
                    expected: "an https:// address in core.auth_api.webhook.url",
                });
            }
            Ok(AuthoriserConfig::Webhook(WebhookConfig { url, timeout, root_ca }))
        }
        "chain" => chain::check(&settings.chain).map(AuthoriserConfig::Chain),
        "policy" => match &settings.policy.file {
            Some(file) => {
                let reload = duration("core.auth_api.policy.reload", &settings.policy.reload)?;
                Ok(AuthoriserConfig::Policy { file: file.clone(), reload })
            }
            None => Err(ConfigError::Value {
                key: "core.auth_api.policy.file",
                actual: String::new(),
                expected: "the path of a policy",
            }),
        },
        "dev" if settings.danger_allow_dev => {
            warnings.push(
                "DANGER: core.auth_api.type = \"dev\": every application gets its keys, whatever image asks"
                    .into(),
            );
            Ok(AuthoriserConfig::DangerAllowAll { gateway_app_id: settings.dev.gateway_app_id.clone() })
        }
        "dev" => Err(ConfigError::Unsupported {
            key: "core.auth_api.type",
            value: "dev",
            reason: "it would give every application its keys; core.auth_api.danger_allow_dev = true accepts that",
        }),
        other => Err(ConfigError::Value {
            key: "core.auth_api.type",
            actual: other.to_owned(),
            expected: "webhook, chain, policy or dev",
        }),
    }
}

fn sealed_release(text: &str) -> Result<SealedRelease, ConfigError> {
    match text {
        "offer" => Ok(SealedRelease::Offer),
        "require" => Ok(SealedRelease::Require),
        "off" => Ok(SealedRelease::Off),
        other => Err(ConfigError::Value {
            key: "core.sealed_release",
            actual: other.to_owned(),
            expected: "offer, require or off",
        }),
    }
}

fn body_limits(limits: &BTreeMap<String, toml::Value>) -> Result<BTreeMap<String, usize>, ConfigError> {
    let mut checked = BTreeMap::new();
    for (method, value) in limits {
        let size = match value {
            toml::Value::String(text) => units::size(text),
            toml::Value::Integer(bytes) => usize::try_from(*bytes).ok(),
            _ => None,
        };
        let size = size.ok_or_else(|| ConfigError::Value {
            key: "rpc.limits",
            actual: format!("{method} = {value}"),
            expected: "sizes such as \"1KiB\" or \"10MiB\"",
        })?;
        checked.insert(method.clone(), size);
    }
    Ok(checked)
}

fn limits(server: &file::Server) -> Result<Limits, ConfigError> {
    let at_least_one = |key, value: usize| {
        if value == 0 {
            Err(ConfigError::Value { key, actual: "0".into(), expected: "at least 1" })
        } else {
            Ok(value)
        }
    };
    Ok(Limits {
        handshake: duration("core.server.handshake_timeout", &server.handshake_timeout)?,
        header: duration("core.server.header_timeout", &server.header_timeout)?,
        body: duration("core.server.body_timeout", &server.body_timeout)?,
        request: duration("core.server.request_timeout", &server.request_timeout)?,
        idle: duration("core.server.idle_timeout", &server.idle_timeout)?,
        shutdown_grace: duration("core.server.shutdown_grace", &server.shutdown_grace)?,
        max_connections: at_least_one("core.server.max_connections", server.max_connections)?,
        max_connections_per_peer: at_least_one(
            "core.server.max_connections_per_peer",
            server.max_connections_per_peer,
        )?,
        max_requests: at_least_one("core.server.max_requests", server.max_requests)?,
        max_verifications: match server.max_verifications {
            0 => default_verifications(),
            number => number,
        },
        verification_queue: at_least_one("core.server.verification_queue", server.verification_queue)?,
    })
}

/// A duration above zero: a deadline of zero would refuse everything, and there is no "none".
fn duration(key: &'static str, text: &str) -> Result<Duration, ConfigError> {
    units::duration(text).filter(|duration| !duration.is_zero()).ok_or_else(|| ConfigError::Value {
        key,
        actual: text.to_owned(),
        expected: "a duration above zero, such as \"500ms\", \"10s\" or \"2m\"",
    })
}

fn duration_or_zero(key: &'static str, text: &str) -> Result<Duration, ConfigError> {
    units::duration(text).ok_or_else(|| ConfigError::Value {
        key,
        actual: text.to_owned(),
        expected: "a duration, such as \"0s\", \"10s\" or \"2m\"",
    })
}

#[cfg(test)]
mod tests;
