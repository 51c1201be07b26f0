//! The file `get-keys` writes (kms-protocol §10): pretty JSON with two spaces, keys in upstream's order.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::Zeroizing;

use crate::derive::{AppK256Key, DiskCryptKey, EnvCryptKey, Signature};

/// Largest file that is read, in bytes; upstream's are about 2.3 kB.
pub const MAX_LEN: usize = 64 * 1024;

/// Why a file could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// More than [`MAX_LEN`] bytes.
    #[error("app keys are {0} bytes, at most {MAX_LEN} are read")]
    TooLong(usize),
    /// Not the JSON it should be. The message names positions and fields, never values.
    #[error("app keys do not parse")]
    Json(#[source] serde_json::Error),
    /// Keys that could not be written.
    #[error("app keys cannot be written")]
    Write(#[source] serde_json::Error),
}

/// An app's keys and where they came from.
pub struct AppKeys {
    /// Key of the disk.
    pub disk_crypt_key: DiskCryptKey,
    /// X25519 secret of the environment; files of other tools may lack it.
    pub env_crypt_key: Option<EnvCryptKey>,
    /// The app's secp256k1 key.
    pub k256_key: AppK256Key,
    /// The KMS's signature over the public key of `k256_key`.
    pub k256_signature: Signature,
    /// App id of the gateway; may be empty.
    pub gateway_app_id: String,
    /// PEM of the KMS's root CA.
    pub ca_cert: String,
    /// Where the keys came from.
    pub key_provider: KeyProvider,
}

/// Where keys came from: a union tagged by the variant's name.
#[derive(Serialize, Deserialize)]
pub enum KeyProvider {
    /// Nowhere: made by the machine for itself.
    None {
        /// Secret.
        key: SecretText,
    },
    /// A local key provider.
    Local {
        /// Secret.
        key: SecretText,
        /// Its measurement.
        #[serde(with = "crate::wire::json::hex_bytes")]
        mr: Vec<u8>,
    },
    /// A TPM.
    Tpm {
        /// Secret.
        key: SecretText,
        /// Its public key.
        #[serde(with = "crate::wire::json::hex_bytes")]
        pubkey: Vec<u8>,
    },
    /// A KMS.
    Kms {
        /// Its URL, with `/prpc`.
        url: String,
        /// SubjectPublicKeyInfo of its root CA.
        #[serde(with = "crate::wire::json::hex_bytes")]
        pubkey: Vec<u8>,
        /// PEM of the temp CA's key, which is no secret.
        tmp_ca_key: String,
        /// PEM of the temp CA.
        tmp_ca_cert: String,
    },
}

/// A secret as text, wiped on drop and not printed.
pub struct SecretText(Zeroizing<String>);

impl SecretText {
    /// The text.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl Serialize for SecretText {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for SecretText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(|text| Self(Zeroizing::new(text)))
    }
}

/// The file's layout. Hex strings of secrets live in wiped buffers on both ways.
#[derive(Serialize, Deserialize)]
struct File {
    disk_crypt_key: SecretText,
    #[serde(default)]
    env_crypt_key: Option<SecretText>,
    k256_key: SecretText,
    #[serde(with = "signature")]
    k256_signature: Signature,
    gateway_app_id: String,
    ca_cert: String,
    key_provider: KeyProvider,
}

mod signature {
    use super::{Deserializer, Serializer, Signature};
    use crate::wire::json::hex_bytes;
    use serde::de::Error;

