//! What the protocol keeps in X.509 certificates (kms-protocol §3.5): extensions under one arc, each a DER
//! `OCTET STRING` inside the extension's own.

use x509_parser::prelude::{FromDer, X509Certificate};

use crate::ids::AppId;

/// `1.3.6.1.4.1.62397.1`: the arc of all extensions.
const ARC: [u64; 8] = [1, 3, 6, 1, 4, 1, 62397, 1];

/// An extension of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extension {
    /// `.1`: raw TDX quote (legacy).
    TdxQuote,
    /// `.2`: JSON event log (legacy).
    EventLog,
    /// `.3`: app id, 20 bytes.
    AppId,
    /// `.4`: what the certificate is for, see [`Usage`].
    Usage,
    /// `.8`: encoded [`crate::attestation_encoding::VersionedAttestation`].
    Attestation,
    /// `.9`: encoded [`crate::app_info::AppInfo`].
    AppInfo,
}

impl Extension {
    /// The OID's arcs, as certificate builders take them.
    #[must_use]
    pub fn oid(self) -> [u64; 9] {
        let last = match self {
            Self::TdxQuote => 1,
            Self::EventLog => 2,
            Self::AppId => 3,
            Self::Usage => 4,
            Self::Attestation => 8,
            Self::AppInfo => 9,
        };
        let mut oid = [0; 9];
        oid[..ARC.len()].copy_from_slice(&ARC);
        oid[ARC.len()] = last;
        oid
    }
}

/// What a certificate of the KMS's hierarchy is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Usage {
    /// `kms:rpc`: a KMS's own listener.
    KmsRpc,
    /// `app:ca`: an app's CA.
    AppCa,
    /// `app:custom`: a certificate an app asked for.
    AppCustom,
    /// Some other text.
    Other(String),
}

impl Usage {
    /// The text in the extension.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::KmsRpc => "kms:rpc",
            Self::AppCa => "app:ca",
            Self::AppCustom => "app:custom",
            Self::Other(text) => text,
        }
    }

    fn from_text(text: &str) -> Self {
        match text {
            "kms:rpc" => Self::KmsRpc,
            "app:ca" => Self::AppCa,
            "app:custom" => Self::AppCustom,
            other => Self::Other(other.to_owned()),
        }
    }
}

/// Why the protocol's part of a certificate could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not one certificate in DER.
    #[error("not a DER certificate")]
    NotACertificate,
    /// Bytes after the certificate.
    #[error("{0} bytes after the certificate")]
    TrailingBytes(usize),
    /// An OID that appears twice.
    #[error("{0:?} extension appears twice")]
    DuplicateExtension(Extension),
    /// A payload without the inner `OCTET STRING`, or with bytes after it, or with an overlong length.
    #[error("{0:?} extension is not one DER octet string")]
    NotWrapped(Extension),
    /// A payload that cannot be what the extension says.
    #[error("{0:?} extension is malformed")]
    Malformed(Extension),
}

impl Error {
    /// A stable name for logs and machine output.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::NotACertificate => "certificate-not-der",
            Self::TrailingBytes(_) => "certificate-trailing-bytes",
            Self::DuplicateExtension(_) => "certificate-duplicate-extension",
            Self::NotWrapped(_) => "certificate-extension-not-wrapped",
            Self::Malformed(_) => "certificate-extension-malformed",
        }
    }
}

/// The protocol's part of a certificate. Nothing about the certificate is verified by reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateContents {
    /// SubjectPublicKeyInfo, DER.
    pub spki_der: Vec<u8>,
    /// What it is for.
    pub usage: Option<Usage>,
    /// The app it was issued to. Says nothing in a client certificate, which anybody can sign.
    pub app_id: Option<AppId>,
    /// Encoded attestation.
    pub attestation: Option<Vec<u8>>,
    /// Encoded app info.
    pub app_info: Option<Vec<u8>>,
    /// The legacy form of TDX evidence: the quote.
    pub legacy_quote: Option<Vec<u8>>,
    /// The legacy form of TDX evidence: the event log, JSON.
    pub legacy_event_log: Option<Vec<u8>>,
}

impl CertificateContents {
    /// Reads a certificate.
    ///
    /// # Errors
    /// See [`Error`]; a malformed extension of ours makes the whole certificate unreadable, as with upstream.
    pub fn decode(der: &[u8]) -> Result<Self, Error> {
        let (rest, certificate) = X509Certificate::from_der(der).map_err(|_| Error::NotACertificate)?;
        if !rest.is_empty() {
            return Err(Error::TrailingBytes(rest.len()));
        }
        let payload = |extension| find(&certificate, extension);
        let usage = payload(Extension::Usage)?
            .map(|bytes| std::str::from_utf8(bytes).map_err(|_| Error::Malformed(Extension::Usage)))
            .transpose()?;
        let app_id = payload(Extension::AppId)?
            .map(|bytes| AppId::try_from(bytes).map_err(|_| Error::Malformed(Extension::AppId)))
            .transpose()?;
        Ok(Self {
            spki_der: certificate.public_key().raw.to_vec(),
            usage: usage.map(Usage::from_text),
            app_id,
            attestation: payload(Extension::Attestation)?.map(<[u8]>::to_vec),
            app_info: payload(Extension::AppInfo)?.map(<[u8]>::to_vec),
            legacy_quote: payload(Extension::TdxQuote)?.map(<[u8]>::to_vec),
            legacy_event_log: payload(Extension::EventLog)?.map(<[u8]>::to_vec),
        })
    }
}

