//! What an app derives from its own k256 key inside the enclave, as upstream's guest agent does: keys by path, and the
//! signatures that lead from them to the KMS.
//!
//! ```text
//! KMS's K256 root ── signs ──▶ app's k256 key ── signs "purpose:hex(public key)" ──▶ key by path
//! ```

use k256::ecdsa::signature::hazmat::{PrehashSigner, PrehashVerifier};
use k256::ecdsa::signature::{Signer, Verifier};
use k256::ecdsa::{SigningKey, VerifyingKey};
use sha3::{Digest, Keccak256};

use super::signatures::{app_key_digest, sign};
use super::{
    AppK256Key, Error, K256PublicKey, P256Scalar, Signature, SignatureError, derive_p256_from, hkdf,
};
use crate::ids::AppId;
use crate::secret::secret_key;

/// Length of an ECDSA signature without its recovery id, in bytes.
pub const ECDSA_LEN: usize = 64;

secret_key! {
    /// A key derived from the app's key by a path: a secp256k1 scalar, or an Ed25519 seed.
    PathKey, "key by path"
}

impl AppK256Key {
    /// The key of a path; the same path gives the same key wherever the app runs. The algorithm does not enter: one
    /// path should serve one algorithm.
    #[must_use]
    pub fn path_key(&self, path: &str) -> PathKey {
        let Ok(key) = PathKey::init_with(|key| {
            hkdf(self.expose(), &[path.as_bytes()], key);
            Ok::<_, std::convert::Infallible>(())
        });
        key
    }

    /// The P-256 key of a path.
    ///
    /// # Errors
    /// [`Error::NotAScalar`], with negligible probability.
    pub fn path_p256(&self, path: &str) -> Result<P256Scalar, Error> {
        derive_p256_from(self.expose(), &[path.as_bytes()])
    }

    /// Signs that a public key was derived from this key for a purpose: Keccak-256 over `purpose:hex(public key)`.
    ///
    /// # Errors
    /// [`Error::NotAScalar`] for a key that came over the wire and is none.
    pub fn sign_path_key(&self, purpose: &str, public_key: &[u8]) -> Result<Signature, Error> {
        Ok(sign(&self.signing_key()?, path_key_digest(purpose, public_key)))
    }
}

impl PathKey {
    fn signing_key(&self) -> Result<SigningKey, Error> {
        SigningKey::from_slice(self.expose()).map_err(|_| Error::NotAScalar { what: "key by path" })
    }

    /// The compressed secp256k1 public key.
    ///
    /// # Errors
    /// [`Error::NotAScalar`], with negligible probability.
    pub fn k256_public_key(&self) -> Result<K256PublicKey, Error> {
        Ok(K256PublicKey::from_verifying_key(self.signing_key()?.verifying_key()))
    }

    /// ECDSA over SHA-256 of `message`; the nonce is RFC 6979's and s is in the lower half.
    ///
    /// # Errors
    /// [`Error::NotAScalar`], with negligible probability.
    pub fn sign_k256(&self, message: &[u8]) -> Result<[u8; ECDSA_LEN], Error> {
        let signature: Result<k256::ecdsa::Signature, _> = self.signing_key()?.try_sign(message);
        ecdsa_bytes(signature)
    }

    /// ECDSA over a digest that somebody else computed.
    ///
    /// # Errors
    /// [`Error::NotAScalar`], with negligible probability.
    pub fn sign_k256_prehashed(&self, digest: &[u8; 32]) -> Result<[u8; ECDSA_LEN], Error> {
        ecdsa_bytes(self.signing_key()?.sign_prehash(digest))
    }
}

fn ecdsa_bytes<E>(signature: Result<k256::ecdsa::Signature, E>) -> Result<[u8; ECDSA_LEN], Error> {
    // Signing fails only for r = 0 or s = 0.
    signature.map(|it| it.to_bytes().into()).map_err(|_| Error::NotAScalar { what: "key by path" })
}

/// Checks an ECDSA signature over SHA-256 of `message`. `public_key` may be compressed or not.
///
/// # Errors
/// [`SignatureError::PublicKey`], [`SignatureError::Malformed`]; a wrong signature is `false`.
pub fn verify_k256(public_key: &[u8], message: &[u8], signature: &[u8]) -> Result<bool, SignatureError> {
    let (key, signature) = ecdsa_parts(public_key, signature)?;
    Ok(key.verify(message, &signature).is_ok())
}

/// Checks an ECDSA signature over a digest, as [`verify_k256`].
///
/// # Errors
/// As [`verify_k256`].
pub fn verify_k256_prehashed(
    public_key: &[u8],
    digest: &[u8],
    signature: &[u8],
) -> Result<bool, SignatureError> {
    let (key, signature) = ecdsa_parts(public_key, signature)?;
    Ok(key.verify_prehash(digest, &signature).is_ok())
}

fn ecdsa_parts(
    public_key: &[u8],
    signature: &[u8],
) -> Result<(VerifyingKey, k256::ecdsa::Signature), SignatureError> {
    let key = VerifyingKey::from_sec1_bytes(public_key).map_err(|_| SignatureError::PublicKey)?;
    let signature = k256::ecdsa::Signature::from_slice(signature).map_err(|_| SignatureError::Malformed)?;
    Ok((key, signature))
}

