//! A PKI shaped like AWS's and an NSM that signs whatever it is told to. What it makes goes through the production path,
//! with its root as the trust anchor.

#![allow(dead_code, reason = "each test binary uses a part of it")]

pub(crate) mod cbor;
pub(crate) mod x509;

use std::collections::BTreeSet;

use attestation::{Error, TrustAnchor, UnixMillis, VerifiedDocument, Verifier};
use x509::{CRL_SIGN, DIGITAL_SIGNATURE, KEY_CERT_SIGN, Key, Spec, basic_constraints, key_usage};

/// 2026-01-15T12:00:00Z.
pub(crate) const NOW: u64 = 1_768_478_400;

const DAY: u64 = 86_400;

/// Names and lifetimes of AWS's chain; the index is the place in the chain.
const LEVELS: [(&str, u64, u64); 5] = [
    ("test.nitro-enclaves", 2000 * DAY, 5000 * DAY),
    ("region.test.nitro-enclaves", 5 * DAY, 15 * DAY),
    ("zone.region.test.nitro-enclaves", DAY, 5 * DAY),
    ("i-0123456789abcdef0.test.nitro-enclaves", 3600, DAY),
    ("i-0123456789abcdef0-enc0123456789abcdef.test", 3, 3 * 3600),
];

pub(crate) const ROOT: usize = 0;
pub(crate) const REGION: usize = 1;
pub(crate) const ZONE: usize = 2;
pub(crate) const INSTANCE: usize = 3;
pub(crate) const LEAF: usize = 4;

pub(crate) struct World {
    pub(crate) keys: [Key; 5],
    pub(crate) stranger: Key,
    pub(crate) specs: [Spec; 5],
}

impl World {
    pub(crate) fn new() -> Self {
        let keys: [Key; 5] = std::array::from_fn(|_| Key::generate());
        let specs = std::array::from_fn(|level| {
            let (subject, before, after) = LEVELS[level];
            let issuer = LEVELS[level.saturating_sub(1)].0;
            let spec = Spec::new(issuer, subject, [NOW - before, NOW + after], keys[level].point());
            let (constraints, usage) = match level {
                ROOT => (basic_constraints(true, None), DIGITAL_SIGNATURE | KEY_CERT_SIGN | CRL_SIGN),
                LEAF => (basic_constraints(false, None), DIGITAL_SIGNATURE | 0x40),
                level => (basic_constraints(true, Some(3 - level as u8)), KEY_CERT_SIGN),
            };
            spec.with(x509::BASIC_CONSTRAINTS, true, constraints).with(
                x509::KEY_USAGE,
                level != LEAF,
                key_usage(usage),
            )
        });
        Self { keys, stranger: Key::generate(), specs }
    }

    /// The certificate of a level, signed by the level above.
    pub(crate) fn issue(&self, level: usize, spec: &Spec) -> Vec<u8> {
        spec.issue(&self.keys[level.saturating_sub(1)])
    }

    pub(crate) fn chain(&self) -> [Vec<u8>; 5] {
        std::array::from_fn(|level| self.issue(level, &self.specs[level]))
    }

    /// The chain with one certificate changed before it is signed. A changed name goes into the issuer below it too.
    pub(crate) fn chain_with(&self, level: usize, change: impl FnOnce(&mut Spec)) -> [Vec<u8>; 5] {
        let mut specs = self.specs.clone();
        change(&mut specs[level]);
        std::array::from_fn(|level| self.issue(level, &specs[level]))
    }

    /// Another chain under a root that exists.
    pub(crate) fn chain_below(&self, root: &[u8]) -> [Vec<u8>; 5] {
        let mut chain = self.chain();
        chain[ROOT] = root.to_vec();
        chain
    }

    /// A document of an honest enclave, under a root made for it.
    pub(crate) fn document(&self) -> Document<'_> {
        Document::new(self, self.chain())
    }

    pub(crate) fn document_with(&self, chain: [Vec<u8>; 5]) -> Document<'_> {
        Document::new(self, chain)
    }

    /// Verifies at [`NOW`] under the root of the evidence, without and with a cache.
    pub(crate) fn verify(&self, evidence: &Evidence) -> Result<VerifiedDocument, Error> {
        self.verify_at(evidence, UnixMillis::from_secs(NOW))
    }

    pub(crate) fn verify_at(&self, evidence: &Evidence, now: UnixMillis) -> Result<VerifiedDocument, Error> {
        let anchor = TrustAnchor::from_der(&evidence.root).unwrap();
        let cached = Verifier::new(anchor.clone()).with_chain_cache(2.try_into().unwrap());
        let verdict = Verifier::new(anchor).verify(&evidence.bytes, now);
        assert_eq!(verdict, cached.verify(&evidence.bytes, now), "an empty cache changes the verdict");
        assert_eq!(verdict, cached.verify(&evidence.bytes, now), "a full cache changes the verdict");
        verdict
    }
}

/// What an attester sends, and the root it should be judged by.
#[derive(Clone)]
pub(crate) struct Evidence {
    pub(crate) bytes: Vec<u8>,
    pub(crate) root: Vec<u8>,
}

/// A document before it is encoded and signed: fields as encoded CBOR, in order.
#[derive(Clone)]
pub(crate) struct Document<'a> {
    pub(crate) world: &'a World,
    pub(crate) fields: Vec<(Vec<u8>, Vec<u8>)>,
    pub(crate) root: Vec<u8>,
    pub(crate) signer: &'a Key,
}

