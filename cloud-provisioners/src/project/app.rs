//! `app.json`: one project of dstack-cloud, old or new.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::Error;

/// How a guest gets the key its disk is encrypted with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeyProvider {
    /// From a KMS, by the app's id: survives an upgrade.
    #[default]
    Kms,
    /// From an SGX key provider on the same host.
    Local,
    /// Sealed to the virtual TPM and this very image and compose: lost with the machine.
    Tpm,
    /// None: a new key at each boot.
    None,
}

impl KeyProvider {
    /// The name `app.json` uses.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kms => "kms",
            Self::Local => "local",
            Self::Tpm => "tpm",
            Self::None => "none",
        }
    }

    /// Whether what the machine stores is lost for good when the machine is deleted.
    #[must_use]
    pub fn keys_die_with_the_machine(self) -> bool {
        matches!(self, Self::Local | Self::Tpm)
    }
}

/// `app.json`, in the order in which dstack-cloud writes it. Keys this program does not know are kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct App {
    /// Name of the app; measured.
    pub name: String,
    /// Name of the OS image's directory under a search path.
    pub os_image: String,
    /// `gcp` or `aws`; only newer projects say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    /// Where on GCP the machine runs.
    pub gcp_config: GcpConfig,
    /// A compose made elsewhere, shipped byte for byte instead of a generated one. Empty: generate.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub app_compose_file: String,
    /// The compose file of the app.
    pub docker_compose_file: String,
    /// The script that runs before the containers.
    pub prelaunch_script: String,
    /// The file of secret variables.
    pub env_file: String,
    /// 20 bytes as hex that make the instance's id.
    pub instance_id_seed: String,
    /// 20 bytes as hex that name the app to a KMS.
    pub app_id: String,
    /// Whether the app is published by a dstack gateway.
    pub gateway_enabled: bool,
    /// Whether the guest serves logs to anyone.
    pub public_logs: bool,
    /// Whether the guest serves system information to anyone.
    pub public_sysinfo: bool,
    /// Whether the guest serves its measured compose to anyone.
    pub public_tcbinfo: bool,
    /// Where the disk key comes from.
    pub key_provider: KeyProvider,
    /// File system of the data disk, `ext4` or `zfs`.
    pub storage_fs: String,
    /// Leave the instance id out of the measurement.
    pub no_instance_id: bool,
    /// Wait for authenticated time at boot; can hang a boot for ever.
    pub secure_time: bool,
    /// Names of variables the app may be given.
    pub allowed_envs: Vec<String>,
    /// Hex of the key provider's public key, or empty for any.
    pub key_provider_id: String,
    /// What else the file holds.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl Default for App {
    /// dstack-cloud's defaults for keys that are absent from the file.
    fn default() -> Self {
        Self {
            name: "myapp".into(),
            os_image: super::DEFAULT_OS_IMAGE.into(),
            platform: None,
            gcp_config: GcpConfig::default(),
            app_compose_file: String::new(),
            docker_compose_file: "docker-compose.yaml".into(),
            prelaunch_script: "prelaunch.sh".into(),
            env_file: ".env".into(),
            instance_id_seed: String::new(),
            app_id: String::new(),
            gateway_enabled: true,
            public_logs: true,
            public_sysinfo: true,
            public_tcbinfo: true,
            key_provider: KeyProvider::Kms,
            storage_fs: "ext4".into(),
            no_instance_id: false,
            secure_time: false,
            allowed_envs: Vec::new(),
            key_provider_id: String::new(),
            other: Map::new(),
        }
    }
}

/// The `gcp_config` of `app.json`, and the `gcp` section of the global settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GcpConfig {
    /// Project id.
    pub project: String,
    /// Zone.
    pub zone: String,
    /// Name of the instance.
    pub instance_name: String,
    /// Machine type.
    pub machine_type: String,
    /// Name of the boot image; empty: the OS image's, with `-` for `.`.
    pub boot_image: String,
    /// Path of a `disk.raw`; empty: found by the OS image's name.
    pub boot_image_tar: String,
    /// Name of the image of the empty data disk.
    pub data_image: String,
    /// Size of the data disk in GB.
    pub data_size: u32,
    /// Bucket for uploads, with or without `gs://`; empty: `PROJECT-dstack`.
    pub bucket: String,
    /// Network.
    pub network: String,
    /// Subnetwork; empty: the network's own.
    pub subnet: String,
    /// Fixed internal address; newer projects only.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub private_ip: String,
    /// No external address; newer projects only.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub no_public_ip: bool,
    /// Service account to attach; empty: none.
    pub service_account: String,
    /// Scopes of that account.
    pub scopes: Vec<String>,
    /// More network tags.
    pub tags: Vec<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// `STANDARD` or `SPOT`; newer projects only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub provisioning_model: Option<String>,
    /// What else the section holds.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl Default for GcpConfig {
    fn default() -> Self {
        Self {
            project: String::new(),
            zone: "us-central1-a".into(),
            instance_name: String::new(),
            machine_type: "c3-standard-4".into(),
            boot_image: String::new(),
            boot_image_tar: String::new(),
            data_image: "dstack-data-disk".into(),
            data_size: 20,
            bucket: String::new(),
            network: "default".into(),
            subnet: String::new(),
            private_ip: String::new(),
            no_public_ip: false,
            service_account: String::new(),
            scopes: Vec::new(),
            tags: Vec::new(),
            labels: BTreeMap::new(),
            provisioning_model: None,
            other: Map::new(),
        }
    }
}