/// Checks the chain that comes with a key by path: `chain[0]` by the app's key over the public key, `chain[1]` by the
/// KMS's root over the app's key. Returns the app's key.
///
/// # Errors
/// See [`SignatureError`].
pub fn verify_path_key(
    root: &K256PublicKey,
    app: &AppId,
    purpose: &str,
    public_key: &[u8],
    chain: &[Signature; 2],
) -> Result<K256PublicKey, SignatureError> {
    // The first signature does not name its key, so whoever made it is the app if the root says so.
    let app_key = chain[0].signer(path_key_digest(purpose, public_key))?;
    chain[1].verify(app_key_digest(app, &app_key), root)?;
    Ok(app_key)
}

fn path_key_digest(purpose: &str, public_key: &[u8]) -> Keccak256 {
    Keccak256::new().chain_update(purpose).chain_update(":").chain_update(hex::encode(public_key))
}

#[cfg(test)]
mod tests {
    use super::super::{K256Root, RootKeys, sign_app_key};
    use super::*;
    use crate::vectors::{ROOT_SCALAR, bytes};

    const APP: AppId = AppId::new([0x11; 20]);

    fn roots() -> RootKeys {
        let ca = P256Scalar::from_slice(&bytes(ROOT_SCALAR)).unwrap();
        RootKeys::new(ca, K256Root::from_slice(&[0x42; 32]).unwrap()).unwrap()
    }

    /// Frozen: fix the code, not the vector. Computed with another implementation of HKDF and of the curves.
    #[test]
    fn keys_by_path_are_frozen() {
        let app = roots().app_k256_key(&APP).unwrap();
        let key = app.path_key("wallet/eth");
        assert_eq!(hex::encode(key.expose()), PATH_KEY);
        assert_eq!(key.k256_public_key().unwrap().to_string(), PATH_PUBLIC);
        assert_eq!(hex::encode(app.path_p256("wallet/eth").unwrap().expose()), PATH_KEY);
        assert_eq!(hex::encode(app.path_key("").expose()), EMPTY_PATH_KEY);
    }

    const PATH_KEY: &str = "443e7a2513e942638e82ec8d36ba38708c59d7269d274bc17b442d020fa94ba1";
    const PATH_PUBLIC: &str = "02ef29a6374d05e02aa987dc6a3d6f277318393b90d825cff51a56058d2ec08b85";
    const EMPTY_PATH_KEY: &str = "4a7c75219fcacf1e29e3981143afd603b57d60295d105c43cf2eb38009e40722";

    #[test]
    fn the_chain_leads_to_the_root_and_to_nothing_else() {
        let roots = roots();
        let app_key = roots.app_k256_key(&APP).unwrap();
        let public = app_key.path_key("a").k256_public_key().unwrap();
        let chain = [
            app_key.sign_path_key("signing", public.as_bytes()).unwrap(),
            sign_app_key(&roots, &APP, &app_key.public_key().unwrap()),
        ];
        let root = roots.k256_public_key();
        let check =
            |app: &AppId, purpose: &str, key: &[u8]| verify_path_key(&root, app, purpose, key, &chain);
        assert_eq!(check(&APP, "signing", public.as_bytes()).unwrap(), app_key.public_key().unwrap());
        assert!(check(&AppId::new([0x12; 20]), "signing", public.as_bytes()).is_err());
        assert!(check(&APP, "other", public.as_bytes()).is_err());
        assert!(check(&APP, "signing", &[2; 33]).is_err());
        let other = app_key.path_key("b").k256_public_key().unwrap();
        assert!(verify_path_key(&other, &APP, "signing", public.as_bytes(), &chain).is_err());
    }

    #[test]
    fn signatures_verify_and_damaged_ones_do_not() {
        let key = roots().app_k256_key(&APP).unwrap().path_key("vms");
        let public = key.k256_public_key().unwrap();
        let mut signature = key.sign_k256(b"message").unwrap();
        assert_eq!(verify_k256(public.as_bytes(), b"message", &signature), Ok(true));
        assert_eq!(verify_k256(public.as_bytes(), b"massage", &signature), Ok(false));
        let prehashed = key.sign_k256_prehashed(&[7; 32]).unwrap();
        assert_eq!(verify_k256_prehashed(public.as_bytes(), &[7; 32], &prehashed), Ok(true));
        assert_eq!(verify_k256_prehashed(public.as_bytes(), &[8; 32], &prehashed), Ok(false));
        signature[40] ^= 1;
        assert_eq!(verify_k256(public.as_bytes(), b"message", &signature), Ok(false));
        assert_eq!(verify_k256(&[], b"message", &signature), Err(SignatureError::PublicKey));
        assert_eq!(verify_k256(public.as_bytes(), b"message", &[0; 64]), Err(SignatureError::Malformed));
        for len in 0..signature.len() {
            let cut = verify_k256(public.as_bytes(), b"message", &signature[..len]);
            assert_eq!(cut, Err(SignatureError::Malformed), "accepted a prefix of {len} bytes");
        }
    }

    #[test]
    fn signing_gives_the_same_bytes_each_time() {
        let key = roots().app_k256_key(&APP).unwrap().path_key("vms");
        assert_eq!(key.sign_k256(b"m").unwrap(), key.sign_k256(b"m").unwrap());
    }
}
