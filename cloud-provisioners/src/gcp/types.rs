//! Bodies of Compute Engine v1, as far as they are used. 64-bit integers are strings on the wire.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// `Image`, as it is read.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Image {
    /// Name.
    pub name: String,
    /// Free text; ours holds the disk's hash.
    #[serde(default)]
    pub description: String,
    /// `READY`, `PENDING`, `FAILED`, `DELETING`.
    #[serde(default)]
    pub status: String,
    /// What the guest can do.
    #[serde(default)]
    pub guest_os_features: Vec<GuestOsFeature>,
    /// Labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// `Image`, to be made from an archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NewImage {
    /// Name.
    pub name: String,
    /// Free text.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// `RAW`, the only one.
    pub source_type: &'static str,
    /// The archive.
    pub raw_disk: RawDisk,
    /// What the guest can do.
    pub guest_os_features: Vec<GuestOsFeature>,
    /// Labels.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// Where an image's archive is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RawDisk {
    /// Address of the object in Cloud Storage.
    pub source: String,
}

/// Something a guest can do: `UEFI_COMPATIBLE`, `TDX_CAPABLE`, `GVNIC`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestOsFeature {
    /// The feature.
    #[serde(rename = "type")]
    pub kind: String,
}

/// `Instance`, as it is read.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Instance {
    /// Name.
    pub name: String,
    /// The number Google gave it: another machine of the same name has another one.
    #[serde(default)]
    pub id: String,
    /// `PROVISIONING`, `STAGING`, `RUNNING`, `STOPPING`, `TERMINATED`, ..
    #[serde(default)]
    pub status: String,
    /// Address of the zone.
    #[serde(default)]
    pub zone: String,
    /// RFC 3339.
    #[serde(default)]
    pub creation_timestamp: String,
    /// Network tags.
    #[serde(default)]
    pub tags: Tags,
    /// Labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Network interfaces.
    #[serde(default)]
    pub network_interfaces: Vec<NetworkInterface>,
    /// Whether the API refuses to delete it.
    #[serde(default)]
    pub deletion_protection: bool,
}

impl Instance {
    /// The first external address.
    #[must_use]
    pub fn external_ip(&self) -> Option<&str> {
        let configs = self.network_interfaces.iter().flat_map(|interface| &interface.access_configs);
        configs.filter_map(|config| config.nat_ip.as_deref()).find(|address| !address.is_empty())
    }

    /// The first internal address.
    #[must_use]
    pub fn internal_ip(&self) -> Option<&str> {
        self.network_interfaces.iter().find_map(|interface| interface.network_ip.as_deref())
    }

    /// The zone's name.
    #[must_use]
    pub fn zone_name(&self) -> &str {
        self.zone.rsplit('/').next().unwrap_or_default()
    }
}

/// `Instance`, to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NewInstance {
    /// Name.
    pub name: String,
    /// `zones/Z/machineTypes/M`.
    pub machine_type: String,
    /// The kind of confidential machine.
    pub confidential_instance_config: ConfidentialInstanceConfig,
    /// Always false.
    pub can_ip_forward: bool,
    /// Whether the API refuses to delete it.
    pub deletion_protection: bool,
    /// How it is placed and restarted.
    pub scheduling: Scheduling,
    /// Virtual TPM and its like.
    pub shielded_instance_config: ShieldedInstanceConfig,
    /// Network tags.
    pub tags: Tags,
    /// Labels.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Network interfaces.
    pub network_interfaces: Vec<NetworkInterface>,
    /// Disks, the boot disk first.
    pub disks: Vec<AttachedDisk>,
    /// Identities; none unless asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub service_accounts: Vec<ServiceAccount>,
}

/// The kind of confidential machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ConfidentialInstanceConfig {
    /// `TDX`.
    pub confidential_instance_type: &'static str,
}

/// How an instance is placed and restarted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Scheduling {
    /// Whether it is started again after the host failed.
    pub automatic_restart: bool,
    /// `TERMINATE`: a TDX machine cannot be moved.
    pub on_host_maintenance: &'static str,
    /// Spot only.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub preemptible: bool,
    /// `SPOT`, or absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub provisioning_model: Option<&'static str>,
    /// `STOP` for spot machines: their disks stay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance_termination_action: Option<&'static str>,
}

