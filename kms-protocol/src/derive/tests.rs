//! Frozen vectors of §13.1. When one fails: fix the code, not the vector.

use super::*;
use crate::vectors::{K256_ROOT_PUBLIC, ROOT_SCALAR, ROOT_SPKI, bytes};

const APP: AppId = AppId::new([0x11; 20]);

fn roots() -> RootKeys {
    let ca = P256Scalar::from_slice(&bytes(ROOT_SCALAR)).unwrap();
    RootKeys::new(ca, K256Root::from_slice(&[0x42; 32]).unwrap()).ok().unwrap()
}

#[test]
fn derived_keys_are_frozen() {
    let roots = roots();
    let mut secret = [0; 32];
    derive_dh_secret(roots.ca(), &[b"context one", b"context two"], &mut secret).unwrap();
    let disk = |instance| roots.disk_crypt_key(&APP, &instance).ok().unwrap();
    let cases: [([u8; 32], &str); 6] = [
        (secret, "663afd58820be8ad645f9c035e93199d114ab16f738db62393bc1d7d623e8813"),
        (
            disk(InstanceId::NONE).expose().to_owned(),
            "14de7a7fd8bddf8e641a55ca97f043cac4344d175419f743940840f3a348f049",
        ),
        (
            disk(InstanceId::new([0x33; 20])).expose().to_owned(),
            "1fef665a1667042d9d3e16305ac19dff2082d4fa6b0d27505bb9e6b7379bb58d",
        ),
        (
            roots.env_crypt_key(&APP).ok().unwrap().expose().to_owned(),
            "a7470db8cfdd0fe24134b461d60766afa7c078abe6dce9f2c8a5c44034ca400e",
        ),
        (
            roots.app_k256_key(&APP).ok().unwrap().expose().to_owned(),
            "dae157edc7e9c0c5494a68c940bd24790d019fb47cd0bb22dc828409a0d47579",
        ),
        (
            roots.app_ca_key(&APP).ok().unwrap().expose().to_owned(),
            "5b779e0a9fe80b2e5866d94958daa1a4e29a183228b3f37acd7eae153e18a75f",
        ),
    ];
    for (actual, expected) in cases {
        assert_eq!(hex::encode(actual), expected);
    }
}

#[test]
fn public_keys_are_frozen() {
    let roots = roots();
    assert_eq!(hex::encode(roots.ca().spki_der().unwrap()), ROOT_SPKI);
    assert_eq!(roots.k256_public_key().to_string(), K256_ROOT_PUBLIC);
    assert_eq!(
        hex::encode(roots.env_crypt_key(&APP).ok().unwrap().public_key()),
        "93cf259f68b24775d54290a8ea57cf93efc994d3ff28a7b8ba7a39e9f512302f"
    );
    assert_eq!(
        roots.app_k256_key(&APP).ok().unwrap().public_key().unwrap().to_string(),
        "03df1f7a6ee9e489a0ec09ff642981052b7d0225a9bcda3f71086f46685af558ce"
    );
    assert_eq!(
        hex::encode(roots.app_ca_key(&APP).ok().unwrap().public_point().unwrap()),
        "040526af58f573724a2933a2b53506caa20343e6b98573fd89e32eee820eb5958fe4797ce498fe8b86f114debf18daaf5e650ab48cec14927e95e71fac13af7697"
    );
}

#[test]
fn signatures_are_frozen_and_verify() {
    let roots = roots();
    let root = roots.k256_public_key();
    let key = roots.app_k256_key(&APP).ok().unwrap();
    let signature = sign_app_key(&roots, &APP, &key.public_key().unwrap());
    assert_eq!(
        hex::encode(signature.as_bytes()),
        "a93bc01ddc35701822022186d4b29d041fd964fa9ce068aeeefc1068cb3a7e87638d29d9a7e364588bfd27cff33eecc25397b3856e142e224dc8686eef6bb6a501"
    );
    verify_app_key(&root, &APP, &key, &signature).unwrap();

    let public = roots.env_crypt_key(&APP).ok().unwrap().public_key();
    let v0 = sign_env_public_key_v0(&roots, &APP, &public);
    assert_eq!(
        hex::encode(v0.as_bytes()),
        "cb1dfadae72b96ccd640f57c930c69957fc4e0efe38eb3e75c83e37ccf75634a3bf271f7eaf3c623eec729ca62c81f61ad309138dd5b0fe8988a7c818aa661df00"
    );
    verify_env_public_key_v0(&root, &APP, &public, &v0).unwrap();

    let v1 = sign_env_public_key_v1(&roots, &APP, 1_700_000_000, &public);
    assert_eq!(
        hex::encode(v1.as_bytes()),
        "63a9043a1f3fdf4c76a0a8c84f257c833f0a07c064084b063c2d04ea80d09d112a783a52b3c70a13bdf5571fcea501a1a387930c4cf16d1db2b966e5514d516e01"
    );
    verify_env_public_key_v1(&root, &APP, 1_700_000_000, &public, &v1).unwrap();
    let wrong_time = verify_env_public_key_v1(&root, &APP, 1_700_000_001, &public, &v1).unwrap_err();
    assert!(
        matches!(wrong_time, SignatureError::OtherKey { .. } | SignatureError::Malformed),
        "{wrong_time}"
    );
}