pub(crate) type Entry = (Vec<u8>, Vec<u8>);

pub(crate) fn pcr_entries(indices: impl IntoIterator<Item = u64>) -> Vec<Entry> {
    indices.into_iter().map(|index| (cbor::uint(index), cbor::bytes(&[index as u8 + 1; 48]))).collect()
}

impl<'a> Document<'a> {
    fn new(world: &'a World, chain: [Vec<u8>; 5]) -> Self {
        let field = |key, value| (cbor::text(key), value);
        let bundle: Vec<_> = chain[..LEAF].iter().map(|der| cbor::bytes(der)).collect();
        let fields = vec![
            field("module_id", cbor::text("i-0123456789abcdef0-enc0123456789abcdef")),
            field("digest", cbor::text("SHA384")),
            field("timestamp", cbor::uint(NOW * 1000)),
            field("pcrs", cbor::map(&pcr_entries(0..16))),
            field("certificate", cbor::bytes(&chain[LEAF])),
            field("cabundle", cbor::array(&bundle)),
            field("public_key", cbor::bytes(b"key")),
            field("user_data", cbor::bytes(b"data")),
            field("nonce", cbor::NULL.to_vec()),
        ];
        Self { world, fields, root: chain[ROOT].clone(), signer: &world.keys[LEAF] }
    }

    pub(crate) fn set(mut self, key: &str, value: Vec<u8>) -> Self {
        let key = cbor::text(key);
        let field = self.fields.iter_mut().find(|field| field.0 == key).unwrap();
        field.1 = value;
        self
    }

    pub(crate) fn value(&self, key: &str) -> Vec<u8> {
        let key = cbor::text(key);
        self.fields.iter().find(|field| field.0 == key).unwrap().1.clone()
    }

    pub(crate) fn without(mut self, key: &str) -> Self {
        let key = cbor::text(key);
        self.fields.retain(|field| field.0 != key);
        self
    }

    pub(crate) fn add(mut self, key: Vec<u8>, value: Vec<u8>) -> Self {
        self.fields.push((key, value));
        self
    }

    pub(crate) fn payload(&self) -> Vec<u8> {
        cbor::map(&self.fields)
    }

    pub(crate) fn sign(&self) -> Evidence {
        self.sign_payload(&self.payload())
    }

    pub(crate) fn sign_payload(&self, payload: &[u8]) -> Evidence {
        self.cose(payload).encode()
    }

    pub(crate) fn cose(&self, payload: &[u8]) -> Cose {
        self.cose_with(&PROTECTED, payload)
    }

    /// A structure whose signature covers this protected header and payload.
    pub(crate) fn cose_with(&self, protected: &[u8], payload: &[u8]) -> Cose {
        let signed = cbor::array(&[
            cbor::text("Signature1"),
            cbor::bytes(protected),
            cbor::bytes(b""),
            cbor::bytes(payload),
        ]);
        Cose {
            protected: cbor::bytes(protected),
            unprotected: vec![0xa0],
            payload: cbor::bytes(payload),
            signature: self.signer.sign_fixed(&signed),
            root: self.root.clone(),
        }
    }
}

/// `{1: -35}`
pub(crate) const PROTECTED: [u8; 4] = [0xa1, 0x01, 0x38, 0x22];

/// The items of COSE_Sign1, all but the signature encoded.
#[derive(Clone)]
pub(crate) struct Cose {
    pub(crate) protected: Vec<u8>,
    pub(crate) unprotected: Vec<u8>,
    pub(crate) payload: Vec<u8>,
    pub(crate) signature: Vec<u8>,
    pub(crate) root: Vec<u8>,
}

impl Cose {
    pub(crate) fn items(&self) -> Vec<Vec<u8>> {
        let signature = cbor::bytes(&self.signature);
        vec![self.protected.clone(), self.unprotected.clone(), self.payload.clone(), signature]
    }

    pub(crate) fn encode(&self) -> Evidence {
        self.evidence(cbor::array(&self.items()))
    }

    pub(crate) fn evidence(&self, bytes: Vec<u8>) -> Evidence {
        Evidence { bytes, root: self.root.clone() }
    }
}

/// What is wrong, the name of its refusal, the evidence.
pub(crate) type Case = (String, &'static str, Evidence);

#[derive(Default)]
pub(crate) struct Cases(Vec<Case>);

impl Cases {
    pub(crate) fn add(&mut self, what: impl Into<String>, refusal: &'static str, evidence: Evidence) {
        self.0.push((what.into(), refusal, evidence));
    }

    /// Every case must be refused, and for its own reason.
    pub(crate) fn check(self, world: &World, at_least: usize) {
        let names: BTreeSet<_> = self.0.iter().map(|(what, ..)| what.as_str()).collect();
        assert_eq!(names.len(), self.0.len(), "two cases have one name");
        assert!(self.0.len() >= at_least, "{} cases", self.0.len());
        let wrong: Vec<_> = self
            .0
            .iter()
            .filter_map(|(what, refusal, evidence)| {
                let verdict = world.verify(evidence).map_err(|error| error.name());
                (verdict.as_ref().err() != Some(refusal))
                    .then(|| format!("{what}: {:?}, expected {refusal}", verdict.map(|_| "accepted")))
            })
            .collect();
        assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), names.len(), wrong.join("\n"));
    }
}
