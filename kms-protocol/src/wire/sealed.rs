//! Messages of sealed release: two methods beside upstream's (docs/sealed-release.md).

use serde::{Deserialize, Serialize};

use super::json::hex_bytes;

/// Request of `GetChallenge`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct ChallengeRequest {
    /// Version of sealed release that the enclave speaks: 1.
    #[prost(uint32, tag = "1")]
    pub version: u32,
}

/// Response of `GetChallenge`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct ChallengeResponse {
    /// The version asked for.
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// 32 bytes, for one `GetAppKeySealed` on the same connection.
    #[prost(bytes = "vec", tag = "2")]
    #[serde(with = "hex_bytes")]
    pub nonce: Vec<u8>,
    /// Seconds from now for which the nonce is good.
    #[prost(uint32, tag = "3")]
    pub valid_for: u32,
}

/// Request of `GetAppKeySealed`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct SealedAppKeyRequest {
    /// As in the challenge.
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// The attestation document (COSE_Sign1) whose `nonce`, `public_key` and `user_data` bind this request.
    #[prost(bytes = "vec", tag = "2")]
    #[serde(with = "hex_bytes")]
    pub document: Vec<u8>,
    /// 20 bytes.
    #[prost(bytes = "vec", tag = "3")]
    #[serde(with = "hex_bytes")]
    pub app_id: Vec<u8>,
    /// 20 bytes, or none.
    #[prost(bytes = "vec", tag = "4")]
    #[serde(with = "hex_bytes")]
    pub instance_id: Vec<u8>,
}

/// Response of `GetAppKeySealed`: an [`AppKeyResponse`](super::AppKeyResponse) that only the enclave can read. It holds
/// no secret for anybody else.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
#[serde(default)]
pub struct SealedAppKeyResponse {
    /// HPKE's encapsulated key, 32 bytes.
    #[prost(bytes = "vec", tag = "1")]
    #[serde(with = "hex_bytes")]
    pub enc: Vec<u8>,
    /// The sealed message with its tag.
    #[prost(bytes = "vec", tag = "2")]
    #[serde(with = "hex_bytes")]
    pub ciphertext: Vec<u8>,
    /// 65 bytes: the root k256 key's signature over binding and answer.
    #[prost(bytes = "vec", tag = "3")]
    #[serde(with = "hex_bytes")]
    pub signature: Vec<u8>,
}
