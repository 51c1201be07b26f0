//! Everything that can be said about one image: for `describe` and `verify`.

use std::fmt;
use std::io::{Read, Seek};
use std::path::Path;

use crate::cpio_read::{is_aligned, read_ramdisk};
use crate::error::Error;
use crate::format::{Header, SectionKind};
use crate::image::{Image, Section};
use crate::measure::{Registers, extend};
use crate::metadata::Metadata;
use crate::problem::{Finding, Lenient, Problem};
use crate::signature::Signature;

/// What reading an image leniently told.
#[derive(Debug)]
pub struct Inspection {
    /// File header.
    pub header: Header,
    /// Sections in file order.
    pub sections: Vec<Section>,
    /// The registers, when the image can be measured.
    pub registers: Option<Registers>,
    /// Whether the stored checksum is that of the content.
    pub crc_is_right: bool,
    /// The metadata section, when there is a readable one. Anyone can change it.
    pub metadata: Option<Metadata>,
    /// The kernel command line for display: one trailing zero byte left out.
    pub cmdline: Option<String>,
    /// Who signed.
    pub signer: Option<SignerFacts>,
    /// Everything that is wrong.
    pub findings: Vec<Finding>,
}

/// The signing certificate, for display.
#[derive(Debug, Clone)]
pub struct SignerFacts {
    /// DER of the certificate.
    pub der: Vec<u8>,
    /// Subject.
    pub subject: String,
    /// Issuer.
    pub issuer: String,
    /// Signature algorithm of the certificate, dotted.
    pub algorithm: String,
    /// Start of the validity.
    pub not_before: String,
    /// End of the validity.
    pub not_after: String,
    /// Whether the signature holds.
    pub state: SignatureState,
    /// Where the section starts.
    offset: u64,
}

/// Whether a signature holds for the image it is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignatureState {
    /// The certificate's key signed this PCR0, and the certificate is valid now.
    Good,
    /// It did not, or it is not.
    Bad,
}

impl fmt::Display for SignatureState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Good => "correctly",
            Self::Bad => "WRONGLY",
        })
    }
}

impl Inspection {
    /// Reads the image at `path`; `deep` also unpacks the ramdisks. `now` is in seconds since the epoch.
    ///
    /// # Errors
    /// When the file cannot be read or is no enclave image at all. Everything else is a finding.
    pub fn of(path: &Path, deep: bool, now: i64) -> Result<Self, Error> {
        let mut lenient = Lenient::default();
        let mut image = Image::open(path, &mut lenient)?;
        let scan = image.scan(&mut lenient)?;
        let crc_is_right = scan.crc == image.header().crc;
        let mut findings = lenient.findings;
        let mut registers = match scan.registers {
            Ok(registers) => Some(registers),
            Err(finding) => {
                // The reason may be among the findings already.
                if !findings.contains(&finding) {
                    findings.push(finding);
                }
                None
            }
        };
        let signer = inspect_signature(&mut image, registers.as_mut(), now, &mut findings);
        let metadata = inspect_metadata(&mut image, &mut findings)?;
        if deep {
            inspect_ramdisks(&mut image, &mut findings)?;
        }
        let cmdline = image.cmdline().ok().flatten().map(|bytes| {
            let text = bytes.strip_suffix(&[0]).unwrap_or(&bytes);
            String::from_utf8_lossy(text).into_owned()
        });
        Ok(Self {
            header: image.header().clone(),
            sections: image.sections().to_vec(),
            registers,
            crc_is_right,
            metadata,
            cmdline,
            signer,
            findings,
        })
    }

    /// Adds a finding unless the certificate in the image is exactly this one.
    pub fn require_signer(&mut self, der: &[u8]) {
        let (offset, reason) = match &self.signer {
            Some(signer) if signer.der == der => return,
            Some(signer) => {
                (signer.offset, format!("made by {}, another certificate than required", signer.subject))
            }
            None => (0x1a, "there is none, one is required".to_owned()),
        };
        self.findings.push(Finding { offset, problem: Problem::Signature(reason) });
    }
}

