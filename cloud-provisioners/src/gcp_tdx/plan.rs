//! From what is wanted and what is there to the steps between them. Pure.

use std::fmt;

use super::wanted::Wanted;
use super::{CONFIGURATION_LABEL, DEPLOYMENT_LABEL, ZONE_LABEL};
use crate::gcp::{Disk, Image, Instance, Zone};

/// What the CPUs of a zone with TDX are called.
const TDX_PLATFORM: &str = "Intel Sapphire Rapids";

/// What Google says is there.
#[derive(Clone, Debug, Default)]
pub(super) struct Found {
    /// The zone.
    pub(super) zone: Option<Zone>,
    /// Whether the zone has the machine type.
    pub(super) has_machine_type: bool,
    /// The machine of this name.
    pub(super) instance: Option<Instance>,
    /// The boot image of this name.
    pub(super) boot_image: Option<Image>,
    /// The configuration image of this name.
    pub(super) shared_image: Option<Image>,
    /// The data disk's image.
    pub(super) data_image: Option<Image>,
    /// The machine's data disk.
    pub(super) data_disk: Option<Disk>,
    /// The machine's configuration disk.
    pub(super) shared_disk: Option<Disk>,
    /// Whether the bucket is there.
    pub(super) bucket: bool,
}

/// Whether an existing machine may be replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Replace {
    /// No.
    No,
    /// Yes, unless keys would be lost with it.
    Yes,
    /// Yes, and the operator named the machine whose keys are lost with it.
    LosingKeysOf(String),
}

/// One step. Those that delete come after everything that can fail before them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Make the bucket for uploads.
    CreateBucket,
    /// Upload the boot disk and make its image.
    MakeBootImage,
    /// Upload the empty data disk and make its image.
    MakeDataImage,
    /// Upload the configuration. Its image is made only after the old one is gone.
    UploadConfiguration,
    /// Switch off deletion protection of the machine that is replaced.
    Unprotect,
    /// Delete the machine with its disks.
    DeleteInstance,
    /// Delete a configuration disk that no machine uses: a new machine would boot with it.
    DeleteStaleConfigurationDisk,
    /// Delete the image of an earlier configuration.
    DeleteConfigurationImage,
    /// Make the image of this configuration.
    MakeConfigurationImage,
    /// Make the machine.
    CreateInstance,
}

impl Step {
    /// Whether something is lost by it.
    #[must_use]
    pub fn deletes(&self) -> bool {
        matches!(
            self,
            Self::DeleteInstance | Self::DeleteStaleConfigurationDisk | Self::DeleteConfigurationImage
        )
    }

    /// Whether it begins to cost money.
    #[must_use]
    pub fn costs(&self) -> bool {
        matches!(self, Self::CreateInstance)
    }
}

/// The steps of a deployment, in order.
#[derive(Clone, Debug)]
pub struct Plan<'a> {
    wanted: &'a Wanted,
    steps: Vec<Step>,
    /// The boot image was made by another program, which did not record what it holds.
    boot_is_unknown: bool,
}

impl Plan<'_> {
    /// The steps, in order.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }
}

impl fmt::Display for Plan<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let config = &self.wanted.config;
        let instance = &config.instance_name;
        if self.boot_is_unknown {
            writeln!(
                f,
                "the image {} was made by another program: what it holds is seen when the guest attests",
                config.boot_image
            )?;
        }
        for (number, step) in self.steps.iter().enumerate() {
            write!(f, "{:>3}. ", number + 1)?;
            match step {
                Step::CreateBucket => writeln!(f, "create the bucket {}", config.bucket_name())?,
                Step::MakeBootImage => writeln!(
                    f,
                    "upload {} and make the image {}",
                    self.wanted.boot_disk.path.display(),
                    config.boot_image
                )?,
                Step::MakeDataImage => {
                    writeln!(f, "make the image {} of an empty data disk", config.data_image)?
                }
                Step::UploadConfiguration => writeln!(f, "upload the configuration of {instance}")?,
                Step::Unprotect => writeln!(f, "switch off deletion protection of {instance}")?,
                Step::DeleteInstance => writeln!(f, "DELETE the machine {instance} with its disks")?,
                Step::DeleteStaleConfigurationDisk => {
                    writeln!(f, "delete the disk {}, left over and unused", self.wanted.shared_disk())?;
                }
                Step::DeleteConfigurationImage => {
                    writeln!(f, "delete the image {}", self.wanted.shared_image())?
                }
                Step::MakeConfigurationImage => writeln!(f, "make the image {}", self.wanted.shared_image())?,
                Step::CreateInstance => writeln!(
                    f,
                    "create the machine {instance}: {} with TDX in {}, disks of 10, {} and 1 GB (costs money)",
                    config.machine_type, config.zone, config.data_size
                )?,
            }
        }
        Ok(())
    }
}

