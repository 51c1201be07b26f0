//! The calls that change something. Each can be repeated: what is done already counts as done.

use aws_sdk_ec2::primitives::Blob;
use aws_sdk_ec2::types::{
    BlockDeviceMapping, EbsBlockDevice, EnclaveOptionsRequest, HttpTokensState,
    IamInstanceProfileSpecification, InstanceInterruptionBehavior, InstanceMarketOptionsRequest,
    InstanceMetadataEndpointState, InstanceMetadataOptionsRequest, InstanceMetadataTagsState, IpPermission,
    IpRange, Ipv6Range, MarketType, ResourceType, ShutdownBehavior, SpotInstanceType, SpotMarketOptions, Tag,
    TagSpecification, VolumeType,
};
use ipnet::IpNet;

use super::client::Client;
use super::error::AwsError;
use super::found::Instance;
use super::{DEPLOYMENT_TAG, MANAGED_BY, read};

/// Everything a launch asks for.
#[derive(Clone, Debug)]
pub(super) struct NewInstance<'a> {
    pub(super) deployment: &'a str,
    pub(super) name: &'a str,
    /// `None` when nothing is made.
    pub(super) token: Option<&'a str>,
    pub(super) instance_type: &'a str,
    /// The id of an image, or `resolve:ssm:` and the name of a parameter.
    pub(super) image: &'a str,
    pub(super) root_device: &'a str,
    pub(super) volume_gib: i32,
    pub(super) subnet: &'a str,
    pub(super) group: Option<&'a str>,
    pub(super) key_name: Option<&'a str>,
    pub(super) instance_profile: Option<&'a str>,
    pub(super) spot: bool,
}

impl Client {
    /// Asks whether a launch would be allowed. Nothing is made.
    pub(super) async fn try_launch(&self, new: &NewInstance<'_>) -> Result<(), AwsError> {
        match self.run_instances(new, true).await {
            Err(error) if error.code() == Some("DryRunOperation") => Ok(()),
            Err(error) => Err(error),
            Ok(_) => Ok(()),
        }
    }

    /// Launches an instance. The same token gives the same instance.
    pub(super) async fn launch(&self, new: &NewInstance<'_>) -> Result<Instance, AwsError> {
        let made = self.run_instances(new, false).await?;
        made.ok_or(AwsError::Incomplete { call: "RunInstances", missing: "instance" })
    }

    async fn run_instances(&self, new: &NewInstance<'_>, dry: bool) -> Result<Option<Instance>, AwsError> {
        let volume = EbsBlockDevice::builder()
            .volume_size(new.volume_gib)
            .volume_type(VolumeType::Gp3)
            .encrypted(true)
            .delete_on_termination(true)
            .build();
        let metadata = InstanceMetadataOptionsRequest::builder()
            .http_endpoint(InstanceMetadataEndpointState::Enabled)
            .http_tokens(HttpTokensState::Required)
            .http_put_response_hop_limit(1)
            .instance_metadata_tags(InstanceMetadataTagsState::Disabled)
            .build();
        let kinds = [ResourceType::Instance, ResourceType::Volume, ResourceType::NetworkInterface];
        let market = new.spot.then(|| {
            let spot = SpotMarketOptions::builder()
                .spot_instance_type(SpotInstanceType::OneTime)
                .instance_interruption_behavior(InstanceInterruptionBehavior::Terminate)
                .build();
            InstanceMarketOptionsRequest::builder().market_type(MarketType::Spot).spot_options(spot).build()
        });
        let request = self
            .ec2
            .run_instances()
            .set_client_token(new.token.map(str::to_owned))
            .image_id(new.image)
            .instance_type(new.instance_type.into())
            .min_count(1)
            .max_count(1)
            .subnet_id(new.subnet)
            .set_security_group_ids(new.group.map(|group| vec![group.to_owned()]))
            .set_key_name(new.key_name.map(str::to_owned))
            .enclave_options(EnclaveOptionsRequest::builder().enabled(true).build())
            .metadata_options(metadata)
            .block_device_mappings(
                BlockDeviceMapping::builder().device_name(new.root_device).ebs(volume).build(),
            )
            .set_instance_market_options(market)
            .set_iam_instance_profile(
                new.instance_profile.map(|it| IamInstanceProfileSpecification::builder().name(it).build()),
            )
            // What runs here is thrown away; a shutdown from inside must not leave a volume that costs.
            .instance_initiated_shutdown_behavior(ShutdownBehavior::Terminate)
            .set_tag_specifications(Some(
                kinds.into_iter().map(|kind| tagged(kind, new.deployment, Some(new.name))).collect(),
            ))
            .set_dry_run(dry.then_some(true));
        let answer = request.send().await.map_err(|error| self.failed("RunInstances", error))?;
        Ok(answer.instances().first().map(read::instance))
    }

    /// Imports a public key under a name. `InvalidKeyPair.Duplicate` when the name is taken.
    pub(super) async fn import_key_pair(
        &self,
        name: &str,
        public_key: &str,
        deployment: &str,
    ) -> Result<(), AwsError> {
        let request = self.ec2.import_key_pair().key_name(name);
        let request = request.public_key_material(Blob::new(public_key.as_bytes()));
        let request = request.tag_specifications(tagged(ResourceType::KeyPair, deployment, None));
        request.send().await.map(|_| ()).map_err(|error| self.failed("ImportKeyPair", error))
    }

