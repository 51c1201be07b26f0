//! Writes X.509 certificates, right or wrong. A certificate library would refuse to make most of the wrong ones.

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P384_SHA384_ASN1_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, KeyPair,
};

pub(crate) const ECDSA_WITH_SHA256: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2];
pub(crate) const ECDSA_WITH_SHA384: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 3];
pub(crate) const EC_PUBLIC_KEY: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1];
pub(crate) const SECP256R1: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7];
pub(crate) const SECP384R1: &[u8] = &[0x2b, 0x81, 4, 0, 0x22];
pub(crate) const BASIC_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 19];
pub(crate) const KEY_USAGE: &[u8] = &[0x55, 0x1d, 15];
pub(crate) const EXTENDED_KEY_USAGE: &[u8] = &[0x55, 0x1d, 37];
pub(crate) const NAME_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 30];
pub(crate) const SERVER_AUTH: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 3, 1];
pub(crate) const CLIENT_AUTH: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 3, 2];

pub(crate) fn tlv(tag: u8, value: &[u8]) -> Vec<u8> {
    let len = value.len();
    let header = match len {
        0..0x80 => vec![tag, len as u8],
        0x80..0x100 => vec![tag, 0x81, len as u8],
        _ => vec![tag, 0x82, (len >> 8) as u8, len as u8],
    };
    [header, value.to_vec()].concat()
}

pub(crate) fn sequence(items: &[Vec<u8>]) -> Vec<u8> {
    tlv(0x30, &items.concat())
}

pub(crate) fn oid(body: &[u8]) -> Vec<u8> {
    tlv(6, body)
}

pub(crate) fn bit_string(bytes: &[u8]) -> Vec<u8> {
    tlv(3, &[&[0], bytes].concat())
}

/// `C=US, CN=...`, in the string types that AWS uses.
pub(crate) fn name(common: &str) -> Vec<u8> {
    let attribute =
        |kind: u8, tag, text: &str| tlv(0x31, &sequence(&[oid(&[0x55, 4, kind]), tlv(tag, text.as_bytes())]));
    sequence(&[attribute(6, 0x13, "US"), attribute(3, 0x0c, common)])
}

/// UTCTime of seconds since 1970.
pub(crate) fn utc_time(secs: u64) -> Vec<u8> {
    let (days, rest) = (secs / 86_400, secs % 86_400);
    let (mut year, mut day) = (1970, days);
    let leap = |year: u64| year.is_multiple_of(4); // no century other than 2000 is in reach
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while day >= lengths[month] {
        day -= lengths[month];
        month += 1;
    }
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    let text = format!("{:02}{:02}{:02}{hour:02}{minute:02}{second:02}Z", year % 100, month + 1, day + 1);
    tlv(0x17, text.as_bytes())
}

#[derive(Clone)]
pub(crate) struct Extension {
    pub(crate) oid: Vec<u8>,
    pub(crate) critical: bool,
    pub(crate) value: Vec<u8>,
}

impl Extension {
    pub(crate) fn new(oid: &[u8], critical: bool, value: Vec<u8>) -> Self {
        Self { oid: oid.into(), critical, value }
    }

    fn encode(&self) -> Vec<u8> {
        let critical = if self.critical { vec![1, 1, 0xff] } else { vec![] };
        sequence(&[oid(&self.oid), critical, tlv(4, &self.value)])
    }
}

pub(crate) fn basic_constraints(ca: bool, path_length: Option<u8>) -> Vec<u8> {
    let ca = if ca { vec![1, 1, 0xff] } else { vec![] };
    sequence(&[ca, path_length.map_or(vec![], |length| vec![2, 1, length])])
}

pub(crate) const DIGITAL_SIGNATURE: u8 = 0x80;
pub(crate) const KEY_CERT_SIGN: u8 = 0x04;
pub(crate) const CRL_SIGN: u8 = 0x02;

/// A BIT STRING of named bits, without trailing zero bits as DER has it.
pub(crate) fn key_usage(bits: u8) -> Vec<u8> {
    tlv(3, &[bits.trailing_zeros() as u8, bits])
}

