//! The signature section: its encoding, and whether it signs the image it is in.

use attestation::Pcr;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ECDSA_P521_SHA512_FIXED, UnparsedPublicKey,
    VerificationAlgorithm,
};
use ciborium::tag::Captured;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_bytes::{ByteBuf, Bytes};
use x509_parser::der_parser::ber::BerObjectContent;
use x509_parser::der_parser::der::parse_der_sequence;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::error::{Error, IoContext};
use crate::format::SectionKind;
use crate::image::{Image, refusal};
use crate::problem::Problem;

/// How deep a signature section nests, with room for a tag.
const MAX_DEPTH: usize = 8;

/// COSE algorithm of a signature; the curve follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// ECDSA with P-256 and SHA-256.
    Es256,
    /// ECDSA with P-384 and SHA-384.
    Es384,
    /// ECDSA with P-521 and SHA-512.
    Es512,
}

impl Algorithm {
    const ALL: [Self; 3] = [Self::Es256, Self::Es384, Self::Es512];

    /// The protected header: a map with one entry, 1 → the algorithm.
    fn protected(self) -> &'static [u8] {
        match self {
            Self::Es256 => &[0xa1, 0x01, 0x26],
            Self::Es384 => &[0xa1, 0x01, 0x38, 0x22],
            Self::Es512 => &[0xa1, 0x01, 0x38, 0x23],
        }
    }

    /// The algorithm for a public key, by its curve.
    fn for_key(point: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|algorithm| algorithm.point_len() == point.len())
    }

    /// Length of a signature, r ‖ s.
    fn signature_len(self) -> usize {
        match self {
            Self::Es256 => 64,
            Self::Es384 => 96,
            Self::Es512 => 132,
        }
    }

    /// Name and hex digest of the hash that goes with the curve.
    #[cfg(feature = "command")]
    pub(crate) fn digest(self, message: &[u8]) -> (&'static str, String) {
        use aws_lc_rs::digest::{SHA256, SHA384, SHA512, digest};
        let (name, hash) = match self {
            Self::Es256 => ("SHA-256", &SHA256),
            Self::Es384 => ("SHA-384", &SHA384),
            Self::Es512 => ("SHA-512", &SHA512),
        };
        (name, hex::encode(digest(hash, message)))
    }

    fn verification(self) -> &'static dyn VerificationAlgorithm {
        match self {
            Self::Es256 => &ECDSA_P256_SHA256_FIXED,
            Self::Es384 => &ECDSA_P384_SHA384_FIXED,
            Self::Es512 => &ECDSA_P521_SHA512_FIXED,
        }
    }

    /// Length of an uncompressed public point on the curve.
    fn point_len(self) -> usize {
        match self {
            Self::Es256 => 65,
            Self::Es384 => 97,
            Self::Es512 => 133,
        }
    }
}

/// A decoded signature section. Nothing about it is proved before [`Signature::verify`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    certificate_pem: Vec<u8>,
    certificate_der: Vec<u8>,
    algorithm: Algorithm,
    payload: Vec<u8>,
    signature: Vec<u8>,
}

impl Signature {
    /// Decodes a section's payload.
    ///
    /// # Errors
    /// When it is not an array with exactly one certificate and COSE_Sign1, or has bytes left over.
    pub fn decode(section: &[u8]) -> Result<Self, String> {
        let entries: Vec<Entry> = decoded("the section", section)?;
        let [Entry { signing_certificate: certificate_pem, signature }] =
            <[Entry; 1]>::try_from(entries).map_err(|all| format!("{} signatures, expected 1", all.len()))?;
        let Captured(tag, cose) = decoded("COSE_Sign1", &signature)?;
        let CoseSign1::<ByteBuf>(protected, NoHeaders {}, payload, signature) = cose;
        if let Some(other) = tag.filter(|tag| *tag != COSE_SIGN1) {
            return Err(format!("tag {other}, expected {COSE_SIGN1} or none"));
        }
        let algorithm = Algorithm::ALL
            .into_iter()
            .find(|algorithm| algorithm.protected() == *protected)
            .ok_or_else(|| format!("unknown protected header {}", hex::encode(&protected)))?;
        let (payload, signature) = (payload.into_vec(), signature.into_vec());
        let certificate_der = CertificateDer::from_pem_slice(&certificate_pem)
            .map_err(|error| format!("the signing certificate is not PEM: {error}"))?
            .to_vec();
        Ok(Self { certificate_pem, certificate_der, algorithm, payload, signature })
    }

