//! The JSON mapping of the messages, which is not canonical proto3 JSON: names in snake_case, `bytes` as lowercase
//! hex, 64-bit integers as numbers, every field written, absent optionals as `null` (kms-protocol §1.4).

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Error;

/// Decodes a JSON body. An empty body (or one of white space) is the default message.
///
/// # Errors
/// [`Error::JsonNotAnObject`] for `null`, arrays and scalars; [`Error::Json`] for everything serde refuses: wrong
/// types, `null` for a field that is not optional, odd hex, a field given twice.
pub fn decode<M: DeserializeOwned + Default>(body: &[u8]) -> Result<M, Error> {
    match body.iter().find(|byte| !byte.is_ascii_whitespace()) {
        None => Ok(M::default()),
        Some(b'{') => serde_json::from_slice(body).map_err(Error::Json),
        Some(_) => Err(Error::JsonNotAnObject),
    }
}

/// Encodes a message as compact JSON, in field number order.
///
/// The buffer may hold secrets when the message does; the caller wipes it.
#[must_use]
pub fn encode<M: Serialize>(message: &M) -> Vec<u8> {
    // Messages have string keys and no foreign Serialize implementation, so serde_json has nothing to refuse.
    serde_json::to_vec(message).unwrap_or_default()
}

/// Serde functions for a `bytes` field: lowercase hex out; hex of either case with any number of `0x` in.
pub(crate) mod hex_bytes {
    use std::fmt;

    use serde::de::{Error as _, Visitor};
    use serde::{Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(bytes))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        struct Hex;
        impl Visitor<'_> for Hex {
            type Value = Vec<u8>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string of hex digits")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Vec<u8>, E> {
                let digits = text.trim_start_matches("0x");
                // The text is not repeated in the message: it may be a secret.
                hex::decode(digits).map_err(|error| E::custom(format_args!("not hex: {error}")))
            }
        }
        deserializer.deserialize_str(Hex).map_err(D::Error::custom)
    }
}

/// Serde functions for a `repeated bytes` field: an array of what [`hex_bytes`] writes and reads.
pub(crate) mod hex_list {
    use serde::ser::SerializeSeq;
    use serde::{Deserialize, Deserializer, Serializer};

    #[derive(Deserialize)]
    #[serde(transparent)]
    struct Item(#[serde(with = "super::hex_bytes")] Vec<u8>);

    pub(crate) fn serialize<S: Serializer>(items: &[Vec<u8>], serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(items.len()))?;
        for item in items {
            list.serialize_element(&hex::encode(item))?;
        }
        list.end()
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Vec<u8>>, D::Error> {
        let items = Vec::<Item>::deserialize(deserializer)?;
        Ok(items.into_iter().map(|Item(bytes)| bytes).collect())
    }
}