/// Why a deployment is refused before anything is changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The zone is not there or closed.
    #[error("zone {zone}: {problem}")]
    Zone {
        /// The zone.
        zone: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The zone does not have the machine type.
    #[error("machine type {machine_type}: not in zone {zone}")]
    MachineType {
        /// The machine type.
        machine_type: String,
        /// The zone.
        zone: String,
    },
    /// A machine of this name is there.
    #[error("instance {0} exists")]
    Exists(String),
    /// Replacing the machine would lose its keys.
    #[error("instance {0} holds keys that exist nowhere else, and replacing it deletes them")]
    KeysWouldBeLost(String),
    /// A boot image of this name was made from another disk.
    #[error("image {image} was made from another disk ({found}), this one hashes to {wanted}")]
    OtherBootImage {
        /// The image.
        image: String,
        /// What its description says.
        found: String,
        /// The disk's hash.
        wanted: String,
    },
    /// An image of this name cannot be used.
    #[error("image {image}: {problem}")]
    Image {
        /// The image.
        image: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A configuration image of this name belongs to a machine in another zone.
    #[error("image {image} belongs to the machine of the same name in {zone}")]
    OtherZone {
        /// The image.
        image: String,
        /// That machine's zone.
        zone: String,
    },
    /// A data disk of this name is there without its machine.
    #[error("disk {0} is left over, and a new machine would use it as it is")]
    DataDiskLeftOver(String),
}

impl Refusal {
    /// The next step.
    #[must_use]
    pub fn hint(&self) -> String {
        match self {
            Self::Zone { .. } | Self::MachineType { .. } => {
                "TDX runs on c3-standard machines, for example in us-central1-a or europe-west4-a".into()
            }
            Self::Exists(_) => "replace it with --delete, or choose another gcp_config.instance_name".into(),
            Self::KeysWouldBeLost(name) => {
                format!("onboard a second KMS first; to lose the keys all the same: --delete --lose-keys-of {name}")
            }
            Self::OtherBootImage { .. } => {
                "set gcp_config.boot_image to another name; --force-boot-image replaces the image for every machine".into()
            }
            Self::Image { image, .. } => format!("delete the image {image}, or use another name"),
            Self::OtherZone { .. } => "choose another gcp_config.instance_name".into(),
            Self::DataDiskLeftOver(name) => format!("delete the disk {name} if nothing on it is needed"),
        }
    }
}

/// Decides the steps. `force_boot_image` makes the boot image again under the same name.
///
/// # Errors
///
/// [`Refusal`] when the deployment cannot work, or would lose what must not be lost.
pub(super) fn plan<'a>(
    wanted: &'a Wanted,
    found: &Found,
    replace: &Replace,
    force_boot_image: bool,
) -> Result<Plan<'a>, Refusal> {
    check_place(wanted, found)?;
    let replacing = match check_instance(wanted, found, replace)? {
        Machine::Current => return Ok(Plan { wanted, steps: Vec::new(), boot_is_unknown: false }),
        Machine::Absent => false,
        Machine::Replaced => true,
    };
    let boot = check_boot_image(wanted, found, force_boot_image)?;
    check_shared_image(wanted, found)?;

    let mut steps = Vec::new();
    let mut add = |needed: bool, step: Step| {
        if needed {
            steps.push(step);
        }
    };
    add(!found.bucket, Step::CreateBucket);
    add(boot == Boot::Wanting, Step::MakeBootImage);
    add(found.data_image.is_none(), Step::MakeDataImage);
    add(true, Step::UploadConfiguration);
    add(replacing && found.instance.as_ref().is_some_and(|it| it.deletion_protection), Step::Unprotect);
    add(replacing, Step::DeleteInstance);
    add(!replacing && found.shared_disk.is_some(), Step::DeleteStaleConfigurationDisk);
    add(found.shared_image.is_some(), Step::DeleteConfigurationImage);
    add(true, Step::MakeConfigurationImage);
    add(true, Step::CreateInstance);
    Ok(Plan { wanted, steps, boot_is_unknown: boot == Boot::Unknown })
}