    /// DER of the signing certificate; PCR8 is its measurement.
    pub fn certificate_der(&self) -> &[u8] {
        &self.certificate_der
    }

    /// The PEM text as stored.
    pub fn certificate_pem(&self) -> &[u8] {
        &self.certificate_pem
    }

    /// The algorithm that the protected header names.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The certificate, parsed.
    ///
    /// # Errors
    /// When it is not an X.509 certificate or has bytes left over.
    pub fn certificate(&self) -> Result<X509Certificate<'_>, String> {
        parse_certificate(&self.certificate_der)
    }

    /// Checks that the key of the certificate in the section signed exactly this PCR0.
    ///
    /// The payload is rebuilt and compared, not parsed. This proves nothing about who the signer is: compare
    /// PCR8 with that of the certificate you expect. Validity dates are left to the caller, who has a clock.
    ///
    /// # Errors
    /// What does not match.
    pub fn verify(&self, pcr0: &Pcr) -> Result<(), String> {
        let expected = signed_payload(pcr0);
        if self.payload != expected {
            return Err(format!(
                "signs {}, expected register 0 with {pcr0}",
                register_in(&self.payload).unwrap_or_else(|reason| format!("something else ({reason})"))
            ));
        }
        let certificate = self.certificate()?;
        let point = certificate.public_key().subject_public_key.data.as_ref();
        if point.len() != self.algorithm.point_len() {
            return Err(format!(
                "the certificate's key has {} bytes, {:?} needs {}",
                point.len(),
                self.algorithm,
                self.algorithm.point_len()
            ));
        }
        let message = signed_message(self.algorithm, &self.payload);
        UnparsedPublicKey::new(self.algorithm.verification(), point)
            .verify(&message, &self.signature)
            .map_err(|_| "was not made by the certificate's key".to_owned())
    }
}

impl<R: std::io::Read + std::io::Seek> Image<R> {
    /// The signature section, decoded, if there is one.
    ///
    /// # Errors
    /// When it cannot be read or decoded.
    pub fn signature(&mut self) -> Result<Option<Signature>, Error> {
        let Some(section) = self.section(SectionKind::Signature) else { return Ok(None) };
        let payload = self.small_payload(section)?;
        Signature::decode(&payload)
            .map(Some)
            .map_err(|reason| refusal(section.payload_offset(), Problem::Signature(reason)))
    }
}

/// Reads a certificate file: one PEM certificate, text around it allowed. Returns the DER.
///
/// # Errors
/// When it cannot be read or has no certificate.
pub fn read_certificate(path: &std::path::Path) -> Result<(Vec<u8>, Vec<u8>), Error> {
    let pem = std::fs::read(path).context("read", path)?;
    let der = pem_to_der(&pem).map_err(|reason| Error::input(path.display(), reason))?;
    Ok((pem, der))
}

/// DER of a PEM certificate in memory.
#[cfg(feature = "command")]
pub(crate) fn certificate_der(pem: &[u8]) -> Result<Vec<u8>, Error> {
    pem_to_der(pem).map_err(|reason| Error::input("the certificate", reason))
}

fn pem_to_der(pem: &[u8]) -> Result<Vec<u8>, String> {
    let der =
        CertificateDer::from_pem_slice(pem).map_err(|error| format!("no PEM certificate: {error}"))?.to_vec();
    parse_certificate(&der)?;
    Ok(der)
}

pub(crate) fn parse_certificate(der: &[u8]) -> Result<X509Certificate<'_>, String> {
    let (rest, certificate) =
        X509Certificate::from_der(der).map_err(|error| format!("no X.509 certificate: {error}"))?;
    if rest.is_empty() { Ok(certificate) } else { Err(format!("{} bytes after the certificate", rest.len())) }
}

/// One signature of the section.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    signing_certificate: Vec<u8>,
    signature: Vec<u8>,
}

/// The tag that a COSE_Sign1 may carry.
const COSE_SIGN1: u64 = 18;

/// COSE_Sign1 (RFC 9052 §4.2): protected header, unprotected header, payload, signature.
#[derive(Serialize, Deserialize)]
struct CoseSign1<B>(B, NoHeaders, B, B);

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NoHeaders {}

/// What is signed about an image.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Payload {
    register_index: u64,
    register_value: Vec<u8>,
}

/// In CBOR's shortest form. A `Vec<u8>` becomes an array of integers, as AWS's tools write it.
fn encoded(value: &impl Serialize) -> Vec<u8> {
    let mut out = Vec::new();
    ciborium::into_writer(value, &mut out).expect("a vector takes all, and these types have a form in CBOR");
    out
}

