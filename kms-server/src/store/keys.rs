//! Keys before they are on the disk.

use kms_protocol::derive::{K256Root, P256Scalar, RootKeys};

use super::{Error, issue};

/// All keys of a KMS, made or received, and not written yet.
pub struct NewKeys {
    pub(super) roots: RootKeys,
    pub(super) temp: P256Scalar,
    pub(super) rpc: P256Scalar,
}

impl NewKeys {
    /// Makes all of them.
    ///
    /// # Errors
    ///
    /// [`Error::Random`].
    pub fn generate() -> Result<Self, Error> {
        let (ca, k256) = (issue::generate_p256()?, K256Root::init_with(issue::random)?);
        // Both must be keys of their curves before anything is written.
        let roots = RootKeys::new(ca, k256).map_err(Error::Key)?;
        Ok(Self { roots, temp: issue::generate_p256()?, rpc: issue::generate_p256()? })
    }

    /// Takes over another KMS's keys, as `GetKmsKey` gives them; the key of the RPC certificate is new.
    ///
    /// # Errors
    ///
    /// When one of them is no key.
    pub fn received(ca_key_pem: &str, k256: &[u8], temp_ca_key_pem: &str) -> Result<Self, Error> {
        let ca = issue::key_from_pem("ca_key of the source", ca_key_pem.as_bytes())?;
        let roots = RootKeys::new(ca, K256Root::from_slice(k256)?).map_err(Error::Key)?;
        let temp = issue::key_from_pem("temp_ca_key of the source", temp_ca_key_pem.as_bytes())?;
        Ok(Self { roots, temp, rpc: issue::generate_p256()? })
    }

    /// SubjectPublicKeyInfo of the root CA, DER.
    ///
    /// # Errors
    ///
    /// [`Error::Key`].
    pub fn ca_spki(&self) -> Result<Vec<u8>, Error> {
        Ok(self.roots.ca().spki_der().map_err(Error::Key)?.to_vec())
    }

    /// SubjectPublicKeyInfo of the RPC certificate's key, DER.
    ///
    /// # Errors
    ///
    /// [`Error::Key`].
    pub fn rpc_spki(&self) -> Result<Vec<u8>, Error> {
        Ok(self.rpc.spki_der().map_err(Error::Key)?.to_vec())
    }

    /// Compressed point of the K256 root.
    #[must_use]
    pub fn k256_public_key(&self) -> [u8; 33] {
        *self.roots.k256_public_key().as_bytes()
    }
}
