//! Issues the certificates of the protocol (kms-protocol §3.3, §3.4, §7.5).

use std::net::IpAddr;

use kms_protocol::AppId;
use kms_protocol::cert::{Extension, Usage, wrap};
use kms_protocol::derive::P256Scalar;
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType, DnValue,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
    SigningKey as _, SubjectPublicKeyInfo,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime};
use sha2::{Digest, Sha256};
use time::{Duration, OffsetDateTime};
use zeroize::Zeroizing;

use crate::Error;
use crate::client::one_certificate;

/// How long certificates are valid.
const LIFETIME: Duration = Duration::days(3650);
/// 1975-01-01T00:00:00Z, before any clock that a CVM or enclave may start with.
const NOT_BEFORE: i64 = 157_766_400;
const ORGANISATION: &str = "Dstack";

/// A P-256 key pair.
pub struct KeyPair(rcgen::KeyPair);

impl KeyPair {
    /// A fresh key.
    ///
    /// # Errors
    /// [`Error::Key`] when the system has no randomness to give.
    pub fn generate() -> Result<Self, Error> {
        rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)
            .map(Self)
            .map_err(|source| Error::Key { what: "fresh key", source })
    }

    /// Reads PKCS#8 PEM.
    ///
    /// # Errors
    /// [`Error::Key`].
    pub fn from_pem(what: &'static str, pem: &str) -> Result<Self, Error> {
        rcgen::KeyPair::from_pkcs8_pem_and_sign_algo(pem, &rcgen::PKCS_ECDSA_P256_SHA256)
            .map(Self)
            .map_err(|source| Error::Key { what, source })
    }

    /// Takes a derived or stored scalar.
    ///
    /// # Errors
    /// [`Error::Key`].
    pub fn from_scalar(what: &'static str, scalar: &P256Scalar) -> Result<Self, Error> {
        let invalid = |source| Error::Key { what, source };
        let der = scalar.to_pkcs8().map_err(|_| invalid(rcgen::Error::CouldNotParseKeyPair))?;
        let der = PrivatePkcs8KeyDer::from(der.as_slice());
        rcgen::KeyPair::from_pkcs8_der_and_sign_algo(&der, &rcgen::PKCS_ECDSA_P256_SHA256)
            .map(Self)
            .map_err(invalid)
    }

    /// PKCS#8 PEM.
    #[must_use]
    pub fn to_pem(&self) -> Zeroizing<String> {
        Zeroizing::new(self.0.serialize_pem())
    }

    /// PKCS#8 DER, as rustls takes it (which wipes it).
    #[must_use]
    pub fn private_key_der(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.0.serialize_der()))
    }

    /// SubjectPublicKeyInfo, DER.
    #[must_use]
    pub fn spki_der(&self) -> Vec<u8> {
        self.0.subject_public_key_info()
    }

    /// An ECDSA signature over SHA-256 of `message`, ASN.1 DER.
    ///
    /// # Errors
    /// [`Error::Key`] when the system has no randomness to give.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        self.0.sign(message).map_err(|source| Error::Key { what: "signing key", source })
    }
}

/// An issued certificate.
#[derive(Debug, Clone)]
pub struct Certificate(rcgen::Certificate);

impl Certificate {
    /// DER.
    #[must_use]
    pub fn der(&self) -> &CertificateDer<'static> {
        self.0.der()
    }

    /// PEM.
    #[must_use]
    pub fn pem(&self) -> String {
        self.0.pem()
    }
}

/// A CA: its certificate and key.
pub struct Ca {
    what: &'static str,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
    certificate: CertificateDer<'static>,
}

impl Ca {
    /// A CA from its certificate and key in PEM.
    ///
    /// # Errors
    /// [`Error::KeyMismatch`] when the two do not belong together; [`Error::Pem`], [`Error::PemCount`],
    /// [`Error::Key`], [`Error::Certificate`], [`Error::Issue`].
    pub fn from_pem(what: &'static str, certificate: &str, key: &str) -> Result<Self, Error> {
        Self::new(what, one_certificate(certificate, what)?, KeyPair::from_pem(what, key)?)
    }

