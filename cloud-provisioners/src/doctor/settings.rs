//! What of the VMM's configuration the checks look at. Source: `vmm/vmm.toml` of Dstack-TEE/dstack, and the older layout.

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::host::Host;

/// The VMM's configuration.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct VmmSettings {
    pub(super) address: String,
    image_path: Option<PathBuf>,
    image: Image,
    pub(super) run_path: Option<PathBuf>,
    pub(super) cvm: Cvm,
    pub(super) auth: Auth,
    pub(super) key_provider: KeyProvider,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Image {
    path: Option<PathBuf>,
}

/// Section `[cvm]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub(super) struct Cvm {
    pub(super) pccs_url: String,
    pub(super) cid_start: u32,
    pub(super) cid_pool_size: u32,
    pub(super) qgs_port: Option<u32>,
    pub(super) networking: Networking,
    pub(super) port_mapping: PortMapping,
}

impl Default for Cvm {
    fn default() -> Self {
        Self {
            pccs_url: String::new(),
            cid_start: 1000,
            cid_pool_size: 1000,
            qgs_port: None,
            networking: Networking::default(),
            port_mapping: PortMapping::default(),
        }
    }
}

/// Section `[cvm.networking]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub(super) struct Networking {
    pub(super) mode: String,
}

impl Default for Networking {
    fn default() -> Self {
        Self { mode: "user".to_owned() }
    }
}

/// Section `[cvm.port_mapping]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct PortMapping {
    pub(super) enabled: bool,
}

/// Section `[auth]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Auth {
    pub(super) enabled: bool,
}

/// Section `[key_provider]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub(super) struct KeyProvider {
    pub(super) enabled: bool,
    pub(super) address: IpAddr,
    pub(super) port: u16,
}

impl Default for KeyProvider {
    fn default() -> Self {
        Self { enabled: true, address: IpAddr::from([127, 0, 0, 1]), port: 3443 }
    }
}

impl VmmSettings {
    /// Reads the file; why it cannot be read is a finding.
    pub(super) fn read(host: &Host, path: &Path) -> Result<Self, String> {
        let shown = path.display();
        let text = host.text(path).map_err(|error| format!("{shown}: {error}"))?;
        toml::from_str(&text).map_err(|error| format!("{shown}: {}", error.message()))
    }

    /// The guests' context ids.
    pub(super) fn cids(&self) -> Range<u32> {
        self.cvm.cid_start..self.cvm.cid_start.saturating_add(self.cvm.cid_pool_size)
    }

    /// Directory of the guest images.
    pub(super) fn images(&self) -> Option<&Path> {
        self.image.path.as_deref().or(self.image_path.as_deref()).filter(|it| !it.as_os_str().is_empty())
    }

    /// The address its API listens at, when that is TCP: `tcp:HOST:PORT`, or an address whose port stands elsewhere.
    pub(super) fn listens_at(&self) -> Option<IpAddr> {
        let address = self.address.strip_prefix("tcp:").unwrap_or(&self.address);
        let socket = address.parse::<SocketAddr>().map(|it| it.ip());
        socket.or_else(|_| address.parse::<IpAddr>()).ok()
    }
}
