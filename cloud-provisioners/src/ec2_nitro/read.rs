//! The calls that only look.

use std::collections::BTreeMap;

use aws_sdk_ec2::primitives::DateTimeFormat;
use aws_sdk_ec2::types::{
    self, ArchitectureType, DeviceType, InstanceLifecycleType, LocationType, NitroEnclavesSupport, Tag,
    UsageClassType,
};

use super::client::{Client, filter};
use super::error::AwsError;
use super::found::{Group, Image, Instance, KeyPair, Machine, Subnet};
use super::{DEPLOYMENT_TAG, MANAGED_BY};

/// Which instances are asked for.
#[derive(Clone, Copy, Debug)]
pub enum Which<'a> {
    /// All of the account in the region.
    All,
    /// Those made by this program.
    Managed,
    /// Those of a deployment.
    Deployment(&'a str),
    /// This one.
    Id(&'a str),
}

impl Client {
    /// Instances, ended ones too. One that is named and not there is an empty list.
    ///
    /// # Errors
    ///
    /// When AWS refuses or does not answer.
    pub async fn instances(&self, which: Which<'_>) -> Result<Vec<Instance>, AwsError> {
        const CALL: &str = "DescribeInstances";
        let mut request = self.ec2.describe_instances();
        request = match which {
            Which::All => request,
            Which::Managed => request.filters(filter(&format!("tag:{}", MANAGED_BY.0), &[MANAGED_BY.1])),
            Which::Deployment(id) => request.filters(filter(&format!("tag:{DEPLOYMENT_TAG}"), &[id])),
            Which::Id(id) => request.instance_ids(id),
        };
        let mut pages = request.into_paginator().send();
        let mut found = Vec::new();
        while let Some(page) = pages.next().await {
            let page = match page.map_err(|error| self.failed(CALL, error)) {
                Err(error) if error.is_not_found() => break,
                other => other?,
            };
            let instances = page.reservations().iter().flat_map(types::Reservation::instances);
            found.extend(instances.map(instance));
        }
        Ok(found)
    }

    /// What AWS says of an instance type, or `None` when there is none of this name here.
    pub(super) async fn machine(&self, instance_type: &str) -> Result<Option<Machine>, AwsError> {
        const CALL: &str = "DescribeInstanceTypes";
        let request = self.ec2.describe_instance_types().instance_types(instance_type.into());
        let answer = match request.send().await.map_err(|error| self.failed(CALL, error)) {
            Err(error) if error.code() == Some("InvalidInstanceType") => return Ok(None),
            other => other?,
        };
        Ok(answer.instance_types().first().map(|info| Machine {
            enclaves: info.nitro_enclaves_support() == Some(&NitroEnclavesSupport::Supported),
            architectures: info
                .processor_info()
                .map(types::ProcessorInfo::supported_architectures)
                .unwrap_or_default()
                .iter()
                .map(|it: &ArchitectureType| it.as_str().to_owned())
                .collect(),
            vcpus: info
                .v_cpu_info()
                .and_then(types::VCpuInfo::default_v_cpus)
                .and_then(|it| u32::try_from(it).ok())
                .unwrap_or(0),
            spot: info.supported_usage_classes().contains(&UsageClassType::Spot),
        }))
    }

    /// The zones that have an instance type.
    pub(super) async fn zones_with(&self, instance_type: &str) -> Result<Vec<String>, AwsError> {
        const CALL: &str = "DescribeInstanceTypeOfferings";
        let request =
            self.ec2.describe_instance_type_offerings().location_type(LocationType::AvailabilityZone);
        let answer = request.filters(filter("instance-type", &[instance_type])).send().await;
        let answer = answer.map_err(|error| self.failed(CALL, error))?;
        let mut zones: Vec<String> = answer
            .instance_type_offerings()
            .iter()
            .filter_map(|it| it.location().map(str::to_owned))
            .collect();
        zones.sort();
        Ok(zones)
    }

    /// The region's default VPC.
    pub(super) async fn default_vpc(&self) -> Result<Option<String>, AwsError> {
        const CALL: &str = "DescribeVpcs";
        let request = self.ec2.describe_vpcs().filters(filter("isDefault", &["true"]));
        let answer = request.send().await.map_err(|error| self.failed(CALL, error))?;
        Ok(answer.vpcs().first().and_then(|it| it.vpc_id().map(str::to_owned)))
    }

    /// The subnets of a VPC that are a zone's default, or the one subnet that is named.
    pub(super) async fn subnets(&self, vpc: Option<&str>, id: Option<&str>) -> Result<Vec<Subnet>, AwsError> {
        const CALL: &str = "DescribeSubnets";
        let mut request = self.ec2.describe_subnets();
        if let Some(vpc) = vpc {
            request = request.filters(filter("vpc-id", &[vpc])).filters(filter("default-for-az", &["true"]));
        }
        if let Some(id) = id {
            request = request.subnet_ids(id);
        }
        let answer = request.send().await.map_err(|error| self.failed(CALL, error))?;
        let mut subnets: Vec<Subnet> = answer
            .subnets()
            .iter()
            .map(|it| Subnet {
                id: text(it.subnet_id()),
                zone: text(it.availability_zone()),
                vpc: text(it.vpc_id()),
            })
            .collect();
        subnets.sort_by(|one, other| one.zone.cmp(&other.zone));
        Ok(subnets)
    }

    /// The image of this id.
    pub(super) async fn image(&self, id: &str) -> Result<Option<Image>, AwsError> {
        const CALL: &str = "DescribeImages";
        let answer = self.ec2.describe_images().image_ids(id).send().await;
        let answer = answer.map_err(|error| self.failed(CALL, error))?;
        Ok(answer.images().first().map(|it| Image {
            id: text(it.image_id()),
            owner: text(it.owner_id()),
            name: text(it.name()),
            architecture: it.architecture().map(|it| it.as_str().to_owned()).unwrap_or_default(),
            root_device: text(it.root_device_name()),
        }))
    }

    /// Security groups by filters.
    pub(super) async fn groups(&self, filters: &[(&str, &str)]) -> Result<Vec<Group>, AwsError> {
        const CALL: &str = "DescribeSecurityGroups";
        let mut request = self.ec2.describe_security_groups();
        for (name, value) in filters {
            request = request.filters(filter(name, &[value]));
        }
        let answer = request.send().await.map_err(|error| self.failed(CALL, error))?;
        Ok(answer.security_groups().iter().map(group).collect())
    }

    /// Key pairs by a filter, with their public halves.
    pub(super) async fn key_pairs(&self, name: &str, value: &str) -> Result<Vec<KeyPair>, AwsError> {
        const CALL: &str = "DescribeKeyPairs";
        let request = self.ec2.describe_key_pairs().include_public_key(true).filters(filter(name, &[value]));
        let answer = request.send().await.map_err(|error| self.failed(CALL, error))?;
        let without_comment =
            |line: &str| line.split_ascii_whitespace().take(2).collect::<Vec<_>>().join(" ");
        Ok(answer
            .key_pairs()
            .iter()
            .map(|it| KeyPair {
                name: text(it.key_name()),
                deployment: tags(it.tags()).remove(DEPLOYMENT_TAG),
                public_key: it.public_key().map(without_comment),
            })
            .collect())
    }

    /// Ids of the volumes of a deployment.
    pub(super) async fn volumes(&self, deployment: &str) -> Result<Vec<String>, AwsError> {
        const CALL: &str = "DescribeVolumes";
        let request =
            self.ec2.describe_volumes().filters(filter(&format!("tag:{DEPLOYMENT_TAG}"), &[deployment]));
        let answer = request.send().await.map_err(|error| self.failed(CALL, error))?;
        Ok(answer.volumes().iter().filter_map(|it| it.volume_id().map(str::to_owned)).collect())
    }

    /// What an instance printed on its console so far.
    pub(super) async fn console(&self, instance: &str) -> Result<String, AwsError> {
        use base64::Engine as _;
        const CALL: &str = "GetConsoleOutput";
        let answer = self.ec2.get_console_output().instance_id(instance).latest(true).send().await;
        let answer = answer.map_err(|error| self.failed(CALL, error))?;
        let encoded: String = answer.output().unwrap_or_default().split_ascii_whitespace().collect();
        let bytes = base64::engine::general_purpose::STANDARD
            .decode(encoded)
            .map_err(|_| AwsError::Incomplete { call: CALL, missing: "console in base64" })?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

fn text(value: Option<&str>) -> String {
    value.unwrap_or_default().to_owned()
}

/// Anybody in the account can write tags, and they are shown on terminals.
fn tags(tags: &[Tag]) -> BTreeMap<String, String> {
    let printable = |value| text(value).replace(char::is_control, " ");
    tags.iter().map(|tag| (printable(tag.key()), printable(tag.value()))).collect()
}

fn group(group: &types::SecurityGroup) -> Group {
    let ssh =
        group.ip_permissions().iter().filter(|it| it.from_port() <= Some(22) && it.to_port() >= Some(22));
    let sources = ssh.flat_map(|it| {
        let v4 = it.ip_ranges().iter().filter_map(types::IpRange::cidr_ip);
        v4.chain(it.ipv6_ranges().iter().filter_map(types::Ipv6Range::cidr_ipv6))
    });
    Group {
        id: text(group.group_id()),
        name: text(group.group_name()),
        deployment: tags(group.tags()).remove(DEPLOYMENT_TAG),
        ssh_from: sources.filter_map(|it| it.parse().ok()).collect(),
    }
}

pub(super) fn instance(it: &types::Instance) -> Instance {
    let reason = it.state_reason().and_then(types::StateReason::message);
    Instance {
        id: text(it.instance_id()),
        state: it
            .state()
            .and_then(types::InstanceState::name)
            .map(|name| name.as_str().to_owned())
            .unwrap_or_default(),
        reason: reason.map(AwsError::shorten),
        instance_type: it.instance_type().map(|it| it.as_str().to_owned()).unwrap_or_default(),
        architecture: it.architecture().map(|it| it.as_str().to_owned()).unwrap_or_default(),
        zone: text(it.placement().and_then(types::Placement::availability_zone)),
        image: text(it.image_id()),
        public_ip: it.public_ip_address().and_then(|it| it.parse().ok()),
        private_ip: it.private_ip_address().and_then(|it| it.parse().ok()),
        enclaves: it.enclave_options().and_then(types::EnclaveOptions::enabled).unwrap_or(false),
        client_token: text(it.client_token()),
        tags: tags(it.tags()),
        launched: it.launch_time().and_then(|it| it.fmt(DateTimeFormat::DateTime).ok()),
        spot: it.instance_lifecycle() == Some(&InstanceLifecycleType::Spot),
        can_stop: it.root_device_type() == Some(&DeviceType::Ebs),
        hibernates: it.hibernation_options().and_then(types::HibernationOptions::configured).unwrap_or(false),
    }
}
