//! COSE_Sign1 (RFC 9052 §4.2) as an NSM writes it: ES384, no external data.
//!
//! Only the protected header, the payload and the signature's key decide anything. Tag, unprotected header and the
//! encoding of the outer array are not signed: anybody can change them, so nothing is read out of them.

use aws_lc_rs::digest::{Context, Digest, SHA384};

use crate::cbor::{CborFault, Integer, Keys, Label, Reader};
use crate::error::{Error, Part};

/// The longest evidence that is looked at, in bytes. The payload has at most 16,384; the rest of a
/// COSE_Sign1 by an NSM takes about 110.
pub const MAX_EVIDENCE_LEN: usize = 17 * 1024;

/// The longest payload: AWS, attestation process, §3.1 (`bstr .size (1..16384)`).
pub(crate) const MAX_PAYLOAD_LEN: usize = 16_384;

/// An ES384 signature: r and s, 48 bytes each (RFC 9053 §2.1).
const SIGNATURE_LEN: usize = 96;

/// Real protected headers have 4 bytes; this leaves room for parameters that need not be understood.
const MAX_PROTECTED_LEN: usize = 256;

/// How many parameters a header may have.
const MAX_PARAMETERS: usize = 16;

const TAG_COSE_SIGN1: u64 = 18;
const ALG: Label<'_> = Label::Int(Integer::Unsigned(1));
const CRIT: Label<'_> = Label::Int(Integer::Unsigned(2));
/// -35, CBOR's "-1 minus 34".
const ES384: Label<'_> = Label::Int(Integer::Negative(34));

/// The order of P-384's base point (FIPS 186-5, SEC 2), big-endian.
const P384_ORDER: [u8; 48] = [
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xc7, 0x63, 0x4d, 0x81, 0xf4, 0x37, 0x2d, 0xdf, 0x58, 0x1a,
    0x0d, 0xb2, 0x48, 0xb0, 0xa7, 0x7a, 0xec, 0xec, 0x19, 0x6a, 0xcc, 0xc5, 0x29, 0x73,
];

/// The parts of a COSE_Sign1 structure, as received.
pub(crate) struct CoseSign1<'a> {
    protected: &'a [u8],
    pub(crate) payload: &'a [u8],
    pub(crate) signature: &'a [u8],
}

impl<'a> CoseSign1<'a> {
    pub(crate) fn decode(evidence: &'a [u8]) -> Result<Self, Error> {
        if evidence.len() > MAX_EVIDENCE_LEN {
            return Err(Error::TooLarge { actual: evidence.len(), max: MAX_EVIDENCE_LEN });
        }
        let at = |part| move |fault| Error::Cbor { part, fault };
        let mut reader = Reader::new(evidence);
        match reader.tag_if_any().map_err(at(Part::Evidence))? {
            None | Some(TAG_COSE_SIGN1) => {}
            Some(tag) => return Err(Error::Tag { tag }),
        }
        let mut items = reader.array(usize::MAX).map_err(at(Part::Evidence))?;
        let mut item = |reader: &mut Reader<'a>, index| match reader.next(&mut items) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Error::CoseLength { actual: index }),
            Err(fault) => Err(Error::Cbor { part: Part::Evidence, fault }),
        };

        item(&mut reader, 0)?;
        let protected = reader.bytes().map_err(at(Part::ProtectedHeader))?;
        item(&mut reader, 1)?;
        check_unprotected(&mut reader)?;
        item(&mut reader, 2)?;
        let payload = reader.bytes().map_err(at(Part::Payload))?;
        item(&mut reader, 3)?;
        let signature = reader.bytes().map_err(at(Part::Signature))?;
        if reader.next(&mut items).map_err(at(Part::Evidence))? {
            return Err(Error::CoseLength { actual: 5 });
        }
        reader.finish().map_err(at(Part::Evidence))?;

        check_length(Part::ProtectedHeader, protected, 0, MAX_PROTECTED_LEN)?;
        check_protected(protected)?;
        check_length(Part::Payload, payload, 1, MAX_PAYLOAD_LEN)?;
        check_signature_range(signature)?;
        Ok(Self { protected, payload, signature })
    }

    /// SHA-384 of the `Sig_structure` (RFC 9052 §4.4), built around the received bytes without copying them.
    pub(crate) fn signed_digest(&self) -> Digest {
        let mut context = Context::new(&SHA384);
        context.update(b"\x84\x6aSignature1");
        update_bstr(&mut context, self.protected);
        update_bstr(&mut context, b"");
        update_bstr(&mut context, self.payload);
        context.finish()
    }
}

