//! `eif-builder describe`, `verify`, `extract` and `diff`

use std::fs::File;
use std::io;

use serde_json::{Map, Value, json};

use super::report::{print_json, print_text};
use super::{DiffArgs, ExtractArgs, ImageArgs, Io, VerifyArgs};
use crate::diff::{Difference, Snapshot};
use crate::error::{Error, IoContext};
use crate::format::SectionKind;
use crate::image::Image;
use crate::inspect::{Inspection, SignatureState};
use crate::problem::{Lenient, Strict};
use crate::provenance::measurements;

pub(super) fn describe(args: &ImageArgs, io: &mut Io<'_>) -> Result<(), Error> {
    let inspection = Inspection::of(&args.image, false, io.now)?;
    if args.json {
        return print_json(io, &to_json(&inspection));
    }
    print_text(io, &to_text(&inspection))
}

pub(super) fn verify(args: &VerifyArgs, io: &mut Io<'_>) -> Result<(), Error> {
    let mut inspection = Inspection::of(&args.image, true, io.now)?;
    if let Some(path) = &args.certificate {
        let (_, der) = crate::read_certificate(path)?;
        inspection.require_signer(&der);
    }
    if args.json {
        print_json(io, &to_json(&inspection))?;
    } else if inspection.findings.is_empty() {
        print_text(io, &to_text(&inspection))?;
    } else {
        let lines: String = inspection.findings.iter().map(|finding| format!("{finding}\n")).collect();
        print_text(io, &lines)?;
    }
    match inspection.findings.len() {
        0 => Ok(()),
        1 => Err(Error::Refused(format!("{}: 1 problem", args.image.display()))),
        count => Err(Error::Refused(format!("{}: {count} problems", args.image.display()))),
    }
}

/// `describe-eif`'s document, with custom metadata kept apart: spread into the object, as AWS's tool does, it
/// could pass for ours.
fn to_json(inspection: &Inspection) -> Value {
    let mut map = Map::new();
    map.insert("EifVersion".into(), inspection.header.version.into());
    map.insert("Architecture".into(), inspection.header.flags.arch().name().into());
    if let Some(registers) = &inspection.registers {
        map.insert("Measurements".into(), measurements(registers));
        map.insert("OsImageHash".into(), format!("0x{}", registers.os_image_hash()).into());
    }
    map.insert("IsSigned".into(), inspection.signer.is_some().into());
    if let Some(signer) = &inspection.signer {
        let crate::inspect::SignerFacts { issuer, algorithm, not_before, not_after, state, .. } = signer;
        map.insert(
            "SigningCertificate".into(),
            json!({ "IssuerName": issuer, "Algorithm": algorithm, "NotBefore": not_before, "NotAfter": not_after }),
        );
        map.insert("SignatureCheck".into(), (*state == SignatureState::Good).into());
    }
    map.insert("CheckCRC".into(), inspection.crc_is_right.into());
    if let Some(metadata) = &inspection.metadata {
        let build = &metadata.build_metadata;
        map.insert("ImageName".into(), metadata.image_name.clone().into());
        map.insert("ImageVersion".into(), metadata.image_version.clone().into());
        map.insert(
            "Metadata".into(),
            json!({
                "BuildTime": build.build_time,
                "BuildTool": build.build_tool,
                "BuildToolVersion": build.build_tool_version,
                "OperatingSystem": build.operating_system,
                "KernelVersion": build.kernel_version,
                "DockerInfo": metadata.docker_info,
                "CustomMetadata": metadata.custom_metadata,
            }),
        );
    }
    if let Some(cmdline) = &inspection.cmdline {
        map.insert("Cmdline".into(), cmdline.clone().into());
    }
    let sections: Vec<Value> = inspection
        .sections
        .iter()
        .map(|section| json!({ "Type": section.kind.name(), "Offset": section.offset, "Size": section.size }))
        .collect();
    map.insert("Sections".into(), sections.into());
    let findings: Vec<Value> = inspection
        .findings
        .iter()
        .map(|finding| json!({ "Offset": finding.offset, "Problem": finding.problem.to_string() }))
        .collect();
    map.insert("Problems".into(), findings.into());
    map.into()
}

