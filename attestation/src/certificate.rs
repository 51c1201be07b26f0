//! X.509 certificates as AWS's Nitro PKI issues them: version 3, P-384, ecdsa-with-SHA384.
//!
//! The `der` crate reads the DER, strictly and without allocating; here is only the profile. It holds what general
//! path validators leave out (key usages) and has no room for what this PKI does not use (other algorithms, name
//! constraints, policies).

use der::asn1::{AnyRef, BitStringRef, GeneralizedTime, ObjectIdentifier, OctetStringRef, UtcTime};
use der::{Decode, Reader, SliceReader, Tag, Tagged};

use crate::key::IssuerKey;

const ECDSA_WITH_SHA384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.3");
const EC_PUBLIC_KEY: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const SECP384R1: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");
const BASIC_CONSTRAINTS: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.19");
const KEY_USAGE: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.15");
const EXTENDED_KEY_USAGE: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.37");
const NAME_CONSTRAINTS: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.30");
const CLIENT_AUTH: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.3.2");

/// An uncompressed point of P-384: 4, x, y (SEC 1 §2.3.3).
const PUBLIC_KEY_LEN: usize = 97;
const UNCOMPRESSED: u8 = 4;

/// Real ones have at most 5.
const MAX_EXTENSIONS: usize = 16;

/// What is wrong with a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CertificateFault {
    /// Not the DER of a certificate.
    #[error("is not a certificate in DER")]
    Der,
    /// Not version 3, or with the unique identifiers of version 2.
    #[error("is not a plain X.509 certificate of version 3")]
    Version,
    /// Not signed with ecdsa-with-SHA384.
    #[error("is signed with another algorithm than ecdsa-with-SHA384")]
    SignatureAlgorithm,
    /// Not an uncompressed point of P-384.
    #[error("has a key that is no uncompressed point of P-384")]
    Key,
    /// An extension comes twice, or too many come.
    #[error("has an extension twice, or more than 16")]
    Extensions,
    /// A critical extension that is not understood, or name constraints.
    #[error("has an extension that is critical and not understood, or constrains names")]
    CriticalExtension,
    /// An issuing certificate without critical basic constraints that say CA.
    #[error("issues certificates without critical basic constraints that make it a CA")]
    NotCa,
    /// The leaf is a CA, or has a path length.
    #[error("is a CA or has a path length, expected an end entity")]
    LeafIsCa,
    /// More CA certificates follow than its path length allows.
    #[error("allows {allowed} CA certificates below it, the chain has {actual}")]
    PathLength {
        /// Its `pathLenConstraint`.
        allowed: u8,
        /// How many follow, the leaf not counted.
        actual: usize,
    },
    /// A CA without keyCertSign, a leaf without digitalSignature, or a leaf with keyCertSign.
    #[error("lacks the key usage for its place, {needed}, or has one that is only for a CA")]
    KeyUsage {
        /// The usage it needs.
        needed: &'static str,
    },
    /// An extended key usage that leaves out clientAuth.
    #[error("has an extended key usage without clientAuth")]
    ExtendedKeyUsage,
    /// The issuer is not the subject of the certificate above.
    #[error("is not issued by the subject of the certificate above it")]
    Issuer,
    /// Before its validity.
    #[error("is not valid before {not_before} (seconds since 1970), now is {now}")]
    NotYetValid {
        /// Start of its validity.
        not_before: u64,
        /// The time of the verification.
        now: u64,
    },
    /// After its validity.
    #[error("is not valid after {not_after} (seconds since 1970), now is {now}")]
    Expired {
        /// End of its validity.
        not_after: u64,
        /// The time of the verification.
        now: u64,
    },
    /// The key of the certificate above did not sign it.
    #[error("has a signature that does not verify with the key of the certificate above it")]
    Signature,
}