/// The SubjectPublicKeyInfo of a certificate, DER.
///
/// # Errors
/// [`Error::NotACertificate`], [`Error::TrailingBytes`].
pub fn spki_der(certificate_der: &[u8]) -> Result<Vec<u8>, Error> {
    let (rest, certificate) =
        X509Certificate::from_der(certificate_der).map_err(|_| Error::NotACertificate)?;
    if !rest.is_empty() {
        return Err(Error::TrailingBytes(rest.len()));
    }
    Ok(certificate.public_key().raw.to_vec())
}

/// The payload of an extension, which may be there once.
fn find<'a>(certificate: &X509Certificate<'a>, extension: Extension) -> Result<Option<&'a [u8]>, Error> {
    let oid = extension.oid();
    let mut found = certificate
        .extensions()
        .iter()
        .filter(|candidate| candidate.oid.iter().is_some_and(|arcs| arcs.eq(oid.iter().copied())));
    let Some(first) = found.next() else { return Ok(None) };
    if found.next().is_some() {
        return Err(Error::DuplicateExtension(extension));
    }
    unwrap(first.value).map(Some).ok_or(Error::NotWrapped(extension))
}

/// The content of one DER `OCTET STRING` that fills its input, with the length in its only DER form.
#[must_use]
pub fn unwrap(der: &[u8]) -> Option<&[u8]> {
    let (&tag, rest) = der.split_first()?;
    let (&first, rest) = rest.split_first()?;
    if tag != 0x04 {
        return None;
    }
    let (len, content) = match first {
        0x00..=0x7F => (usize::from(first), rest),
        0x81..=0x84 => {
            let (digits, content) = rest.split_at_checked(usize::from(first & 0x7F))?;
            let len = digits.iter().fold(0_u64, |len, byte| (len << 8) | u64::from(*byte));
            // The shortest form: no leading zero, and the short form below 128.
            if digits[0] == 0 || len < 0x80 {
                return None;
            }
            (usize::try_from(len).ok()?, content)
        }
        _ => return None,
    };
    (content.len() == len).then_some(content)
}

/// Wraps a payload into a DER `OCTET STRING`: what goes into the extension's own `OCTET STRING`.
#[must_use]
pub fn wrap(payload: &[u8]) -> Vec<u8> {
    let mut der = vec![0x04];
    let len = payload.len().to_be_bytes();
    let digits = &len[len.iter().position(|byte| *byte != 0).unwrap_or(len.len() - 1)..];
    if payload.len() >= 0x80 {
        der.push(0x80 | u8::try_from(digits.len()).unwrap_or(u8::MAX));
    }
    der.extend_from_slice(digits);
    der.extend_from_slice(payload);
    der
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrapping_uses_the_shortest_length() {
        assert_eq!(wrap(&[7]), [0x04, 1, 7]);
        assert_eq!(wrap(&[]), [0x04, 0]);
        assert_eq!(wrap(&[0; 0x7F])[..2], [0x04, 0x7F]);
        assert_eq!(wrap(&[0; 0x80])[..3], [0x04, 0x81, 0x80]);
        // The example of §3.5: a payload of 2130 bytes.
        assert_eq!(wrap(&[0; 2130])[..4], [0x04, 0x82, 0x08, 0x52]);
    }

    #[test]
    fn wrapped_payloads_come_back_and_prefixes_do_not() {
        for len in [0, 1, 0x7F, 0x80, 0xFF, 0x100, 0x1_0000] {
            let payload = vec![0xA5; len];
            let der = wrap(&payload);
            assert_eq!(unwrap(&der), Some(payload.as_slice()));
            for cut in 0..der.len().min(300) {
                assert_eq!(unwrap(&der[..cut]), None, "accepted {cut} of {} bytes", der.len());
            }
        }
    }

    #[test]
    fn other_der_is_not_unwrapped() {
        let cases: [(&str, &[u8]); 6] = [
            ("another tag", &[0x05, 0x00]),
            ("long form of a short length", &[0x04, 0x81, 0x01, 0x00]),
            ("leading zero in the length", &[0x04, 0x82, 0x00, 0x80]),
            ("indefinite length", &[0x04, 0x80, 0x00, 0x00]),
            ("trailing byte", &[0x04, 0x01, 0x00, 0x00]),
            ("length of nine bytes", &[0x04, 0x89, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
        ];
        for (what, der) in cases {
            assert_eq!(unwrap(der), None, "{what}");
        }
    }

    #[test]
    fn oids_are_under_the_arc() {
        assert_eq!(Extension::Attestation.oid(), [1, 3, 6, 1, 4, 1, 62397, 1, 8]);
        assert_eq!(Extension::Usage.oid(), [1, 3, 6, 1, 4, 1, 62397, 1, 4]);
    }
}
