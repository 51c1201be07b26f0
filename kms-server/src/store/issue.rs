//! Making keys and certificates, and keys as PEM, as upstream writes them.

use std::time::Duration;

use attestation::UnixMillis;
use kms_protocol::derive::P256Scalar;
use ratls::issue::{self, Ca, Certificate, KeyPair};
use rustls_pki_types::{CertificateDer, UnixTime};
use zeroize::Zeroizing;

use super::{Domain, Error};

/// Which of the two authorities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Authority {
    /// Signs RPC certificates and the applications' authorities.
    Root,
    /// Signs clients' certificates; its key is public.
    Temporary,
}

/// A self-signed authority.
pub(super) fn authority(which: Authority, key: &P256Scalar, now: UnixMillis) -> Result<Certificate, Error> {
    let key = key_pair(key)?;
    let certificate = match which {
        Authority::Root => issue::root_ca(&key, unix_time(now)),
        Authority::Temporary => issue::temp_ca(&key, unix_time(now)),
    };
    certificate.map_err(Error::Issue)
}

/// The certificate that clients see: issued by the root directly, usage `kms:rpc`, valid for one name, with evidence of
/// this machine if there is any.
pub(super) fn rpc_leaf(
    domain: &Domain,
    rpc_key: &P256Scalar,
    attestation: Option<&[u8]>,
    root: CertificateDer<'static>,
    root_key: &P256Scalar,
    now: UnixMillis,
) -> Result<Certificate, Error> {
    let root = Ca::new("root CA", root, key_pair(root_key)?).map_err(Error::Issue)?;
    issue::rpc_leaf(&root, &key_pair(rpc_key)?, domain.as_str(), attestation, unix_time(now))
        .map_err(Error::Issue)
}

fn key_pair(key: &P256Scalar) -> Result<KeyPair, Error> {
    KeyPair::from_scalar("KMS key", key).map_err(Error::Issue)
}

fn unix_time(now: UnixMillis) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_millis(now.0))
}

/// A new P-256 key.
pub(super) fn generate_p256() -> Result<P256Scalar, Error> {
    // All but one in 2^32 random strings are below the curve's order; more than a few failures mean that the
    // generator is broken.
    for _ in 0..8 {
        let scalar = P256Scalar::init_with(random)?;
        if scalar.public_point().is_ok() {
            return Ok(scalar);
        }
    }
    Err(Error::Random)
}

/// Fills `bytes` from the operating system.
pub(super) fn random(bytes: &mut [u8; 32]) -> Result<(), Error> {
    aws_lc_rs::rand::fill(bytes).map_err(|_| Error::Random)
}

/// PKCS#8 in PEM, as upstream writes keys.
pub(crate) fn key_to_pem(key: &P256Scalar) -> Result<Zeroizing<String>, Error> {
    let der = key.to_pkcs8().map_err(Error::Key)?;
    pem_rfc7468::encode_string("PRIVATE KEY", pem_rfc7468::LineEnding::LF, der.as_slice())
        .map(Zeroizing::new)
        .map_err(|source| Error::Pem { what: "private key", source })
}

/// Reads what [`key_to_pem`] wrote.
pub(super) fn key_from_pem(name: &'static str, pem: &[u8]) -> Result<P256Scalar, Error> {
    let (label, der) = pem_rfc7468::decode_vec(pem).map_err(|source| Error::Pem { what: name, source })?;
    let der = Zeroizing::new(der);
    if label != "PRIVATE KEY" {
        return Err(Error::Pem { what: name, source: pem_rfc7468::Error::Label });
    }
    P256Scalar::from_pkcs8(&der).map_err(|source| Error::KeyFile { name, source })
}
