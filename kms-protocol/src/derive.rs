//! Every derivation and signature of the KMS (kms-protocol §7).
//!
//! All labels of the protocol sit in this file. A changed label loses users' disks, so each has a frozen vector.

mod app;
mod signatures;

pub use app::{ECDSA_LEN, PathKey, verify_k256, verify_k256_prehashed, verify_path_key};
pub use signatures::{
    K256PublicKey, Signature, SignatureError, sign_app_key, sign_env_public_key_v0, sign_env_public_key_v1,
    sign_sealed_app_keys, verify_app_key, verify_env_public_key_v0, verify_env_public_key_v1,
    verify_sealed_app_keys,
};

use hkdf::Hkdf;
use k256::ecdsa::SigningKey;
use p256::elliptic_curve::sec1::ToSec1Point;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::ids::{AppId, InstanceId};
use crate::secret::secret_key;

pub use crate::secret::SecretLength;

/// Salt of every derivation.
const SALT: &[u8] = b"RATLS";
const DISK_CRYPT_KEY: &[u8] = b"app-disk-crypt-key";
const ENV_ENCRYPT_KEY: &[u8] = b"env-encrypt-key";
const APP_KEY: &[u8] = b"app-key";
const APP_CA: &[u8] = b"app-ca";

/// A PKCS#8 document of a P-256 key up to the scalar: version 0, id-ecPublicKey, prime256v1, ECPrivateKey version 1.
const PKCS8_HEAD: [u8; 36] = [
    0x30, 0x81, 0x87, 0x02, 0x01, 0x00, 0x30, 0x13, 0x06, 0x07, 0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x02, 0x01,
    0x06, 0x08, 0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x03, 0x01, 0x07, 0x04, 0x6D, 0x30, 0x6B, 0x02, 0x01, 0x01,
    0x04, 0x20,
];
/// What stands between the scalar and the uncompressed public point.
const PKCS8_MIDDLE: [u8; 5] = [0xA1, 0x44, 0x03, 0x42, 0x00];
/// SubjectPublicKeyInfo of a P-256 key up to the uncompressed point.
const SPKI_HEAD: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x02, 0x01, 0x06, 0x08, 0x2A, 0x86,
    0x48, 0xCE, 0x3D, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];

/// Length of a P-256 key's PKCS#8 document as [`P256Scalar::to_pkcs8`] writes it, in bytes.
pub const PKCS8_LEN: usize = 138;
/// Length of a P-256 key's SubjectPublicKeyInfo in DER, in bytes.
pub const P256_SPKI_LEN: usize = 91;

/// A derivation that has no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// 32 bytes that are no private key of the curve: zero, or not below its order.
    #[error("{what} is not a private key of its curve")]
    NotAScalar {
        /// Which key.
        what: &'static str,
    },
    /// A PKCS#8 document that is not the 138-byte form of a P-256 key.
    #[error("{what} is not the PKCS#8 form of a P-256 key")]
    NotPkcs8 {
        /// Which key.
        what: &'static str,
    },
}

secret_key! {
    /// The key of an app's disk: 32 bytes.
    DiskCryptKey, "disk_crypt_key"
}
secret_key! {
    /// The X25519 secret an app's environment is encrypted to, as returned on the wire: unclamped.
    EnvCryptKey, "env_crypt_key"
}
secret_key! {
    /// An app's own secp256k1 private key.
    AppK256Key, "k256_key"
}
secret_key! {
    /// A P-256 private key, big-endian.
    P256Scalar, "P-256 key"
}
secret_key! {
    /// The secp256k1 private key that signs for the KMS and from which the apps' keys are derived.
    K256Root, "K256 root"
}

/// The two secrets of a KMS from which all others follow.
pub struct RootKeys {
    ca: P256Scalar,
    k256: K256Root,
}

impl RootKeys {
    /// Takes both roots.
    ///
    /// # Errors
    /// When one is not a private key of its curve.
    pub fn new(ca: P256Scalar, k256: K256Root) -> Result<Self, Error> {
        ca.secret_key()?;
        k256.signing_key()?;
        Ok(Self { ca, k256 })
    }

