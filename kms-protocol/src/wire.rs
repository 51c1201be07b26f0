//! The KMS's wire vocabulary: messages, their two encodings, methods, error bodies, the authorisation webhook.
//!
//! Names mirror the upstream `.proto` exactly; nothing here judges a value. Messages that carry secrets are wiped on
//! drop and print nothing of them: convert them into the types of [`crate::derive`] and drop them.

pub mod error_body;
pub mod guest;
pub mod json;
pub mod kms;
pub mod method;
pub mod onboard;
pub mod sealed;
pub mod webhook;

pub use error_body::ErrorBody;
pub use kms::{
    AppId, AppKeyResponse, GetAppKeyRequest, GetKmsKeyRequest, GetMetaResponse, GetTempCaCertResponse,
    KmsKeyResponse, KmsKeys, LegacyClearImageCacheRequest, PublicKeyResponse, SignCertRequest,
    SignCertResponse,
};
pub use method::{Encoding, Method, RequestForm, Service};
pub use onboard::{
    AttestationInfoResponse, BootstrapRequest, BootstrapResponse, ClearImageCacheRequest, OnboardRequest,
    OnboardResponse,
};
pub use sealed::{ChallengeRequest, ChallengeResponse, SealedAppKeyRequest, SealedAppKeyResponse};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Largest request body a server reads unless configured otherwise, in bytes (§1.6).
pub const MAX_BODY: usize = 10 * 1024 * 1024;

/// The JSON text of the empty message.
pub const EMPTY_JSON: &[u8] = b"null";

/// Why a message could not be decoded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A JSON body that is not an object.
    #[error("JSON body is not an object")]
    JsonNotAnObject,
    /// A JSON body that does not fit the message.
    #[error("JSON body does not fit the message")]
    Json(#[source] serde_json::Error),
    /// A protobuf body that does not fit the message.
    #[error("protobuf body does not fit the message")]
    Protobuf(#[source] prost::DecodeError),
    /// A query string that does not fit the message.
    #[error("query string does not fit the message")]
    Query(#[source] serde_urlencoded::de::Error),
}

/// A message in both encodings. Implemented for every message of this module.
pub trait WireMessage: prost::Message + Serialize + DeserializeOwned + Default {
    /// Decodes a body.
    ///
    /// # Errors
    /// See [`Error`].
    fn decode_body(encoding: Encoding, body: &[u8]) -> Result<Self, Error> {
        match encoding {
            Encoding::Json => json::decode(body),
            Encoding::Protobuf => prost::Message::decode(body).map_err(Error::Protobuf),
        }
    }

    /// Decodes the query string (without `?`) of a `GET` request; unknown names are ignored.
    ///
    /// # Errors
    /// [`Error::Query`] when a value does not fit its field or a field is given twice.
    fn decode_query(query: &str) -> Result<Self, Error> {
        serde_urlencoded::from_str(query).map_err(Error::Query)
    }

    /// Encodes a body. Wipe it when the message carries secrets.
    fn encode_body(&self, encoding: Encoding) -> Vec<u8> {
        match encoding {
            Encoding::Json => json::encode(self),
            Encoding::Protobuf => self.encode_to_vec(),
        }
    }
}

impl<M: prost::Message + Serialize + DeserializeOwned + Default> WireMessage for M {}

/// The body of an empty response: `null` in JSON, nothing in protobuf.
#[must_use]
pub fn empty_body(encoding: Encoding) -> &'static [u8] {
    match encoding {
        Encoding::Json => EMPTY_JSON,
        Encoding::Protobuf => &[],
    }
}

#[cfg(test)]
mod tests;