fn to_text(inspection: &Inspection) -> String {
    let header = &inspection.header;
    let mut text = format!("EIF version {}, {}\n", header.version, header.flags.arch());
    for section in &inspection.sections {
        text += &format!(
            "  {:<9}  offset {:>12}  {:>12} bytes\n",
            section.kind.name(),
            section.offset,
            section.size
        );
    }
    if let Some(cmdline) = &inspection.cmdline {
        text += &format!("cmdline: {cmdline}\n");
    }
    if let Some(metadata) = &inspection.metadata {
        let build = &metadata.build_metadata;
        text += &format!(
            "name: {} {} (not measured)\n",
            shown(&metadata.image_name),
            shown(&metadata.image_version)
        );
        text += &format!(
            "built: {} by {} {} (not measured)\n",
            shown(&build.build_time),
            shown(&build.build_tool),
            shown(&build.build_tool_version)
        );
    }
    if let Some(signer) = &inspection.signer {
        text += &format!(
            "signed: {} by {} ({} to {})\n",
            signer.state,
            shown(&signer.subject),
            signer.not_before,
            signer.not_after
        );
    }
    match &inspection.registers {
        None => text += "not measurable\n",
        Some(registers) => {
            text +=
                &format!("PCR0: {}\nPCR1: {}\nPCR2: {}\n", registers.pcr0, registers.pcr1, registers.pcr2);
            if let Some(pcr8) = &registers.pcr8 {
                text += &format!("PCR8: {pcr8}\n");
            }
            text += &format!("OS_IMAGE_HASH: 0x{}\n", registers.os_image_hash());
        }
    }
    for finding in &inspection.findings {
        text += &format!("problem: {finding}\n");
    }
    text
}

/// Text out of the image, without what could move a terminal's cursor.
fn shown(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

pub(super) fn extract(args: &ExtractArgs, io: &mut Io<'_>) -> Result<(), Error> {
    let mut image = Image::open(&args.image, &mut Lenient::default())?;
    std::fs::create_dir(&args.output).context("create", &args.output)?;
    let mut files = Vec::new();
    let mut ramdisks = 0;
    let certificate = image.signature().ok().flatten().map(|signature| signature.certificate_pem().to_vec());
    for section in image.sections().to_vec() {
        let name = match section.kind {
            SectionKind::Kernel => "kernel".to_owned(),
            SectionKind::Cmdline => "cmdline".to_owned(),
            SectionKind::Metadata => "metadata.json".to_owned(),
            SectionKind::Signature => "signature.cbor".to_owned(),
            SectionKind::Ramdisk => {
                ramdisks += 1;
                format!("ramdisk{}", ramdisks - 1)
            }
        };
        let path = args.output.join(&name);
        let mut file = File::create_new(&path).context("create", &path)?;
        io::copy(&mut image.payload(section)?, &mut file).context("write", &path)?;
        files.push(json!({ "File": name, "Offset": section.payload_offset(), "Size": section.size }));
    }
    if let Some(pem) = certificate {
        let path = args.output.join("certificate.pem");
        std::fs::write(&path, &pem).context("write", &path)?;
        files.push(json!({ "File": "certificate.pem", "Size": pem.len() }));
    }
    if args.json {
        return print_json(io, &json!({ "Files": files }));
    }
    let names: String = files
        .iter()
        .filter_map(|file| file["File"].as_str())
        .map(|name| format!("{}\n", args.output.join(name).display()))
        .collect();
    print_text(io, &names)
}

pub(super) fn diff(args: &DiffArgs, io: &mut Io<'_>) -> Result<(), Error> {
    let before = Snapshot::of(&mut Image::open(&args.before, &mut Strict)?)?;
    let after = Snapshot::of(&mut Image::open(&args.after, &mut Strict)?)?;
    for note in before.notes.iter().chain(&after.notes) {
        writeln!(io.err, "warning: {note}").context("write", "a warning")?;
    }
    let difference = Difference::between(&before, &after);
    if args.json {
        return print_json(io, &difference.to_json());
    }
    print_text(io, &difference.to_string())
}
