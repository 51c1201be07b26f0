//! `state.json`: what dstack-cloud remembers of a deployment.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// `state.json`, in the order in which dstack-cloud writes it. Keys this program does not know are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct State {
    /// Name of the instance.
    pub instance_name: String,
    /// Project id.
    pub project: String,
    /// Zone.
    pub zone: String,
    /// External address, or empty.
    pub external_ip: String,
    /// Internal address.
    pub internal_ip: String,
    /// `RUNNING`, `STOPPED`, `REMOVED` or what the API said.
    pub status: String,
    /// When it was deployed, ISO 8601.
    pub created_at: String,
    /// When this file was last written, ISO 8601.
    pub updated_at: String,
    /// Name of the boot image.
    pub boot_image: String,
    /// Name of the data disk's image.
    pub data_image: String,
    /// Name of the configuration disk's image.
    pub shared_image: String,
    /// What else the file holds.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}