fn check_place(wanted: &Wanted, found: &Found) -> Result<(), Refusal> {
    let name = &wanted.config.zone;
    let refuse = |problem: &str| Refusal::Zone { zone: name.clone(), problem: problem.to_owned() };
    let zone = found.zone.as_ref().ok_or_else(|| refuse("there is no such zone"))?;
    if zone.status == "DOWN" {
        return Err(refuse("is down"));
    }
    let platforms = &zone.available_cpu_platforms;
    if !platforms.is_empty() && !platforms.iter().any(|it| it == TDX_PLATFORM) {
        return Err(refuse("has no Sapphire Rapids CPUs, so no TDX"));
    }
    match found.has_machine_type {
        true => Ok(()),
        false => {
            Err(Refusal::MachineType { machine_type: wanted.config.machine_type.clone(), zone: name.clone() })
        }
    }
}

/// What is to become of the machine.
enum Machine {
    /// There is none yet.
    Absent,
    /// It is there, made from this very configuration by this deployment: a run before this one got that far.
    Current,
    /// It is there and goes.
    Replaced,
}

fn check_instance(wanted: &Wanted, found: &Found, replace: &Replace) -> Result<Machine, Refusal> {
    let name = &wanted.config.instance_name;
    let Some(instance) = &found.instance else {
        return match &found.data_disk {
            Some(disk) => Err(Refusal::DataDiskLeftOver(disk.name.clone())),
            None => Ok(Machine::Absent),
        };
    };
    let ours = |label: &str, value: &str| instance.labels.get(label).is_some_and(|it| it == value);
    match replace {
        Replace::No
            if ours(DEPLOYMENT_LABEL, &wanted.deployment_id)
                && ours(CONFIGURATION_LABEL, &wanted.configuration_label()) =>
        {
            Ok(Machine::Current)
        }
        Replace::No => Err(Refusal::Exists(name.clone())),
        Replace::LosingKeysOf(named) if named == name => Ok(Machine::Replaced),
        Replace::Yes if !wanted.key_provider.keys_die_with_the_machine() => Ok(Machine::Replaced),
        _ => Err(Refusal::KeysWouldBeLost(name.clone())),
    }
}

/// What is known of the boot image.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Boot {
    /// It must be made.
    Wanting,
    /// It was made from this very disk.
    Current,
    /// It is there, and nobody recorded from what it was made: dstack-cloud does not. It is used, because the guest measures
    /// it; replacing it would change other machines.
    Unknown,
}

fn check_boot_image(wanted: &Wanted, found: &Found, force: bool) -> Result<Boot, Refusal> {
    let Some(image) = &found.boot_image else { return Ok(Boot::Wanting) };
    if force {
        return Ok(Boot::Wanting);
    }
    if image.status == "FAILED" {
        return Err(Refusal::Image { image: image.name.clone(), problem: "could not be made".to_owned() });
    }
    if !image.guest_os_features.iter().any(|feature| feature.kind == "TDX_CAPABLE") {
        let problem = "is not marked TDX_CAPABLE".to_owned();
        return Err(Refusal::Image { image: image.name.clone(), problem });
    }
    match image.description.as_str() {
        "" => Ok(Boot::Unknown),
        description if description == wanted.boot_description() => Ok(Boot::Current),
        description => Err(Refusal::OtherBootImage {
            image: image.name.clone(),
            found: description.to_owned(),
            wanted: hex::encode(wanted.boot_disk.sha256),
        }),
    }
}

