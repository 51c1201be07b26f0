//! Messages of the guest agent (kms-protocol §2.4), the service an app finds on its Unix socket: upstream's `DstackGuest`,
//! and `Tappd` of older releases.

use std::fmt;

use serde::{Deserialize, Serialize};
use zeroize::Zeroize;

use super::json::{hex_bytes, hex_list};

/// A method of the guest agent. No two services have different methods of one name, so a service prefix says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestMethod {
    /// A fresh P-256 key with a certificate.
    GetTlsKey,
    /// A key by path.
    GetKey,
    /// Evidence for report data.
    GetQuote,
    /// The same as a versioned attestation.
    Attest,
    /// About this app.
    Info,
    /// GPU evidence.
    GpuInfo,
    /// Signs with the app's signing key.
    Sign,
    /// Checks a signature.
    Verify,
    /// Which agent answers.
    Version,
    /// Records an event in a register (releases before 0.6).
    EmitEvent,
    /// `Tappd`: a P-256 key by path with a certificate.
    DeriveKey,
    /// `Tappd`: [`Self::GetKey`] under other names.
    DeriveK256Key,
    /// `Tappd`: evidence for hashed report data.
    TdxQuote,
    /// `Tappd`: evidence for 64 bytes of report data.
    RawQuote,
    /// Ours: fetches the keys again.
    RefreshKeys,
}

impl GuestMethod {
    /// All of them.
    pub const ALL: [Self; 15] = [
        Self::GetTlsKey,
        Self::GetKey,
        Self::GetQuote,
        Self::Attest,
        Self::Info,
        Self::GpuInfo,
        Self::Sign,
        Self::Verify,
        Self::Version,
        Self::EmitEvent,
        Self::DeriveKey,
        Self::DeriveK256Key,
        Self::TdxQuote,
        Self::RawQuote,
        Self::RefreshKeys,
    ];

    /// The name in paths.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::GetTlsKey => "GetTlsKey",
            Self::GetKey => "GetKey",
            Self::GetQuote => "GetQuote",
            Self::Attest => "Attest",
            Self::Info => "Info",
            Self::GpuInfo => "GpuInfo",
            Self::Sign => "Sign",
            Self::Verify => "Verify",
            Self::Version => "Version",
            Self::EmitEvent => "EmitEvent",
            Self::DeriveKey => "DeriveKey",
            Self::DeriveK256Key => "DeriveK256Key",
            Self::TdxQuote => "TdxQuote",
            Self::RawQuote => "RawQuote",
            Self::RefreshKeys => "RefreshKeys",
        }
    }

    /// The method of a path: `/M`, `/prpc/M`, and either with a service in front, as in `/prpc/Tappd.M`.
    #[must_use]
    pub fn of_path(path: &str) -> Option<Self> {
        let segment = path.strip_prefix('/')?;
        let segment = segment.strip_prefix("prpc/").unwrap_or(segment);
        let services = ["Tappd.", "DstackGuest."];
        let name = services.iter().find_map(|service| segment.strip_prefix(service)).unwrap_or(segment);
        Self::ALL.into_iter().find(|method| method.name() == name)
    }
}

/// Request of `GetTlsKey`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct GetTlsKeyArgs {
    /// `CN` of the certificate.
    #[prost(string, tag = "1")]
    pub subject: String,
    /// DNS names and IP addresses as text.
    #[prost(string, repeated, tag = "2")]
    pub alt_names: Vec<String>,
    /// Whether to put evidence into the certificate.
    #[prost(bool, tag = "3")]
    pub usage_ra_tls: bool,
    /// Whether a server may use it.
    #[prost(bool, tag = "4")]
    pub usage_server_auth: bool,
    /// Whether a client may use it.
    #[prost(bool, tag = "5")]
    pub usage_client_auth: bool,
    /// Start of its validity, seconds since the epoch.
    #[prost(uint64, optional, tag = "6")]
    pub not_before: Option<u64>,
    /// End of its validity, seconds since the epoch.
    #[prost(uint64, optional, tag = "7")]
    pub not_after: Option<u64>,
    /// Whether to put the app info into it.
    #[prost(bool, tag = "8")]
    pub with_app_info: bool,
}

