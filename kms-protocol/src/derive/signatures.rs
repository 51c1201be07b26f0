//! What the K256 root signs (kms-protocol §7.4): Keccak-256 digests, 65-byte recoverable signatures.

use std::fmt;
use std::str::FromStr;

use k256::ecdsa::{RecoveryId, SigningKey, VerifyingKey};
use sha2::Sha256;
use sha3::{Digest, Keccak256};

use super::RootKeys;
use crate::ids::AppId;
use crate::sealed::Commitment;

const APP_KEY_ISSUED: &[u8] = b"dstack-kms-issued";
const ENV_PUBLIC_KEY: &[u8] = b"dstack-env-encrypt-pubkey";
/// Ours, see docs/sealed-release.md.
const SEALED_APP_KEYS: &[u8] = b"keyferry-sealed-release-v1";

/// Why a signature proves nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// Not 65 bytes.
    #[error("signature is {0} bytes, expected 65")]
    Length(usize),
    /// r, s or the recovery id are out of range, or s is in the upper half.
    #[error("signature is malformed")]
    Malformed,
    /// A good signature by another key.
    #[error("signature is by {actual}, expected {expected}")]
    OtherKey {
        /// Who should have signed.
        expected: K256PublicKey,
        /// Who did.
        actual: K256PublicKey,
    },
    /// A public key that is no compressed secp256k1 point.
    #[error("not a compressed secp256k1 public key")]
    PublicKey,
    /// The key the signature speaks for is not one.
    #[error("the signed key is not one")]
    SignedKey(#[source] super::Error),
}

/// A secp256k1 public key: a point of the curve in compressed SEC1 form, 33 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct K256PublicKey([u8; 33]);

impl K256PublicKey {
    pub(super) fn from_verifying_key(key: &VerifyingKey) -> Self {
        let mut bytes = [0; 33];
        bytes.copy_from_slice(key.to_encoded_point(true).as_bytes());
        Self(bytes)
    }

    /// Reads the compressed form.
    ///
    /// # Errors
    /// [`SignatureError::PublicKey`] for other forms and points off the curve.
    pub fn from_sec1(bytes: &[u8]) -> Result<Self, SignatureError> {
        let compressed: [u8; 33] = bytes.try_into().map_err(|_| SignatureError::PublicKey)?;
        VerifyingKey::from_sec1_bytes(bytes).map_err(|_| SignatureError::PublicKey)?;
        Ok(Self(compressed))
    }

    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 33] {
        &self.0
    }
}

impl fmt::Display for K256PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for K256PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "K256PublicKey({self})")
    }
}

impl FromStr for K256PublicKey {
    type Err = SignatureError;

    /// Reads 66 hex digits, with or without `0x`.
    fn from_str(text: &str) -> Result<Self, SignatureError> {
        let digits = text.strip_prefix("0x").unwrap_or(text);
        Self::from_sec1(&hex::decode(digits).map_err(|_| SignatureError::PublicKey)?)
    }
}

/// r (32 bytes), s (32 bytes, lower half), recovery id (0 or 1, in theory up to 3).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Signature([u8; 65]);

impl Signature {
    /// Length in bytes.
    pub const LEN: usize = 65;

    /// Takes the 65 bytes of the wire; verification judges their content.
    ///
    /// # Errors
    /// [`SignatureError::Length`].
    pub fn from_slice(bytes: &[u8]) -> Result<Self, SignatureError> {
        bytes.try_into().map(Self).map_err(|_| SignatureError::Length(bytes.len()))
    }

    /// The bytes of the wire.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 65] {
        &self.0
    }

    /// The key that made this signature over `digest`.
    pub(super) fn signer(&self, digest: Keccak256) -> Result<K256PublicKey, SignatureError> {
        let (rs, id) = self.0.split_at(64);
        let signature = k256::ecdsa::Signature::from_slice(rs).map_err(|_| SignatureError::Malformed)?;
        // (r, n-s) is as valid as (r, s); one form keeps the signature unique.
        if signature.normalize_s().is_some() {
            return Err(SignatureError::Malformed);
        }
        let id = RecoveryId::from_byte(id[0]).ok_or(SignatureError::Malformed)?;
        let key = VerifyingKey::recover_from_digest(digest, &signature, id)
            .map_err(|_| SignatureError::Malformed)?;
        Ok(K256PublicKey::from_verifying_key(&key))
    }

    pub(super) fn verify(&self, digest: Keccak256, expected: &K256PublicKey) -> Result<(), SignatureError> {
        let actual = self.signer(digest)?;
        if actual == *expected {
            Ok(())
        } else {
            Err(SignatureError::OtherKey { expected: *expected, actual })
        }
    }
}

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signature({})", hex::encode(self.0))
    }
}