fn check_shared_image(wanted: &Wanted, found: &Found) -> Result<(), Refusal> {
    let zone = found.shared_image.as_ref().and_then(|image| image.labels.get(ZONE_LABEL));
    match zone {
        Some(zone) if *zone != wanted.config.zone => {
            Err(Refusal::OtherZone { image: wanted.shared_image(), zone: zone.clone() })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::BootDisk;
    use super::*;
    use crate::project::{App, GcpConfig, KeyProvider};

    fn wanted(key_provider: KeyProvider) -> Wanted {
        let app = App { key_provider, ..App::default() };
        let config = GcpConfig {
            project: "demo-proj".into(),
            instance_name: "dstack-kms".into(),
            bucket: "gs://demo-bucket".into(),
            ..GcpConfig::default()
        };
        Wanted::new(&app, config, "d-1", BootDisk { path: "disk.raw".into(), sha256: [1; 32] }, [2; 32])
            .unwrap()
    }

    fn read<T: serde::de::DeserializeOwned>(value: serde_json::Value) -> Option<T> {
        Some(serde_json::from_value(value).unwrap())
    }

    fn empty() -> Found {
        Found {
            zone: read(json!({"name": "us-central1-a", "status": "UP"})),
            has_machine_type: true,
            bucket: true,
            ..Found::default()
        }
    }

    fn deployed(wanted: &Wanted) -> Found {
        Found {
            instance: read(json!({"name": "dstack-kms", "deletionProtection": true})),
            boot_image: read(json!({
                "name": "dstack-cloud-0-6-0",
                "description": wanted.boot_description(),
                "guestOsFeatures": [{"type": "TDX_CAPABLE"}],
            })),
            data_image: read(json!({"name": "dstack-data-disk"})),
            shared_image: read(json!({"name": "dstack-kms-shared", "labels": {"zone": "us-central1-a"}})),
            shared_disk: read(json!({"name": "dstack-kms-shared"})),
            data_disk: read(json!({"name": "dstack-kms-data"})),
            ..empty()
        }
    }

    #[test]
    fn a_first_deployment_makes_everything() {
        let wanted = wanted(KeyProvider::Tpm);
        let plan = plan(&wanted, &Found { bucket: false, ..empty() }, &Replace::No, false).unwrap();
        assert_eq!(
            plan.steps(),
            [
                Step::CreateBucket,
                Step::MakeBootImage,
                Step::MakeDataImage,
                Step::UploadConfiguration,
                Step::MakeConfigurationImage,
                Step::CreateInstance,
            ]
        );
        assert!(!plan.steps().iter().any(Step::deletes));
    }

    #[test]
    fn a_replacement_deletes_only_after_every_upload() {
        let wanted = wanted(KeyProvider::Kms);
        let plan = plan(&wanted, &deployed(&wanted), &Replace::Yes, false).unwrap();
        assert_eq!(
            plan.steps(),
            [
                Step::UploadConfiguration,
                Step::Unprotect,
                Step::DeleteInstance,
                Step::DeleteConfigurationImage,
                Step::MakeConfigurationImage,
                Step::CreateInstance,
            ]
        );
    }

    #[test]
    fn a_configuration_disk_that_was_left_over_is_not_booted_from() {
        let wanted = wanted(KeyProvider::Kms);
        let found = Found { instance: None, data_disk: None, ..deployed(&wanted) };
        let plan = plan(&wanted, &found, &Replace::No, false).unwrap();
        let at = |step: &Step| plan.steps().iter().position(|it| it == step).unwrap();
        assert!(at(&Step::DeleteStaleConfigurationDisk) < at(&Step::CreateInstance), "{:?}", plan.steps());
    }

    #[test]
    fn a_run_that_got_as_far_as_the_machine_is_done() {
        let wanted = wanted(KeyProvider::Tpm);
        let made = |configuration: &str| Found {
            instance: read(json!({
                "name": "dstack-kms",
                "labels": {"deployment-id": "d-1", "configuration": configuration},
            })),
            ..deployed(&wanted)
        };
        let current = made(&wanted.configuration_label());
        assert_eq!(plan(&wanted, &current, &Replace::No, false).unwrap().steps(), []);
        let other = plan(&wanted, &made("another"), &Replace::No, false);
        assert_eq!(other.unwrap_err(), Refusal::Exists("dstack-kms".into()));
    }

    #[test]
    fn keys_sealed_to_a_machine_are_lost_only_by_naming_it() {
        let wanted = wanted(KeyProvider::Tpm);
        let found = deployed(&wanted);
        let decide = |replace| plan(&wanted, &found, &replace, false).map(|plan| plan.steps().len());
        let lost = Err(Refusal::KeysWouldBeLost("dstack-kms".into()));
        assert_eq!(decide(Replace::No), Err(Refusal::Exists("dstack-kms".into())));
        assert_eq!(decide(Replace::Yes), lost);
        assert_eq!(decide(Replace::LosingKeysOf("another".into())), lost);
        assert_eq!(decide(Replace::LosingKeysOf("dstack-kms".into())), Ok(6));
    }

    #[test]
    fn what_cannot_work_is_refused_with_a_next_step() {
        let wanted = wanted(KeyProvider::Kms);
        let zone = |value| Found { zone: read(value), ..empty() };
        for (found, shown) in [
            (Found { zone: None, ..empty() }, "zone us-central1-a: there is no such zone"),
            (zone(json!({"name": "z", "status": "DOWN"})), "zone us-central1-a: is down"),
            (
                zone(json!({"name": "z", "availableCpuPlatforms": ["AMD Milan"]})),
                "zone us-central1-a: has no Sapphire Rapids CPUs, so no TDX",
            ),
            (
                Found { has_machine_type: false, ..empty() },
                "machine type c3-standard-4: not in zone us-central1-a",
            ),
            (
                Found { data_disk: read(json!({"name": "dstack-kms-data"})), ..empty() },
                "disk dstack-kms-data is left over, and a new machine would use it as it is",
            ),
            (
                Found {
                    shared_image: read(json!({"name": "s", "labels": {"zone": "europe-west4-a"}})),
                    ..empty()
                },
                "image dstack-kms-shared belongs to the machine of the same name in europe-west4-a",
            ),
            (
                Found { boot_image: read(json!({"name": "dstack-cloud-0-6-0"})), ..empty() },
                "image dstack-cloud-0-6-0: is not marked TDX_CAPABLE",
            ),
        ] {
            let refusal = plan(&wanted, &found, &Replace::Yes, false).unwrap_err();
            assert_eq!(refusal.to_string(), shown);
            assert!(!refusal.hint().is_empty());
        }
    }

    #[test]
    fn an_image_from_another_disk_is_not_overwritten_silently() {
        let wanted = wanted(KeyProvider::Kms);
        let mut image = json!({"name": "dstack-cloud-0-6-0", "guestOsFeatures": [{"type": "TDX_CAPABLE"}]});
        let found = Found { boot_image: read(image.clone()), ..empty() };
        let unknown = plan(&wanted, &found, &Replace::No, false).unwrap();
        assert!(!unknown.steps().contains(&Step::MakeBootImage), "what dstack-cloud uploaded is used");
        assert!(unknown.to_string().starts_with("the image dstack-cloud-0-6-0 was made by another program"));
        image["description"] = json!("sha256 of disk.raw: 00");
        let found = Found { boot_image: read(image), ..empty() };
        assert!(matches!(plan(&wanted, &found, &Replace::No, false), Err(Refusal::OtherBootImage { .. })));
        let forced = plan(&wanted, &found, &Replace::No, true).unwrap();
        assert!(forced.steps().contains(&Step::MakeBootImage));
    }

    /// The body the `gcloud` of the reference sends for the same project, with the differences named in the
    /// documentation: no service account, the virtual TPM said explicitly, labels, and keys protected from deletion.
    #[test]
    fn the_machine_is_the_one_dstack_cloud_asks_for() {
        let body = serde_json::to_value(wanted(KeyProvider::Kms).instance()).unwrap();
        assert_eq!(body["machineType"], "zones/us-central1-a/machineTypes/c3-standard-4");
        assert_eq!(body["confidentialInstanceConfig"], json!({"confidentialInstanceType": "TDX"}));
        assert_eq!(body["scheduling"], json!({"automaticRestart": true, "onHostMaintenance": "TERMINATE"}));
        assert_eq!(body["tags"], json!({"items": ["fw-dstack-kms"]}));
        assert_eq!(
            body["disks"][1]["initializeParams"],
            json!({
                "diskName": "dstack-kms-data",
                "diskSizeGb": "20",
                "diskType": "zones/us-central1-a/diskTypes/pd-balanced",
                "sourceImage": "global/images/dstack-data-disk",
            })
        );
        assert_eq!(
            body["networkInterfaces"],
            json!([{
                "network": "global/networks/default",
                "accessConfigs": [{"name": "external-nat", "type": "ONE_TO_ONE_NAT"}],
            }])
        );
        assert_eq!(body.get("serviceAccounts"), None);
    }
}