/// Request of `DeriveKey`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct DeriveKeyArgs {
    /// The path.
    #[prost(string, tag = "1")]
    pub path: String,
    /// `CN` of the certificate.
    #[prost(string, tag = "2")]
    pub subject: String,
    /// DNS names and IP addresses as text.
    #[prost(string, repeated, tag = "3")]
    pub alt_names: Vec<String>,
    /// Whether to put evidence into the certificate.
    #[prost(bool, tag = "4")]
    pub usage_ra_tls: bool,
    /// Whether a server may use it.
    #[prost(bool, tag = "5")]
    pub usage_server_auth: bool,
    /// Whether a client may use it.
    #[prost(bool, tag = "6")]
    pub usage_client_auth: bool,
    /// Whether the key is a fresh one.
    #[prost(bool, tag = "7")]
    pub random_seed: bool,
}

/// Response of `GetTlsKey` and `DeriveKey`. Wiped on drop, and not printed by `Debug`.
#[derive(PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[prost(skip_debug)]
pub struct GetTlsKeyResponse {
    /// PKCS#8 PEM, secret.
    #[prost(string, tag = "1")]
    #[serde(default)]
    pub key: String,
    /// PEM of the leaf and of what is above it.
    #[prost(string, repeated, tag = "2")]
    #[serde(default)]
    pub certificate_chain: Vec<String>,
}

impl fmt::Debug for GetTlsKeyResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GetTlsKeyResponse")
    }
}

impl Drop for GetTlsKeyResponse {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}

/// Request of `GetKey` and `DeriveK256Key`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct GetKeyArgs {
    /// The path.
    #[prost(string, tag = "1")]
    pub path: String,
    /// What the signature chain is to say.
    #[prost(string, tag = "2")]
    pub purpose: String,
    /// `secp256k1` (also `k256` and empty) or `ed25519`.
    #[prost(string, tag = "3")]
    pub algorithm: String,
}

/// Response of `GetKey`. Wiped on drop, and not printed by `Debug`.
#[derive(PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[prost(skip_debug)]
pub struct GetKeyResponse {
    /// 32 bytes, secret.
    #[prost(bytes = "vec", tag = "1")]
    #[serde(default, with = "hex_bytes")]
    pub key: Vec<u8>,
    /// By the app's key over the public key, by the KMS's root over the app's key; 65 bytes each.
    #[prost(bytes = "vec", repeated, tag = "2")]
    #[serde(default, with = "hex_list")]
    pub signature_chain: Vec<Vec<u8>>,
}

impl fmt::Debug for GetKeyResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GetKeyResponse")
    }
}

impl Drop for GetKeyResponse {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}

/// Response of `DeriveK256Key`. Wiped on drop, and not printed by `Debug`.
#[derive(PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[prost(skip_debug)]
pub struct DeriveK256KeyResponse {
    /// 32 bytes, secret.
    #[prost(bytes = "vec", tag = "1")]
    #[serde(default, with = "hex_bytes")]
    pub k256_key: Vec<u8>,
    /// As in [`GetKeyResponse`].
    #[prost(bytes = "vec", repeated, tag = "2")]
    #[serde(default, with = "hex_list")]
    pub k256_signature_chain: Vec<Vec<u8>>,
}

impl fmt::Debug for DeriveK256KeyResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DeriveK256KeyResponse")
    }
}

impl Drop for DeriveK256KeyResponse {
    fn drop(&mut self) {
        self.k256_key.zeroize();
    }
}

/// Request of `TdxQuote`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct TdxQuoteArgs {
    /// What to bind, of any length unless the algorithm is `raw`.
    #[prost(bytes = "vec", tag = "1")]
    #[serde(with = "hex_bytes")]
    pub report_data: Vec<u8>,
    /// `sha512` and others, or `raw`; empty is `sha512`.
    #[prost(string, tag = "2")]
    pub hash_algorithm: String,
    /// The tag in front of the data; empty is `app-data`.
    #[prost(string, tag = "3")]
    pub prefix: String,
}

/// Request of `GetQuote`, `Attest` and `RawQuote`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct RawQuoteArgs {
    /// Up to 64 bytes, filled up with zeros.
    #[prost(bytes = "vec", tag = "1")]
    #[serde(with = "hex_bytes")]
    pub report_data: Vec<u8>,
}