    /// Makes a security group and gives its id. `InvalidGroup.Duplicate` when the name is taken.
    pub(super) async fn create_group(
        &self,
        name: &str,
        vpc: &str,
        deployment: &str,
    ) -> Result<String, AwsError> {
        const CALL: &str = "CreateSecurityGroup";
        let request = self.ec2.create_security_group().group_name(name).vpc_id(vpc);
        let request = request.description("The way in to a Nitro Enclave host made by keyferry");
        let request = request.tag_specifications(tagged(ResourceType::SecurityGroup, deployment, Some(name)));
        let answer = request.send().await.map_err(|error| self.failed(CALL, error))?;
        answer.group_id.ok_or(AwsError::Incomplete { call: CALL, missing: "group id" })
    }

    /// Lets `source` in to port 22.
    pub(super) async fn allow_ssh(&self, group: &str, source: IpNet) -> Result<(), AwsError> {
        let request = self.ec2.authorize_security_group_ingress().group_id(group);
        let sent = request.ip_permissions(ssh_from(source)).send().await;
        match sent.map_err(|error| self.failed("AuthorizeSecurityGroupIngress", error)) {
            Err(error) if error.code() == Some("InvalidPermission.Duplicate") => Ok(()),
            other => other.map(|_| ()),
        }
    }

    /// Lets `source` in no longer.
    pub(super) async fn revoke_ssh(&self, group: &str, source: IpNet) -> Result<(), AwsError> {
        let request = self.ec2.revoke_security_group_ingress().group_id(group);
        let sent = request.ip_permissions(ssh_from(source)).send().await;
        gone(sent.map_err(|error| self.failed("RevokeSecurityGroupIngress", error)))
    }

    /// Stops an instance.
    pub(super) async fn stop(&self, instance: &str) -> Result<(), AwsError> {
        let sent = self.ec2.stop_instances().instance_ids(instance).send().await;
        sent.map(|_| ()).map_err(|error| self.failed("StopInstances", error))
    }

    /// Starts an instance.
    pub(super) async fn start(&self, instance: &str) -> Result<(), AwsError> {
        let sent = self.ec2.start_instances().instance_ids(instance).send().await;
        sent.map(|_| ()).map_err(|error| self.failed("StartInstances", error))
    }

    /// Switches the enclave option of a stopped instance on.
    pub(super) async fn enable_enclaves(&self, instance: &str) -> Result<(), AwsError> {
        let on = EnclaveOptionsRequest::builder().enabled(true).build();
        let request = self.ec2.modify_instance_attribute().instance_id(instance).enclave_options(on);
        request.send().await.map(|_| ()).map_err(|error| self.failed("ModifyInstanceAttribute", error))
    }

    /// Ends an instance for good.
    pub(super) async fn terminate(&self, instance: &str) -> Result<(), AwsError> {
        let sent = self.ec2.terminate_instances().instance_ids(instance).send().await;
        gone(sent.map_err(|error| self.failed("TerminateInstances", error)))
    }

    /// Deletes a security group. `DependencyViolation` while something uses it.
    pub(super) async fn delete_group(&self, group: &str) -> Result<(), AwsError> {
        let sent = self.ec2.delete_security_group().group_id(group).send().await;
        gone(sent.map_err(|error| self.failed("DeleteSecurityGroup", error)))
    }

    /// Deletes a key pair.
    pub(super) async fn delete_key_pair(&self, name: &str) -> Result<(), AwsError> {
        let sent = self.ec2.delete_key_pair().key_name(name).send().await;
        gone(sent.map_err(|error| self.failed("DeleteKeyPair", error)))
    }

    /// Deletes a volume.
    pub(super) async fn delete_volume(&self, volume: &str) -> Result<(), AwsError> {
        let sent = self.ec2.delete_volume().volume_id(volume).send().await;
        gone(sent.map_err(|error| self.failed("DeleteVolume", error)))
    }
}

/// What is not there counts as gone.
fn gone<T>(result: Result<T, AwsError>) -> Result<(), AwsError> {
    match result {
        Err(error) if error.is_not_found() => Ok(()),
        other => other.map(|_| ()),
    }
}

fn ssh_from(source: IpNet) -> IpPermission {
    let permission = IpPermission::builder().ip_protocol("tcp").from_port(22).to_port(22);
    match source {
        IpNet::V4(range) => permission.ip_ranges(IpRange::builder().cidr_ip(range.to_string()).build()),
        IpNet::V6(range) => permission.ipv6_ranges(Ipv6Range::builder().cidr_ipv6(range.to_string()).build()),
    }
    .build()
}

fn tagged(kind: ResourceType, deployment: &str, name: Option<&str>) -> TagSpecification {
    let tag = |key: &str, value: &str| Tag::builder().key(key).value(value).build();
    TagSpecification::builder()
        .resource_type(kind)
        .set_tags(Some(
            [(MANAGED_BY.0, MANAGED_BY.1), (DEPLOYMENT_TAG, deployment)]
                .into_iter()
                .chain(name.map(|name| ("Name", name)))
                .map(|(key, value)| tag(key, value))
                .collect(),
        ))
        .build()
}
