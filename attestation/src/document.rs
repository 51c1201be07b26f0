//! The attestation document proper: the payload that the NSM signed.
//!
//! Field rules are those of AWS's attestation process (`docs/attestation_process.md` of aws-nitro-enclaves-nsm-api,
//! §2.2 and §3.2.2), corrected by what real documents of 2021 to 2026 look like: an optional field that was not asked
//! for is null, `public_key` can be empty, and the map has an indefinite length since 2025.

use std::fmt;
use std::ops::Range;

use crate::UnixMillis;
use crate::cbor::{Keys, Reader};
use crate::cose::{CoseSign1, check_length};
use crate::error::{Error, Part};
use crate::pcr::{OsImageHash, PCR_COUNT, Pcr, PcrBank, PcrIndex, os_image_hash};

/// AWS sets no limit; real ones have 39 bytes.
const MAX_MODULE_ID_LEN: usize = 256;
/// AWS, §2.2: `cert = bytes .size (1..1024)`. Real ones have 533 to 797 bytes.
pub(crate) const MAX_CERTIFICATE_LEN: usize = 1024;
/// The longest chain looked at. Real ones have 4 certificates in the bundle; every one costs a signature check.
pub(crate) const MAX_CA_BUNDLE: usize = 8;
/// AWS, §3.2.2.2.
const MAX_USER_DATA_LEN: usize = 512;
/// AWS, §3.2.2.2.
const MAX_NONCE_LEN: usize = 512;
/// AWS, §3.2.2.2. Empty ones are real, although the text asks for one byte.
const MAX_PUBLIC_KEY_LEN: usize = 1024;
/// Known fields are 9; the rest is room for what AWS may add.
const MAX_FIELDS: usize = 32;

/// A decoded document: well-formed and complete, but **not verified**. Anybody can write one.
///
/// [`crate::Verifier::verify`] turns evidence into a [`crate::VerifiedDocument`].
#[derive(Clone, PartialEq, Eq)]
pub struct AttestationDocument {
    payload: Box<[u8]>,
    module_id: Box<str>,
    fields: Fields,
}

impl AttestationDocument {
    /// Decodes a COSE_Sign1 structure and the document in it. Checks no signature.
    ///
    /// # Errors
    /// The first rule of the format that is broken.
    pub fn decode(evidence: &[u8]) -> Result<Self, Error> {
        let cose = CoseSign1::decode(evidence)?;
        Payload::decode(cose.payload).map(|payload| payload.to_document())
    }

    /// The enclave's name: instance id, `-enc`, 16 hex digits. Nothing but UTF-8 and its length is sure.
    pub fn module_id(&self) -> &str {
        &self.module_id
    }

    /// When the document was made, by the hypervisor's clock.
    pub fn timestamp(&self) -> UnixMillis {
        self.fields.timestamp
    }

    /// A register; `None` if it is not in the document (only locked registers are), which is not the same as zero.
    pub fn pcr(&self, index: PcrIndex) -> Option<&Pcr> {
        self.fields.pcrs.get(index)
    }

    /// All registers of the document in ascending order.
    pub fn pcrs(&self) -> impl Iterator<Item = (PcrIndex, &Pcr)> {
        self.fields.pcrs.iter()
    }

    /// What the enclave asked to be signed; `None` if absent or null.
    pub fn user_data(&self) -> Option<&[u8]> {
        self.optional(&self.fields.user_data)
    }

    /// The challenge that the enclave passed on; `None` if absent or null.
    pub fn nonce(&self) -> Option<&[u8]> {
        self.optional(&self.fields.nonce)
    }

    /// A key that the enclave asked to be signed; `None` if absent or null. Can be empty.
    pub fn public_key(&self) -> Option<&[u8]> {
        self.optional(&self.fields.public_key)
    }

    /// The leaf certificate, DER.
    pub fn certificate(&self) -> &[u8] {
        self.fields.certificate.of(&self.payload)
    }

    /// The issuing certificates as the document orders them, DER: root first, the leaf's issuer last.
    pub fn cabundle(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        self.fields.cabundle().iter().map(|span| span.of(&self.payload))
    }

    /// Whether this is a debug enclave, or claims to be none with a register of the image zero.
    pub fn is_debug(&self) -> bool {
        self.first_zero_image_pcr().is_some()
    }

    /// The name of the image: `sha256(PCR0 ‖ PCR1 ‖ PCR2)`.
    pub fn os_image_hash(&self) -> OsImageHash {
        let [pcr0, pcr1, pcr2] = &self.fields.image;
        os_image_hash(pcr0, pcr1, pcr2)
    }

    pub(crate) fn first_zero_image_pcr(&self) -> Option<PcrIndex> {
        IMAGE_PCRS.into_iter().zip(&self.fields.image).find_map(|(index, pcr)| pcr.is_zero().then_some(index))
    }