/// Response of `TdxQuote` and `RawQuote`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct TdxQuoteResponse {
    /// The evidence.
    #[prost(bytes = "vec", tag = "1")]
    #[serde(with = "hex_bytes")]
    pub quote: Vec<u8>,
    /// JSON array of events.
    #[prost(string, tag = "2")]
    pub event_log: String,
    /// The algorithm used.
    #[prost(string, tag = "3")]
    pub hash_algorithm: String,
    /// The tag used.
    #[prost(string, tag = "4")]
    pub prefix: String,
}

/// Response of `Attest`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct AttestResponse {
    /// Encoded [`crate::attestation_encoding::VersionedAttestation`].
    #[prost(bytes = "vec", tag = "1")]
    #[serde(with = "hex_bytes")]
    pub attestation: Vec<u8>,
}

/// Response of `GetQuote`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct GetQuoteResponse {
    /// The evidence.
    #[prost(bytes = "vec", tag = "1")]
    #[serde(with = "hex_bytes")]
    pub quote: Vec<u8>,
    /// JSON array of events.
    #[prost(string, tag = "2")]
    pub event_log: String,
    /// The 64 bytes that are bound.
    #[prost(bytes = "vec", tag = "3")]
    #[serde(with = "hex_bytes")]
    pub report_data: Vec<u8>,
    /// JSON text of the configuration.
    #[prost(string, tag = "4")]
    pub vm_config: String,
    /// Encoded [`crate::attestation_encoding::VersionedAttestation`].
    #[prost(bytes = "vec", tag = "5")]
    #[serde(with = "hex_bytes")]
    pub attestation: Vec<u8>,
}

/// Response of `GpuInfo`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct GpuInfoResponse {
    /// Evidence of a GPU; empty without one.
    #[prost(string, tag = "1")]
    pub attestation: String,
}

/// Response of `Info`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct AppInfo {
    /// The app.
    #[prost(bytes = "vec", tag = "1")]
    #[serde(with = "hex_bytes")]
    pub app_id: Vec<u8>,
    /// The instance; empty on Nitro Enclaves.
    #[prost(bytes = "vec", tag = "2")]
    #[serde(with = "hex_bytes")]
    pub instance_id: Vec<u8>,
    /// PEM of a certificate of the app.
    #[prost(string, tag = "3")]
    pub app_cert: String,
    /// JSON text of the measurements.
    #[prost(string, tag = "4")]
    pub tcb_info: String,
    /// Name of the app.
    #[prost(string, tag = "5")]
    pub app_name: String,
    /// SHA-256 over what identifies the device.
    #[prost(bytes = "vec", tag = "8")]
    #[serde(with = "hex_bytes")]
    pub device_id: Vec<u8>,
    /// One hash over all measurements.
    #[prost(bytes = "vec", tag = "9")]
    #[serde(with = "hex_bytes")]
    pub mr_aggregated: Vec<u8>,
    /// Image hash.
    #[prost(bytes = "vec", tag = "10")]
    #[serde(with = "hex_bytes")]
    pub os_image_hash: Vec<u8>,
    /// JSON text: who gave the keys.
    #[prost(string, tag = "12")]
    pub key_provider_info: String,
    /// The app's hash.
    #[prost(bytes = "vec", tag = "13")]
    #[serde(with = "hex_bytes")]
    pub compose_hash: Vec<u8>,
    /// JSON text of the configuration.
    #[prost(string, tag = "14")]
    pub vm_config: String,
    /// Who runs the machine.
    #[prost(string, tag = "15")]
    pub cloud_vendor: String,
    /// What the machine is.
    #[prost(string, tag = "16")]
    pub cloud_product: String,
}

/// Response of `Version`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct WorkerVersion {
    /// Version.
    #[prost(string, tag = "1")]
    pub version: String,
    /// Revision of the source.
    #[prost(string, tag = "2")]
    pub rev: String,
}

/// Request of `EmitEvent`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct EmitEventArgs {
    /// Name of the event.
    #[prost(string, tag = "1")]
    pub event: String,
    /// Its payload.
    #[prost(bytes = "vec", tag = "2")]
    #[serde(with = "hex_bytes")]
    pub payload: Vec<u8>,
}

/// Request of `Sign`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct SignRequest {
    /// `ed25519`, `secp256k1` or `secp256k1_prehashed`.
    #[prost(string, tag = "1")]
    pub algorithm: String,
    /// What to sign; a digest of 32 bytes for `secp256k1_prehashed`.
    #[prost(bytes = "vec", tag = "2")]
    #[serde(with = "hex_bytes")]
    pub data: Vec<u8>,
}

