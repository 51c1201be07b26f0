use std::collections::BTreeMap;
use std::time::Duration;

use aws_lc_rs::digest::{Context, SHA256};
use rustls_pki_types::{CertificateDer, SignatureVerificationAlgorithm, UnixTime};
use webpki::{
    CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage, OwnedCertRevocationList,
    RevocationCheckDepth, RevocationOptionsBuilder, UnknownStatusPolicy,
};

use super::attest::{self, Attest, Reader};
use super::error::Error;
use crate::UnixMillis;

/// Google's root for the endorsement and attestation keys of its virtual TPMs: `CN=EK/AK CA Root`, 2022-07-08 to
/// 2122-07-08.
static GCP_ROOT: &[u8] = include_bytes!("gcp-ek-ak-root.der");
/// The extended key usage 2.23.133.8.1 of the TCG (`tcg-kp-EKCertificate`), DER body: what Google's CA puts into these
/// certificates, if any. One with other usages alone is refused, as upstream has it.
const EK_CERTIFICATE: &[u8] = &[0x67, 0x81, 0x05, 0x08, 0x01];
/// Algorithm numbers of `TPMT_SIGNATURE`.
const RSASSA: u16 = 0x0014;
const ECDSA: u16 = 0x0018;

/// Longest `TPMS_ATTEST`, signature and certificate: real ones have 150, 260 and 1,500 bytes.
const MAX_PART: usize = 8 << 10;
/// Most events that are looked at; real boots log about a hundred.
pub const MAX_TPM_EVENTS: usize = 4096;
/// Most certificates between the attestation key's and the root.
const MAX_INTERMEDIATES: usize = 4;

/// One event of the boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event<'a> {
    /// The register it extended.
    pub pcr: u32,
    /// With what.
    pub digest: &'a [u8],
}

/// A TPM quote, unverified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TpmQuote<'a> {
    /// `TPMS_ATTEST`.
    pub message: &'a [u8],
    /// `TPMT_SIGNATURE` over it.
    pub signature: &'a [u8],
    /// Index and SHA-256 value of each register, in the order of the signed selection.
    pub pcrs: Vec<(u32, &'a [u8])>,
    /// The attestation key's certificate, DER.
    pub ak_cert: &'a [u8],
    /// The events of the boot.
    pub events: Vec<Event<'a>>,
}

/// What leads from the attestation key's certificate to the root.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Certificates in between, DER.
    pub intermediates: Vec<Vec<u8>>,
    /// Revocation lists, DER; each must be valid at the time of verification.
    pub crls: Vec<Vec<u8>>,
}

/// Verifies quotes under one root.
#[derive(Clone)]
pub struct Verifier {
    root: CertificateDer<'static>,
}

impl Default for Verifier {
    fn default() -> Self {
        Self { root: CertificateDer::from(GCP_ROOT) }
    }
}

impl Verifier {
    /// A verifier that trusts another root, DER, instead of Google's.
    ///
    /// # Errors
    /// [`Error::Root`].
    pub fn with_root(root: &[u8]) -> Result<Self, Error> {
        let root = CertificateDer::from(root.to_vec());
        webpki::anchor_from_trusted_cert(&root).map_err(|error| Error::Root { reason: error.to_string() })?;
        Ok(Self { root })
    }

    /// Checks registers, event log, signature and chain of a quote.
    ///
    /// # Errors
    /// The first check that fails. What costs least is checked first.
    pub fn verify(
        &self,
        quote: &TpmQuote<'_>,
        chain: &Chain,
        now: UnixMillis,
    ) -> Result<VerifiedTpmQuote, Error> {
        bounded(quote, chain)?;
        let attest = Attest::decode(quote.message)?;
        if !attest.pcrs.iter().eq(quote.pcrs.iter().map(|(index, _)| index)) {
            return Err(Error::Selection);
        }
        let mut digest = Context::new(&SHA256);
        let mut pcrs = BTreeMap::new();
        for (index, value) in &quote.pcrs {
            digest.update(value);
            let value: [u8; 32] = (*value).try_into().map_err(|_| Error::Digest)?;
            pcrs.insert(*index, value);
        }
        if digest.finish().as_ref() != attest.pcr_digest {
            return Err(Error::Digest);
        }
        for (index, value) in &pcrs {
            check_events(*index, value, &quote.events)?;
        }
        let certificate = CertificateDer::from(quote.ak_cert);
        let unreadable = |error: webpki::Error| Error::Chain { reason: error.to_string() };
        let ak = EndEntityCert::try_from(&certificate).map_err(unreadable)?;
        check_signature(&ak, quote.message, quote.signature)?;
        self.check_chain(&ak, chain, now).map_err(unreadable)?;
        Ok(VerifiedTpmQuote { qualifying_data: attest.qualifying_data.to_vec(), pcrs })
    }

