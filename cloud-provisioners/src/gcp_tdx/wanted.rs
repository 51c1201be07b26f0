//! What a project asks for, as the bodies of the calls that make it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::{CONFIGURATION_LABEL, DEPLOYMENT_LABEL, MANAGED_BY, ZONE_LABEL, firewall_tag};
use crate::Error;
use crate::gcp::{
    AccessConfig, AttachedDisk, ConfidentialInstanceConfig, GuestOsFeature, InitializeParams,
    NetworkInterface, NewImage, NewInstance, Object, RawDisk, Scheduling, ServiceAccount,
    ShieldedInstanceConfig, Tags,
};
use crate::project::{App, GcpConfig, KeyProvider};

/// What the boot disk's guest can do. The boot image alone must be able to run in TDX.
const BOOT_FEATURES: [&str; 3] = ["UEFI_COMPATIBLE", "TDX_CAPABLE", "GVNIC"];
const DATA_FEATURES: [&str; 1] = ["GVNIC"];

/// The disk an image is made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootDisk {
    /// The file.
    pub path: PathBuf,
    /// SHA-256 of its content.
    pub sha256: [u8; 32],
}

/// Everything a deployment needs, decided.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Where.
    pub config: GcpConfig,
    /// Where the machine's disk key comes from.
    pub key_provider: KeyProvider,
    /// Id of the deployment.
    pub deployment_id: String,
    /// The boot disk.
    pub boot_disk: BootDisk,
    /// SHA-256 of the configuration volume.
    pub configuration: [u8; 32],
    /// Whether the API is to refuse a deletion of the machine.
    pub protect: bool,
}

impl Wanted {
    /// Decides from a project's settings, which are checked here.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] names a key that cannot work.
    pub fn new(
        app: &App,
        config: GcpConfig,
        deployment_id: &str,
        boot_disk: BootDisk,
        configuration: [u8; 32],
    ) -> Result<Self, Error> {
        config.validate()?;
        let platform = app.platform.as_deref().unwrap_or("gcp");
        if platform != "gcp" {
            let problem = format!("is {platform}, expected gcp");
            return Err(Error::Setting { setting: "platform", problem });
        }
        if app.key_provider == KeyProvider::Local {
            let problem = "is local, which needs SGX beside the machine; Google has none".to_owned();
            return Err(Error::Setting { setting: "key_provider", problem });
        }
        let mut config = config;
        if config.boot_image.is_empty() {
            config.boot_image = app.os_image.replace('.', "-");
        }
        config.validate()?;
        let protect = app.key_provider.keys_die_with_the_machine();
        Ok(Self {
            config,
            key_provider: app.key_provider,
            deployment_id: deployment_id.to_owned(),
            boot_disk,
            configuration,
            protect,
        })
    }

    /// Name of the image with this machine's configuration.
    #[must_use]
    pub fn shared_image(&self) -> String {
        format!("{}-shared", self.config.instance_name)
    }

    /// Name of the disk with this machine's configuration.
    #[must_use]
    pub fn shared_disk(&self) -> String {
        format!("{}-shared", self.config.instance_name)
    }

    /// Name of the disk that holds what the machine stores.
    #[must_use]
    pub fn data_disk(&self) -> String {
        format!("{}-data", self.config.instance_name)
    }

    /// The beginning of the configuration's hash: a label holds 63 characters.
    #[must_use]
    pub fn configuration_label(&self) -> String {
        hex::encode(&self.configuration[..20])
    }

    /// The object an image is made from.
    #[must_use]
    pub fn object(&self, image: &str) -> Object {
        Object { bucket: self.config.bucket_name(), name: format!("{image}.tar.gz") }
    }

    /// The description of the boot image: it holds the disk's hash, which a label is too short for.
    #[must_use]
    pub fn boot_description(&self) -> String {
        format!("sha256 of disk.raw: {}", hex::encode(self.boot_disk.sha256))
    }

    /// The boot image.
    #[must_use]
    pub fn boot_image(&self) -> NewImage {
        self.image(&self.config.boot_image, self.boot_description(), &BOOT_FEATURES, BTreeMap::new())
    }

    /// The image of the empty data disk, shared by all machines of a project.
    #[must_use]
    pub fn data_image(&self) -> NewImage {
        self.image(&self.config.data_image, String::new(), &DATA_FEATURES, BTreeMap::new())
    }

