//! Sealed release's part that needs cryptography: the exporter, the enclave's key, HPKE (docs/sealed-release.md).
//!
//! HPKE is rustls's on aws-lc-rs: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM, base mode.

use kms_protocol::sealed::{Commitment, EXPORTER_LABEL, EXPORTER_LEN, Exporter, PUBLIC_KEY_LEN};
use rustls::crypto::aws_lc_rs::hpke::DH_KEM_X25519_HKDF_SHA256_AES_256 as SUITE;
use rustls::crypto::hpke::{EncapsulatedSecret, Hpke, HpkePrivateKey, HpkePublicKey};
use rustls::{ConnectionCommon, ProtocolVersion};
use zeroize::Zeroizing;

use crate::Error;

/// The exporter of a connection whose handshake is over.
///
/// # Errors
/// [`Error::ExporterVersion`] for TLS 1.2, whose exporter is bound to the handshake only with an extension that not
/// every peer has; [`Error::Tls`].
pub fn exporter<Data>(connection: &ConnectionCommon<Data>) -> Result<Exporter, Error> {
    if connection.protocol_version() != Some(ProtocolVersion::TLSv1_3) {
        return Err(Error::ExporterVersion);
    }
    let material =
        connection.export_keying_material([0; EXPORTER_LEN], EXPORTER_LABEL, None).map_err(Error::Tls)?;
    Ok(Exporter(material))
}

/// A message that only the holder of a [`RecipientKey`] can read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// HPKE's encapsulated key.
    pub enc: [u8; PUBLIC_KEY_LEN],
    /// Ciphertext and tag.
    pub ciphertext: Vec<u8>,
}

/// Seals `plaintext` to a public key that evidence with this commitment has vouched for.
///
/// # Errors
/// [`Error::Hpke`] when the public key is none (a point of small order).
pub fn seal(
    public_key: &[u8; PUBLIC_KEY_LEN],
    commitment: &Commitment,
    plaintext: &[u8],
) -> Result<Sealed, Error> {
    let recipient = HpkePublicKey(public_key.to_vec());
    let (EncapsulatedSecret(enc), ciphertext) =
        SUITE.seal(&commitment.hpke_info(), &[], plaintext, &recipient).map_err(Error::Hpke)?;
    let enc = enc.try_into().map_err(|_| Error::Hpke(rustls::Error::General("length of enc".into())))?;
    Ok(Sealed { enc, ciphertext })
}

/// A fresh key of an enclave, for one answer: opening consumes it.
pub struct RecipientKey {
    public: [u8; PUBLIC_KEY_LEN],
    private: HpkePrivateKey,
}

impl RecipientKey {
    /// Makes a key.
    ///
    /// # Errors
    /// [`Error::Hpke`] without randomness.
    pub fn generate() -> Result<Self, Error> {
        let (HpkePublicKey(public), private) = SUITE.generate_key_pair().map_err(Error::Hpke)?;
        let public =
            public.try_into().map_err(|_| Error::Hpke(rustls::Error::General("length of a key".into())))?;
        Ok(Self { public, private })
    }

    /// For the document's `public_key`.
    #[must_use]
    pub fn public_key(&self) -> &[u8; PUBLIC_KEY_LEN] {
        &self.public
    }

    /// Opens what was sealed to this key under this commitment.
    ///
    /// # Errors
    /// [`Error::Hpke`] when it was not, or was changed.
    pub fn open(self, commitment: &Commitment, sealed: &Sealed) -> Result<Zeroizing<Vec<u8>>, Error> {
        let enc = EncapsulatedSecret(sealed.enc.to_vec());
        SUITE
            .open(&enc, &commitment.hpke_info(), &[], &sealed.ciphertext, &self.private)
            .map(Zeroizing::new)
            .map_err(Error::Hpke)
    }
}

#[cfg(test)]
mod tests;