impl CertificateFault {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Der => "certificate-der",
            Self::Version => "certificate-version",
            Self::SignatureAlgorithm => "certificate-signature-algorithm",
            Self::Key => "certificate-key",
            Self::Extensions => "certificate-extensions",
            Self::CriticalExtension => "certificate-critical-extension",
            Self::NotCa => "certificate-not-ca",
            Self::LeafIsCa => "certificate-leaf-is-ca",
            Self::PathLength { .. } => "certificate-path-length",
            Self::KeyUsage { .. } => "certificate-key-usage",
            Self::ExtendedKeyUsage => "certificate-extended-key-usage",
            Self::Issuer => "certificate-issuer",
            Self::NotYetValid { .. } => "certificate-not-yet-valid",
            Self::Expired { .. } => "certificate-expired",
            Self::Signature => "certificate-signature",
        }
    }
}

impl From<der::Error> for CertificateFault {
    fn from(_: der::Error) -> Self {
        Self::Der
    }
}

type Result<T> = std::result::Result<T, CertificateFault>;

/// From the first to the last second of a certificate's validity, in seconds since 1970, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Validity {
    pub(crate) not_before: u64,
    pub(crate) not_after: u64,
}

impl Validity {
    pub(crate) fn check(self, now: u64) -> Result<()> {
        let Self { not_before, not_after } = self;
        if now < not_before {
            return Err(CertificateFault::NotYetValid { not_before, now });
        }
        if now > not_after {
            return Err(CertificateFault::Expired { not_after, now });
        }
        Ok(())
    }

    pub(crate) fn intersect(self, other: Self) -> Self {
        Self {
            not_before: self.not_before.max(other.not_before),
            not_after: self.not_after.min(other.not_after),
        }
    }
}

/// A certificate that fits the profile so far as it can be seen without its neighbours. Nothing is verified.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Certificate<'a> {
    /// The signed bytes, as received.
    tbs: &'a [u8],
    /// DER of an ECDSA signature.
    signature: &'a [u8],
    issuer: &'a [u8],
    subject: &'a [u8],
    pub(crate) validity: Validity,
    /// An uncompressed point that may not be on the curve.
    pub(crate) public_key: &'a [u8],
    extensions: Extensions,
}

impl<'a> Certificate<'a> {
    pub(crate) fn decode(der: &'a [u8]) -> Result<Self> {
        let mut outer = SliceReader::new(der)?;
        let certificate = outer.sequence(|certificate| {
            let tbs = certificate.tlv_bytes()?;
            let algorithm = signature_algorithm(certificate)?;
            let signature = whole_bytes(certificate.decode()?)?;
            algorithm.then_some(()).ok_or(CertificateFault::SignatureAlgorithm)?;
            Self::decode_tbs(tbs, signature)
        })?;
        outer.finish()?;
        Ok(certificate)
    }

    fn decode_tbs(tbs: &'a [u8], signature: &'a [u8]) -> Result<Self> {
        let mut outer = SliceReader::new(tbs)?;
        let certificate = outer.sequence(|reader| {
            version_3(reader)?;
            Tag::peek(reader)?.assert_eq(Tag::Integer)?;
            reader.tlv_bytes()?; // the serial number, whatever it is
            let algorithm = signature_algorithm(reader)?;
            let issuer = name(reader)?;
            let validity = validity(reader)?;
            let subject = name(reader)?;
            let public_key = public_key(reader)?;
            algorithm.then_some(()).ok_or(CertificateFault::SignatureAlgorithm)?;
            let extensions = extensions(reader)?;
            Ok::<_, CertificateFault>(Self {
                tbs,
                signature,
                issuer,
                subject,
                validity,
                public_key,
                extensions,
            })
        })?;
        outer.finish()?;
        Ok(certificate)
    }

    /// Whether this may issue a chain with `below` more CA certificates under it, the leaf not counted.
    pub(crate) fn check_ca(&self, below: usize) -> Result<()> {
        match self.extensions.basic_constraints {
            Some(BasicConstraints { critical: true, ca: true, path_length }) => match path_length {
                Some(allowed) if usize::from(allowed) < below => {
                    return Err(CertificateFault::PathLength { allowed, actual: below });
                }
                _ => {}
            },
            _ => return Err(CertificateFault::NotCa),
        }
        self.extensions.check_extended_key_usage()?;
        match self.extensions.key_usage {
            Some(KeyUsage { key_cert_sign: true, .. }) => Ok(()),
            _ => Err(CertificateFault::KeyUsage { needed: "keyCertSign" }),
        }
    }

