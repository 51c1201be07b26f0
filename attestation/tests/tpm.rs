//! TPM quotes of a test CA: the good one, and each way to be wrong.

#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]

use attestation::UnixMillis;
use attestation::tpm::{Chain, Error, Event, TpmQuote, Verifier};
use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeyPair as RsaKeyPair, KeySize};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, RSA_PKCS1_SHA256};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};

const NOW: UnixMillis = UnixMillis::from_secs(1_767_225_600);

/// A root, an intermediate CA, and an attestation key.
struct Pki {
    root: Vec<u8>,
    intermediate: Vec<u8>,
    ak_cert: Vec<u8>,
    ak: AttestationKey,
}

enum AttestationKey {
    Ecdsa(EcdsaKeyPair),
    Rsa(RsaKeyPair),
}

fn ca(name: &str) -> CertificateParams {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

impl Pki {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let ak = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &key.serialize_der()).unwrap();
        Self::certify(&key, AttestationKey::Ecdsa(ak))
    }

    /// With the kind of attestation key that Google's virtual TPMs have by default.
    fn rsa() -> Self {
        let ak = RsaKeyPair::generate(KeySize::Rsa2048).unwrap();
        let key = ak.as_der().unwrap();
        let key = key.as_ref().into();
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&key, &rcgen::PKCS_RSA_SHA256).unwrap();
        Self::certify(&key, AttestationKey::Rsa(ak))
    }

    fn certify(certified: &KeyPair, ak: AttestationKey) -> Self {
        let root_key = KeyPair::generate().unwrap();
        let root_params = ca("root");
        let root = root_params.self_signed(&root_key).unwrap().der().to_vec();
        let root = (root, Issuer::new(root_params, root_key));
        let key = KeyPair::generate().unwrap();
        let params = ca("intermediate");
        let intermediate = params.signed_by(&key, &root.1).unwrap().der().to_vec();
        let issuer = Issuer::new(params, key);
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        // tcg-kp-EKCertificate
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::Other(vec![2, 23, 133, 8, 1])];
        let ak_cert = params.signed_by(certified, &issuer).unwrap().der().to_vec();
        Self { root: root.0, intermediate, ak_cert, ak }
    }

    fn verifier(&self) -> Verifier {
        Verifier::with_root(&self.root).unwrap()
    }

    fn chain(&self) -> Chain {
        Chain { intermediates: vec![self.intermediate.clone()], crls: Vec::new() }
    }

    /// A `TPMT_SIGNATURE` over the message.
    fn sign(&self, message: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        match &self.ak {
            AttestationKey::Ecdsa(key) => {
                let signature = key.sign(&random, message).unwrap();
                let (r, s) = signature.as_ref().split_at(32);
                [&[0x00, 0x18, 0x00, 0x0B, 0x00, 0x20], r, &[0x00, 0x20], s].concat()
            }
            AttestationKey::Rsa(key) => {
                let mut signature = vec![0; key.public_modulus_len()];
                key.sign(&RSA_PKCS1_SHA256, &random, message, &mut signature).unwrap();
                [&[0x00, 0x14, 0x00, 0x0B, 0x01, 0x00], signature.as_slice()].concat()
            }
        }
    }
}

fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    digest(&SHA256, &parts.concat()).as_ref().try_into().unwrap()
}

/// `TPMS_ATTEST` for PCR0 and PCR14.
fn attest(pcrs: &[[u8; 32]; 2]) -> Vec<u8> {
    let digest = sha256(&[&pcrs[0], &pcrs[1]]);
    [
        b"\xFFTCG\x80\x18\x00\x01q\x00\x04data".as_slice(),
        &[0; 25],
        &[0, 0, 0, 1, 0x00, 0x0B, 3, 0x01, 0x40, 0x00, 0x00, 0x20],
        &digest,
    ]
    .concat()
}

struct Owned {
    message: Vec<u8>,
    signature: Vec<u8>,
    pcrs: [[u8; 32]; 2],
    events: Vec<(u32, [u8; 32])>,
}

impl Owned {
    fn new(pki: &Pki) -> Self {
        let event = [7; 32];
        let pcrs = [[9; 32], sha256(&[&[0; 32], &event])];
        let message = attest(&pcrs);
        let signature = pki.sign(&message);
        Self { message, signature, pcrs, events: vec![(14, event)] }
    }

    fn parts<'a>(&'a self, pki: &'a Pki) -> TpmQuote<'a> {
        TpmQuote {
            message: &self.message,
            signature: &self.signature,
            pcrs: vec![(0, self.pcrs[0].as_slice()), (14, self.pcrs[1].as_slice())],
            ak_cert: &pki.ak_cert,
            events: self.events.iter().map(|(pcr, digest)| Event { pcr: *pcr, digest }).collect(),
        }
    }
}