fn inspect_signature<R: Read + Seek>(
    image: &mut Image<R>,
    registers: Option<&mut Registers>,
    now: i64,
    findings: &mut Vec<Finding>,
) -> Option<SignerFacts> {
    let section = image.section(SectionKind::Signature)?;
    let offset = section.payload_offset();
    let mut report = |reason: String| findings.push(Finding { offset, problem: Problem::Signature(reason) });
    let signature: Signature = match image.signature() {
        Ok(signature) => signature?,
        Err(Error::Format(Finding { problem: Problem::Signature(reason), .. })) => {
            report(reason);
            return None;
        }
        Err(error) => {
            report(error.to_string());
            return None;
        }
    };
    let certificate = match signature.certificate() {
        Ok(certificate) => certificate,
        Err(reason) => {
            report(reason);
            return None;
        }
    };
    let mut state = SignatureState::Good;
    if let Some(registers) = registers {
        registers.pcr8 = Some(extend(signature.certificate_der()));
        if let Err(reason) = signature.verify(&registers.pcr0) {
            state = SignatureState::Bad;
            report(reason);
        }
    } else {
        state = SignatureState::Bad;
    }
    let validity = certificate.validity();
    let (not_before, not_after) = (validity.not_before, validity.not_after);
    if !(not_before.timestamp()..=not_after.timestamp()).contains(&now) {
        state = SignatureState::Bad;
        report(format!("the certificate is valid from {not_before} to {not_after}, which is not now"));
    }
    Some(SignerFacts {
        subject: certificate.subject().to_string(),
        issuer: certificate.issuer().to_string(),
        algorithm: certificate.signature_algorithm.algorithm.to_id_string(),
        not_before: not_before.to_string(),
        not_after: not_after.to_string(),
        der: signature.certificate_der().to_vec(),
        state,
        offset,
    })
}

fn inspect_metadata<R: Read + Seek>(
    image: &mut Image<R>,
    findings: &mut Vec<Finding>,
) -> Result<Option<Metadata>, Error> {
    let Some(section) = image.section(SectionKind::Metadata) else { return Ok(None) };
    if section.size > crate::format::MAX_METADATA_LEN {
        return Ok(None); // reported with the structure
    }
    match Metadata::decode(&image.small_payload(section)?) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) => {
            let problem = Problem::Metadata(error.to_string());
            findings.push(Finding { offset: section.payload_offset(), problem });
            Ok(None)
        }
    }
}

fn inspect_ramdisks<R: Read + Seek>(image: &mut Image<R>, findings: &mut Vec<Finding>) -> Result<(), Error> {
    let ramdisks = image.ramdisks();
    for (index, section) in ramdisks.iter().enumerate() {
        let offset = section.payload_offset();
        if let Err(reason) = read_ramdisk(image.payload(*section)?, &mut |_, _| Ok(())) {
            findings.push(Finding { offset, problem: Problem::Ramdisk { index, reason } });
        }
        // Packed archives may start anywhere; the length of a packed one still shifts a plain one behind it.
        let next_is_plain = match ramdisks.get(index + 1) {
            Some(next) => starts_plain(image, *next)?,
            None => false,
        };
        let end: u64 = ramdisks[..=index].iter().map(|section| section.size).sum();
        if next_is_plain && !is_aligned(end) {
            let reason =
                format!("starts at {end} behind the others, Linux wants a multiple of 4 and would lose it");
            let offset = ramdisks[index + 1].payload_offset();
            findings.push(Finding { offset, problem: Problem::Ramdisk { index: index + 1, reason } });
        }
    }
    Ok(())
}

fn starts_plain<R: Read + Seek>(image: &mut Image<R>, section: Section) -> Result<bool, Error> {
    let mut start = Vec::new();
    let read = image.payload(section)?.take(4).read_to_end(&mut start);
    Ok(read.is_ok() && start == b"0707")
}