    /// Whether this may sign documents, and nothing else.
    pub(crate) fn check_leaf(&self) -> Result<()> {
        if let Some(constraints) = self.extensions.basic_constraints
            && (constraints.ca || constraints.path_length.is_some())
        {
            return Err(CertificateFault::LeafIsCa);
        }
        self.extensions.check_extended_key_usage()?;
        match self.extensions.key_usage {
            Some(KeyUsage { digital_signature: true, key_cert_sign: false }) => Ok(()),
            _ => Err(CertificateFault::KeyUsage { needed: "digitalSignature" }),
        }
    }

    /// Whether the names say that `issuer` issued this. Names of this PKI are copied byte by byte.
    pub(crate) fn check_issuer(&self, issuer: &Certificate<'_>) -> Result<()> {
        if self.issuer == issuer.subject { Ok(()) } else { Err(CertificateFault::Issuer) }
    }

    /// Whether `key` signed this.
    pub(crate) fn check_signature(&self, key: &IssuerKey) -> Result<()> {
        key.verify(self.tbs, self.signature).map_err(|_| CertificateFault::Signature)
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Extensions {
    basic_constraints: Option<BasicConstraints>,
    key_usage: Option<KeyUsage>,
    /// Whether an extended key usage lists clientAuth; `None` without one, which allows everything.
    client_auth: Option<bool>,
}

impl Extensions {
    /// Upstream verifies chains for client authentication, which counts only where the extension is present.
    fn check_extended_key_usage(&self) -> Result<()> {
        match self.client_auth {
            Some(false) => Err(CertificateFault::ExtendedKeyUsage),
            _ => Ok(()),
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct BasicConstraints {
    critical: bool,
    ca: bool,
    path_length: Option<u8>,
}

#[derive(Clone, Copy, Debug)]
struct KeyUsage {
    digital_signature: bool,
    key_cert_sign: bool,
}

/// `[0] EXPLICIT INTEGER { v3(2) }`
fn version_3(reader: &mut SliceReader<'_>) -> Result<()> {
    match explicit(reader, 0)? {
        [2, 1, 2] => Ok(()),
        _ => Err(CertificateFault::Version),
    }
}

/// What an EXPLICIT context-specific tag of that number holds; another tag belongs to another version.
fn explicit<'a>(reader: &mut SliceReader<'a>, number: u32) -> Result<&'a [u8]> {
    let field = AnyRef::decode(reader)?;
    let tag = field.tag();
    if !tag.is_context_specific() || !tag.is_constructed() || tag.number().value() != number {
        return Err(CertificateFault::Version);
    }
    Ok(field.value())
}

/// Whether the algorithm is ecdsa-with-SHA384, whose parameters are absent (RFC 5758 §3.2).
fn signature_algorithm(reader: &mut SliceReader<'_>) -> Result<bool> {
    reader.sequence(|algorithm| {
        let oid = ObjectIdentifier::decode(algorithm)?;
        let parameters = algorithm.read_slice(algorithm.remaining_len())?;
        Ok(oid == ECDSA_WITH_SHA384 && parameters.is_empty())
    })
}

/// A name is compared as it is encoded, so only its outline is checked.
fn name<'a>(reader: &mut SliceReader<'a>) -> Result<&'a [u8]> {
    Tag::peek(reader)?.assert_eq(Tag::Sequence)?;
    Ok(reader.tlv_bytes()?)
}

fn validity(reader: &mut SliceReader<'_>) -> Result<Validity> {
    reader.sequence(|times| Ok(Validity { not_before: time(times)?, not_after: time(times)? }))
}

fn time(reader: &mut SliceReader<'_>) -> Result<u64> {
    let since_1970 = match Tag::peek(reader)? {
        Tag::UtcTime => UtcTime::decode(reader)?.to_unix_duration(),
        _ => GeneralizedTime::decode(reader)?.to_unix_duration(),
    };
    Ok(since_1970.as_secs())
}

fn public_key<'a>(reader: &mut SliceReader<'a>) -> Result<&'a [u8]> {
    reader.sequence(|info| {
        let on_p384 = info.sequence(|algorithm| {
            let kind = ObjectIdentifier::decode(algorithm)?;
            let parameters = algorithm.read_slice(algorithm.remaining_len())?;
            let curve = ObjectIdentifier::from_der(parameters);
            Ok::<_, CertificateFault>(kind == EC_PUBLIC_KEY && curve == Ok(SECP384R1))
        })?;
        let point = whole_bytes(info.decode()?)?;
        if !on_p384 || point.len() != PUBLIC_KEY_LEN || point[0] != UNCOMPRESSED {
            return Err(CertificateFault::Key);
        }
        Ok(point)
    })
}