impl GcpConfig {
    /// This section over the global settings: what is empty here is taken from there, as dstack-cloud does.
    #[must_use]
    pub fn over(&self, global: &Self) -> Self {
        let text = |own: &String, other: &String| if own.is_empty() { other.clone() } else { own.clone() };
        let list =
            |own: &Vec<String>, other: &Vec<String>| if own.is_empty() { other.clone() } else { own.clone() };
        Self {
            project: text(&self.project, &global.project),
            zone: text(&self.zone, &global.zone),
            instance_name: text(&self.instance_name, &global.instance_name),
            machine_type: text(&self.machine_type, &global.machine_type),
            boot_image: text(&self.boot_image, &global.boot_image),
            boot_image_tar: text(&self.boot_image_tar, &global.boot_image_tar),
            data_image: text(&self.data_image, &global.data_image),
            data_size: self.data_size,
            bucket: text(&self.bucket, &global.bucket),
            network: text(&self.network, &global.network),
            subnet: text(&self.subnet, &global.subnet),
            private_ip: text(&self.private_ip, &global.private_ip),
            no_public_ip: self.no_public_ip,
            service_account: text(&self.service_account, &global.service_account),
            scopes: list(&self.scopes, &global.scopes),
            tags: list(&self.tags, &global.tags),
            labels: if self.labels.is_empty() { global.labels.clone() } else { self.labels.clone() },
            provisioning_model: self.provisioning_model.clone().or_else(|| global.provisioning_model.clone()),
            other: self.other.clone(),
        }
    }

    /// The bucket's name, without a scheme.
    #[must_use]
    pub fn bucket_name(&self) -> String {
        match self.bucket.trim_start_matches("gs://").trim_end_matches('/') {
            "" => format!("{}-dstack", self.project),
            name => name.to_owned(),
        }
    }

    /// Everything that can be found wrong before a call is made.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] names the first key that cannot work.
    pub fn validate(&self) -> Result<(), Error> {
        let missing = |setting, value: &str| match value {
            "" => Err(Error::Setting { setting, problem: "is required and empty".into() }),
            _ => Ok(()),
        };
        missing("gcp_config.project", &self.project)?;
        missing("gcp_config.zone", &self.zone)?;
        missing("gcp_config.machine_type", &self.machine_type)?;
        // `-allow-tcp-65535` is the longest suffix of a name made from this one, and names end at 63 characters.
        resource_name("gcp_config.instance_name", &self.instance_name, 47)?;
        resource_name("gcp_config.data_image", &self.data_image, 63)?;
        if !self.boot_image.is_empty() {
            resource_name("gcp_config.boot_image", &self.boot_image, 63)?;
        }
        if !(10..=65536).contains(&self.data_size) {
            let problem = format!("{} GB, expected 10 to 65536", self.data_size);
            return Err(Error::Setting { setting: "gcp_config.data_size", problem });
        }
        match self.provisioning_model.as_deref() {
            None | Some("STANDARD" | "SPOT") => Ok(()),
            Some(other) => Err(Error::Setting {
                setting: "gcp_config.provisioning_model",
                problem: format!("is {other}, expected STANDARD or SPOT"),
            }),
        }
    }
}

/// Compute Engine's rule for names: `[a-z]([-a-z0-9]{0,61}[a-z0-9])?`.
fn resource_name(setting: &'static str, name: &str, longest: usize) -> Result<(), Error> {
    let fail = |problem: String| Err(Error::Setting { setting, problem });
    if name.is_empty() {
        return fail("is required and empty".into());
    }
    if name.len() > longest {
        return fail(format!("{name:?} has {} characters, at most {longest} fit", name.len()));
    }
    let letters = name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'));
    if !letters || !name.starts_with(|first: char| first.is_ascii_lowercase()) || name.ends_with('-') {
        return fail(format!(
            "{name:?} is no name Compute Engine takes: lower-case letters, digits and hyphens, a letter first, \
             no hyphen last"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_keys_survive_a_round_trip() {
        let text = r#"{"name":"a","aws_config":{"region":"x"},"gcp_config":{"project":"p","new_key":1},"later":[2]}"#;
        let app: App = serde_json::from_str(text).unwrap();
        assert_eq!(app.gcp_config.project, "p");
        let again = serde_json::to_value(&app).unwrap();
        assert_eq!(again["aws_config"]["region"], "x");
        assert_eq!(again["gcp_config"]["new_key"], 1);
        assert_eq!(again["later"][0], 2);
        assert_eq!(again.get("platform"), None);
    }

    #[test]
    fn an_empty_key_is_taken_from_the_global_settings() {
        let global = GcpConfig { project: "g".into(), zone: "europe-west4-a".into(), ..GcpConfig::default() };
        let own = GcpConfig { zone: String::new(), ..GcpConfig::default() };
        let merged = own.over(&global);
        assert_eq!((merged.project.as_str(), merged.zone.as_str()), ("g", "europe-west4-a"));
        assert_eq!(merged.bucket_name(), "g-dstack");
    }

    #[test]
    fn names_compute_engine_would_refuse_half_way_are_refused_first() {
        let good = GcpConfig { project: "p".into(), instance_name: "kms-1".into(), ..GcpConfig::default() };
        assert!(good.validate().is_ok());
        for (name, why) in [
            ("", "empty"),
            ("Kms", "upper case"),
            ("1kms", "digit first"),
            ("kms-", "hyphen last"),
            ("kms.prod", "dot"),
            ("kms_prod", "underscore"),
            ("a-name-of-forty-eight-characters-that-ends-in-48x", "too long with a rule's suffix"),
        ] {
            let config = GcpConfig { instance_name: name.into(), ..good.clone() };
            let error = config.validate().expect_err(why);
            assert!(error.to_string().starts_with("gcp_config.instance_name: "), "{why}: {error}");
        }
    }
}