    fn check_chain(
        &self,
        ak: &EndEntityCert<'_>,
        chain: &Chain,
        now: UnixMillis,
    ) -> Result<(), webpki::Error> {
        let anchor = [webpki::anchor_from_trusted_cert(&self.root)?];
        let intermediates: Vec<_> =
            chain.intermediates.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
        let crls = chain
            .crls
            .iter()
            .map(|der| OwnedCertRevocationList::from_der(der).map(CertRevocationList::from))
            .collect::<Result<Vec<_>, _>>()?;
        let crls: Vec<_> = crls.iter().collect();
        // A certificate without a distribution point has no list; one with a list that is missing was the fetcher's to
        // refuse.
        let revocation = RevocationOptionsBuilder::new(&crls).ok().map(|builder| {
            builder
                .with_depth(RevocationCheckDepth::Chain)
                .with_status_policy(UnknownStatusPolicy::Allow)
                .with_expiration_policy(ExpirationPolicy::Enforce)
                .build()
        });
        let now = UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs()));
        let usage = KeyUsage::required_if_present(EK_CERTIFICATE);
        let algorithms = webpki::ALL_VERIFICATION_ALGS;
        ak.verify_for_usage(algorithms, &anchor, &intermediates, now, usage, revocation, None).map(|_| ())
    }
}

/// A quote whose signature, chain and event log were checked. Only [`Verifier::verify`] makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifiedTpmQuote {
    qualifying_data: Vec<u8>,
    pcrs: BTreeMap<u32, [u8; 32]>,
}

impl VerifiedTpmQuote {
    /// What the caller of the TPM chose.
    pub fn qualifying_data(&self) -> &[u8] {
        &self.qualifying_data
    }

    /// The value of a register, if it was quoted.
    pub fn pcr(&self, index: u32) -> Option<&[u8; 32]> {
        self.pcrs.get(&index)
    }
}

fn bounded(quote: &TpmQuote<'_>, chain: &Chain) -> Result<(), Error> {
    let parts = [
        ("message", quote.message.len(), MAX_PART),
        ("signature", quote.signature.len(), MAX_PART),
        ("certificate", quote.ak_cert.len(), MAX_PART),
        ("number of PCRs", quote.pcrs.len(), 32),
        ("number of events", quote.events.len(), MAX_TPM_EVENTS),
        ("number of intermediate certificates", chain.intermediates.len(), MAX_INTERMEDIATES),
        ("number of revocation lists", chain.crls.len(), MAX_INTERMEDIATES + 1),
    ];
    let too_large = parts.into_iter().find(|(_, actual, max)| actual > max);
    too_large.map_or(Ok(()), |(what, actual, max)| Err(Error::TooLarge { what, actual, max }))
}

/// The events of a register must lead to its value. A register without events may hold anything.
fn check_events(index: u32, value: &[u8; 32], events: &[Event<'_>]) -> Result<(), Error> {
    let mut events = events.iter().filter(|event| event.pcr == index).peekable();
    if events.peek().is_none() {
        return Ok(());
    }
    let mut register = [0; 32];
    for event in events {
        let mut context = Context::new(&SHA256);
        context.update(&register);
        context.update(event.digest);
        register.copy_from_slice(context.finish().as_ref());
    }
    if register == *value { Ok(()) } else { Err(Error::EventLog { index }) }
}

fn check_signature(ak: &EndEntityCert<'_>, message: &[u8], signature: &[u8]) -> Result<(), Error> {
    let refused = |reason| Error::Signature { reason };
    let malformed = |_| refused("it is cut off");
    let mut reader = Reader(signature);
    let algorithm = reader.u16().map_err(malformed)?;
    if reader.u16().map_err(malformed)? != attest::SHA256 {
        return Err(refused("it is not over SHA-256"));
    }
    let (verification, signature): (&dyn SignatureVerificationAlgorithm, Vec<u8>) = match algorithm {
        RSASSA => {
            (webpki::aws_lc_rs::RSA_PKCS1_2048_8192_SHA256, reader.sized().map_err(malformed)?.to_vec())
        }
        ECDSA => {
            let (r, s) = (reader.sized().map_err(malformed)?, reader.sized().map_err(malformed)?);
            if r.len() > 32 || s.len() > 32 {
                return Err(refused("its numbers are too long"));
            }
            let body = [der_integer(r), der_integer(s)].concat();
            (webpki::aws_lc_rs::ECDSA_P256_SHA256, [&[0x30, short_len(&body)], body.as_slice()].concat())
        }
        _ => return Err(refused("its algorithm is neither RSASSA nor ECDSA")),
    };
    if !reader.0.is_empty() {
        return Err(refused("bytes follow it"));
    }
    ak.verify_signature(verification, message, &signature)
        .map_err(|_| refused("it is not by the certified key"))
}

/// A DER `INTEGER` of at most 32 bytes: shortest form, never negative.
fn der_integer(number: &[u8]) -> Vec<u8> {
    let start = number.iter().position(|byte| *byte != 0).unwrap_or(number.len());
    let digits = &number[start..];
    let pad: &[u8] = if digits.first().is_none_or(|byte| byte & 0x80 != 0) { &[0] } else { &[] };
    let content = [pad, digits].concat();
    [&[0x02, short_len(&content)], content.as_slice()].concat()
}

/// The callers' contents have at most 70 bytes, so the length has one.
fn short_len(content: &[u8]) -> u8 {
    u8::try_from(content.len()).unwrap_or(u8::MAX)
}