    /// A CA from its certificate and key.
    ///
    /// # Errors
    /// See [`Self::from_pem`].
    pub fn new(
        what: &'static str,
        certificate: CertificateDer<'static>,
        key: KeyPair,
    ) -> Result<Self, Error> {
        let spki = kms_protocol::cert::spki_der(&certificate)
            .map_err(|source| Error::Certificate { what, source })?;
        if spki != key.spki_der() {
            return Err(Error::KeyMismatch { what });
        }
        let issuer = rcgen::Issuer::from_ca_cert_der(&certificate, key.0)
            .map_err(|source| Error::Issue { what, source })?;
        Ok(Self { what, issuer, certificate })
    }

    /// Its certificate.
    #[must_use]
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    fn issue(
        &self,
        what: &'static str,
        params: &CertificateParams,
        key: &impl PublicKeyData,
    ) -> Result<Certificate, Error> {
        params.signed_by(key, &self.issuer).map(Certificate).map_err(|source| Error::Issue { what, source })
    }
}

impl std::fmt::Debug for Ca {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ca({})", self.what)
    }
}

/// What a certificate of an app is for (`SignCert`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AppLeaf {
    /// SubjectPublicKeyInfo of the key to certify, DER.
    pub spki_der: Vec<u8>,
    /// `O` of the subject.
    pub organisation: Option<String>,
    /// `CN` of the subject.
    pub subject: String,
    /// DNS names and IP addresses as text.
    pub names: Vec<String>,
    /// Whether a server may use it.
    pub server_auth: bool,
    /// Whether a client may use it.
    pub client_auth: bool,
    /// Encoded app info to put into it.
    pub app_info: Option<Vec<u8>>,
    /// Encoded attestation to put into it.
    pub attestation: Option<Vec<u8>>,
    /// Start of its validity, seconds since the epoch; by default 1975.
    pub not_before: Option<u64>,
    /// End of its validity, seconds since the epoch; by default ten years from now.
    pub not_after: Option<u64>,
}

/// Issues the root CA's certificate.
///
/// # Errors
/// [`Error::Issue`], [`Error::Time`].
pub fn root_ca(key: &KeyPair, now: UnixTime) -> Result<Certificate, Error> {
    self_signed("root CA", &ca_params(&key.0, "Dstack KMS CA", 1, now)?, key)
}

/// Issues the temp CA's certificate.
///
/// # Errors
/// [`Error::Issue`], [`Error::Time`].
pub fn temp_ca(key: &KeyPair, now: UnixTime) -> Result<Certificate, Error> {
    self_signed("temp CA", &ca_params(&key.0, "Dstack Client Temp CA", 0, now)?, key)
}

/// Issues the certificate of the KMS's listener: for one domain (or IP address), with usage `kms:rpc`, and with the
/// encoded attestation if there is one.
///
/// # Errors
/// [`Error::Issue`], [`Error::Time`].
pub fn rpc_leaf(
    root: &Ca,
    key: &KeyPair,
    domain: &str,
    attestation: Option<&[u8]>,
    now: UnixTime,
) -> Result<Certificate, Error> {
    let mut params = leaf_params(&key.0, &[(DnType::CommonName, domain)], now)?;
    params.subject_alt_names = vec![alt_name("RPC certificate", domain)?];
    params.custom_extensions.push(extension(Extension::Usage, Usage::KmsRpc.as_str().as_bytes()));
    params.custom_extensions.extend(attestation.map(|bytes| extension(Extension::Attestation, bytes)));
    root.issue("RPC certificate", &params, &key.0)
}

/// Issues a client's RA-TLS certificate, by the temp CA or, for servers that have none, by its own key.
///
/// # Errors
/// [`Error::Issue`], [`Error::Time`].
pub fn client_certificate(
    key: &KeyPair,
    attestation: &[u8],
    temp_ca: Option<&Ca>,
    now: UnixTime,
) -> Result<Certificate, Error> {
    let mut params = leaf_params(&key.0, &[(DnType::CommonName, "RA-TLS TEMP Cert")], now)?;
    params.custom_extensions.push(extension(Extension::Attestation, attestation));
    match temp_ca {
        Some(ca) => ca.issue("client certificate", &params, &key.0),
        None => self_signed("client certificate", &params, key),
    }
}

/// Issues an app's CA certificate.
///
/// # Errors
/// [`Error::Issue`], [`Error::Time`].
pub fn app_ca(root: &Ca, key: &KeyPair, app: &AppId, now: UnixTime) -> Result<Certificate, Error> {
    let mut params = ca_params(&key.0, "Dstack App CA", 0, now)?;
    params.custom_extensions.push(extension(Extension::AppId, app.as_bytes()));
    params.custom_extensions.push(extension(Extension::Usage, Usage::AppCa.as_str().as_bytes()));
    root.issue("App CA", &params, &key.0)
}

