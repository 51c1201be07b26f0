//! `[kms]` and `[agent]` of a project, and the measured `/etc/keyferry/agent.toml` that they become.
//!
//! The agent reads the file strictly. A test that links both programs builds a project with everything in it and has
//! the agent read the result, so that a key added here is known there.

use std::path::PathBuf;

use kms_protocol::kms_file::KmsFile;
use serde::{Deserialize, Serialize};

use crate::error::{Error, IoContext};
use crate::project::{LOCK_FILE, Project};

/// `[kms]`: where the keys come from, and where they go.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KmsTable {
    /// A `kms.json`, as `keyferry kms up` writes it: address and both keys at once.
    pub file: Option<PathBuf>,
    /// Address of the KMS; that of `file` when left out.
    #[serde(default)]
    pub url: String,
    /// More addresses of the same KMS.
    #[serde(default)]
    pub replicas: Vec<String>,
    /// Application id, 40 hex digits.
    pub app_id: String,
    /// A PEM file with the KMS's root CA, or `"fetch"` for the one in the lock file.
    pub kms_ca: Option<String>,
    /// The KMS's root k256 public key, 66 hex digits.
    pub k256_pubkey: Option<String>,
    /// A policy file for the TDX evidence in the KMS's certificate, without the name of its collateral.
    pub policy: Option<PathBuf>,
    /// Intel's collateral for that evidence.
    pub collateral: Option<PathBuf>,
    /// Insists on the exchange that seals the keys to one connection.
    #[serde(default)]
    pub require_sealed: bool,
    /// Goes on without a trust anchor.
    #[serde(default)]
    pub danger_accept_any_kms: bool,
    /// Fetches keys in debug mode.
    #[serde(default)]
    pub danger_allow_debug: bool,
    /// How keys reach the application.
    pub delivery: Option<Vec<String>>,
    /// age recipients for exported keys.
    #[serde(default)]
    pub recipients: Vec<String>,
    /// Ports that the parent may reach.
    #[serde(default)]
    pub allowed_ports: Vec<u16>,
    /// Hands keys to the parent in plain.
    #[serde(default)]
    pub danger_export_plaintext: bool,
}

/// `[agent]`: the rest of the agent's configuration, as the agent reads it.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct AgentTable {
    /// How often the keys are fetched again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refresh: Option<String>,
    /// How long one fetch may take.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<String>,
    /// How often one fetch is tried.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempts: Option<u32>,
    /// How far the enclave's clock may be from the NSM's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_clock_skew: Option<String>,
    /// vsock port of the parent that takes exported keys.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub export_port: Option<u32>,
    /// vsock port of the parent's proxy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy_port: Option<u32>,
    /// Port on 127.0.0.1 where the application finds the proxy; 0 for none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub local_proxy_port: Option<u16>,
    /// When the application is started again: never, on-failure or always.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restart: Option<String>,
    /// How often at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_restarts: Option<u32>,
    /// Ports on 127.0.0.1 that lead to services of the parent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forwards: Option<Vec<Forward>>,
}

/// A port on 127.0.0.1 that leads to a vsock port of the parent.
#[derive(Debug, Clone, Copy, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Forward {
    /// The port on 127.0.0.1.
    pub local: u16,
    /// The parent's vsock port.
    pub parent: u32,
}

/// The agent's file, in the order in which it is written.
#[derive(Serialize)]
struct AgentConfig<'a> {
    kms_url: &'a str,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    kms_replicas: &'a [String],
    app_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    kms_ca: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kms_k256_pubkey: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kms_policy: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kms_collateral: Option<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    require_sealed: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    danger_accept_any_kms: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    danger_allow_debug: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    delivery: Option<&'a [String]>,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    recipients: &'a [String],
    #[serde(skip_serializing_if = "<[u16]>::is_empty")]
    allowed_ports: &'a [u16],
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    danger_export_plaintext: bool,
    #[serde(flatten)]
    agent: &'a AgentTable,
}