    fn optional(&self, span: &Option<Span>) -> Option<&[u8]> {
        span.as_ref().map(|span| span.of(&self.payload))
    }
}

/// Text from the document is escaped and binary fields show as their length: any of them may be hostile.
impl fmt::Debug for AttestationDocument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AttestationDocument")
            .field("module_id", &self.module_id)
            .field("timestamp", &self.timestamp())
            .field("os_image_hash", &self.os_image_hash())
            .field("user_data_len", &self.user_data().map(<[u8]>::len))
            .field("nonce_len", &self.nonce().map(<[u8]>::len))
            .field("public_key_len", &self.public_key().map(<[u8]>::len))
            .finish_non_exhaustive()
    }
}

const IMAGE_PCRS: [PcrIndex; 3] = [PcrIndex::IMAGE, PcrIndex::KERNEL, PcrIndex::APPLICATION];

/// A decoded payload that still borrows from the evidence.
pub(crate) struct Payload<'a> {
    bytes: &'a [u8],
    module_id: &'a str,
    fields: Fields,
}

impl<'a> Payload<'a> {
    pub(crate) fn decode(bytes: &'a [u8]) -> Result<Self, Error> {
        let mut found = Found::default();
        let mut unknown = Keys::<MAX_FIELDS>::new();
        let fault = |fault| Error::Cbor { part: Part::Payload, fault };
        let mut reader = Reader::new(bytes);
        let mut entries = reader.map(MAX_FIELDS).map_err(fault)?;
        while reader.next(&mut entries).map_err(fault)? {
            let key = reader.text().map_err(fault)?;
            unknown.add(key.as_bytes()).map_err(fault)?;
            found.field(key, &mut reader)?;
        }
        reader.finish().map_err(fault)?;
        found.complete(bytes)
    }

    pub(crate) fn timestamp(&self) -> UnixMillis {
        self.fields.timestamp
    }

    pub(crate) fn certificate(&self) -> &'a [u8] {
        self.fields.certificate.of(self.bytes)
    }

    pub(crate) fn cabundle(&self) -> impl ExactSizeIterator<Item = &'a [u8]> {
        self.fields.cabundle().iter().map(|span| span.of(self.bytes))
    }

    pub(crate) fn to_document(&self) -> AttestationDocument {
        AttestationDocument {
            payload: self.bytes.into(),
            module_id: self.module_id.into(),
            fields: self.fields.clone(),
        }
    }
}

/// Where a byte string lies in the payload.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Span(Range<usize>);

impl Span {
    fn of<'a>(&self, payload: &'a [u8]) -> &'a [u8] {
        &payload[self.0.clone()]
    }
}

#[derive(Clone, PartialEq, Eq)]
struct Fields {
    timestamp: UnixMillis,
    pcrs: PcrBank,
    image: [Pcr; 3],
    certificate: Span,
    cabundle: CaBundle,
    public_key: Option<Span>,
    user_data: Option<Span>,
    nonce: Option<Span>,
}

impl Fields {
    fn cabundle(&self) -> &[Span] {
        &self.cabundle.spans[..self.cabundle.len]
    }
}

#[derive(Clone, Default, PartialEq, Eq)]
struct CaBundle {
    spans: [Span; MAX_CA_BUNDLE],
    len: usize,
}

/// Fields as they come, in any order.
#[derive(Default)]
struct Found<'a> {
    module_id: Option<&'a str>,
    digest: bool,
    timestamp: Option<UnixMillis>,
    pcrs: Option<PcrBank>,
    certificate: Option<Span>,
    cabundle: Option<CaBundle>,
    public_key: Option<Span>,
    user_data: Option<Span>,
    nonce: Option<Span>,
}

impl<'a> Found<'a> {
    fn field(&mut self, key: &str, reader: &mut Reader<'a>) -> Result<(), Error> {
        match key {
            "module_id" => self.module_id = Some(module_id(reader)?),
            "digest" => self.digest = digest(reader)?,
            "timestamp" => self.timestamp = Some(timestamp(reader)?),
            "pcrs" => self.pcrs = Some(pcrs(reader)?),
            "certificate" => {
                self.certificate = Some(bytes(Part::Certificate, reader, 1, MAX_CERTIFICATE_LEN)?);
            }
            "cabundle" => self.cabundle = Some(cabundle(reader)?),
            "public_key" => self.public_key = optional(Part::PublicKey, reader, MAX_PUBLIC_KEY_LEN)?,
            "user_data" => self.user_data = optional(Part::UserData, reader, MAX_USER_DATA_LEN)?,
            "nonce" => self.nonce = optional(Part::Nonce, reader, MAX_NONCE_LEN)?,
            // AWS's root also vouches for the documents of a NitroTPM. They say nothing about an enclave: the
            // instance's owner extends those registers at will.
            "nitrotpm_pcrs" => return Err(Error::NitroTpm),
            _ => {
                reader.skip().map_err(|fault| Error::Cbor { part: Part::UnknownField, fault })?;
            }
        }
        Ok(())
    }

