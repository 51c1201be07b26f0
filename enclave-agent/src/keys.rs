//! [`Keys`]: what the KMS released, after every check.

use kms_protocol::AppId;
use kms_protocol::app_keys::{self, AppKeys, KeyProvider};
use serde::Serialize;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

/// An app's keys. Only [`crate::get_keys`] makes one, after the KMS was authenticated and its answer checked.
///
/// No `Clone`, no `Debug`, no `Serialize`; wiped on drop.
pub struct Keys {
    pub(crate) app_id: AppId,
    pub(crate) os_image_hash: [u8; 32],
    pub(crate) app_keys: AppKeys,
    pub(crate) exchange: Exchange,
}

/// How keys came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Exchange {
    /// Sealed to this enclave and signed by the KMS's root k256 key (docs/sealed-release.md).
    Sealed,
    /// In upstream's exchange, in plain inside TLS.
    Upstream,
}

/// What may be shown of [`Keys`]: public keys, and fingerprints of what has none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KeySummary {
    /// The app, hex.
    pub app_id: String,
    /// How the keys came.
    pub exchange: Exchange,
    /// The KMS that answered.
    pub kms_url: String,
    /// The image the keys were released for, hex.
    pub os_image_hash: String,
    /// The gateway's app id, as the authoriser gave it.
    pub gateway_app_id: String,
    /// SHA-256 of the root CA's SubjectPublicKeyInfo, hex.
    pub root_ca_spki_sha256: String,
    /// First 8 bytes of SHA-256 over the key's name, a colon and the key, hex.
    pub disk_crypt_key_fingerprint: String,
    /// X25519 public key of the environment, hex.
    pub env_public_key: String,
    /// The app's compressed secp256k1 public key, hex.
    pub k256_public_key: String,
}

impl Keys {
    /// The app.
    pub fn app_id(&self) -> &AppId {
        &self.app_id
    }

    /// The image the keys were released for: SHA-256 over PCR0 to PCR2.
    pub fn os_image_hash(&self) -> &[u8; 32] {
        &self.os_image_hash
    }

    /// How they came.
    pub fn exchange(&self) -> Exchange {
        self.exchange
    }

    /// The keys themselves.
    pub fn app_keys(&self) -> &AppKeys {
        &self.app_keys
    }

    /// The text of `app_keys.json` as upstream writes it. Whoever copies it wipes the copy.
    ///
    /// # Errors
    /// Those of [`AppKeys::to_json`], which do not happen for released keys.
    pub fn to_json(&self) -> Result<Zeroizing<Vec<u8>>, app_keys::Error> {
        self.app_keys.to_json()
    }

    /// What may be shown.
    pub fn summary(&self) -> KeySummary {
        let keys = &self.app_keys;
        let (kms_url, root_spki) = match &keys.key_provider {
            KeyProvider::Kms { url, pubkey, .. } => (url.clone(), pubkey.as_slice()),
            KeyProvider::None { .. } | KeyProvider::Local { .. } | KeyProvider::Tpm { .. } => {
                Default::default()
            }
        };
        let disk = Sha256::new().chain_update("disk_crypt_key:").chain_update(keys.disk_crypt_key.expose());
        KeySummary {
            app_id: self.app_id.to_string(),
            exchange: self.exchange,
            kms_url,
            os_image_hash: hex::encode(self.os_image_hash),
            gateway_app_id: keys.gateway_app_id.clone(),
            root_ca_spki_sha256: hex::encode(Sha256::digest(root_spki)),
            disk_crypt_key_fingerprint: hex::encode(&disk.finalize()[..8]),
            env_public_key: keys
                .env_crypt_key
                .as_ref()
                .map(|key| hex::encode(key.public_key()))
                .unwrap_or_default(),
            k256_public_key: keys.k256_key.public_key().map(|key| key.to_string()).unwrap_or_default(),
        }
    }
}
