//! Signing with a local key, or with a key elsewhere.
//!
//! With a local key, nonces are derived from key and message (RFC 6979), so that the same image signed with the same
//! key has the same bytes. A key in a key management service or a hardware module signs [`Signer::message`] with
//! that service's own tools, and the result is attached.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use attestation::Pcr;
use p256::pkcs8::DecodePrivateKey as _;
use zeroize::Zeroizing;

use crate::error::{Error, IoContext};
use crate::signature::{
    Algorithm, Signature, encode_section, fixed_width, message_for, parse_certificate, read_certificate,
};

/// A certificate, and what signs with its key.
pub struct Signer {
    key: Key,
    certificate_pem: Vec<u8>,
    certificate_der: Vec<u8>,
}

enum Key {
    P256(p256::ecdsa::SigningKey),
    P384(p384::ecdsa::SigningKey),
    /// The key is elsewhere; this is what it made.
    Elsewhere(Vec<u8>),
}

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signer").finish_non_exhaustive()
    }
}

impl Signer {
    /// Reads a PEM key (SEC1 or PKCS#8; P-384 or P-256) and a PEM certificate.
    ///
    /// # Errors
    /// When one of them cannot be read, or when they do not belong together. There is no way to go on without.
    pub fn from_files(key: &Path, certificate: &Path) -> Result<Self, Error> {
        let (certificate_pem, certificate_der) = read_certificate(certificate)?;
        let pem = Zeroizing::new(std::fs::read_to_string(key).context("read the private key", key)?);
        let signer = Self { key: parse_key(&pem, key)?, certificate_pem, certificate_der };
        signer.check_pair(key, certificate)?;
        Ok(signer)
    }

    /// A signature that was made elsewhere, over [`Signer::message`], and the certificate of its key. It is checked
    /// when it meets its image.
    ///
    /// # Errors
    /// When one of the files cannot be read.
    pub fn detached(signature: &Path, certificate: &Path) -> Result<Self, Error> {
        // The longest one, P-521 in DER, has 139 bytes.
        const MAX: u64 = 1 << 10;
        let (certificate_pem, certificate_der) = read_certificate(certificate)?;
        let mut bytes = Vec::new();
        File::open(signature)
            .and_then(|file| file.take(MAX).read_to_end(&mut bytes))
            .context("read the signature", signature)?;
        Ok(Self { key: Key::Elsewhere(bytes), certificate_pem, certificate_der })
    }

    /// What the key of a certificate has to sign for an image with this PCR0 (RFC 9052 §4.4), and the algorithm.
    ///
    /// # Errors
    /// When the certificate cannot be read, or its key is on none of the three curves.
    pub fn message(certificate: &Path, pcr0: &Pcr) -> Result<(Algorithm, Vec<u8>), Error> {
        let (_, der) = read_certificate(certificate)?;
        message_for(&der, pcr0).map_err(|reason| Error::input(certificate.display(), reason))
    }

    /// DER of the certificate; PCR8 is its measurement.
    pub fn certificate_der(&self) -> &[u8] {
        &self.certificate_der
    }

    /// The payload of the signature section for an image with this PCR0.
    ///
    /// # Errors
    /// When a signature that was made elsewhere is not one of this image by the certificate's key.
    pub fn section(&self, pcr0: &Pcr) -> Result<Vec<u8>, Error> {
        let refuse = |reason: String| Error::input("the signature", reason);
        let (algorithm, message) = message_for(&self.certificate_der, pcr0).map_err(refuse)?;
        let signature = match &self.key {
            Key::P256(key) => {
                use p256::ecdsa::signature::Signer as _;
                let signature: p256::ecdsa::Signature = key.sign(&message);
                signature.to_bytes().to_vec()
            }
            Key::P384(key) => {
                use p384::ecdsa::signature::Signer as _;
                let signature: p384::ecdsa::Signature = key.sign(&message);
                signature.to_bytes().to_vec()
            }
            Key::Elsewhere(signature) => fixed_width(algorithm, signature).map_err(refuse)?,
        };
        let section = encode_section(pcr0, &self.certificate_pem, algorithm, &signature);
        // Ours are right by construction; it costs a millisecond to know.
        Signature::decode(&section).and_then(|made| made.verify(pcr0)).map_err(refuse)?;
        Ok(section)
    }

    fn check_pair(&self, key: &Path, certificate: &Path) -> Result<(), Error> {
        let parsed = parse_certificate(&self.certificate_der)
            .map_err(|reason| Error::input(certificate.display(), reason))?;
        let point = match &self.key {
            Key::P256(key) => key.verifying_key().to_sec1_point(false).as_bytes().to_vec(),
            Key::P384(key) => key.verifying_key().to_sec1_point(false).as_bytes().to_vec(),
            Key::Elsewhere(_) => return Ok(()),
        };
        if parsed.public_key().subject_public_key.data.as_ref() == point {
            return Ok(());
        }
        Err(Error::input(certificate.display(), format!("is not for the key in {}", key.display())))
    }
}

fn parse_key(pem: &str, path: &Path) -> Result<Key, Error> {
    if let Ok(key) = p384::SecretKey::from_pkcs8_pem(pem) {
        return Ok(Key::P384(key.into()));
    }
    if let Ok(key) = p256::SecretKey::from_pkcs8_pem(pem) {
        return Ok(Key::P256(key.into()));
    }
    if let Ok(key) = p384::SecretKey::from_sec1_pem(pem) {
        return Ok(Key::P384(key.into()));
    }
    if let Ok(key) = p256::SecretKey::from_sec1_pem(pem) {
        return Ok(Key::P256(key.into()));
    }
    Err(Error::input(path.display(), "no P-384 or P-256 private key in PEM (PKCS#8 or SEC1)"))
}