    pub(super) fn serialize<S: Serializer>(signature: &Signature, serializer: S) -> Result<S::Ok, S::Error> {
        hex_bytes::serialize(signature.as_bytes(), serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Signature, D::Error> {
        Signature::from_slice(&hex_bytes::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

/// Lowercase hex in a buffer that never grows, so that no piece of it stays behind.
fn secret_hex(key: &[u8; 32]) -> Result<SecretText, serde_json::Error> {
    let mut digits = Zeroizing::new([0; 64]);
    hex::encode_to_slice(key, digits.as_mut_slice()).map_err(serde_json::Error::custom)?;
    let text = std::str::from_utf8(digits.as_slice()).map_err(serde_json::Error::custom)?;
    Ok(SecretText(Zeroizing::new(text.to_owned())))
}

/// Fills a key from hex in place.
fn fill(text: &SecretText, what: &str) -> impl FnOnce(&mut [u8; 32]) -> Result<(), serde_json::Error> {
    move |key| {
        hex::decode_to_slice(text.expose(), key).map_err(|error| {
            serde_json::Error::custom(format_args!("{what} is not 32 bytes in hex: {error}"))
        })
    }
}

impl AppKeys {
    /// Writes the file's content.
    ///
    /// # Errors
    /// [`Error::Write`], which cannot happen for keys made by this crate.
    pub fn to_json(&self) -> Result<Zeroizing<Vec<u8>>, Error> {
        let file = FileRef::new(self).map_err(Error::Write)?;
        // Large enough from the start: a vector that grows leaves its old buffer behind.
        let texts = self.gateway_app_id.len() + self.ca_cert.len() + self.key_provider.text_len();
        let mut json = Zeroizing::new(Vec::with_capacity(2048 + 6 * texts));
        serde_json::to_writer_pretty(&mut *json, &file).map_err(Error::Write)?;
        Ok(json)
    }

    /// Reads a file's content.
    ///
    /// # Errors
    /// [`Error::TooLong`], [`Error::Json`].
    pub fn from_json(json: &[u8]) -> Result<Self, Error> {
        if json.len() > MAX_LEN {
            return Err(Error::TooLong(json.len()));
        }
        let file: File = serde_json::from_slice(json).map_err(Error::Json)?;
        let env = file.env_crypt_key.as_ref();
        Ok(Self {
            disk_crypt_key: DiskCryptKey::init_with(fill(&file.disk_crypt_key, "disk_crypt_key"))
                .map_err(Error::Json)?,
            env_crypt_key: env
                .map(|text| EnvCryptKey::init_with(fill(text, "env_crypt_key")))
                .transpose()
                .map_err(Error::Json)?,
            k256_key: AppK256Key::init_with(fill(&file.k256_key, "k256_key")).map_err(Error::Json)?,
            k256_signature: file.k256_signature,
            gateway_app_id: file.gateway_app_id,
            ca_cert: file.ca_cert,
            key_provider: file.key_provider,
        })
    }
}

impl KeyProvider {
    /// Room its texts take, for the buffer's size.
    fn text_len(&self) -> usize {
        match self {
            Self::None { key } => key.expose().len(),
            Self::Local { key, mr } => key.expose().len() + mr.len(),
            Self::Tpm { key, pubkey } => key.expose().len() + pubkey.len(),
            Self::Kms { url, pubkey, tmp_ca_key, tmp_ca_cert } => {
                url.len() + pubkey.len() + tmp_ca_key.len() + tmp_ca_cert.len()
            }
        }
    }
}

/// [`File`] for writing, without taking the keys.
#[derive(Serialize)]
struct FileRef<'a> {
    disk_crypt_key: SecretText,
    #[serde(skip_serializing_if = "Option::is_none")]
    env_crypt_key: Option<SecretText>,
    k256_key: SecretText,
    #[serde(with = "signature")]
    k256_signature: Signature,
    gateway_app_id: &'a str,
    ca_cert: &'a str,
    key_provider: &'a KeyProvider,
}

impl<'a> FileRef<'a> {
    fn new(keys: &'a AppKeys) -> Result<Self, serde_json::Error> {
        Ok(Self {
            disk_crypt_key: secret_hex(keys.disk_crypt_key.expose())?,
            env_crypt_key: keys.env_crypt_key.as_ref().map(|key| secret_hex(key.expose())).transpose()?,
            k256_key: secret_hex(keys.k256_key.expose())?,
            k256_signature: keys.k256_signature,
            gateway_app_id: &keys.gateway_app_id,
            ca_cert: &keys.ca_cert,
            key_provider: &keys.key_provider,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys() -> AppKeys {
        AppKeys {
            disk_crypt_key: DiskCryptKey::from_slice(&[0xD1; 32]).unwrap(),
            env_crypt_key: Some(EnvCryptKey::from_slice(&[0xE2; 32]).unwrap()),
            k256_key: AppK256Key::from_slice(&[0x33; 32]).unwrap(),
            k256_signature: Signature::from_slice(&[0x44; 65]).unwrap(),
            gateway_app_id: "any".into(),
            ca_cert: "-----BEGIN CERTIFICATE-----\nAA==\n".into(),
            key_provider: KeyProvider::Kms {
                url: "https://kms.example/prpc".into(),
                pubkey: vec![0x30, 0x59],
                tmp_ca_key: "key\n".into(),
                tmp_ca_cert: "cert\n".into(),
            },
        }
    }

    /// The layout of §10.
    fn text() -> String {
        let (disk, env, k256, signature) =
            ("d1".repeat(32), "e2".repeat(32), "33".repeat(32), "44".repeat(65));
        format!(
            r#"{{
  "disk_crypt_key": "{disk}",
  "env_crypt_key": "{env}",
  "k256_key": "{k256}",
  "k256_signature": "{signature}",
  "gateway_app_id": "any",
  "ca_cert": "-----BEGIN CERTIFICATE-----\nAA==\n",
  "key_provider": {{
    "Kms": {{
      "url": "https://kms.example/prpc",
      "pubkey": "3059",
      "tmp_ca_key": "key\n",
      "tmp_ca_cert": "cert\n"
    }}
  }}
}}"#
        )
    }

    #[test]
    fn the_layout_is_upstreams() {
        assert_eq!(std::str::from_utf8(&keys().to_json().unwrap()).unwrap(), text());
    }

    #[test]
    fn the_buffer_never_grows() {
        let keys = AppKeys { ca_cert: "\u{1}\n".repeat(5000), ..keys() };
        let json = keys.to_json().unwrap();
        assert_eq!(json.capacity(), 2048 + 6 * (3 + 10_000 + keys.key_provider.text_len()));
    }

    #[test]
    fn files_are_read_back() {
        let read = AppKeys::from_json(text().as_bytes()).unwrap();
        assert_eq!(read.disk_crypt_key.expose(), &[0xD1; 32]);
        assert_eq!(read.to_json().unwrap().as_slice(), text().as_bytes());

        let without_env = text().replace(&format!("  \"env_crypt_key\": \"{}\",\n", "e2".repeat(32)), "");
        let read = AppKeys::from_json(without_env.as_bytes()).unwrap();
        assert!(read.env_crypt_key.is_none());
        assert_eq!(read.to_json().unwrap().as_slice(), without_env.as_bytes());
    }

    #[test]
    fn other_key_providers_are_read_back() {
        let providers = [
            r#"{"None":{"key":"k"}}"#,
            r#"{"Local":{"key":"k","mr":"00ff"}}"#,
            r#"{"Tpm":{"key":"k","pubkey":"04"}}"#,
        ];
        for text in providers {
            let provider: KeyProvider = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&provider).unwrap(), text);
        }
    }

    #[test]
    fn refusals_do_not_repeat_secrets() {
        let short = text().replace(&"d1".repeat(32), &"d1".repeat(31));
        let Err(Error::Json(error)) = AppKeys::from_json(short.as_bytes()) else {
            panic!("accepted 31 bytes")
        };
        assert_eq!(error.to_string(), "disk_crypt_key is not 32 bytes in hex: Invalid string length");
        let long = vec![b' '; MAX_LEN + 1];
        assert!(matches!(AppKeys::from_json(&long), Err(Error::TooLong(len)) if len == MAX_LEN + 1));
    }

    #[test]
    fn every_truncation_is_rejected() {
        let text = text();
        for len in 0..text.len() {
            assert!(
                matches!(AppKeys::from_json(&text.as_bytes()[..len]), Err(Error::Json(_))),
                "accepted a prefix of {len} bytes"
            );
        }
    }
}
