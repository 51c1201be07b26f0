//! The shape of kms.toml, as serde reads it. Nothing here is checked; `super` does that.

use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::PathBuf;

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct File {
    pub(super) rpc: Rpc,
    pub(super) core: Core,
}

#[derive(Debug, Deserialize)]
#[serde(default)]
pub(super) struct Rpc {
    pub(super) address: String,
    pub(super) port: u16,
    pub(super) tls: Tls,
    pub(super) limits: BTreeMap<String, toml::Value>,
}

impl Default for Rpc {
    fn default() -> Self {
        Self { address: "0.0.0.0".into(), port: 8000, tls: Tls::default(), limits: BTreeMap::new() }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Tls {
    pub(super) key: Option<PathBuf>,
    pub(super) certs: Option<PathBuf>,
    pub(super) mutual: Mutual,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Mutual {
    pub(super) ca_certs: Option<PathBuf>,
    pub(super) mandatory: bool,
}

#[derive(Debug, Deserialize)]
#[serde(default)]
pub(super) struct Core {
    pub(super) cert_dir: PathBuf,
    pub(super) subject_postfix: Option<String>,
    pub(super) site_name: String,
    pub(super) enforce_self_authorization: bool,
    pub(super) attest_rpc_cert: bool,
    pub(super) accept_self_issued_certs: bool,
    pub(super) admin_token_hash: String,
    pub(super) agent: Agent,
    pub(super) nitro_enclave_key_release: Option<bool>,
    pub(super) sealed_release: String,
    pub(super) sev_snp_key_release: bool,
    pub(super) aws_nitro_tpm_key_release: bool,
    pub(super) attestation: Attestation,
    pub(super) image: Image,
    pub(super) admin: Admin,
    pub(super) audit: Audit,
    pub(super) metrics: Metrics,
    pub(super) auth_api: AuthApi,
    pub(super) onboard: Onboard,
    pub(super) server: Server,
}

impl Default for Core {
    fn default() -> Self {
        Self {
            cert_dir: "/etc/kms/certs".into(),
            subject_postfix: None,
            site_name: String::new(),
            enforce_self_authorization: true,
            attest_rpc_cert: true,
            accept_self_issued_certs: false,
            admin_token_hash: String::new(),
            agent: Agent::default(),
            nitro_enclave_key_release: None,
            sealed_release: "offer".into(),
            sev_snp_key_release: false,
            aws_nitro_tpm_key_release: false,
            attestation: Attestation::default(),
            image: Image::default(),
            admin: Admin::default(),
            audit: Audit::default(),
            metrics: Metrics::default(),
            auth_api: AuthApi::default(),
            onboard: Onboard::default(),
            server: Server::default(),
        }
    }
}

/// Where this machine's own evidence comes from.
#[derive(Debug, Deserialize)]
#[serde(default)]
pub(super) struct Agent {
    pub(super) address: String,
    pub(super) timeout: String,
}

impl Default for Agent {
    fn default() -> Self {
        Self { address: String::new(), timeout: "20s".into() }
    }
}

/// A misspelt key here could mean another trust anchor than the writer thinks, so there are no unknown ones.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Attestation {
    pub(super) insecure_allow_external_trust_anchors: bool,
    pub(super) fetch_timeout: String,
    pub(super) urls: Urls,
    pub(super) root_ca: RootCa,
}

impl Default for Attestation {
    fn default() -> Self {
        Self {
            insecure_allow_external_trust_anchors: false,
            fetch_timeout: "10s".into(),
            urls: Urls::default(),
            root_ca: RootCa::default(),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Urls {
    pub(super) pccs: String,
    pub(super) gcp_pki_hosts: Vec<String>,
    pub(super) amd_kds: Option<String>,
}

impl Default for Urls {
    fn default() -> Self {
        Self {
            pccs: "https://pccs.phala.network".into(),
            gcp_pki_hosts: vec!["storage.googleapis.com".into(), "pki.goog".into()],
            amd_kds: None,
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RootCa {
    pub(super) tdx: Option<PathBuf>,
    pub(super) gcp_tpm: Option<PathBuf>,
    pub(super) aws_nitro_enclave: Option<PathBuf>,
    pub(super) aws_nitro_tpm: Option<PathBuf>,
    pub(super) sev_snp_milan: Option<PathBuf>,
    pub(super) sev_snp_genoa: Option<PathBuf>,
    pub(super) sev_snp_turin: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(default)]
pub(super) struct Image {
    pub(super) verify: bool,
    pub(super) tdx_measurements: Option<PathBuf>,
    pub(super) cache_dir: PathBuf,
    pub(super) download_url: Option<String>,
    pub(super) download_timeout: Option<String>,
}

impl Default for Image {
    fn default() -> Self {
        Self {
            verify: true,
            tdx_measurements: None,
            cache_dir: "/usr/share/dstack/images".into(),
            download_url: None,
            download_timeout: None,
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Admin {
    pub(super) enabled: bool,
    pub(super) address: Option<String>,
    pub(super) port: Option<u16>,
    pub(super) auth_token: Option<String>,
    pub(super) htpasswd_file: Option<String>,
    pub(super) insecure_no_auth: bool,
}

/// A misspelt key here would mean that nothing is recorded.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Audit {
    pub(super) file: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(default)]
pub(super) struct Metrics {
    pub(super) enabled: bool,
}

impl Default for Metrics {
    fn default() -> Self {
        Self { enabled: true }
    }
}

#[derive(Debug, Deserialize)]
#[serde(default)]
pub(super) struct AuthApi {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) decision_cache: String,
    pub(super) webhook: Webhook,
    pub(super) chain: Chain,
    pub(super) policy: Policy,
    pub(super) dev: Dev,
    pub(super) danger_allow_dev: bool,
}

impl Default for AuthApi {
    fn default() -> Self {
        Self {
            kind: "webhook".into(),
            decision_cache: "0s".into(),
            webhook: Webhook::default(),
            chain: Chain::default(),
            policy: Policy::default(),
            dev: Dev::default(),
            danger_allow_dev: false,
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(default)]
pub(super) struct Webhook {
    pub(super) url: String,
    pub(super) timeout: String,
    pub(super) root_ca: Option<PathBuf>,
}

impl Default for Webhook {
    fn default() -> Self {
        Self { url: "http://auth-api:8000".into(), timeout: "10s".into(), root_ca: None }
    }
}

/// A misspelt key here could mean fewer endpoints or no proofs, so there are no unknown ones.
#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Chain {
    pub(super) rpc_urls: Vec<String>,
    pub(super) agree: Option<usize>,
    pub(super) chain_id: Option<u64>,
    pub(super) kms_contract: String,
    pub(super) timeout: String,
    pub(super) max_head_age: String,
    pub(super) behind_head: u64,
    pub(super) kms_code: Option<String>,
    pub(super) app_code: Option<String>,
}

impl Default for Chain {
    fn default() -> Self {
        Self {
            rpc_urls: Vec::new(),
            agree: None,
            chain_id: None,
            kms_contract: String::new(),
            timeout: "10s".into(),
            max_head_age: "5m".into(),
            behind_head: 0,
            kms_code: None,
            app_code: None,
        }
    }
}

/// The addresses often hold access keys.
impl std::fmt::Debug for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chain").field("kms_contract", &self.kms_contract).finish_non_exhaustive()
    }
}

#[derive(Debug, Deserialize)]
#[serde(default)]
pub(super) struct Policy {
    pub(super) file: Option<PathBuf>,
    pub(super) reload: String,
}

impl Default for Policy {
    fn default() -> Self {
        Self { file: None, reload: "2s".into() }
    }
}

#[derive(Debug, Deserialize)]
#[serde(default)]
pub(super) struct Dev {
    pub(super) gateway_app_id: String,
}

impl Default for Dev {
    fn default() -> Self {
        Self { gateway_app_id: "any".into() }
    }
}

#[derive(Debug, Deserialize)]
#[serde(default)]
pub(super) struct Onboard {
    pub(super) enabled: bool,
    pub(super) auto_bootstrap_domain: String,
    pub(super) address: Option<String>,
    pub(super) port: Option<u16>,
    pub(super) allow_from: Option<Vec<String>>,
    pub(super) token: bool,
}

impl Default for Onboard {
    fn default() -> Self {
        Self {
            enabled: true,
            auto_bootstrap_domain: String::new(),
            address: None,
            port: None,
            allow_from: None,
            token: false,
        }
    }
}

/// Keys of our own: how long the server waits and how much it takes. Unknown ones are an error.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Server {
    pub(super) handshake_timeout: String,
    pub(super) header_timeout: String,
    pub(super) body_timeout: String,
    pub(super) request_timeout: String,
    pub(super) idle_timeout: String,
    pub(super) shutdown_grace: String,
    pub(super) max_connections: usize,
    pub(super) max_connections_per_peer: usize,
    pub(super) max_requests: usize,
    pub(super) max_verifications: usize,
    pub(super) verification_queue: usize,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            handshake_timeout: "10s".into(),
            header_timeout: "10s".into(),
            body_timeout: "20s".into(),
            request_timeout: "30s".into(),
            idle_timeout: "60s".into(),
            shutdown_grace: "10s".into(),
            max_connections: 2048,
            max_connections_per_peer: 1536,
            max_requests: 1024,
            max_verifications: 0,
            verification_queue: 256,
        }
    }
}