/// Virtual TPM and its like.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ShieldedInstanceConfig {
    /// Needed by the guest's attestation.
    pub enable_vtpm: bool,
    /// Integrity monitoring.
    pub enable_integrity_monitoring: bool,
    /// Off: the guest's UKI is measured, not signed.
    pub enable_secure_boot: bool,
}

/// Network tags and the fingerprint that guards a change of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tags {
    /// The tags.
    #[serde(default)]
    pub items: Vec<String>,
    /// Opaque; must be current for a change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
}

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NetworkInterface {
    /// `global/networks/N`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// `regions/R/subnetworks/S`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subnetwork: Option<String>,
    /// Internal address.
    #[serde(rename = "networkIP", skip_serializing_if = "Option::is_none")]
    pub network_ip: Option<String>,
    /// External addresses.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub access_configs: Vec<AccessConfig>,
}

/// An external address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessConfig {
    /// `external-nat`.
    pub name: String,
    /// `ONE_TO_ONE_NAT`.
    #[serde(rename = "type")]
    pub kind: String,
    /// A reserved address, or the one that was given.
    #[serde(rename = "natIP", default, skip_serializing_if = "Option::is_none")]
    pub nat_ip: Option<String>,
}

/// A disk of a new instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AttachedDisk {
    /// Whether it is booted from.
    pub boot: bool,
    /// Whether it is deleted with the instance.
    pub auto_delete: bool,
    /// `READ_WRITE`.
    pub mode: &'static str,
    /// `PERSISTENT`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// What it is made from.
    pub initialize_params: InitializeParams,
}

/// What a disk is made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct InitializeParams {
    /// Name; absent: the instance's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_name: Option<String>,
    /// Size in GB, a string on the wire.
    pub disk_size_gb: String,
    /// `zones/Z/diskTypes/T`; absent: the zone's default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_type: Option<String>,
    /// `global/images/I`.
    pub source_image: String,
}

/// An identity given to an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ServiceAccount {
    /// Its address.
    pub email: String,
    /// Its scopes.
    pub scopes: Vec<String>,
}

/// `Disk`, as it is read.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Disk {
    /// Name.
    pub name: String,
    /// Addresses of the instances it is attached to.
    #[serde(default)]
    pub users: Vec<String>,
}

/// `Zone`, as it is read.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Zone {
    /// Name.
    pub name: String,
    /// `UP` or `DOWN`.
    #[serde(default)]
    pub status: String,
    /// Names such as `Intel Sapphire Rapids`.
    #[serde(default)]
    pub available_cpu_platforms: Vec<String>,
}

/// `Firewall`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Firewall {
    /// Name.
    pub name: String,
    /// Free text.
    #[serde(default)]
    pub description: String,
    /// `INGRESS`.
    pub direction: String,
    /// The network, `global/networks/N` or its full address.
    pub network: String,
    /// Lower wins; absent: 1000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<u32>,
    /// CIDR blocks.
    #[serde(default)]
    pub source_ranges: Vec<String>,
    /// Tags of the machines it holds for.
    #[serde(default)]
    pub target_tags: Vec<String>,
    /// What is let in.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allowed: Vec<Permission>,
    /// What is kept out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub denied: Vec<Permission>,
}

/// Protocol and ports of a firewall rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Permission {
    /// `tcp` or `udp`.
    #[serde(rename = "IPProtocol")]
    pub protocol: String,
    /// Ports or ranges.
    #[serde(default)]
    pub ports: Vec<String>,
}

/// A piece of a serial port's output.
#[derive(Clone, Debug, Deserialize)]
pub struct SerialOutput {
    /// The text.
    #[serde(default)]
    pub contents: String,
    /// Position of its first byte. Beyond the position asked for, the server has dropped what was between.
    #[serde(default, deserialize_with = "number")]
    pub start: u64,
    /// Position after its last byte.
    #[serde(default, deserialize_with = "number")]
    pub next: u64,
}

/// A 64-bit integer, which Google writes as a string.
fn number<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map_err(serde::de::Error::custom)
}
