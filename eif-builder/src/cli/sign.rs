//! `eif-builder sign` and `eif-builder strip`

use std::io::{Read, Seek};
use std::path::{Path, PathBuf};

use serde_json::json;

use super::{Io, SignArgs, SigningKeyArgs, StripArgs, report};
use crate::assemble::{Assembled, Assembler};
use crate::error::{Error, IoContext};
use crate::format::SectionKind;
use crate::image::Image;
use crate::problem::{Lenient, Problem, Strict};
use crate::scratch::Scratch;
use crate::sign::Signer;

pub(super) fn run(args: &SignArgs, io: &mut Io<'_>) -> Result<(), Error> {
    let SigningKeyArgs { private_key, prepare, signature } = &args.key;
    let signer = match (private_key, prepare, signature) {
        (Some(key), ..) => Signer::from_files(key, &args.signing_certificate)?,
        (None, None, Some(signature)) => Signer::detached(signature, &args.signing_certificate)?,
        (None, Some(message), _) => return write_message(args, message, io),
        (None, None, None) => return Err(Error::input("signing", "needs a key or a signature")),
    };
    let assembled = rewrite(&args.image, output(&args.image, args.output.as_ref()), Some(&signer))?;
    report::print(io, &assembled.registers, args.json)
}

/// Writes what a key elsewhere has to sign. The digest on stdout is for services that take only that.
fn write_message(args: &SignArgs, output: &Path, io: &mut Io<'_>) -> Result<(), Error> {
    let mut image = Image::open(&args.image, &mut Strict)?;
    let registers = image.scan(&mut Strict)?.registers.map_err(Error::Format)?;
    let (algorithm, message) = Signer::message(&args.signing_certificate, &registers.pcr0)?;
    std::fs::write(output, &message).context("write", output)?;
    let (hash, digest) = algorithm.digest(&message);
    if args.json {
        return report::print_json(
            io,
            &json!({ "Hash": hash, "Digest": digest, "PCR0": registers.pcr0.to_string() }),
        );
    }
    report::print_text(io, &format!("{hash}: {digest}\n"))
}

pub(super) fn strip(args: &StripArgs, io: &mut Io<'_>) -> Result<(), Error> {
    let assembled = rewrite(&args.image, output(&args.image, args.output.as_ref()), None)?;
    report::print(io, &assembled.registers, args.json)
}

fn output<'a>(image: &'a Path, output: Option<&'a PathBuf>) -> &'a Path {
    output.map_or(image, PathBuf::as_path)
}

/// Copies an image without its signature, and with another one if there is a signer.
fn rewrite(image: &Path, output: &Path, signer: Option<&Signer>) -> Result<Assembled, Error> {
    let mut lenient = Lenient::default();
    let mut image = Image::open(image, &mut lenient)?;
    image.scan(&mut lenient)?;
    // What a wrong signature section alone explains goes away with it; the rest must be in order.
    if let Some(finding) =
        lenient.findings.iter().find(|finding| !is_about_signature(&image, &finding.problem))
    {
        return Err(Error::Format(finding.clone()));
    }
    let file = Scratch::beside(output)?;
    let mut assembler = Assembler::rewriting(image.header(), file.as_file())?;
    for section in image.sections().to_vec() {
        if section.kind != SectionKind::Signature {
            let mut payload = image.payload(section)?;
            assembler
                .section(section.kind, |target| target.copy_from(&mut payload, "the image").map(drop))?;
        }
    }
    let (assembled, _) = assembler.finish(signer)?;
    file.publish(output)?;
    Ok(assembled)
}

/// The reference tool leaves the old length of a signature in the file header when it signs again.
fn is_about_signature<R: Read + Seek>(image: &Image<R>, problem: &Problem) -> bool {
    let Some(signature) = image.section(SectionKind::Signature) else { return false };
    match problem {
        Problem::SizeMismatch { slot, .. } | Problem::TooLarge { slot, .. } => *slot == signature.slot,
        Problem::Trailing { .. } | Problem::PastEnd { .. } => signature.end() == image.file_len(),
        _ => false,
    }
}