    /// The image with this machine's configuration.
    #[must_use]
    pub fn configuration_image(&self) -> NewImage {
        let labels = BTreeMap::from([
            (DEPLOYMENT_LABEL.to_owned(), self.deployment_id.clone()),
            (ZONE_LABEL.to_owned(), self.config.zone.clone()),
        ]);
        self.image(&self.shared_image(), String::new(), &DATA_FEATURES, labels)
    }

    fn image(
        &self,
        name: &str,
        description: String,
        features: &[&str],
        mut labels: BTreeMap<String, String>,
    ) -> NewImage {
        labels.insert(MANAGED_BY.0.to_owned(), MANAGED_BY.1.to_owned());
        NewImage {
            name: name.to_owned(),
            description,
            source_type: "RAW",
            raw_disk: RawDisk { source: self.object(name).source_url() },
            guest_os_features: features.iter().map(|it| GuestOsFeature { kind: (*it).to_owned() }).collect(),
            labels,
        }
    }

    /// The machine.
    #[must_use]
    pub fn instance(&self) -> NewInstance {
        let config = &self.config;
        let spot = config.provisioning_model.as_deref() == Some("SPOT");
        let mut labels = config.labels.clone();
        labels.insert(MANAGED_BY.0.to_owned(), MANAGED_BY.1.to_owned());
        labels.insert(DEPLOYMENT_LABEL.to_owned(), self.deployment_id.clone());
        labels.insert(CONFIGURATION_LABEL.to_owned(), self.configuration_label());
        let mut tags = config.tags.clone();
        let firewall = firewall_tag(&config.instance_name);
        if !tags.contains(&firewall) {
            tags.push(firewall);
        }
        let accounts = match config.service_account.as_str() {
            "" => Vec::new(),
            email => vec![ServiceAccount { email: email.to_owned(), scopes: config.scopes.clone() }],
        };
        NewInstance {
            name: config.instance_name.clone(),
            machine_type: format!("zones/{}/machineTypes/{}", config.zone, config.machine_type),
            confidential_instance_config: ConfidentialInstanceConfig { confidential_instance_type: "TDX" },
            can_ip_forward: false,
            deletion_protection: self.protect,
            scheduling: Scheduling {
                automatic_restart: !spot,
                on_host_maintenance: "TERMINATE",
                preemptible: spot,
                provisioning_model: spot.then_some("SPOT"),
                instance_termination_action: spot.then_some("STOP"),
            },
            shielded_instance_config: ShieldedInstanceConfig {
                enable_vtpm: true,
                enable_integrity_monitoring: true,
                enable_secure_boot: false,
            },
            tags: Tags { items: tags, fingerprint: None },
            labels,
            network_interfaces: vec![self.interface()],
            disks: self.disks(),
            service_accounts: accounts,
        }
    }

    fn interface(&self) -> NetworkInterface {
        let config = &self.config;
        let region = config.zone.rsplit_once('-').map_or(config.zone.as_str(), |(region, _)| region);
        // A fixed internal address needs a named subnetwork; that of the default network has its network's name.
        let subnet = match (config.subnet.as_str(), config.private_ip.as_str()) {
            ("", "") => None,
            ("", _) => Some("default"),
            (subnet, _) => Some(subnet),
        };
        let public =
            AccessConfig { name: "external-nat".into(), kind: "ONE_TO_ONE_NAT".into(), nat_ip: None };
        NetworkInterface {
            network: Some(format!("global/networks/{}", config.network)),
            subnetwork: subnet.map(|subnet| format!("regions/{region}/subnetworks/{subnet}")),
            network_ip: Some(config.private_ip.clone()).filter(|address| !address.is_empty()),
            access_configs: if config.no_public_ip { Vec::new() } else { vec![public] },
        }
    }

    fn disks(&self) -> Vec<AttachedDisk> {
        let config = &self.config;
        let disk = |name: Option<String>, gigabytes: u32, image: &str| AttachedDisk {
            boot: name.is_none(),
            auto_delete: true,
            mode: "READ_WRITE",
            kind: "PERSISTENT",
            initialize_params: InitializeParams {
                disk_type: name.as_ref().map(|_| format!("zones/{}/diskTypes/pd-balanced", config.zone)),
                disk_name: name,
                disk_size_gb: gigabytes.to_string(),
                source_image: format!("global/images/{image}"),
            },
        };
        vec![
            disk(None, 10, &config.boot_image),
            disk(Some(self.data_disk()), config.data_size, &config.data_image),
            disk(Some(self.shared_disk()), 1, &self.shared_image()),
        ]
    }
}