#[test]
fn a_quote_under_the_root_verifies() {
    for pki in [Pki::new(), Pki::rsa()] {
        let quote = Owned::new(&pki);
        let verified = pki.verifier().verify(&quote.parts(&pki), &pki.chain(), NOW).unwrap();
        assert_eq!(verified.qualifying_data(), b"data");
        assert_eq!((verified.pcr(0), verified.pcr(14)), (Some(&quote.pcrs[0]), Some(&quote.pcrs[1])));
        assert_eq!(verified.pcr(1), None);
    }
}

#[test]
fn a_signature_of_another_key_kind_is_refused() {
    let (ecdsa, rsa) = (Pki::new(), Pki::rsa());
    let quotes = [Owned::new(&ecdsa), Owned::new(&rsa)];
    for (pki, other) in [(&ecdsa, &quotes[1]), (&rsa, &quotes[0])] {
        let error = pki.verifier().verify(&other.parts(pki), &pki.chain(), NOW).unwrap_err();
        assert_eq!(error.name(), "tpm-signature", "{error}");
    }
}

#[test]
fn each_wrong_part_is_named() {
    let (pki, other) = (Pki::new(), Pki::new());
    let quote = Owned::new(&pki);
    let refused = |quote: &TpmQuote<'_>, chain: &Chain, expected: &str| {
        let error = pki.verifier().verify(quote, chain, NOW).unwrap_err();
        assert_eq!(error.name(), expected, "{error}");
    };
    let good = quote.parts(&pki);
    let chain = pki.chain();
    refused(&TpmQuote { pcrs: good.pcrs[..1].to_vec(), ..good.clone() }, &chain, "tpm-pcr-selection");
    let swapped = vec![(0, quote.pcrs[1].as_slice()), (14, quote.pcrs[0].as_slice())];
    refused(&TpmQuote { pcrs: swapped, ..good.clone() }, &chain, "tpm-pcr-digest");
    let event = Event { pcr: 14, digest: &[8; 32] };
    refused(&TpmQuote { events: vec![event], ..good.clone() }, &chain, "tpm-event-log");
    refused(&TpmQuote { ak_cert: &other.ak_cert, ..good.clone() }, &chain, "tpm-signature");
    refused(&good, &Chain::default(), "tpm-chain");
    refused(&good, &other.chain(), "tpm-chain");
    let many = Chain { intermediates: vec![pki.intermediate.clone(); 5], ..Chain::default() };
    refused(&good, &many, "tpm-quote-too-large");
    let error = other.verifier().verify(&good, &chain, NOW).unwrap_err();
    assert_eq!(error.name(), "tpm-chain");
    assert!(matches!(Verifier::with_root(b"x"), Err(Error::Root { .. })));
    // Google's root has not issued this.
    assert_eq!(Verifier::default().verify(&good, &chain, NOW).unwrap_err().name(), "tpm-chain");
}

#[test]
fn every_truncation_and_every_flipped_bit_of_message_and_signature_is_rejected() {
    for pki in [Pki::new(), Pki::rsa()] {
        reject_changes(&pki);
    }
}

fn reject_changes(pki: &Pki) {
    let quote = Owned::new(pki);
    let good = quote.parts(pki);
    let (verifier, chain) = (pki.verifier(), pki.chain());
    for len in 0..quote.message.len() {
        let cut = TpmQuote { message: &quote.message[..len], ..good.clone() };
        assert!(verifier.verify(&cut, &chain, NOW).is_err(), "accepted {len} bytes of the message");
    }
    for len in 0..quote.signature.len() {
        let cut = TpmQuote { signature: &quote.signature[..len], ..good.clone() };
        let error = verifier.verify(&cut, &chain, NOW).unwrap_err();
        assert_eq!(error.name(), "tpm-signature", "{len} bytes of the signature");
    }
    for (position, bit) in (0..quote.message.len()).map(|position| (position, position % 8)) {
        let mut message = quote.message.clone();
        message[position] ^= 1 << bit;
        let changed = TpmQuote { message: &message, ..good.clone() };
        assert!(verifier.verify(&changed, &chain, NOW).is_err(), "accepted a change at {position}");
    }
    let trailing = [quote.message.as_slice(), &[0]].concat();
    let error = verifier.verify(&TpmQuote { message: &trailing, ..good }, &chain, NOW).unwrap_err();
    assert_eq!(error.name(), "tpm-attest-malformed");
}

#[test]
fn another_bank_is_refused() {
    let pki = Pki::new();
    let mut quote = Owned::new(&pki);
    let at = quote.message.windows(2).rposition(|pair| pair == [0x00, 0x0B]).unwrap();
    quote.message[at + 1] = 0x04;
    let error = pki.verifier().verify(&quote.parts(&pki), &pki.chain(), NOW).unwrap_err();
    assert_eq!(error, Error::Bank { actual: 0x0004 });
}
