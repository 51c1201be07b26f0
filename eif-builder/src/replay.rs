//! What the fuzz targets check, here so that the kept corpus is replayed by an ordinary test.

use std::io::Cursor;

use crate::format::SectionKind;
use crate::layer::{Lost, apply, decompressed};
use crate::tree::{Limits, Tree};
use crate::{Error, Image, Lenient, Strict, cpio, read_ramdisk};

/// Any bytes as an enclave image. A strict reader must refuse with an offset or agree with the lenient one.
///
/// # Panics
/// When one of the promises does not hold.
pub fn reader(bytes: &[u8]) {
    let strict = Image::read(Cursor::new(bytes), &mut Strict).and_then(|mut image| image.scan(&mut Strict));
    let mut findings = Lenient::default();
    let lenient = Image::read(Cursor::new(bytes), &mut findings).and_then(|mut image| {
        let scan = image.scan(&mut findings)?;
        // Whatever else can be asked of an image must not panic either.
        let _ = image.signature();
        let _ = image.cmdline();
        if let Some(section) = image.section(SectionKind::Metadata) {
            let _ = image.small_payload(section).map(|payload| crate::metadata::Metadata::decode(&payload));
        }
        for ramdisk in image.ramdisks() {
            let _ = read_ramdisk(image.payload(ramdisk)?, &mut |_, _| Ok(()));
        }
        Ok(scan)
    });
    match (strict, lenient) {
        (Ok(strict), Ok(lenient)) => {
            assert!(findings.findings.is_empty(), "strict passes over {:?}", findings.findings);
            assert_eq!(strict.registers.ok(), lenient.registers.ok());
        }
        (Err(Error::Format(finding)), lenient) => {
            assert!(finding.offset <= bytes.len() as u64 + 1, "{finding}");
            assert!(lenient.is_err() || !findings.findings.is_empty(), "lenient does not report {finding}");
        }
        (Err(other), _) => panic!("not a refusal: {other}"),
        (Ok(_), Err(error)) => panic!("strict accepts what lenient refuses: {error}"),
    }
}

/// Any bytes as layers, split at a marker. What the tree then holds must read back from its ramdisk.
///
/// # Panics
/// When one of the promises does not hold.
pub fn layer(bytes: &[u8]) {
    let limits = Limits { entries: 10_000, content: 16 << 20 };
    let mut tree = Tree::in_memory(limits);
    let mut lost = Lost::default();
    for layer in bytes.chunks(bytes.len().div_ceil(2).next_multiple_of(512).max(512)) {
        let Ok(stream) = decompressed(layer) else { return };
        if apply(&mut tree, std::io::Read::take(stream, 16 << 20), "fuzz", &mut lost).is_err() {
            break;
        }
    }
    for (path, _) in tree.iter() {
        assert!(path.split(|byte| *byte == b'/').all(|part| !matches!(part, b"" | b"." | b"..")));
        if let Some(cut) = path.iter().rposition(|byte| *byte == b'/') {
            assert!(matches!(
                tree.get(&path[..cut]).map(|inode| &inode.kind),
                Some(crate::tree::Kind::Directory)
            ));
        }
    }
    let mut archive = cpio::Writer::new(Vec::new());
    if tree.write_to(&mut archive, "").is_err() {
        return; // a name that only an archive refuses, such as TRAILER!!!
    }
    let Ok((ramdisk, _)) = archive.finish() else { panic!("a trailer always fits") };
    let mut paths = Vec::new();
    let read = read_ramdisk(ramdisk.as_slice(), &mut |entry, _| {
        paths.push(entry.name.clone());
        Ok(())
    });
    assert_eq!(read, Ok(()));
    assert!(paths.iter().map(Vec::as_slice).eq(tree.iter().map(|(path, _)| path)));
}