    /// The root CA's key.
    #[must_use]
    pub fn ca(&self) -> &P256Scalar {
        &self.ca
    }

    /// The K256 root.
    #[must_use]
    pub fn k256(&self) -> &K256Root {
        &self.k256
    }

    /// The public key of the K256 root, as `GetMeta` shows it.
    #[must_use]
    pub fn k256_public_key(&self) -> K256PublicKey {
        K256PublicKey::from_verifying_key(self.k256.checked().verifying_key())
    }

    /// The key of the app's disk.
    ///
    /// # Errors
    /// [`Error::NotAScalar`], with negligible probability.
    pub fn disk_crypt_key(&self, app: &AppId, instance: &InstanceId) -> Result<DiskCryptKey, Error> {
        let context: [&[u8]; 3] = [app.as_bytes(), instance.as_bytes(), DISK_CRYPT_KEY];
        DiskCryptKey::init_with(|key| derive_dh_secret(&self.ca, &context, key))
    }

    /// The X25519 secret of the app's encrypted environment.
    ///
    /// # Errors
    /// [`Error::NotAScalar`], with negligible probability.
    pub fn env_crypt_key(&self, app: &AppId) -> Result<EnvCryptKey, Error> {
        EnvCryptKey::init_with(|key| derive_dh_secret(&self.ca, &[app.as_bytes(), ENV_ENCRYPT_KEY], key))
    }

    /// The app's secp256k1 key.
    ///
    /// # Errors
    /// [`Error::NotAScalar`], with negligible probability.
    pub fn app_k256_key(&self, app: &AppId) -> Result<AppK256Key, Error> {
        let key = AppK256Key::init_with(|key| {
            hkdf(self.k256.expose(), &[app.as_bytes(), APP_KEY], key);
            Ok::<_, Error>(())
        })?;
        key.signing_key()?;
        Ok(key)
    }

    /// The key of the app's own CA, below the root CA.
    ///
    /// # Errors
    /// [`Error::NotAScalar`], with negligible probability.
    pub fn app_ca_key(&self, app: &AppId) -> Result<P256Scalar, Error> {
        derive_p256(&self.ca, &[app.as_bytes(), APP_CA])
    }
}

impl P256Scalar {
    fn secret_key(&self) -> Result<p256::SecretKey, Error> {
        p256::SecretKey::from_slice(self.expose()).map_err(|_| Error::NotAScalar { what: "P-256 key" })
    }

    /// The uncompressed public point (65 bytes).
    ///
    /// # Errors
    /// [`Error::NotAScalar`].
    pub fn public_point(&self) -> Result<[u8; 65], Error> {
        let encoded = self.secret_key()?.public_key().to_sec1_point(false);
        let mut point = [0; 65];
        point.copy_from_slice(encoded.as_bytes());
        Ok(point)
    }

    /// The SubjectPublicKeyInfo in DER.
    ///
    /// # Errors
    /// [`Error::NotAScalar`].
    pub fn spki_der(&self) -> Result<[u8; P256_SPKI_LEN], Error> {
        let mut spki = [0; P256_SPKI_LEN];
        spki[..SPKI_HEAD.len()].copy_from_slice(&SPKI_HEAD);
        spki[SPKI_HEAD.len()..].copy_from_slice(&self.public_point()?);
        Ok(spki)
    }

    /// The PKCS#8 document, byte for byte as the derivation hashes it.
    ///
    /// # Errors
    /// [`Error::NotAScalar`].
    pub fn to_pkcs8(&self) -> Result<Box<Zeroizing<[u8; PKCS8_LEN]>>, Error> {
        let point = self.public_point()?;
        let mut der = Box::new(Zeroizing::new([0; PKCS8_LEN]));
        let (head, rest) = der.split_at_mut(PKCS8_HEAD.len());
        let (scalar, rest) = rest.split_at_mut(32);
        let (middle, tail) = rest.split_at_mut(PKCS8_MIDDLE.len());
        head.copy_from_slice(&PKCS8_HEAD);
        scalar.copy_from_slice(self.expose());
        middle.copy_from_slice(&PKCS8_MIDDLE);
        tail.copy_from_slice(&point);
        Ok(der)
    }