impl Project {
    /// The measured configuration of the agent.
    ///
    /// # Errors
    /// When there is no trust anchor for the KMS, or one that is not pinned.
    pub fn agent_config(&self) -> Result<String, Error> {
        let Some(kms) = &self.file.kms else {
            return Err(Error::input("[kms]", "missing; the agent needs to know its KMS"));
        };
        let KmsTable {
            file: _,
            url,
            replicas,
            app_id,
            kms_ca,
            k256_pubkey,
            policy,
            collateral,
            require_sealed,
            danger_accept_any_kms,
            danger_allow_debug,
            delivery,
            recipients,
            allowed_ports,
            danger_export_plaintext,
        } = kms;
        let app_id_digits = app_id.strip_prefix("0x").unwrap_or(app_id);
        if app_id_digits.len() != 40 || hex::decode(app_id_digits).is_err() {
            return Err(Error::input("app_id", format!("is {app_id:?}, expected 40 hex digits")));
        }
        if url.is_empty() {
            return Err(Error::input("[kms]", "needs url, or file = \"kms.json\""));
        }
        let anchored = kms_ca.is_some() || k256_pubkey.is_some() || policy.is_some();
        if anchored == *danger_accept_any_kms {
            let reason = if anchored {
                "beside danger_accept_any_kms; expected one or the other"
            } else {
                "missing: without it the enclave would take keys from anyone; give a PEM file or \"fetch\""
            };
            return Err(Error::input("kms_ca", reason));
        }
        let kms_ca = match kms_ca.as_deref() {
            None => self.kms_file.as_ref().map(|file| file.ca_cert.clone()),
            Some("fetch") => Some(self.locked_ca(url)?),
            Some(path) => {
                crate::read_certificate(&self.folder.join(path))?;
                Some(self.text(path.as_ref())?)
            }
        };
        let config = AgentConfig {
            kms_url: url,
            kms_replicas: replicas,
            app_id: app_id_digits,
            kms_ca,
            kms_k256_pubkey: k256_pubkey.as_deref(),
            kms_policy: policy.as_deref().map(|path| self.text(path)).transpose()?,
            kms_collateral: collateral.as_deref().map(|path| self.text(path)).transpose()?,
            require_sealed: *require_sealed,
            danger_accept_any_kms: *danger_accept_any_kms,
            danger_allow_debug: *danger_allow_debug,
            delivery: delivery.as_deref(),
            recipients,
            allowed_ports,
            danger_export_plaintext: *danger_export_plaintext,
            agent: &self.file.agent,
        };
        toml::to_string(&config).map_err(|error| Error::input("agent.toml", error))
    }

    /// Takes over what `[kms] file` says. What the project says too must be the same.
    ///
    /// # Errors
    /// When the file is none, or contradicts the project.
    pub(crate) fn take_kms_file(&mut self) -> Result<(), Error> {
        let Some(kms) = &mut self.file.kms else { return Ok(()) };
        let Some(path) = kms.file.as_ref().map(|path| self.folder.join(path)) else { return Ok(()) };
        let bytes = std::fs::read(&path).context("read", &path)?;
        let file = KmsFile::decode(&bytes).map_err(|error| Error::input(path.display(), error))?;
        let contradicts = |key: &str, own: &str, file: &str| {
            Error::input(format!("[kms] {key}"), format!("is {own}, and {file} in {}", path.display()))
        };
        if kms.url.is_empty() {
            kms.url.clone_from(&file.url);
        } else if kms.url != file.url && !file.replicas.contains(&kms.url) {
            return Err(contradicts("url", &kms.url, &file.url));
        }
        let k256 = kms.k256_pubkey.get_or_insert_with(|| file.k256_pubkey.clone());
        if !k256.trim_start_matches("0x").eq_ignore_ascii_case(&file.k256_pubkey) {
            return Err(contradicts("k256_pubkey", k256, &file.k256_pubkey));
        }
        if kms.kms_ca.is_some() {
            return Err(Error::input(
                "[kms] kms_ca",
                "beside file, which has the certificate; leave one out",
            ));
        }
        for url in [&file.url].into_iter().chain(&file.replicas) {
            if *url != kms.url && !kms.replicas.contains(url) {
                kms.replicas.push(url.clone());
            }
        }
        self.kms_file = Some(file);
        Ok(())
    }

    fn text(&self, path: &std::path::Path) -> Result<String, Error> {
        let path = self.folder.join(path);
        std::fs::read_to_string(&path).context("read", &path)
    }

    fn locked_ca(&self, url: &str) -> Result<String, Error> {
        match &self.lock.kms_ca {
            Some(locked) if locked.url == url => Ok(locked.certificate.clone()),
            _ => Err(Error::input(
                "kms_ca = \"fetch\"",
                format!(
                    "{LOCK_FILE} has no certificate for {url}; run `eif-builder lock` and commit the file"
                ),
            )),
        }
    }
}