/// Issues a certificate an app asked for.
///
/// # Errors
/// [`Error::PublicKey`], [`Error::Issue`], [`Error::Time`].
pub fn app_leaf(app_ca: &Ca, app: &AppId, leaf: &AppLeaf, now: UnixTime) -> Result<Certificate, Error> {
    let what = "app certificate";
    let key = SubjectPublicKeyInfo::from_der(&leaf.spki_der).map_err(|_| Error::PublicKey { what })?;
    let organisation = leaf.organisation.as_deref().map(|name| (DnType::OrganizationName, name));
    let names: Vec<_> =
        organisation.into_iter().chain([(DnType::CommonName, leaf.subject.as_str())]).collect();
    let mut params = leaf_params(&key, &names, now)?;
    params.subject_alt_names =
        leaf.names.iter().map(|name| alt_name(what, name)).collect::<Result<_, _>>()?;
    let usages = [
        (leaf.server_auth, ExtendedKeyUsagePurpose::ServerAuth),
        (leaf.client_auth, ExtendedKeyUsagePurpose::ClientAuth),
    ];
    params.extended_key_usages =
        usages.into_iter().filter_map(|(wanted, usage)| wanted.then_some(usage)).collect();
    if let Some(seconds) = leaf.not_before {
        params.not_before = time_at(seconds)?;
    }
    if let Some(seconds) = leaf.not_after {
        params.not_after = time_at(seconds)?;
    }
    let extensions = &mut params.custom_extensions;
    extensions.push(extension(Extension::AppId, app.as_bytes()));
    extensions.extend(leaf.app_info.as_deref().map(|bytes| extension(Extension::AppInfo, bytes)));
    extensions.push(extension(Extension::Usage, Usage::AppCustom.as_str().as_bytes()));
    extensions.extend(leaf.attestation.as_deref().map(|bytes| extension(Extension::Attestation, bytes)));
    app_ca.issue(what, &params, &key)
}

fn self_signed(what: &'static str, params: &CertificateParams, key: &KeyPair) -> Result<Certificate, Error> {
    params.self_signed(&key.0).map(Certificate).map_err(|source| Error::Issue { what, source })
}

fn ca_params(
    key: &impl PublicKeyData,
    name: &str,
    path_len: u8,
    now: UnixTime,
) -> Result<CertificateParams, Error> {
    let names = [(DnType::OrganizationName, ORGANISATION), (DnType::CommonName, name)];
    let mut params = leaf_params(key, &names, now)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_len));
    params.key_usages.extend([KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign]);
    Ok(params)
}

/// What all certificates share: validity, serial, digital signature, names as UTF8String in the given order.
fn leaf_params(
    key: &impl PublicKeyData,
    names: &[(DnType, &str)],
    now: UnixTime,
) -> Result<CertificateParams, Error> {
    let mut params = CertificateParams::default();
    params.not_before = OffsetDateTime::from_unix_timestamp(NOT_BEFORE).map_err(|_| Error::Time(0))?;
    params.not_after = time_at(now.as_secs())?.checked_add(LIFETIME).ok_or(Error::Time(now.as_secs()))?;
    params.serial_number = Some(serial(key.der_bytes()));
    params.key_identifier_method = KeyIdMethod::Sha256;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.distinguished_name = DistinguishedName::new();
    for (kind, value) in names {
        params.distinguished_name.push(kind.clone(), DnValue::Utf8String((*value).to_owned()));
    }
    Ok(params)
}

/// The serial upstream's certificates have: from the public point, so that a key has one serial for ever.
fn serial(public_point: &[u8]) -> SerialNumber {
    let mut serial = Sha256::digest(public_point)[..20].to_vec();
    serial[0] &= 0x7F;
    SerialNumber::from(serial)
}

fn time_at(seconds: u64) -> Result<OffsetDateTime, Error> {
    i64::try_from(seconds)
        .ok()
        .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok())
        .ok_or(Error::Time(seconds))
}

fn alt_name(what: &'static str, name: &str) -> Result<SanType, Error> {
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    Ia5String::try_from(name).map(SanType::DnsName).map_err(|source| Error::Issue { what, source })
}

fn extension(extension: Extension, payload: &[u8]) -> CustomExtension {
    CustomExtension::from_oid_content(&extension.oid(), wrap(payload))
}

#[cfg(test)]
mod tests;