    fn complete(self, bytes: &'a [u8]) -> Result<Payload<'a>, Error> {
        fn required<T>(field: Option<T>, part: Part) -> Result<T, Error> {
            field.ok_or(Error::Missing { part })
        }
        let module_id = required(self.module_id, Part::ModuleId)?;
        required(self.digest.then_some(()), Part::Digest)?;
        let timestamp = required(self.timestamp, Part::Timestamp)?;
        let pcrs = required(self.pcrs, Part::Pcrs)?;
        let certificate = required(self.certificate, Part::Certificate)?;
        let cabundle = required(self.cabundle, Part::CaBundle)?;
        let mut image = [Pcr::ZERO; 3];
        for (pcr, index) in image.iter_mut().zip(IMAGE_PCRS) {
            *pcr = *pcrs.get(index).ok_or(Error::PcrMissing { index })?;
        }
        let (public_key, user_data, nonce) = (self.public_key, self.user_data, self.nonce);
        let fields = Fields { timestamp, pcrs, image, certificate, cabundle, public_key, user_data, nonce };
        Ok(Payload { bytes, module_id, fields })
    }
}

fn module_id<'a>(reader: &mut Reader<'a>) -> Result<&'a str, Error> {
    let part = Part::ModuleId;
    let text = reader.text().map_err(|fault| Error::Cbor { part, fault })?;
    check_length(part, text.as_bytes(), 1, MAX_MODULE_ID_LEN)?;
    Ok(text)
}

fn digest(reader: &mut Reader<'_>) -> Result<bool, Error> {
    match reader.text() {
        Ok("SHA384") => Ok(true),
        Ok(_) => Err(Error::Digest),
        Err(fault) => Err(Error::Cbor { part: Part::Digest, fault }),
    }
}

fn timestamp(reader: &mut Reader<'_>) -> Result<UnixMillis, Error> {
    match reader.unsigned() {
        Ok(0) => Err(Error::ZeroTimestamp),
        Ok(millis) => Ok(UnixMillis(millis)),
        Err(fault) => Err(Error::Cbor { part: Part::Timestamp, fault }),
    }
}

fn pcrs(reader: &mut Reader<'_>) -> Result<PcrBank, Error> {
    let part = Part::Pcrs;
    let fault = |fault| Error::Cbor { part, fault };
    let mut bank = PcrBank::EMPTY;
    let mut count = 0;
    let mut entries = reader.map(PCR_COUNT).map_err(fault)?;
    while reader.next(&mut entries).map_err(fault)? {
        let number = reader.unsigned().map_err(fault)?;
        let index = u8::try_from(number).ok().and_then(PcrIndex::new);
        let index = index.ok_or(Error::PcrIndex { index: number })?;
        let value = reader.bytes().map_err(|fault| Error::Cbor { part: Part::Pcr, fault })?;
        check_length(Part::Pcr, value, Pcr::LEN, Pcr::LEN)?;
        let mut pcr = [0; Pcr::LEN];
        pcr.copy_from_slice(value);
        if !bank.set_once(index, Pcr::new(pcr)) {
            return Err(fault(crate::CborFault::DuplicateKey));
        }
        count += 1;
    }
    match count {
        0 => Err(Error::Count { part, actual: 0, min: 1 }),
        _ => Ok(bank),
    }
}

fn cabundle(reader: &mut Reader<'_>) -> Result<CaBundle, Error> {
    let part = Part::CaBundle;
    let fault = |fault| Error::Cbor { part, fault };
    let mut bundle = CaBundle::default();
    let mut entries = reader.array(MAX_CA_BUNDLE).map_err(fault)?;
    while reader.next(&mut entries).map_err(fault)? {
        bundle.spans[bundle.len] = bytes(Part::CaBundleEntry, reader, 1, MAX_CERTIFICATE_LEN)?;
        bundle.len += 1;
    }
    match bundle.len {
        0 => Err(Error::Count { part, actual: 0, min: 1 }),
        _ => Ok(bundle),
    }
}

/// Null means that the field is absent; an empty string is kept as one.
fn optional(part: Part, reader: &mut Reader<'_>, max: usize) -> Result<Option<Span>, Error> {
    if reader.take_null() {
        return Ok(None);
    }
    bytes(part, reader, 0, max).map(Some)
}

fn bytes(part: Part, reader: &mut Reader<'_>, min: usize, max: usize) -> Result<Span, Error> {
    let found = reader.bytes().map_err(|fault| Error::Cbor { part, fault })?;
    check_length(part, found, min, max)?;
    let end = reader.position();
    Ok(Span(end - found.len()..end))
}
