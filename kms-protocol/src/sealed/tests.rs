//! The vectors of docs/sealed-release.md, and the life of a nonce.

use proptest::prelude::*;

use super::*;
use crate::derive::{
    K256Root, P256Scalar, RootKeys, Signature, SignatureError, sign_sealed_app_keys, verify_sealed_app_keys,
};
use crate::vectors;

const PUBLIC_KEY: &str = "1cf579aba45a10ba1d1ef06d91fca2aa9ed0a1150515653155405d0b18cb9a67";
const ENC: &str = "38ab664bd86f77d7e66bdd9ae0792913a94fd8b33a1260027e4b46c1f4884c67";
const CIPHERTEXT: &str =
    "318a552e4e66becf65ec2189c58491d47a458856dba3b8cd4db6ecd9e98296910abe217c5f086927610ce0ea3c";

/// The inputs of the vectors: root keys as everywhere in this crate.
struct Vector {
    roots: RootKeys,
    nonce: [u8; 32],
    public_key: [u8; 32],
    app_id: AppId,
    instance_id: InstanceId,
    exporter: Exporter,
}

impl Vector {
    fn new() -> Self {
        let scalar = P256Scalar::from_slice(&vectors::bytes(vectors::ROOT_SCALAR)).unwrap();
        Self {
            roots: RootKeys::new(scalar, K256Root::from_slice(&[0x42; 32]).unwrap()).unwrap(),
            nonce: [0xa1; 32],
            // Of the X25519 private key 32 times 0x77.
            public_key: vectors::bytes(PUBLIC_KEY).try_into().unwrap(),
            app_id: AppId::new([0x11; 20]),
            instance_id: InstanceId::NONE,
            exporter: Exporter([0xee; 32]),
        }
    }

    fn commitment(&self) -> Commitment {
        Binding {
            nonce: &self.nonce,
            public_key: &self.public_key,
            app_id: &self.app_id,
            instance_id: &self.instance_id,
            root_ca_spki: &vectors::bytes(vectors::ROOT_SPKI),
            root_k256: &self.roots.k256_public_key(),
            exporter: &self.exporter,
        }
        .commitment()
    }
}

/// Frozen, and made a second time by an independent program: fix the code, not the vector.
#[test]
fn the_commitment_is_the_frozen_one() {
    let mut vector = Vector::new();
    assert_eq!(
        hex::encode(vector.commitment().as_bytes()),
        "f4694e755cebc2c23b2425a3ff341e12369881bacf5a626794240fe07e6bfb35"
    );
    let info = vector.commitment().hpke_info();
    assert_eq!(
        info,
        [b"keyferry sealed release v1: app keys", vector.commitment().as_bytes().as_slice()].concat()
    );
    vector.instance_id = InstanceId::new([0x33; 20]);
    assert_eq!(
        hex::encode(vector.commitment().as_bytes()),
        "953ca8b07a81f364bbc791f11a07eed50954d33c1bad0b7555efe80ea4de412f"
    );
}

/// Frozen: fix the code, not the vector.
#[test]
fn the_signature_is_the_frozen_one_and_covers_every_part() {
    let vector = Vector::new();
    let (commitment, root) = (vector.commitment(), vector.roots.k256_public_key());
    let enc: [u8; 32] = vectors::bytes(ENC).try_into().unwrap();
    let ciphertext = &vectors::bytes(CIPHERTEXT);
    let signature = sign_sealed_app_keys(&vector.roots, &commitment, &enc, ciphertext);
    assert_eq!(
        hex::encode(signature.as_bytes()),
        "68cbfdb6241b9cc477d9d09a2dd0f8fb0af6039657337d6a17d74fc17386a7a26a33c9c0bd7b4c78bfab0b33e509963dd22cc9e89b3b256c9514709664e07df101"
    );
    verify_sealed_app_keys(&root, &commitment, &enc, ciphertext, &signature).unwrap();

    let other = |result: Result<(), SignatureError>| {
        assert!(matches!(result, Err(SignatureError::OtherKey { .. })), "{result:?}");
    };
    let mut changed = Vector::new();
    changed.nonce[31] ^= 1;
    other(verify_sealed_app_keys(&root, &changed.commitment(), &enc, ciphertext, &signature));
    other(verify_sealed_app_keys(&root, &commitment, &[0xcd; 32], ciphertext, &signature));
    other(verify_sealed_app_keys(&root, &commitment, &enc, &ciphertext[1..], &signature));
    let impostor =
        RootKeys::new(P256Scalar::from_slice(&[1; 32]).unwrap(), K256Root::from_slice(&[2; 32]).unwrap())
            .unwrap();
    let forged = sign_sealed_app_keys(&impostor, &commitment, &enc, ciphertext);
    other(verify_sealed_app_keys(&root, &commitment, &enc, ciphertext, &forged));
    for cut in 0..Signature::LEN {
        let error = Signature::from_slice(&signature.as_bytes()[..cut]).unwrap_err();
        assert_eq!(error, SignatureError::Length(cut));
    }
}