/// Everything that goes into a certificate but the issuer's signature.
#[derive(Clone)]
pub(crate) struct Spec {
    pub(crate) version: Vec<u8>,
    pub(crate) serial: Vec<u8>,
    pub(crate) inner_algorithm: Vec<u8>,
    pub(crate) outer_algorithm: Vec<u8>,
    pub(crate) issuer: Vec<u8>,
    pub(crate) validity: [Vec<u8>; 2],
    pub(crate) subject: Vec<u8>,
    pub(crate) public_key: Vec<u8>,
    pub(crate) after_public_key: Vec<u8>,
    pub(crate) extensions: Vec<Extension>,
}

pub(crate) fn algorithm(identifier: &[u8]) -> Vec<u8> {
    sequence(&[oid(identifier)])
}

pub(crate) fn public_key_info(kind: &[u8], curve: &[u8], point: &[u8]) -> Vec<u8> {
    sequence(&[sequence(&[oid(kind), oid(curve)]), bit_string(point)])
}

impl Spec {
    pub(crate) fn new(issuer: &str, subject: &str, [not_before, not_after]: [u64; 2], point: &[u8]) -> Self {
        Self {
            version: tlv(0xa0, &[2, 1, 2]),
            serial: tlv(2, &[0, 0xf9, 0x31]),
            inner_algorithm: algorithm(ECDSA_WITH_SHA384),
            outer_algorithm: algorithm(ECDSA_WITH_SHA384),
            issuer: name(issuer),
            validity: [utc_time(not_before), utc_time(not_after)],
            subject: name(subject),
            public_key: public_key_info(EC_PUBLIC_KEY, SECP384R1, point),
            after_public_key: vec![],
            extensions: vec![],
        }
    }

    pub(crate) fn with(mut self, oid: &[u8], critical: bool, value: Vec<u8>) -> Self {
        self.extensions.push(Extension::new(oid, critical, value));
        self
    }

    pub(crate) fn without(mut self, oid: &[u8]) -> Self {
        self.extensions.retain(|extension| extension.oid != oid);
        self
    }

    pub(crate) fn tbs(&self) -> Vec<u8> {
        let extensions = match self.extensions.iter().map(Extension::encode).collect::<Vec<_>>() {
            none if none.is_empty() => vec![],
            some => tlv(0xa3, &sequence(&some)),
        };
        sequence(&[
            self.version.clone(),
            self.serial.clone(),
            self.inner_algorithm.clone(),
            self.issuer.clone(),
            sequence(&self.validity),
            self.subject.clone(),
            self.public_key.clone(),
            self.after_public_key.clone(),
            extensions,
        ])
    }

    pub(crate) fn issue(&self, key: &Key) -> Vec<u8> {
        let tbs = self.tbs();
        let signature = key.sign_der(&tbs);
        sequence(&[tbs, self.outer_algorithm.clone(), bit_string(&signature)])
    }
}

/// A P-384 key that signs certificates and documents.
pub(crate) struct Key {
    der: EcdsaKeyPair,
    fixed: EcdsaKeyPair,
}

impl Key {
    pub(crate) fn generate() -> Self {
        let rng = SystemRandom::new();
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P384_SHA384_ASN1_SIGNING, &rng).unwrap();
        let key = |signing| EcdsaKeyPair::from_pkcs8(signing, pkcs8.as_ref()).unwrap();
        Self { der: key(&ECDSA_P384_SHA384_ASN1_SIGNING), fixed: key(&ECDSA_P384_SHA384_FIXED_SIGNING) }
    }

    pub(crate) fn point(&self) -> &[u8] {
        self.der.public_key().as_ref()
    }

    pub(crate) fn sign_der(&self, message: &[u8]) -> Vec<u8> {
        self.der.sign(&SystemRandom::new(), message).unwrap().as_ref().to_vec()
    }

    pub(crate) fn sign_fixed(&self, message: &[u8]) -> Vec<u8> {
        self.fixed.sign(&SystemRandom::new(), message).unwrap().as_ref().to_vec()
    }
}