/// Signs with a nonce of RFC 6979 over Keccak-256, so that equal inputs give equal bytes, upstream's too.
#[expect(clippy::expect_used, reason = "fails only for r = 0 or s = 0, which nobody can find an input for")]
pub(super) fn sign(key: &SigningKey, digest: Keccak256) -> Signature {
    let (signature, id) = key.sign_digest_recoverable(digest).expect("r and s are not zero");
    let mut bytes = [0; 65];
    bytes[..64].copy_from_slice(&signature.to_bytes());
    bytes[64] = id.to_byte();
    Signature(bytes)
}

pub(super) fn app_key_digest(app: &AppId, key: &K256PublicKey) -> Keccak256 {
    Keccak256::new()
        .chain_update(APP_KEY_ISSUED)
        .chain_update(":")
        .chain_update(app.as_bytes())
        .chain_update(key.as_bytes())
}

fn env_digest_v0(app: &AppId, public_key: &[u8; 32]) -> Keccak256 {
    Keccak256::new()
        .chain_update(ENV_PUBLIC_KEY)
        .chain_update(":")
        .chain_update(app.as_bytes())
        .chain_update(public_key)
}

fn env_digest_v1(app: &AppId, timestamp: u64, public_key: &[u8; 32]) -> Keccak256 {
    Keccak256::new()
        .chain_update(ENV_PUBLIC_KEY)
        .chain_update(":")
        .chain_update(app.as_bytes())
        .chain_update(timestamp.to_be_bytes())
        .chain_update(public_key)
}

fn sealed_digest(commitment: &Commitment, enc: &[u8; 32], ciphertext: &[u8]) -> Keccak256 {
    Keccak256::new()
        .chain_update(SEALED_APP_KEYS)
        .chain_update(":")
        .chain_update(commitment.as_bytes())
        .chain_update(enc)
        .chain_update(Sha256::digest(ciphertext))
}

/// Signs that `key` is the app's k256 key (`k256_signature`).
#[must_use]
pub fn sign_app_key(roots: &RootKeys, app: &AppId, key: &K256PublicKey) -> Signature {
    sign(&roots.k256.checked(), app_key_digest(app, key))
}

/// Checks that the holder of `root` issued the app's k256 key.
///
/// # Errors
/// See [`SignatureError`].
pub fn verify_app_key(
    root: &K256PublicKey,
    app: &AppId,
    key: &super::AppK256Key,
    signature: &Signature,
) -> Result<(), SignatureError> {
    let key = key.public_key().map_err(SignatureError::SignedKey)?;
    signature.verify(app_key_digest(app, &key), root)
}

/// Signs the environment's public key without a time (`PublicKeyResponse.signature`).
#[must_use]
pub fn sign_env_public_key_v0(roots: &RootKeys, app: &AppId, public_key: &[u8; 32]) -> Signature {
    sign(&roots.k256.checked(), env_digest_v0(app, public_key))
}

/// Checks a signature of [`sign_env_public_key_v0`].
///
/// # Errors
/// See [`SignatureError`].
pub fn verify_env_public_key_v0(
    root: &K256PublicKey,
    app: &AppId,
    public_key: &[u8; 32],
    signature: &Signature,
) -> Result<(), SignatureError> {
    signature.verify(env_digest_v0(app, public_key), root)
}

/// Signs the environment's public key and the time in seconds (`PublicKeyResponse.signature_v1`).
#[must_use]
pub fn sign_env_public_key_v1(
    roots: &RootKeys,
    app: &AppId,
    timestamp: u64,
    public_key: &[u8; 32],
) -> Signature {
    sign(&roots.k256.checked(), env_digest_v1(app, timestamp, public_key))
}

/// Checks a signature of [`sign_env_public_key_v1`].
///
/// # Errors
/// See [`SignatureError`].
pub fn verify_env_public_key_v1(
    root: &K256PublicKey,
    app: &AppId,
    timestamp: u64,
    public_key: &[u8; 32],
    signature: &Signature,
) -> Result<(), SignatureError> {
    signature.verify(env_digest_v1(app, timestamp, public_key), root)
}

/// Signs a sealed answer (`SealedAppKeyResponse.signature`): these keys, to this enclave, for this request.
#[must_use]
pub fn sign_sealed_app_keys(
    roots: &RootKeys,
    commitment: &Commitment,
    enc: &[u8; 32],
    ciphertext: &[u8],
) -> Signature {
    sign(&roots.k256.checked(), sealed_digest(commitment, enc, ciphertext))
}

/// Checks a signature of [`sign_sealed_app_keys`].
///
/// # Errors
/// See [`SignatureError`].
pub fn verify_sealed_app_keys(
    root: &K256PublicKey,
    commitment: &Commitment,
    enc: &[u8; 32],
    ciphertext: &[u8],
    signature: &Signature,
) -> Result<(), SignatureError> {
    signature.verify(sealed_digest(commitment, enc, ciphertext), root)
}
