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

/// Why a body is no boot info.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("boot info field {field}: {problem}")]
pub struct BootInfoError {
    /// Which field; `body` when it is all of it.
    pub field: &'static str,
    /// What is wrong with it.
    pub problem: String,
}

impl BootInfoError {
    fn new(field: &'static str, problem: impl Into<String>) -> Self {
        Self { field, problem: problem.into() }
    }
}

impl BootInfo {
    /// Reads a body of the contract. Byte fields are hex with or without `0x`; `mrSystem`, `keyProviderInfo`, `tcbStatus`
    /// and `advisoryIds` may be missing, and the first key may have the name of any generation. Fields are no longer than
    /// upstream's service allows.
    ///
    /// # Errors
    ///
    /// [`BootInfoError`] names the field that is missing, malformed or too long.
    pub fn from_json(text: &[u8]) -> Result<Self, BootInfoError> {
        let body: Received = serde_json::from_slice(text)
            .map_err(|error| BootInfoError::new("body", bounded_reason(&format!("not one: {error}"))))?;
        let required = |field, text: Option<String>, longest| match text {
            Some(text) => bytes(field, &text, longest),
            None => Err(BootInfoError::new(field, "missing, expected a hex string")),
        };
        let optional =
            |field, text: Option<String>, longest| bytes(field, &text.unwrap_or_default(), longest);
        let tcb_status = body.tcb_status.unwrap_or_default();
        let advisory_ids = body.advisory_ids.unwrap_or_default();
        let too_long = advisory_ids.iter().any(|id| id.len() > MAX_ADVISORY);
        if too_long || advisory_ids.len() > MAX_ADVISORIES {
            return Err(BootInfoError::new("advisoryIds", "too many, or too long"));
        }
        if tcb_status.len() > MAX_TCB_STATUS {
            return Err(BootInfoError::new("tcbStatus", "too long"));
        }
        Ok(Self {
            tee_variant: body.tee_variant.or(body.attestation_mode).unwrap_or_default(),
            mr_aggregated: required("mrAggregated", body.mr_aggregated, 32)?,
            os_image_hash: required("osImageHash", body.os_image_hash, 32)?,
            mr_system: optional("mrSystem", body.mr_system, 32)?,
            app_id: required("appId", body.app_id, 20)?,
            compose_hash: required("composeHash", body.compose_hash, 32)?,
            instance_id: required("instanceId", body.instance_id, 20)?,
            device_id: required("deviceId", body.device_id, 32)?,
            key_provider_info: optional("keyProviderInfo", body.key_provider_info, 4096)?,
            tcb_status,
            advisory_ids,
        })
    }
}

/// The published service's limits, in bytes and entries.
const MAX_TCB_STATUS: usize = 128;
const MAX_ADVISORIES: usize = 128;
const MAX_ADVISORY: usize = 256;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Received {
    tee_variant: Option<String>,
    attestation_mode: Option<String>,
    mr_aggregated: Option<String>,
    os_image_hash: Option<String>,
    mr_system: Option<String>,
    app_id: Option<String>,
    compose_hash: Option<String>,
    instance_id: Option<String>,
    device_id: Option<String>,
    key_provider_info: Option<String>,
    tcb_status: Option<String>,
    advisory_ids: Option<Vec<String>>,
}

fn bytes(field: &'static str, text: &str, longest: usize) -> Result<Vec<u8>, BootInfoError> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    // An odd number of digits is padded on the left, as the published service pads whole fields.
    let padded = format!("{}{digits}", if digits.len() % 2 == 1 { "0" } else { "" });
    let bytes = hex::decode(padded).map_err(|_| BootInfoError::new(field, "not hex"))?;
    if bytes.len() > longest {
        return Err(BootInfoError::new(field, format!("{} bytes, at most {longest} fit", bytes.len())));
    }
    Ok(bytes)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> BootInfo {
        BootInfo {
            tee_variant: TEE_VARIANT_NITRO.into(),
            mr_aggregated: vec![1; 32],
            os_image_hash: vec![2; 32],
            mr_system: vec![3; 32],
            app_id: vec![4; 20],
            compose_hash: vec![5; 32],
            instance_id: Vec::new(),
            device_id: vec![6; 32],
            key_provider_info: vec![7; 91],
            tcb_status: "UpToDate".into(),
            advisory_ids: vec!["INTEL-SA-00001".into()],
        }
    }

    #[test]
    fn bodies_of_every_generation_are_read_back() {
        for keys in [BootInfoKeys::TeeVariant, BootInfoKeys::AttestationMode] {
            assert_eq!(BootInfo::from_json(&info().to_json(keys)).unwrap(), info());
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let body = String::from_utf8(info().to_json(BootInfoKeys::TeeVariant)).unwrap();
        let app = "04".repeat(20);
        for (name, body, field) in [
            ("no JSON", "no".to_owned(), "body"),
            ("another type", body.replace("\"UpToDate\"", "1"), "body"),
            ("a missing field", body.replace("deviceId", "device"), "deviceId"),
            ("another alphabet", body.replace(&app, "zz"), "appId"),
            ("a long id", body.replace(&app, &"04".repeat(21)), "appId"),
            ("a long status", body.replace("UpToDate", &"x".repeat(129)), "tcbStatus"),
            ("a long advisory", body.replace("INTEL", &"x".repeat(257)), "advisoryIds"),
        ] {
            assert_eq!(BootInfo::from_json(body.as_bytes()).unwrap_err().field, field, "{name}");
        }
        let short = body.replace(&app, "0x1");
        assert_eq!(BootInfo::from_json(short.as_bytes()).unwrap().app_id, [1]);
    }
}
