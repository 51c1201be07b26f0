//! Messages of the VMM's RPC as JSON. Source: `vmm/rpc/proto/vmm_rpc.proto` of Dstack-TEE/dstack. What a newer VMM adds is
//! not looked at.

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// `VmConfiguration`, as far as a KMS needs it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Configuration {
    /// Name, not unique.
    pub name: String,
    /// Name of the guest image.
    pub image: String,
    /// The text of `app-compose.json`; its hash is measured.
    pub compose_file: String,
    /// Virtual processors.
    pub vcpu: u32,
    /// MiB.
    pub memory: u32,
    /// GB.
    pub disk_size: u32,
    /// Ports of the host that lead into the guest.
    pub ports: Vec<PortMapping>,
    /// `.user-config` of the guest; not measured.
    pub user_config: UserConfig,
    /// Where the guest's own keys come from, when from a KMS.
    pub kms_urls: Vec<String>,
    /// Gateways.
    pub gateway_urls: Vec<String>,
    /// Make it, and start it later.
    pub stopped: bool,
}

/// What goes into a guest's `.user-config`: it may hold secrets, so it is wiped and never printed.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
#[serde(transparent)]
pub struct UserConfig(String);

impl UserConfig {
    /// Takes the text over.
    #[must_use]
    pub fn new(mut text: Zeroizing<String>) -> Self {
        Self(std::mem::take(&mut text))
    }

    /// Its size in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.0.len()
    }
}

impl std::fmt::Debug for UserConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "UserConfig({} bytes)", self.0.len())
    }
}

/// `PortMapping`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PortMapping {
    /// `tcp` or `udp`.
    pub protocol: String,
    /// Port of the host.
    pub host_port: u32,
    /// Port of the guest.
    pub vm_port: u32,
    /// Address of the host; empty: the VMM's own choice, mostly loopback.
    pub host_address: String,
}

impl std::str::FromStr for PortMapping {
    type Err = String;

    /// `tcp:ADDRESS:HOST:GUEST`, with fewer parts from the left: `HOST:GUEST` is TCP.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no port mapping, expected tcp:ADDRESS:HOST:GUEST");
        let mut parts: Vec<&str> = text.split(':').collect();
        let port = |part: Option<&str>| {
            let port = part.and_then(|it| it.parse::<u16>().ok()).filter(|port| *port != 0);
            port.map(u32::from).ok_or_else(wrong)
        };
        let vm_port = port(parts.pop())?;
        let host_port = port(parts.pop())?;
        let (protocol, host_address) = match parts.as_slice() {
            [] => ("tcp", ""),
            [protocol @ ("tcp" | "udp")] => (*protocol, ""),
            [protocol @ ("tcp" | "udp"), address] => {
                address.parse::<std::net::IpAddr>().map_err(|_| wrong())?;
                (*protocol, *address)
            }
            _ => return Err(wrong()),
        };
        let (protocol, host_address) = (protocol.to_owned(), host_address.to_owned());
        Ok(Self { protocol, host_port, vm_port, host_address })
    }
}

impl std::fmt::Display for PortMapping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { protocol, host_port, vm_port, host_address } = self;
        match host_address.as_str() {
            "" => write!(f, "{protocol}:{host_port}:{vm_port}"),
            address => write!(f, "{protocol}:{address}:{host_port}:{vm_port}"),
        }
    }
}

/// `VmInfo`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Machine {
    /// The VMM's id.
    pub id: String,
    /// Name.
    pub name: String,
    /// `running`, `stopped`, `stopping`, `exited`, `removing`.
    pub status: String,
    /// How long it has been up, for people.
    pub uptime: String,
    /// The app's id, hex.
    pub app_id: String,
    /// The instance's id, hex, once the guest told it.
    pub instance_id: Option<String>,
    /// How it was made; absent in short answers.
    pub configuration: Option<Configuration>,
    /// How far the guest's boot is.
    pub boot_progress: String,
    /// Why the guest's boot failed.
    pub boot_error: String,
    /// Version of the guest image.
    pub image_version: String,
}

impl Machine {
    /// Whether its guest runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.status == "running"
    }
}

/// `ImageInfo`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuestImage {
    /// Name, that of its directory.
    pub name: String,
    /// Version.
    pub version: String,
    /// Whether one can log in: no secret belongs there.
    pub is_dev: bool,
}

#[derive(Debug, Serialize)]
pub(super) struct Id<'a> {
    pub(super) id: &'a str,
}

/// `UpdateVmRequest`, as far as ports are concerned; what is left out stays as it is.
#[derive(Debug, Serialize)]
pub(super) struct Update<'a> {
    pub(super) id: &'a str,
    pub(super) update_ports: bool,
    pub(super) ports: &'a [PortMapping],
}

#[derive(Debug, Default, Serialize)]
pub(super) struct StatusRequest<'a> {
    pub(super) keyword: &'a str,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Made {
    pub(super) id: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct StatusResponse {
    pub(super) vms: Vec<Machine>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ImageList {
    pub(super) images: Vec<GuestImage>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct InfoResponse {
    pub(super) found: bool,
    pub(super) info: Option<Machine>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Version {
    pub(super) version: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Resources {
    pub(super) max_allocable_vcpu: u32,
    pub(super) max_allocable_memory_in_mb: u32,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Meta {
    pub(super) resources: Resources,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_mappings_are_read_and_written_alike() {
        for text in ["tcp:0.0.0.0:9100:8000", "tcp:12001:8000", "udp:127.0.0.1:53:53"] {
            assert_eq!(text.parse::<PortMapping>().unwrap().to_string(), text);
        }
        assert_eq!("9100:8000".parse::<PortMapping>().unwrap().to_string(), "tcp:9100:8000");
        for text in ["", "8000", "0:1", "1:0", "tcp:x:1:2", "sctp:1:2", "a:b:c:1:2", "70000:1", "-1:1"] {
            assert!(text.parse::<PortMapping>().is_err(), "{text}");
        }
    }
}
