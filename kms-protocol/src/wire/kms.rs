//! Messages of the service `KMS` on the main listener (kms-protocol §2.1).

use std::fmt;

use serde::{Deserialize, Serialize};
use zeroize::Zeroize;

use super::json::hex_bytes;
use super::onboard::BootstrapResponse;

/// Request of `GetAppKey`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct GetAppKeyRequest {
    /// 0 or 1.
    #[prost(uint32, tag = "1")]
    pub api_version: u32,
    /// JSON text of the VM configuration; empty: the one inside the attestation counts.
    #[prost(string, tag = "2")]
    pub vm_config: String,
}

/// Response of `GetAppKey`: the keys of an app. Wiped on drop, and not printed by `Debug`.
#[derive(PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[prost(skip_debug)]
pub struct AppKeyResponse {
    /// PEM of the root CA.
    #[prost(string, tag = "1")]
    #[serde(default)]
    pub ca_cert: String,
    /// 32 bytes, secret.
    #[prost(bytes = "vec", tag = "2")]
    #[serde(default, with = "hex_bytes")]
    pub disk_crypt_key: Vec<u8>,
    /// 32 bytes, secret (an X25519 secret).
    #[prost(bytes = "vec", tag = "3")]
    #[serde(default, with = "hex_bytes")]
    pub env_crypt_key: Vec<u8>,
    /// 32 bytes, secret (a secp256k1 scalar).
    #[prost(bytes = "vec", tag = "4")]
    #[serde(default, with = "hex_bytes")]
    pub k256_key: Vec<u8>,
    /// 65 bytes: the KMS's signature over the public key of `k256_key`.
    #[prost(bytes = "vec", tag = "5")]
    #[serde(default, with = "hex_bytes")]
    pub k256_signature: Vec<u8>,
    /// The old name of `gateway_app_id`, always the same value.
    #[prost(string, tag = "6")]
    #[serde(default)]
    pub tproxy_app_id: String,
    /// App id of the gateway, from the authoriser; may be empty.
    #[prost(string, tag = "7")]
    #[serde(default)]
    pub gateway_app_id: String,
    /// The image hash the KMS released the keys for.
    #[prost(bytes = "vec", tag = "8")]
    #[serde(default, with = "hex_bytes")]
    pub os_image_hash: Vec<u8>,
}

impl fmt::Debug for AppKeyResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AppKeyResponse").field("gateway_app_id", &self.gateway_app_id).finish_non_exhaustive()
    }
}

impl Drop for AppKeyResponse {
    fn drop(&mut self) {
        self.disk_crypt_key.zeroize();
        self.env_crypt_key.zeroize();
        self.k256_key.zeroize();
    }
}

/// Request of `GetKmsKey`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct GetKmsKeyRequest {
    /// JSON text of the VM configuration.
    #[prost(string, tag = "1")]
    pub vm_config: String,
}

/// One set of root keys. Wiped on drop, and not printed by `Debug`.
#[derive(PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[prost(skip_debug)]
pub struct KmsKeys {
    /// PKCS#8 PEM of the root CA key, secret.
    #[prost(string, tag = "1")]
    #[serde(default)]
    pub ca_key: String,
    /// 32 bytes, secret: the K256 root.
    #[prost(bytes = "vec", tag = "2")]
    #[serde(default, with = "hex_bytes")]
    pub k256_key: Vec<u8>,
}

impl fmt::Debug for KmsKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KmsKeys")
    }
}

impl Drop for KmsKeys {
    fn drop(&mut self) {
        self.ca_key.zeroize();
        self.k256_key.zeroize();
    }
}

/// Response of `GetKmsKey`: everything a new replica needs. Not printed by `Debug`.
#[derive(PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[prost(skip_debug)]
#[serde(default)]
pub struct KmsKeyResponse {
    /// PKCS#8 PEM of the temp CA key.
    #[prost(string, tag = "1")]
    pub temp_ca_key: String,
    /// Exactly one set.
    #[prost(message, repeated, tag = "2")]
    pub keys: Vec<KmsKeys>,
}

impl fmt::Debug for KmsKeyResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KmsKeyResponse").field("keys", &self.keys.len()).finish_non_exhaustive()
    }
}