/// `[3] EXPLICIT SEQUENCE OF Extension`, the end of the certificate.
fn extensions(reader: &mut SliceReader<'_>) -> Result<Extensions> {
    let mut found = Extensions::default();
    if reader.is_finished() {
        return Ok(found);
    }
    let mut list = SliceReader::new(explicit(reader, 3)?)?;
    list.sequence(|list| {
        let mut seen = [None; MAX_EXTENSIONS];
        let mut slots = seen.len();
        while !list.is_finished() {
            let oid = list.sequence(|extension| one_extension(extension, &mut found))?;
            slots = slots.checked_sub(1).ok_or(CertificateFault::Extensions)?;
            if seen.contains(&Some(oid)) {
                return Err(CertificateFault::Extensions);
            }
            seen[slots] = Some(oid);
        }
        Ok::<_, CertificateFault>(())
    })?;
    list.finish()?;
    Ok(found)
}

fn one_extension(reader: &mut SliceReader<'_>, found: &mut Extensions) -> Result<ObjectIdentifier> {
    let oid = ObjectIdentifier::decode(reader)?;
    let critical = match Tag::peek(reader)? {
        Tag::Boolean => bool::decode(reader)?,
        _ => false,
    };
    let value = <&OctetStringRef>::decode(reader)?.as_bytes();
    match oid {
        BASIC_CONSTRAINTS => found.basic_constraints = Some(basic_constraints(value, critical)?),
        KEY_USAGE => found.key_usage = Some(key_usage(value)?),
        EXTENDED_KEY_USAGE => found.client_auth = Some(lists_client_auth(value)?),
        NAME_CONSTRAINTS => return Err(CertificateFault::CriticalExtension),
        _ if critical => return Err(CertificateFault::CriticalExtension),
        _ => {}
    }
    Ok(oid)
}

fn basic_constraints(value: &[u8], critical: bool) -> Result<BasicConstraints> {
    let mut outer = SliceReader::new(value)?;
    let constraints = outer.sequence(|reader| {
        let ca = match reader.peek_byte() {
            Some(0x01) => bool::decode(reader)?,
            _ => false,
        };
        let path_length = if reader.is_finished() { None } else { Some(u8::decode(reader)?) };
        Ok::<_, CertificateFault>(BasicConstraints { critical, ca, path_length })
    })?;
    outer.finish()?;
    Ok(constraints)
}

fn key_usage(value: &[u8]) -> Result<KeyUsage> {
    let bits = BitStringRef::from_der(value)?;
    let bit = |number| bits.get(number).unwrap_or(false);
    Ok(KeyUsage { digital_signature: bit(0), key_cert_sign: bit(5) })
}

fn lists_client_auth(value: &[u8]) -> Result<bool> {
    let mut outer = SliceReader::new(value)?;
    let listed = outer.sequence(|usages| {
        let mut listed = false;
        while !usages.is_finished() {
            listed |= ObjectIdentifier::decode(usages)? == CLIENT_AUTH;
        }
        Ok::<_, CertificateFault>(listed)
    })?;
    outer.finish()?;
    Ok(listed)
}

fn whole_bytes(bits: BitStringRef<'_>) -> Result<&[u8]> {
    bits.as_bytes().ok_or(CertificateFault::Der)
}
