//! The contract with the authorisation webhook (kms-protocol §6.3 and §6.6).

use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};

/// Path of the question about an app, below the webhook's URL.
pub const BOOT_AUTH_APP: &str = "bootAuth/app";
/// Path of the question about a KMS, below the webhook's URL.
pub const BOOT_AUTH_KMS: &str = "bootAuth/kms";
/// Longest reason, in bytes, that is passed on to clients and logs. Upstream cuts error excerpts at the same length,
/// but inside characters, which kills it (§12.3, 18).
pub const MAX_REASON: usize = 512;
/// Name of the Nitro Enclaves platform in `teeVariant`.
pub const TEE_VARIANT_NITRO: &str = "dstack-nitro-enclave";

/// What an authoriser is told about the one that asks for keys. Byte fields are lowercase hex on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BootInfo {
    /// Kind of TEE, such as [`TEE_VARIANT_NITRO`].
    pub tee_variant: String,
    /// Aggregated measurement.
    pub mr_aggregated: Vec<u8>,
    /// Image hash.
    pub os_image_hash: Vec<u8>,
    /// Measurement of the system part.
    pub mr_system: Vec<u8>,
    /// App id, 20 bytes.
    pub app_id: Vec<u8>,
    /// Compose hash.
    pub compose_hash: Vec<u8>,
    /// Instance id, may be empty.
    pub instance_id: Vec<u8>,
    /// Device id.
    pub device_id: Vec<u8>,
    /// Key provider's description.
    pub key_provider_info: Vec<u8>,
    /// TCB status, empty where the platform has none.
    pub tcb_status: String,
    /// Advisories that apply.
    pub advisory_ids: Vec<String>,
}

/// What the first key of the body is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BootInfoKeys {
    /// `teeVariant` (generation C).
    #[default]
    TeeVariant,
    /// `attestationMode` (generations A and B).
    AttestationMode,
}

impl BootInfo {
    /// The compact JSON body, keys in upstream's order.
    #[must_use]
    pub fn to_json(&self, keys: BootInfoKeys) -> Vec<u8> {
        // Strings only, so serialisation cannot fail.
        serde_json::to_vec(&Body { info: self, keys }).unwrap_or_default()
    }
}

struct Body<'a> {
    info: &'a BootInfo,
    keys: BootInfoKeys,
}

impl Serialize for Body<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let info = self.info;
        let mut map = serializer.serialize_map(Some(11))?;
        let first = match self.keys {
            BootInfoKeys::TeeVariant => "teeVariant",
            BootInfoKeys::AttestationMode => "attestationMode",
        };
        map.serialize_entry(first, &info.tee_variant)?;
        let bytes: [(&str, &[u8]); 8] = [
            ("mrAggregated", &info.mr_aggregated),
            ("osImageHash", &info.os_image_hash),
            ("mrSystem", &info.mr_system),
            ("appId", &info.app_id),
            ("composeHash", &info.compose_hash),
            ("instanceId", &info.instance_id),
            ("deviceId", &info.device_id),
            ("keyProviderInfo", &info.key_provider_info),
        ];
        for (key, value) in bytes {
            map.serialize_entry(key, &hex::encode(value))?;
        }
        map.serialize_entry("tcbStatus", &info.tcb_status)?;
        map.serialize_entry("advisoryIds", &info.advisory_ids)?;
        map.end()
    }
}

/// The webhook's decision. All keys are required, others are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BootResponse {
    /// The decision itself.
    pub is_allowed: bool,
    /// App id of the gateway; may be empty.
    pub gateway_app_id: String,
    /// Why not.
    pub reason: String,
}

impl BootResponse {
    /// The reason, bounded and fit for logs and clients: see [`bounded_reason`].
    #[must_use]
    pub fn bounded_reason(&self) -> String {
        bounded_reason(&self.reason)
    }
}

/// The webhook's answer to `GET` on its base URL: facts for `GetMeta`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AuthInfo {
    /// Free text, `ok` by habit.
    pub status: String,
    /// Address of the KMS contract.
    pub kms_contract_addr: String,
    /// App id of the gateway.
    pub gateway_app_id: String,
    /// Chain of the contract.
    pub chain_id: u64,
    /// Address of the app contract's implementation.
    pub app_implementation: String,
    /// RPC endpoint (generation C, optional).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eth_rpc_url: Option<String>,
}

/// At most [`MAX_REASON`] bytes of a text somebody else wrote (on chain, anybody can), cut between characters, with
/// control characters replaced so that it cannot forge log lines.
#[must_use]
pub fn bounded_reason(text: &str) -> String {
    let mut reason = String::new();
    for char in text.chars() {
        let char = if char.is_control() { ' ' } else { char };
        if reason.len() + char.len_utf8() > MAX_REASON {
            break;
        }
        reason.push(char);
    }
    reason
}