/// Request of `GetAppEnvEncryptPubKey`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct AppId {
    /// 20 bytes.
    #[prost(bytes = "vec", tag = "1")]
    #[serde(with = "hex_bytes")]
    pub app_id: Vec<u8>,
}

/// Response of `GetAppEnvEncryptPubKey`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct PublicKeyResponse {
    /// 32 bytes, X25519.
    #[prost(bytes = "vec", tag = "1")]
    #[serde(with = "hex_bytes")]
    pub public_key: Vec<u8>,
    /// 65 bytes, without the time.
    #[prost(bytes = "vec", tag = "2")]
    #[serde(with = "hex_bytes")]
    pub signature: Vec<u8>,
    /// Seconds since the epoch.
    #[prost(uint64, tag = "3")]
    pub timestamp: u64,
    /// 65 bytes, over the time too.
    #[prost(bytes = "vec", tag = "4")]
    #[serde(with = "hex_bytes")]
    pub signature_v1: Vec<u8>,
}

/// Response of `GetMeta`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct GetMetaResponse {
    /// PEM of the root CA.
    #[prost(string, tag = "1")]
    pub ca_cert: String,
    /// True with the development authoriser.
    #[prost(bool, tag = "2")]
    pub allow_any_upgrade: bool,
    /// 33 bytes, compressed SEC1 point of the K256 root.
    #[prost(bytes = "vec", tag = "3")]
    #[serde(with = "hex_bytes")]
    pub k256_pubkey: Vec<u8>,
    /// What `Bootstrap` answered; absent when the keys were made otherwise.
    #[prost(message, optional, tag = "4")]
    pub bootstrap_info: Option<BootstrapResponse>,
    /// True with the development authoriser.
    #[prost(bool, tag = "5")]
    pub is_dev: bool,
    /// App id of the gateway.
    #[prost(string, optional, tag = "6")]
    pub gateway_app_id: Option<String>,
    /// Address of the KMS contract.
    #[prost(string, optional, tag = "7")]
    pub kms_contract_address: Option<String>,
    /// Chain the contract lives on.
    #[prost(uint64, optional, tag = "8")]
    pub chain_id: Option<u64>,
    /// Address of the app contract's implementation.
    #[prost(string, optional, tag = "9")]
    pub app_auth_implementation: Option<String>,
}

/// Response of `GetTempCaCert`. The key is handed to everybody, so it is no secret: see pitfall 16.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct GetTempCaCertResponse {
    /// PEM of the temp CA.
    #[prost(string, tag = "1")]
    pub temp_ca_cert: String,
    /// PKCS#8 PEM of the temp CA key.
    #[prost(string, tag = "2")]
    pub temp_ca_key: String,
    /// PEM of the root CA.
    #[prost(string, tag = "3")]
    pub ca_cert: String,
}

/// Request of `SignCert`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct SignCertRequest {
    /// 1 or 2: the layout of `csr`.
    #[prost(uint32, tag = "1")]
    pub api_version: u32,
    /// The signing request, see [`crate::csr`].
    #[prost(bytes = "vec", tag = "2")]
    #[serde(with = "hex_bytes")]
    pub csr: Vec<u8>,
    /// ASN.1 DER ECDSA signature by the request's key over `csr`.
    #[prost(bytes = "vec", tag = "3")]
    #[serde(with = "hex_bytes")]
    pub signature: Vec<u8>,
    /// JSON text of the VM configuration.
    #[prost(string, tag = "4")]
    pub vm_config: String,
}

/// Response of `SignCert`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct SignCertResponse {
    /// PEM of the leaf, the App CA and the root CA.
    #[prost(string, repeated, tag = "1")]
    pub certificate_chain: Vec<String>,
}

/// Request of `ClearImageCache` where it was still part of this service (generations A and B).
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct LegacyClearImageCacheRequest {
    /// Its SHA-256 is in the configuration.
    #[prost(string, tag = "1")]
    pub token: String,
    /// Empty, `all`, or hex digits.
    #[prost(string, tag = "2")]
    pub image_hash: String,
    /// Empty, `all`, or hex digits.
    #[prost(string, tag = "3")]
    pub config_hash: String,
}
