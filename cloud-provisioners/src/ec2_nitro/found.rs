//! What AWS says is there, in the few words this program needs.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use super::DEPLOYMENT_TAG;

/// An instance.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Instance {
    /// Its id.
    pub id: String,
    /// `pending`, `running`, `stopping`, `stopped`, `shutting-down` or `terminated`.
    pub state: String,
    /// Why it is in that state, where AWS says it.
    pub reason: Option<String>,
    /// Its type.
    pub instance_type: String,
    /// Its processor, as AWS writes it.
    pub architecture: String,
    /// Its availability zone.
    pub zone: String,
    /// The image it started from.
    pub image: String,
    /// Its public address.
    pub public_ip: Option<IpAddr>,
    /// Its address in the VPC.
    pub private_ip: Option<IpAddr>,
    /// Whether it may run enclaves.
    pub enclaves: bool,
    /// The token it was launched with.
    pub client_token: String,
    /// Its tags.
    pub tags: BTreeMap<String, String>,
    /// When it was launched, RFC 3339.
    pub launched: Option<String>,
    /// Whether AWS may take it back.
    pub spot: bool,
    /// Whether it can be stopped and started again: its root is a network volume.
    pub can_stop: bool,
    /// Whether it is set up to hibernate, which excludes enclaves.
    pub hibernates: bool,
}

impl Instance {
    /// Whether it ends or has ended.
    #[must_use]
    pub fn is_ending(&self) -> bool {
        matches!(self.state.as_str(), "shutting-down" | "terminated")
    }

    /// Whether nothing is left of it.
    #[must_use]
    pub fn is_terminated(&self) -> bool {
        self.state == "terminated"
    }

    /// The address it is reached at.
    #[must_use]
    pub fn address(&self) -> Option<IpAddr> {
        self.public_ip.or(self.private_ip)
    }

    /// The deployment it belongs to.
    #[must_use]
    pub fn deployment(&self) -> Option<&str> {
        self.tags.get(DEPLOYMENT_TAG).map(String::as_str)
    }

    /// Its `Name` tag.
    #[must_use]
    pub fn name(&self) -> &str {
        self.tags.get("Name").map_or("", String::as_str)
    }
}

/// What AWS says of an instance type.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Machine {
    pub(super) enclaves: bool,
    pub(super) architectures: Vec<String>,
    pub(super) vcpus: u32,
    pub(super) spot: bool,
}

/// A subnet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Subnet {
    pub(super) id: String,
    pub(super) zone: String,
    pub(super) vpc: String,
}

/// A security group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) deployment: Option<String>,
    /// Sources let in to port 22.
    pub(super) ssh_from: Vec<IpNet>,
}

/// A key pair of EC2.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct KeyPair {
    pub(super) name: String,
    pub(super) deployment: Option<String>,
    /// Type and base64, without a comment.
    pub(super) public_key: Option<String>,
}

/// A machine image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Image {
    pub(super) id: String,
    pub(super) owner: String,
    pub(super) name: String,
    pub(super) architecture: String,
    pub(super) root_device: String,
}

/// What AWS says is there.
#[derive(Clone, Debug, Default)]
pub(super) struct Found {
    /// The account.
    pub(super) account: String,
    /// The wanted instance type, if there is one of this name.
    pub(super) machine: Option<Machine>,
    /// The zones that have it.
    pub(super) zones: Vec<String>,
    /// The default VPC's subnets, or the one that was given.
    pub(super) subnets: Vec<Subnet>,
    /// The image that was given.
    pub(super) image: Option<Image>,
    /// The group of this deployment's name.
    pub(super) group: Option<Group>,
    /// The key pair of the wanted name.
    pub(super) key_pair: Option<KeyPair>,
    /// The public half of the private key on this machine.
    pub(super) local_key: Option<String>,
    /// Instances of this deployment, ended ones too; or the one to adopt.
    pub(super) instances: Vec<Instance>,
}
