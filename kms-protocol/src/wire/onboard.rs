//! Messages of the services `Onboard` and `Admin` (kms-protocol §2.2 and §2.3).

use serde::{Deserialize, Serialize};

use super::json::hex_bytes;

/// Request of `Bootstrap`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct BootstrapRequest {
    /// Host name the KMS will be reached by.
    #[prost(string, tag = "1")]
    pub domain: String,
}

/// Response of `Bootstrap`, also kept as `bootstrap-info.json` and shown by `GetMeta`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct BootstrapResponse {
    /// SubjectPublicKeyInfo of the root CA, DER (91 bytes).
    #[prost(bytes = "vec", tag = "1")]
    #[serde(with = "hex_bytes")]
    pub ca_pubkey: Vec<u8>,
    /// 33 bytes, compressed SEC1 point of the K256 root.
    #[prost(bytes = "vec", tag = "2")]
    #[serde(with = "hex_bytes")]
    pub k256_pubkey: Vec<u8>,
    /// Versioned attestation over both keys, see [`crate::report_data::bootstrap`].
    #[prost(bytes = "vec", tag = "3")]
    #[serde(with = "hex_bytes")]
    pub attestation: Vec<u8>,
}

/// Request of `Onboard`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct OnboardRequest {
    /// URL of the KMS to copy the keys from.
    #[prost(string, tag = "1")]
    pub source_url: String,
    /// Host name the new KMS will be reached by.
    #[prost(string, tag = "2")]
    pub domain: String,
}

/// Response of `Onboard`; the field is missing before generation C.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct OnboardResponse {
    /// 33 bytes, compressed SEC1 point of the K256 root.
    #[prost(bytes = "vec", tag = "1")]
    #[serde(with = "hex_bytes")]
    pub k256_pubkey: Vec<u8>,
}

/// Response of `GetAttestationInfo`: what an operator registers on chain.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct AttestationInfoResponse {
    /// SHA-256 of `ppid`.
    #[prost(bytes = "vec", tag = "1")]
    #[serde(with = "hex_bytes")]
    pub device_id: Vec<u8>,
    /// Aggregated measurement.
    #[prost(bytes = "vec", tag = "2")]
    #[serde(with = "hex_bytes")]
    pub mr_aggregated: Vec<u8>,
    /// Image hash.
    #[prost(bytes = "vec", tag = "3")]
    #[serde(with = "hex_bytes")]
    pub os_image_hash: Vec<u8>,
    /// Kind of TEE; generations A and B call it `attestation_mode`, which is read too.
    #[prost(string, tag = "4")]
    #[serde(alias = "attestation_mode")]
    pub tee_variant: String,
    /// Name of the site from the configuration.
    #[prost(string, tag = "5")]
    pub site_name: String,
    /// RPC endpoint of the chain.
    #[prost(string, tag = "6")]
    pub eth_rpc_url: String,
    /// Address of the KMS contract.
    #[prost(string, tag = "7")]
    pub kms_contract_address: String,
    /// The raw device id.
    #[prost(bytes = "vec", tag = "8")]
    #[serde(with = "hex_bytes")]
    pub ppid: Vec<u8>,
}

/// Request of the Admin service's `ClearImageCache`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct ClearImageCacheRequest {
    /// Empty, `all`, or hex digits.
    #[prost(string, tag = "1")]
    pub image_hash: String,
    /// Empty, `all`, or hex digits.
    #[prost(string, tag = "2")]
    pub config_hash: String,
}