#[test]
fn every_field_changes_the_commitment() {
    let honest = Vector::new().commitment();
    let k256 = Vector::new().roots.k256_public_key();
    let other_k256 =
        RootKeys::new(P256Scalar::from_slice(&[1; 32]).unwrap(), K256Root::from_slice(&[2; 32]).unwrap())
            .unwrap()
            .k256_public_key();
    let vector = Vector::new();
    let spki = vectors::bytes(vectors::ROOT_SPKI);
    let base = Binding {
        nonce: &vector.nonce,
        public_key: &vector.public_key,
        app_id: &vector.app_id,
        instance_id: &vector.instance_id,
        root_ca_spki: &spki,
        root_k256: &k256,
        exporter: &vector.exporter,
    };
    assert_eq!(base.commitment(), honest);
    let app = AppId::new([0x12; 20]);
    let instance = InstanceId::new([0; 20]);
    let changes = [
        Binding { nonce: &[0; 32], ..base },
        Binding { public_key: &[0; 32], ..base },
        Binding { app_id: &app, ..base },
        Binding { instance_id: &instance, ..base },
        Binding { root_ca_spki: &spki[..90], ..base },
        Binding { root_k256: &other_k256, ..base },
        Binding { exporter: &Exporter([0; 32]), ..base },
        // Two neighbours exchanged.
        Binding { nonce: &vector.public_key, public_key: &vector.nonce, ..base },
    ];
    let mut seen = vec![honest];
    for change in changes {
        let commitment = change.commitment();
        assert!(!seen.contains(&commitment), "{change:?}");
        seen.push(commitment);
    }
}

const NOW: Duration = Duration::from_secs(1_700_000_000);

#[test]
fn a_nonce_is_good_once() {
    let mut challenges = Challenges::default();
    challenges.issue([1; 32], NOW);
    assert_eq!(challenges.redeem(&[2; 32], NOW), Err(ChallengeError::Unknown));
    assert_eq!(challenges.redeem(&[1; 31], NOW), Err(ChallengeError::Unknown));
    assert_eq!(challenges.redeem(&[], NOW), Err(ChallengeError::Unknown));
    assert_eq!(challenges.redeem(&[1; 32], NOW).unwrap().as_bytes(), &[1; 32]);
    assert_eq!(challenges.redeem(&[1; 32], NOW), Err(ChallengeError::Unknown));
}

#[test]
fn a_nonce_dies_after_its_lifetime_and_when_the_clock_goes_back() {
    for (redeemed, good) in [
        (NOW, true),
        (NOW + NONCE_LIFETIME, true),
        (NOW + NONCE_LIFETIME + Duration::from_millis(1), false),
        (NOW - Duration::from_millis(1), false),
        (Duration::ZERO, false),
    ] {
        let mut challenges = Challenges::default();
        challenges.issue([1; 32], NOW);
        let result = challenges.redeem(&[1; 32], redeemed);
        assert_eq!(result.is_ok(), good, "{redeemed:?}: {result:?}");
        // Dead or alive, it was taken out.
        assert_eq!(challenges.redeem(&[1; 32], NOW), Err(ChallengeError::Unknown));
    }
}

#[test]
fn one_more_challenge_replaces_the_oldest_of_its_own_connection() {
    let (mut greedy, mut neighbour) = (Challenges::default(), Challenges::default());
    neighbour.issue([9; 32], NOW);
    for nonce in 0..=u8::try_from(MAX_OPEN_CHALLENGES).unwrap() {
        greedy.issue([nonce; 32], NOW);
    }
    assert_eq!(greedy.len(), MAX_OPEN_CHALLENGES);
    assert_eq!(greedy.redeem(&[0; 32], NOW), Err(ChallengeError::Unknown));
    assert!(greedy.redeem(&[1; 32], NOW).is_ok());
    assert!(neighbour.redeem(&[9; 32], NOW).is_ok());
    assert!(neighbour.is_empty());
}

proptest! {
    /// Whatever is asked in whatever order: never more than the bound, never twice, never late.
    #[test]
    fn the_store_keeps_its_promises(steps in proptest::collection::vec((any::<bool>(), 0_u8..12, 0_u64..90), 0..200)) {
        let mut challenges = Challenges::default();
        let mut issued = std::collections::HashMap::new();
        let mut now = NOW;
        let mut next = 0_u8;
        for (issue, which, pause) in steps {
            if issue {
                challenges.issue([next; 32], now);
                issued.insert(next, now);
                next = next.wrapping_add(1);
            } else {
                let nonce = next.wrapping_sub(which);
                let result = challenges.redeem(&[nonce; 32], now);
                if result.is_ok() {
                    let at = issued.remove(&nonce);
                    prop_assert!(at.is_some_and(|at| now - at <= NONCE_LIFETIME));
                }
            }
            prop_assert!(challenges.len() <= MAX_OPEN_CHALLENGES);
            now += Duration::from_secs(pause);
        }
    }
}