/// Response of `Sign`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct SignResponse {
    /// 64 bytes.
    #[prost(bytes = "vec", tag = "1")]
    #[serde(with = "hex_bytes")]
    pub signature: Vec<u8>,
    /// The signature, then those of [`GetKeyResponse`].
    #[prost(bytes = "vec", repeated, tag = "2")]
    #[serde(with = "hex_list")]
    pub signature_chain: Vec<Vec<u8>>,
    /// The key that verifies it.
    #[prost(bytes = "vec", tag = "3")]
    #[serde(with = "hex_bytes")]
    pub public_key: Vec<u8>,
}

/// Request of `Verify`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct VerifyRequest {
    /// As in [`SignRequest`].
    #[prost(string, tag = "1")]
    pub algorithm: String,
    /// What was signed.
    #[prost(bytes = "vec", tag = "2")]
    #[serde(with = "hex_bytes")]
    pub data: Vec<u8>,
    /// 64 bytes.
    #[prost(bytes = "vec", tag = "3")]
    #[serde(with = "hex_bytes")]
    pub signature: Vec<u8>,
    /// The public key.
    #[prost(bytes = "vec", tag = "4")]
    #[serde(with = "hex_bytes")]
    pub public_key: Vec<u8>,
}

/// Response of `Verify`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct VerifyResponse {
    /// Whether the signature is one over the data by the key.
    #[prost(bool, tag = "1")]
    pub valid: bool,
}

/// Response of `RefreshKeys`, which is ours.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct RefreshKeysResponse {
    /// Whether the KMS gave other keys than before.
    #[prost(bool, tag = "1")]
    pub changed: bool,
}

#[cfg(test)]
mod tests {
    use super::super::{Encoding, WireMessage};
    use super::*;

    #[test]
    fn paths_name_methods_with_and_without_a_service() {
        for path in
            ["/GetKey", "/prpc/GetKey", "/prpc/Tappd.GetKey", "/prpc/DstackGuest.GetKey", "/Tappd.GetKey"]
        {
            assert_eq!(GuestMethod::of_path(path), Some(GuestMethod::GetKey), "{path}");
        }
        let wrong =
            ["", "/", "GetKey", "/getkey", "/GetKey/", "//GetKey", "/prpc/prpc/GetKey", "/prpc/Kms.GetKey"];
        for path in wrong {
            assert_eq!(GuestMethod::of_path(path), None, "{path}");
        }
        for method in GuestMethod::ALL {
            assert_eq!(GuestMethod::of_path(&format!("/{}", method.name())), Some(method));
        }
    }

    #[test]
    fn bytes_are_hex_in_json_and_in_lists() {
        let response = GetKeyResponse { key: vec![0xab; 2], signature_chain: vec![vec![1], vec![]] };
        let json = response.encode_body(Encoding::Json);
        assert_eq!(json, br#"{"key":"abab","signature_chain":["01",""]}"#);
        assert_eq!(GetKeyResponse::decode_body(Encoding::Json, &json).unwrap(), response);
        let protobuf = response.encode_body(Encoding::Protobuf);
        assert_eq!(hex::encode(&protobuf), "0a02abab1201011200");
        assert_eq!(GetKeyResponse::decode_body(Encoding::Protobuf, &protobuf).unwrap(), response);
        let odd = br#"{"key":"ab","signature_chain":["a"]}"#;
        assert!(GetKeyResponse::decode_body(Encoding::Json, odd).is_err());
    }

    #[test]
    fn a_query_is_a_message_too() {
        let args = RawQuoteArgs::decode_query("report_data=0xAB01&json").unwrap();
        assert_eq!(args.report_data, [0xab, 1]);
        let args = GetKeyArgs::decode_query("path=a%2Fb&purpose=x").unwrap();
        assert_eq!((args.path.as_str(), args.purpose.as_str(), args.algorithm.as_str()), ("a/b", "x", ""));
    }

    #[test]
    fn secrets_are_not_printed() {
        let response = GetTlsKeyResponse { key: "secret".into(), certificate_chain: vec![] };
        assert_eq!(format!("{response:?}"), "GetTlsKeyResponse");
    }
}
