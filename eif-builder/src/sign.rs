//! Signing with a local key. Nonces are derived from key and message (RFC 6979), so that the same image signed
//! with the same key has the same bytes.

use std::path::Path;

use attestation::Pcr;
use p256::pkcs8::DecodePrivateKey as _;
use zeroize::Zeroizing;

use crate::error::{Error, IoContext};
use crate::signature::{Algorithm, encode_section, parse_certificate, read_certificate};

/// A private key and the certificate that goes with it.
pub struct Signer {
    key: Key,
    certificate_pem: Vec<u8>,
    certificate_der: Vec<u8>,
}

enum Key {
    P256(p256::ecdsa::SigningKey),
    P384(p384::ecdsa::SigningKey),
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

    /// DER of the certificate; PCR8 is its measurement.
    pub fn certificate_der(&self) -> &[u8] {
        &self.certificate_der
    }

    /// The payload of the signature section for an image with this PCR0.
    pub fn section(&self, pcr0: &Pcr) -> Vec<u8> {
        match &self.key {
            Key::P256(key) => encode_section(pcr0, &self.certificate_pem, Algorithm::Es256, |message| {
                use p256::ecdsa::signature::Signer as _;
                let signature: p256::ecdsa::Signature = key.sign(message);
                signature.to_bytes().to_vec()
            }),
            Key::P384(key) => encode_section(pcr0, &self.certificate_pem, Algorithm::Es384, |message| {
                use p384::ecdsa::signature::Signer as _;
                let signature: p384::ecdsa::Signature = key.sign(message);
                signature.to_bytes().to_vec()
            }),
        }
    }

    fn check_pair(&self, key: &Path, certificate: &Path) -> Result<(), Error> {
        let parsed = parse_certificate(&self.certificate_der)
            .map_err(|reason| Error::input(certificate.display(), reason))?;
        let point = match &self.key {
            Key::P256(key) => key.verifying_key().to_sec1_point(false).as_bytes().to_vec(),
            Key::P384(key) => key.verifying_key().to_sec1_point(false).as_bytes().to_vec(),
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
