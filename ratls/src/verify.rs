//! What both ends check about a certificate, on webpki.

use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls_pki_types::{CertificateDer, Der, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::asn1_rs::{Any, FromDer as _};
use x509_parser::prelude::X509Certificate;

/// The content of a DER value without its tag and length, as webpki's anchors want it.
pub(crate) fn content(der: &[u8]) -> Option<&[u8]> {
    let (rest, value) = Any::from_der(der).ok()?;
    rest.is_empty().then_some(value.data)
}

/// The name in a certificate's issuer and subject fields, DER.
pub(crate) fn names(certificate: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    Some((certificate.issuer().as_raw().to_vec(), certificate.subject().as_raw().to_vec()))
}

/// Whether a SubjectPublicKeyInfo parses as one DER value.
pub(crate) fn is_spki(der: &[u8]) -> bool {
    x509_parser::x509::SubjectPublicKeyInfo::from_der(der).is_ok_and(|(rest, _)| rest.is_empty())
}

/// Whether a certificate is a CA's.
pub(crate) fn is_ca(certificate: &[u8]) -> bool {
    X509Certificate::from_der(certificate).is_ok_and(|(_, certificate)| certificate.is_ca())
}

/// Whether the usages of an end entity's certificate let it sign handshakes: no key usage, or digitalSignature.
pub(crate) fn may_sign(certificate: &[u8]) -> bool {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else { return false };
    // webpki does not look at key usage.
    certificate.key_usage().is_ok_and(|usage| usage.is_none_or(|usage| usage.value.digital_signature()))
}

/// Checks that the key in `issuer_spki` signed the certificate directly, that it is an end entity's, valid at `now`
/// and, if it names extended usages, meant for `usage`. `issuer_subject` is the issuer's name when that is known.
pub(crate) fn issued_directly_by(
    certificate: &CertificateDer<'_>,
    issuer_spki: &[u8],
    issuer_subject: Option<&[u8]>,
    algorithms: &WebPkiSupportedAlgorithms,
    now: UnixTime,
    usage: KeyUsage,
) -> Result<(), webpki::Error> {
    let end_entity = EndEntityCert::try_from(certificate)?;
    let (issuer, _) = names(certificate).ok_or(webpki::Error::BadDer)?;
    if issuer_subject.is_some_and(|subject| subject != issuer) {
        return Err(webpki::Error::UnknownIssuer);
    }
    let anchor = TrustAnchor {
        subject: Der::from_slice(content(&issuer).ok_or(webpki::Error::BadDer)?),
        subject_public_key_info: Der::from_slice(content(issuer_spki).ok_or(webpki::Error::BadDer)?),
        name_constraints: None,
    };
    // No intermediates, whatever the peer sent.
    end_entity.verify_for_usage(algorithms.all, &[anchor], &[], now, usage, None, None).map(|_| ())
}