/// Hashes a byte string with its CBOR head.
fn update_bstr(context: &mut Context, bytes: &[u8]) {
    let len = (bytes.len() as u64).to_be_bytes();
    match bytes.len() {
        0..24 => context.update(&[0x40 | len[7]]),
        24..256 => context.update(&[0x58, len[7]]),
        256..65_536 => context.update(&[0x59, len[6], len[7]]),
        _ => context.update(&[0x5b, len[0], len[1], len[2], len[3], len[4], len[5], len[6], len[7]]),
    }
    context.update(bytes);
}

/// The protected header must name ES384 and mark nothing critical that is not understood.
fn check_protected(header: &[u8]) -> Result<(), Error> {
    let fault = |fault| Error::Cbor { part: Part::ProtectedHeader, fault };
    // RFC 9052 §3: an empty map is written as an empty string.
    if header.is_empty() {
        return Err(Error::AlgorithmMissing);
    }
    let mut reader = Reader::new(header);
    let mut algorithm = None;
    let mut critical = true;
    for_each_parameter(&mut reader, fault, |reader, label| {
        match label {
            ALG => algorithm = Some(is_es384(reader).map_err(fault)?),
            CRIT => critical = lists_only_alg(reader).map_err(fault)?,
            _ => drop(reader.skip().map_err(fault)?),
        }
        Ok(())
    })?;
    reader.finish().map_err(fault)?;
    match algorithm {
        None => Err(Error::AlgorithmMissing),
        Some(false) => Err(Error::Algorithm),
        Some(true) if !critical => Err(Error::Critical),
        Some(true) => Ok(()),
    }
}

/// The unprotected header may say anything except what has to be protected.
fn check_unprotected(reader: &mut Reader<'_>) -> Result<(), Error> {
    let fault = |fault| Error::Cbor { part: Part::UnprotectedHeader, fault };
    for_each_parameter(reader, fault, |reader, label| match label {
        ALG => Err(Error::Unprotected { label: 1 }),
        CRIT => Err(Error::Unprotected { label: 2 }),
        _ => reader.skip().map(drop).map_err(fault),
    })
}

fn for_each_parameter<'a>(
    reader: &mut Reader<'a>,
    fault: impl Fn(CborFault) -> Error,
    mut parameter: impl FnMut(&mut Reader<'a>, Label<'a>) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut entries = reader.map(MAX_PARAMETERS).map_err(&fault)?;
    let mut keys = Keys::<MAX_PARAMETERS>::new();
    while reader.next(&mut entries).map_err(&fault)? {
        let mut key = reader.clone();
        let label = reader.label().map_err(&fault)?;
        keys.add(key.skip().map_err(&fault)?).map_err(&fault)?;
        parameter(reader, label)?;
    }
    Ok(())
}

/// Whether the algorithm is ES384. A bignum or text that stands for it is not ES384: RFC 9053 registers the integer.
fn is_es384(reader: &mut Reader<'_>) -> Result<bool, CborFault> {
    let mut whole = reader.clone();
    whole.skip()?;
    let es384 = reader.label() == Ok(ES384);
    *reader = whole;
    Ok(es384)
}

/// Whether `crit` lists one label or more, and only such as are present and understood: that is `alg`.
fn lists_only_alg(reader: &mut Reader<'_>) -> Result<bool, CborFault> {
    let mut labels = reader.array(MAX_PARAMETERS)?;
    let (mut any, mut only_alg) = (false, true);
    while reader.next(&mut labels)? {
        any = true;
        only_alg &= reader.label()? == ALG;
    }
    Ok(any && only_alg)
}

/// Zero and values from the order up are refused here, whatever a library does with them (CVE-2022-21449).
fn check_signature_range(signature: &[u8]) -> Result<(), Error> {
    check_length(Part::Signature, signature, SIGNATURE_LEN, SIGNATURE_LEN)?;
    let (r, s) = signature.split_at(SIGNATURE_LEN / 2);
    for (component, value) in [('r', r), ('s', s)] {
        // Of equal length and big-endian, so the order of bytes is the order of numbers.
        if value.iter().all(|byte| *byte == 0) || value >= &P384_ORDER[..] {
            return Err(Error::SignatureRange { component });
        }
    }
    Ok(())
}

pub(crate) fn check_length(part: Part, bytes: &[u8], min: usize, max: usize) -> Result<(), Error> {
    match bytes.len() {
        actual if actual < min || actual > max => Err(Error::Length { part, actual, min, max }),
        _ => Ok(()),
    }
}
