//! Bodies of error answers (kms-protocol §1.5): the text is the error chain, outermost first, joined by `: `.

use serde::{Deserialize, Serialize};

use super::method::Encoding;

/// The body of every error that a method or its decoding raises; the status is 400.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
pub struct ErrorBody {
    /// What went wrong.
    #[prost(string, tag = "1")]
    pub error: String,
}

impl ErrorBody {
    /// An error body with that text.
    #[must_use]
    pub fn new(error: impl Into<String>) -> Self {
        Self { error: error.into() }
    }

    /// The bytes a server sends.
    #[must_use]
    pub fn encode_as(&self, encoding: Encoding) -> Vec<u8> {
        match encoding {
            // Pretty with two spaces, which is what serde_json's pretty printer writes; a string never fails.
            Encoding::Json => serde_json::to_vec_pretty(self).unwrap_or_default(),
            Encoding::Protobuf => prost::Message::encode_to_vec(self),
        }
    }

    /// Reads an error body from whatever the server sent: clients cannot know the encoding beforehand, because errors
    /// raised before dispatch ignore the request's `Content-Type`. Also reads the web server's own errors, in which
    /// `error` is an object. `None` when it is none of these.
    #[must_use]
    pub fn sniff(body: &[u8]) -> Option<String> {
        let starts_as_json = body.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'{');
        if starts_as_json && let Ok(value) = serde_json::from_slice::<serde_json::Value>(body) {
            return match &value["error"] {
                serde_json::Value::String(text) => Some(text.clone()),
                serde_json::Value::Object(object) => ["description", "reason"]
                    .iter()
                    .find_map(|key| Some(object.get(*key)?.as_str()?.to_owned())),
                _ => None,
            };
        }
        if body.first() != Some(&0x0A) {
            return None;
        }
        let decoded: Self = prost::Message::decode(body).ok()?;
        Some(decoded.error).filter(|text| !text.is_empty())
    }
}
