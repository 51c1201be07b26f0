//! The local certificate chain: root, region, zone, instance and leaf, with the shape of AWS's and a root of our own.
//!
//! The root is made once and kept as long as the emulator lives. What is below it is made again when the leaf comes
//! close to its end, or when the clock has moved to where the chain is not valid.

use crate::Error;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P384_SHA384, SerialNumber, date_time_ymd,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use std::time::Duration;

/// CN of the local root. AWS's is `aws.nitro-enclaves`.
pub const ROOT_COMMON_NAME: &str = "keyferry-local.nitro-enclaves";
/// Where the emulated module claims to be; the names of AWS's chain have a region in this place.
const REGION: &str = "local-1";

const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;
/// Real leaves begin this long before the document that needed them.
const LEAF_BACKDATE: u64 = 3;
const LEAF_LIFETIME: u64 = 3 * HOUR;
/// A leaf with less time left is replaced.
const LEAF_RENEWAL: u64 = 600;

/// 2020-01-01 and 2049-12-31, the validity of the local root, in seconds since 1970.
const ROOT_VALIDITY: std::ops::Range<u64> = 1_577_836_800..2_524_521_600;

/// A root that signs the chains below it.
pub(crate) struct Root {
    der: Vec<u8>,
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// What signs documents, and the certificates that go into them.
pub(crate) struct Leaf {
    key: EcdsaKeyPair,
    /// DER of the leaf certificate.
    pub(crate) certificate: Vec<u8>,
    /// DER, in AWS's order: root, region, zone, instance.
    pub(crate) cabundle: Vec<Vec<u8>>,
    not_before: u64,
    not_after: u64,
}

impl Root {
    pub(crate) fn generate() -> Result<Self, Error> {
        let what = "root";
        let mut params = params(what, ROOT_COMMON_NAME, ROOT_VALIDITY.start, ROOT_VALIDITY.end)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = ca_usages();
        params.use_authority_key_identifier_extension = false;
        let key = key(what)?;
        let certificate = params.self_signed(&key).map_err(|source| Error::Pki { what, source })?;
        let (der, pem) = (certificate.der().to_vec(), certificate.pem());
        Ok(Self { der, pem, issuer: Issuer::new(params, key) })
    }

    /// A root that was made before, from its certificate and key.
    pub(crate) fn from_pem(certificate: &str, key: &str) -> Result<Self, Error> {
        let what = "root";
        let wrong = |source| Error::Pki { what, source };
        let der = CertificateDer::from_pem_slice(certificate.as_bytes()).map_err(|_| Error::RootPem)?;
        let issuer = Issuer::from_ca_cert_der(&der, KeyPair::from_pem(key).map_err(wrong)?).map_err(wrong)?;
        Ok(Self { der: der.to_vec(), pem: certificate.to_owned(), issuer })
    }

    /// The key, for whoever keeps this root.
    pub(crate) fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    pub(crate) fn der(&self) -> &[u8] {
        &self.der
    }

    pub(crate) fn pem(&self) -> String {
        self.pem.clone()
    }

    /// A fresh chain for `module_id` that is valid at `now` (seconds since 1970).
    pub(crate) fn issue(&self, module_id: &str, now: u64) -> Result<Leaf, Error> {
        let margin = ROOT_VALIDITY.start + DAY..ROOT_VALIDITY.end - 30 * DAY;
        if !margin.contains(&now) {
            return Err(Error::Clock { millis: now.saturating_mul(1000) });
        }
        let instance_id = module_id.split("-enc").next().unwrap_or(module_id);
        let region = authority(
            ("region", &format!("{}.{REGION}.{ROOT_COMMON_NAME}", random_label()?)),
            now - HOUR..now + 20 * DAY,
            2,
            &self.issuer,
        )?;
        let zone = authority(
            ("zone", &format!("{}.zonal.{REGION}.{ROOT_COMMON_NAME}", random_label()?)),
            now - HOUR..now + 6 * DAY,
            1,
            &region,
        )?;
        let instance = authority(
            ("instance", &format!("{instance_id}.{REGION}.{ROOT_COMMON_NAME}")),
            now - HOUR..now + DAY,
            0,
            &zone,
        )?;

        let what = "leaf";
        let (not_before, not_after) = (now - LEAF_BACKDATE, now + LEAF_LIFETIME);
        let name = format!("{module_id}.{REGION}.keyferry-local");
        let mut params = params(what, &name, not_before, not_after)?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::ContentCommitment];
        let leaf_key = key(what)?;
        let certificate =
            params.signed_by(&leaf_key, &instance).map_err(|source| Error::Pki { what, source })?;
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P384_SHA384_FIXED_SIGNING, leaf_key.serialized_der())
            .map_err(|_| Error::Sign)?;
        Ok(Leaf {
            key,
            certificate: certificate.der().to_vec(),
            cabundle: [self.der(), region.der(), zone.der(), instance.der()].map(<[u8]>::to_vec).to_vec(),
            not_before,
            not_after,
        })
    }
}

impl Leaf {
    /// Whether a document made at `now` (seconds since 1970) should be signed by this leaf.
    pub(crate) fn serves(&self, now: u64) -> bool {
        self.not_before <= now && now + LEAF_RENEWAL < self.not_after
    }

    /// ECDSA with SHA-384 over `message`, as r and s of 48 bytes each.
    pub(crate) fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        let signature = self.key.sign(&SystemRandom::new(), message).map_err(|_| Error::Sign)?;
        Ok(signature.as_ref().to_vec())
    }
}

/// A certification authority named `name` that allows `path_length` further ones below it.
fn authority(
    (what, name): (&'static str, &str),
    validity: std::ops::Range<u64>,
    path_length: u8,
    issuer: &Issuer<'static, KeyPair>,
) -> Result<CertifiedIssuer<'static, KeyPair>, Error> {
    let mut params = params(what, name, validity.start, validity.end)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_length));
    // The instance's authority may sign certificates and nothing else; those above it also sign revocation lists.
    params.key_usages = if path_length == 0 { vec![KeyUsagePurpose::KeyCertSign] } else { ca_usages() };
    CertifiedIssuer::signed_by(params, key(what)?, issuer).map_err(|source| Error::Pki { what, source })
}

fn ca_usages() -> Vec<KeyUsagePurpose> {
    vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign]
}

fn key(what: &'static str) -> Result<KeyPair, Error> {
    KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).map_err(|source| Error::Pki { what, source })
}

fn params(
    what: &'static str,
    common_name: &str,
    not_before: u64,
    not_after: u64,
) -> Result<CertificateParams, Error> {
    let mut params = CertificateParams::new(Vec::new()).map_err(|source| Error::Pki { what, source })?;
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, "Keyferry");
    name.push(DnType::OrganizationalUnitName, "Local");
    name.push(DnType::CommonName, common_name);
    params.distinguished_name = name;
    let epoch = date_time_ymd(1970, 1, 1);
    params.not_before = epoch + Duration::from_secs(not_before);
    params.not_after = epoch + Duration::from_secs(not_after);
    params.serial_number = Some(SerialNumber::from_slice(&random::<16>()?));
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// 16 hexadecimal digits, where AWS has a UUID or a hash.
fn random_label() -> Result<String, Error> {
    Ok(random::<8>()?.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// `N` random bytes from the operating system.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| Error::Random)?;
    Ok(bytes)
}
