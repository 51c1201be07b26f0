//! P-384 keys, parsed once and bound to the one algorithm that each may be used with.

use aws_lc_rs::digest::Digest;
use aws_lc_rs::signature::{ECDSA_P384_SHA384_ASN1, ECDSA_P384_SHA384_FIXED, ParsedPublicKey};

use crate::certificate::CertificateFault;

/// A signature does not verify.
pub(crate) struct BadSignature;

/// The key of a certificate that issues others; their signatures are DER.
#[derive(Clone)]
pub(crate) struct IssuerKey(ParsedPublicKey);

impl IssuerKey {
    /// Takes an uncompressed point, and checks that it is on the curve.
    pub(crate) fn new(point: &[u8]) -> Result<Self, CertificateFault> {
        let key = ParsedPublicKey::new(&ECDSA_P384_SHA384_ASN1, point);
        key.map(Self).map_err(|_| CertificateFault::Key)
    }

    pub(crate) fn verify(&self, message: &[u8], signature: &[u8]) -> Result<(), BadSignature> {
        self.0.verify_sig(message, signature).map_err(|_| BadSignature)
    }
}

/// The key of a leaf, which signs documents; signatures are r and s, 48 bytes each.
#[derive(Clone)]
pub(crate) struct LeafKey(ParsedPublicKey);

impl LeafKey {
    /// Takes an uncompressed point, and checks that it is on the curve.
    pub(crate) fn new(point: &[u8]) -> Result<Self, CertificateFault> {
        let key = ParsedPublicKey::new(&ECDSA_P384_SHA384_FIXED, point);
        key.map(Self).map_err(|_| CertificateFault::Key)
    }

    pub(crate) fn verify_digest(&self, digest: &Digest, signature: &[u8]) -> Result<(), BadSignature> {
        self.0.verify_digest_sig(digest, signature).map_err(|_| BadSignature)
    }
}