/// Takes what [`encoded`] writes and nothing else, so that there is one way to write a signature.
fn decoded<T: Serialize + DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, String> {
    let mut rest = bytes;
    let value = ciborium::de::from_reader_with_recursion_limit(&mut rest, MAX_DEPTH)
        .map_err(|error| format!("{what}: {}", fault(&error)))?;
    match rest.len() {
        0 if encoded(&value) == bytes => Ok(value),
        0 => Err(format!("{what} is not in the form that AWS's tools write")),
        left => Err(format!("{left} bytes after the end of {what}")),
    }
}

fn fault<E>(error: &ciborium::de::Error<E>) -> String {
    use ciborium::de::Error;
    match error {
        Error::Io(_) => "ends too early".to_owned(),
        Error::Syntax(at) => format!("no CBOR at byte {at}"),
        Error::Semantic(_, problem) => problem.clone(),
        Error::RecursionLimitExceeded => format!("nests deeper than {MAX_DEPTH} levels"),
    }
}

/// Register 0 and its value.
fn signed_payload(pcr0: &Pcr) -> Vec<u8> {
    encoded(&Payload { register_index: 0, register_value: pcr0.as_bytes().to_vec() })
}

/// The message that goes into the signature algorithm (RFC 9052 §4.4).
fn signed_message(algorithm: Algorithm, payload: &[u8]) -> Vec<u8> {
    let external: &[u8] = &[];
    encoded(&("Signature1", Bytes::new(algorithm.protected()), Bytes::new(external), Bytes::new(payload)))
}

/// What the key of a certificate has to sign for an image with this PCR0.
///
/// # Errors
/// When the certificate's key is on none of the three curves.
pub(crate) fn message_for(certificate_der: &[u8], pcr0: &Pcr) -> Result<(Algorithm, Vec<u8>), String> {
    let certificate = parse_certificate(certificate_der)?;
    let point = certificate.public_key().subject_public_key.data.as_ref();
    let algorithm = Algorithm::for_key(point).ok_or("the certificate's key is not P-256, P-384 or P-521")?;
    Ok((algorithm, signed_message(algorithm, &signed_payload(pcr0))))
}

/// r ‖ s out of what a signer returned: r ‖ s already, or DER (RFC 3279 §2.2.3), as key management services and
/// OpenSSL write it.
///
/// # Errors
/// When it is neither.
pub(crate) fn fixed_width(algorithm: Algorithm, signature: &[u8]) -> Result<Vec<u8>, String> {
    let len = algorithm.signature_len();
    if signature.len() == len {
        return Ok(signature.to_vec());
    }
    let not_one = || format!("{} bytes, neither {len} nor an ECDSA signature in DER", signature.len());
    let (rest, parsed) = parse_der_sequence(signature).map_err(|_| not_one())?;
    let parts = parsed.as_sequence().map_err(|_| not_one())?;
    let [r, s] = parts.as_slice() else { return Err(not_one()) };
    if !rest.is_empty() {
        return Err(not_one());
    }
    let mut fixed = vec![0; len];
    for (part, place) in [r, s].into_iter().zip(fixed.chunks_exact_mut(len / 2)) {
        let BerObjectContent::Integer(bytes) = &part.content else { return Err(not_one()) };
        let digits = bytes.iter().position(|byte| *byte != 0).map_or(&[][..], |first| &bytes[first..]);
        let start = place.len().checked_sub(digits.len()).ok_or_else(not_one)?;
        place[start..].copy_from_slice(digits);
    }
    Ok(fixed)
}

/// A complete section around a signature, r ‖ s.
pub(crate) fn encode_section(
    pcr0: &Pcr,
    certificate_pem: &[u8],
    algorithm: Algorithm,
    signature: &[u8],
) -> Vec<u8> {
    let payload = signed_payload(pcr0);
    let [protected, payload, signature] = [algorithm.protected(), &payload, signature].map(Bytes::new);
    let signature = encoded(&CoseSign1(protected, NoHeaders {}, payload, signature));
    encoded(&[Entry { signing_certificate: certificate_pem.to_vec(), signature }])
}

/// For the error message: which register and value a foreign payload names.
fn register_in(payload: &[u8]) -> Result<String, String> {
    let Payload { register_index, register_value } = decoded("the payload", payload)?;
    Ok(format!("register {register_index} with {}", hex::encode(register_value)))
}