    /// Reads the scalar out of the PKCS#8 document that [`Self::to_pkcs8`], ring and aws-lc-rs write.
    ///
    /// # Errors
    /// [`Error::NotPkcs8`] for every other form, also when the public point is not the scalar's.
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, Error> {
        let refused = Error::NotPkcs8 { what: "P-256 key" };
        if der.len() != PKCS8_LEN || der[..PKCS8_HEAD.len()] != PKCS8_HEAD {
            return Err(refused);
        }
        let scalar = Self::from_slice(&der[PKCS8_HEAD.len()..PKCS8_HEAD.len() + 32]).map_err(|_| refused)?;
        let canonical = scalar.to_pkcs8()?;
        // Only the public tail is compared; the secret part was copied from the same bytes.
        let tail = PKCS8_HEAD.len() + 32;
        if canonical[tail..] == der[tail..] { Ok(scalar) } else { Err(refused) }
    }
}

impl EnvCryptKey {
    /// The X25519 public key others encrypt to.
    #[must_use]
    pub fn public_key(&self) -> [u8; 32] {
        let secret = x25519_dalek::StaticSecret::from(*self.expose());
        x25519_dalek::PublicKey::from(&secret).to_bytes()
    }
}

impl AppK256Key {
    fn signing_key(&self) -> Result<SigningKey, Error> {
        SigningKey::from_slice(self.expose()).map_err(|_| Error::NotAScalar { what: "app k256 key" })
    }

    /// The compressed public key.
    ///
    /// # Errors
    /// [`Error::NotAScalar`] for a key that came over the wire and is none.
    pub fn public_key(&self) -> Result<K256PublicKey, Error> {
        Ok(K256PublicKey::from_verifying_key(self.signing_key()?.verifying_key()))
    }
}

impl K256Root {
    fn signing_key(&self) -> Result<SigningKey, Error> {
        SigningKey::from_slice(self.expose()).map_err(|_| Error::NotAScalar { what: "K256 root" })
    }

    #[expect(clippy::expect_used, reason = "only RootKeys::new hands it out, and that checked it")]
    fn checked(&self) -> SigningKey {
        self.signing_key().expect("RootKeys::new checked the scalar")
    }
}

/// HKDF-SHA256 with the protocol's salt; the context parts are joined without separators.
fn hkdf(ikm: &[u8; 32], context: &[&[u8]], out: &mut [u8; 32]) {
    let expanded = Hkdf::<Sha256>::new(Some(SALT), ikm).expand_multi_info(context, out);
    debug_assert!(expanded.is_ok(), "32 bytes are less than 255 hashes");
}

/// `P256(ctx)` of §7.2: the output is the scalar, there is no retry.
fn derive_p256(root: &P256Scalar, context: &[&[u8]]) -> Result<P256Scalar, Error> {
    derive_p256_from(root.expose(), context)
}

/// The same from a secret of another kind.
fn derive_p256_from(ikm: &[u8; 32], context: &[&[u8]]) -> Result<P256Scalar, Error> {
    let key = P256Scalar::init_with(|key| {
        hkdf(ikm, context, key);
        Ok::<_, Error>(())
    })?;
    key.secret_key()?;
    Ok(key)
}

/// `DH(ctx)` of §7.2: SHA-256 over the PKCS#8 document of the derived key.
fn derive_dh_secret(root: &P256Scalar, context: &[&[u8]], out: &mut [u8; 32]) -> Result<(), Error> {
    let pkcs8 = derive_p256(root, context)?.to_pkcs8()?;
    Sha256::new().chain_update(pkcs8.as_slice()).finalize_into(out.into());
    Ok(())
}

#[cfg(test)]
mod tests;
