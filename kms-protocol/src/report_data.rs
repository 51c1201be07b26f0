//! The 64 bytes that bind evidence to what it speaks for (kms-protocol §5.1 and §8.3).

use sha2::{Digest, Sha512};
use sha3::Keccak256;

/// Length of report data in bytes.
pub const LEN: usize = 64;

/// Report data of a local attestation, which binds nothing.
pub const LOCAL: [u8; LEN] = [0; LEN];

/// Binds the key of an RA-TLS certificate: SHA-512 over `ratls-cert:` and its SubjectPublicKeyInfo in DER.
#[must_use]
pub fn ratls_cert(spki_der: &[u8]) -> [u8; LEN] {
    tagged("ratls-cert", spki_der)
}

/// Binds a KMS root CA's key, as upstream's `gen-ca-cert` helper does.
#[must_use]
pub fn kms_root_ca(spki_der: &[u8]) -> [u8; LEN] {
    tagged("kms-root-ca", spki_der)
}

/// Binds a payload of the application.
#[must_use]
pub fn app_data(payload: &[u8]) -> [u8; LEN] {
    tagged("app-data", payload)
}

/// The general rule: SHA-512 over the tag, a colon and the content.
#[must_use]
pub fn tagged(tag: &str, content: &[u8]) -> [u8; LEN] {
    Sha512::new().chain_update(tag).chain_update(":").chain_update(content).finalize().into()
}

/// Binds the keys a KMS made at bootstrap: Keccak-256 of a text with both keys in hex, padded with zeros.
///
/// `ca_spki_der` is the root CA's SubjectPublicKeyInfo, `k256_public` the compressed point of the K256 root.
#[must_use]
pub fn bootstrap(ca_spki_der: &[u8], k256_public: &[u8; 33]) -> [u8; LEN] {
    // The spelling is upstream's and part of the format.
    let hash = Keccak256::new()
        .chain_update("dstack-kms-genereted-keys-v1:")
        .chain_update(hex::encode(ca_spki_der))
        .chain_update(";")
        .chain_update(hex::encode(k256_public))
        .chain_update(";")
        .finalize();
    let mut report_data = [0; LEN];
    report_data[..32].copy_from_slice(&hash);
    report_data
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vectors::{K256_ROOT_PUBLIC, ROOT_SPKI, bytes};

    /// Frozen (§13.2): fix the code, not the vector.
    #[test]
    fn report_data_is_frozen() {
        let cases = [
            (
                ratls_cert(b"hello"),
                "c2629fa319fdf865ba0bdc17b6c0521fc2cc5e6434915ba9abe0d614a2441d1edef67c8087d44d1a1707e89e959ec815562a6f46458be0f47187e908e94a6e57",
            ),
            (
                ratls_cert(&bytes(ROOT_SPKI)),
                "d224180bddf1a335755b07626fdc80ce18090be1ff37e7d6e1b53e780e27da0d8fafe99fc41e90333fcb51949ae5a1fc95b7820e142e611256ff4a8dc8997506",
            ),
            (
                kms_root_ca(b"hello"),
                "3aa73a024e7cc2e70b54c32de04156d5655d72ff3b394bd33277c817b984038a5a3d148b7ed133873f2a8086008592163aab4c7b52f624368dce6013ccf08383",
            ),
            (
                app_data(b"hello"),
                "e39fd3dbee991d65e65cc38c6e9d664324929816279a19b495bcd3f77a62d81949ba61282d8a732916d39bb9f6a6a16d11211c0d800b6ffc56ecf74419a7c835",
            ),
            (
                app_data(b"test content"),
                "7ea0b744ed5e9c0c83ff9f575668e1697652cd349f2027cdf26f918d4c53e8cd50b5ea9b449b4c3d50e20ae00ec29688d5a214e8daff8a10041f5d624dae8a01",
            ),
        ];
        for (actual, expected) in cases {
            assert_eq!(hex::encode(actual), expected);
        }
    }

    /// Frozen (§13.1): fix the code, not the vector.
    #[test]
    fn bootstrap_binding_is_frozen() {
        let k256: [u8; 33] = bytes(K256_ROOT_PUBLIC).try_into().unwrap();
        let report_data = bootstrap(&bytes(ROOT_SPKI), &k256);
        let hash = "7040375da0310e22aaea37615694d9b3d6700ed24a36655cc3cbc3d99917b766";
        assert_eq!(hex::encode(report_data), format!("{hash}{}", "0".repeat(64)));
    }
}
