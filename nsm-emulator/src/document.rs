//! Attestation documents, byte for byte in the shape that AWS's module writes.

use crate::Error;
use crate::cbor::Writer;
use crate::pki::Leaf;
use crate::request::AttestationRequest;

/// `{1: -35}`: ECDSA with SHA-384, in the protected header.
const PROTECTED: [u8; 4] = [0xa1, 0x01, 0x38, 0x22];

/// The claims of a document.
pub(crate) struct Claims<'a> {
    pub(crate) module_id: &'a str,
    /// Milliseconds since 1970.
    pub(crate) timestamp: u64,
    /// Index and value of each locked register, in ascending order.
    pub(crate) pcrs: Vec<(u8, [u8; 48])>,
    pub(crate) request: AttestationRequest<'a>,
}

/// The untagged `COSE_Sign1` that carries `claims`, signed by `leaf`.
pub(crate) fn sign(claims: &Claims<'_>, leaf: &Leaf) -> Result<Vec<u8>, Error> {
    let payload = payload(claims, leaf);
    let to_be_signed =
        Writer::default().array(4).text("Signature1").bytes(&PROTECTED).bytes(&[]).bytes(&payload).take();
    let signature = leaf.sign(&to_be_signed)?;
    Ok(Writer::default().array(4).bytes(&PROTECTED).map(0).bytes(&payload).bytes(&signature).take())
}

fn payload(claims: &Claims<'_>, leaf: &Leaf) -> Vec<u8> {
    let mut writer = Writer::default();
    // The module writes the outer map with an indefinite length and the timestamp in its longest form.
    writer.raw(&[0xbf]);
    writer.text("module_id").text(claims.module_id);
    writer.text("digest").text("SHA384");
    writer.text("timestamp").raw(&[0x1b]).raw(&claims.timestamp.to_be_bytes());
    writer.text("pcrs").map(claims.pcrs.len());
    for (index, value) in &claims.pcrs {
        writer.unsigned(u64::from(*index)).bytes(value);
    }
    writer.text("certificate").bytes(&leaf.certificate);
    writer.text("cabundle").array(leaf.cabundle.len());
    for certificate in &leaf.cabundle {
        writer.bytes(certificate);
    }
    writer.text("public_key").optional_bytes(claims.request.public_key);
    writer.text("user_data").optional_bytes(claims.request.user_data);
    writer.text("nonce").optional_bytes(claims.request.nonce);
    writer.raw(&[0xff]).take()
}