#[test]
fn a_signature_for_another_app_is_by_another_key() {
    let roots = roots();
    let key = roots.app_k256_key(&APP).ok().unwrap();
    let signature = sign_app_key(&roots, &APP, &key.public_key().unwrap());
    let error =
        verify_app_key(&roots.k256_public_key(), &AppId::new([0x12; 20]), &key, &signature).unwrap_err();
    assert!(matches!(error, SignatureError::OtherKey { .. }), "{error}");
}

#[test]
fn malformed_signatures_are_refused() {
    let roots = roots();
    let root = roots.k256_public_key();
    let key = roots.app_k256_key(&APP).ok().unwrap();
    let good = *sign_app_key(&roots, &APP, &key.public_key().unwrap()).as_bytes();
    let verify = |bytes: [u8; 65]| {
        verify_app_key(&root, &APP, &key, &Signature::from_slice(&bytes).unwrap()).unwrap_err()
    };

    let mut zero_r = good;
    zero_r[..32].fill(0);
    assert_eq!(verify(zero_r), SignatureError::Malformed);
    let mut zero_s = good;
    zero_s[32..64].fill(0);
    assert_eq!(verify(zero_s), SignatureError::Malformed);
    // Ethereum's 27 and 28 never appear in this protocol.
    let mut ethereum_id = good;
    ethereum_id[64] += 27;
    assert_eq!(verify(ethereum_id), SignatureError::Malformed);

    let signature = k256::ecdsa::Signature::from_slice(&good[..64]).unwrap();
    let (r, s) = signature.split_scalars();
    let high = k256::ecdsa::Signature::from_scalars(r, -s).unwrap();
    let mut high_s = good;
    high_s[..64].copy_from_slice(&high.to_bytes());
    high_s[64] ^= 1;
    assert_eq!(verify(high_s), SignatureError::Malformed);

    assert_eq!(Signature::from_slice(&good[..64]).unwrap_err(), SignatureError::Length(64));
}

#[test]
fn pkcs8_is_read_back_and_nothing_else_is() {
    let key = P256Scalar::from_slice(&bytes(ROOT_SCALAR)).unwrap();
    let der = key.to_pkcs8().unwrap();
    assert_eq!(P256Scalar::from_pkcs8(der.as_slice()).ok().unwrap().expose(), key.expose());
    for len in 0..der.len() {
        assert!(P256Scalar::from_pkcs8(&der[..len]).is_err(), "accepted a prefix of {len} bytes");
    }
    let mut other_point = **der;
    other_point[137] ^= 1;
    assert_eq!(P256Scalar::from_pkcs8(&other_point).err(), Some(Error::NotPkcs8 { what: "P-256 key" }));
}

#[test]
fn roots_that_are_no_scalars_are_refused() {
    let zero = || P256Scalar::from_slice(&[0; 32]).unwrap();
    let root = |byte| K256Root::from_slice(&[byte; 32]).unwrap();
    assert_eq!(RootKeys::new(zero(), root(0x42)).err(), Some(Error::NotAScalar { what: "P-256 key" }));
    let good = P256Scalar::from_slice(&bytes(ROOT_SCALAR)).unwrap();
    assert_eq!(RootKeys::new(good, root(0xFF)).err(), Some(Error::NotAScalar { what: "K256 root" }));
    assert_eq!(P256Scalar::from_slice(&[1; 31]).err(), Some(SecretLength { what: "P-256 key", actual: 31 }));
}
