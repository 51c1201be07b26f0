//! Images that are wrong in one way each: refused with the offset of what is wrong, never with a panic.
#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]

mod support;

use std::io::Cursor;

use eif_builder::{Error, Image, Lenient, Problem, SectionKind, Strict};
use support::{Inputs, fix_crc, pattern};

/// A small image with all kinds of sections: kernel, command line, metadata, two ramdisks, signature.
fn small_signed() -> Vec<u8> {
    let inputs = Inputs::new();
    let ramdisks = [pattern(2, 600), pattern(3, 1003)];
    let mut recipe =
        inputs.recipe("small", eif_builder::Arch::X86_64, &pattern(1, 1000), "console=ttyS0", &ramdisks);
    recipe.signer = Some(inputs.p384());
    inputs.build(&recipe)
}

/// Reads and scans strictly.
fn refusal(image: &[u8]) -> Option<(u64, Problem)> {
    let result = Image::read(Cursor::new(image), &mut Strict).and_then(|mut image| image.scan(&mut Strict));
    match result {
        Ok(_) => None,
        Err(Error::Format(finding)) => Some((finding.offset, finding.problem)),
        Err(other) => panic!("not a refusal of the format: {other}"),
    }
}

fn changed(image: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut image = image.to_vec();
    image[at..at + bytes.len()].copy_from_slice(bytes);
    fix_crc(&mut image);
    image
}

fn offset_slot(slot: usize) -> usize {
    0x1c + 8 * slot
}

fn size_slot(slot: usize) -> usize {
    0x11c + 8 * slot
}

#[test]
fn each_named_mutation_is_refused_for_its_reason() {
    let good = small_signed();
    assert_eq!(refusal(&good), None);
    let sections = Image::read(Cursor::new(&good), &mut Strict).unwrap().sections().to_vec();
    let at = |slot: usize| usize::try_from(sections[slot].offset).unwrap();
    let len = good.len() as u64;

    let expect =
        |name: &str, image: Vec<u8>, offset: u64, matches: fn(&Problem) -> bool| match refusal(&image) {
            Some((found, problem)) => {
                assert!(
                    found == offset && matches(&problem),
                    "{name}: {problem} at {found:#x}, expected {offset:#x}"
                );
            }
            None => panic!("{name}: accepted"),
        };
    expect("magic", changed(&good, 0, b"/eif"), 0, |p| matches!(p, Problem::Magic { .. }));
    for version in [0_u16, 1, 5, 0xffff] {
        expect("version", changed(&good, 4, &version.to_be_bytes()), 4, |p| {
            matches!(p, Problem::Version { .. })
        });
    }
    for flags in [0x40_u16, 0x240, 0x340, 2] {
        expect("flags", changed(&good, 6, &flags.to_be_bytes()), 6, |p| {
            matches!(p, Problem::UnknownFlags { .. })
        });
    }
    for count in [0_u16, 1, 33, 0xffff] {
        expect("count", changed(&good, 0x1a, &count.to_be_bytes()), 0x1a, |p| {
            matches!(p, Problem::SectionCount { .. })
        });
    }
    let mut flipped = good.clone();
    flipped[700] ^= 1;
    expect("payload without its CRC", flipped, 544, |p| matches!(p, Problem::Crc { .. }));
    let off_by_one = (sections[1].size + 1).to_be_bytes();
    expect("size in the table", changed(&good, size_slot(1), &off_by_one), offset_slot(2) as u64, |p| {
        matches!(p, Problem::Placement { slot: 2, .. })
    });
    expect("size in the section", changed(&good, at(1) + 4, &off_by_one), at(1) as u64 + 4, |p| {
        matches!(p, Problem::SizeMismatch { slot: 1, .. })
    });
    expect(
        "offset behind the end",
        changed(&good, offset_slot(3), &len.to_be_bytes()),
        offset_slot(3) as u64,
        |p| matches!(p, Problem::Placement { slot: 3, .. }),
    );
    for size in [u64::MAX, u64::MAX - 548, 4 << 30, 1 << 63] {
        expect("huge", changed(&good, size_slot(5), &size.to_be_bytes()), size_slot(5) as u64, |p| {
            matches!(p, Problem::PastEnd { slot: 5, .. })
        });
    }
    let overlapping = (sections[3].offset).to_be_bytes();
    expect("overlap", changed(&good, offset_slot(4), &overlapping), offset_slot(4) as u64, |p| {
        matches!(p, Problem::Placement { slot: 4, .. })
    });
    for kind in [0_u16, 6, 9, 0xffff] {
        expect("type", changed(&good, at(3), &kind.to_be_bytes()), at(3) as u64, |p| {
            matches!(p, Problem::SectionType { .. })
        });
    }
    expect("section flags", changed(&good, at(0) + 2, &[0, 1]), at(0) as u64 + 2, |p| {
        matches!(p, Problem::SectionFlags { .. })
    });
    expect("two kernels", changed(&good, at(1), &[0, 1]), at(1) as u64, |p| {
        matches!(p, Problem::Duplicate { kind: SectionKind::Kernel, .. })
    });
    expect("no metadata", changed(&good, at(2), &[0, 3]), 0x1a, |p| {
        matches!(p, Problem::Missing { kind: SectionKind::Metadata, .. })
    });
    expect("metadata before version 4", changed(&good, 4, &[0, 3]), at(2) as u64, |p| {
        matches!(p, Problem::TooNew { kind: SectionKind::Metadata, .. })
    });
    expect("unused slot", changed(&good, offset_slot(9), &[1; 8]), offset_slot(9) as u64, |p| {
        matches!(p, Problem::UnusedSlot { slot: 9, .. })
    });
    let mut trailing = good.clone();
    trailing.extend_from_slice(&[0; 16]);
    fix_crc(&mut trailing);
    expect("trailing bytes", trailing, len, |p| matches!(p, Problem::Trailing { .. }));
}

#[test]
fn ramdisk_in_front_of_the_kernel_is_refused() {
    let good = small_signed();
    // The kernel section becomes a ramdisk, the first ramdisk the kernel.
    let sections = Image::read(Cursor::new(&good), &mut Strict).unwrap().sections().to_vec();
    let at = |slot: usize| usize::try_from(sections[slot].offset).unwrap();
    let swapped = changed(&changed(&good, at(0), &[0, 3]), at(3), &[0, 1]);
    assert!(matches!(refusal(&swapped), Some((548, Problem::RamdiskBeforeKernel { slot: 0 }))));
}

#[test]
fn a_gap_is_refused_strictly_and_measured_leniently() {
    let good = small_signed();
    let sections = Image::read(Cursor::new(&good), &mut Strict).unwrap().sections().to_vec();
    let at = usize::try_from(sections[3].offset).unwrap();
    let mut gap = [&good[..at], &[0xaa; 16], &good[at..]].concat();
    for slot in 3..sections.len() {
        let moved = (sections[slot].offset + 16).to_be_bytes();
        gap[offset_slot(slot)..][..8].copy_from_slice(&moved);
    }
    fix_crc(&mut gap);
    assert!(matches!(refusal(&gap), Some((_, Problem::Placement { slot: 3, .. }))));
    let expected = Image::read(Cursor::new(&good), &mut Strict).unwrap().scan(&mut Strict).unwrap();
    let mut lenient = Lenient::default();
    let mut image = Image::read(Cursor::new(&gap), &mut lenient).unwrap();
    let scan = image.scan(&mut lenient).unwrap();
    assert_eq!(scan.registers.unwrap(), expected.registers.unwrap());
    assert_eq!(scan.crc, image.header().crc);
}

#[test]
fn unknown_flags_never_get_a_pcr0() {
    let image = changed(&small_signed(), 6, &0x240_u16.to_be_bytes());
    let mut lenient = Lenient::default();
    let mut image = Image::read(Cursor::new(&image), &mut lenient).unwrap();
    let reason = image.scan(&mut lenient).unwrap().registers.unwrap_err();
    assert!(reason.to_string().contains("unknown measurement scheme"), "{reason}");
}

#[test]
fn every_truncation_is_refused() {
    let good = small_signed();
    for len in 0..good.len() {
        let mut image = good[..len].to_vec();
        if len >= 548 {
            fix_crc(&mut image);
        }
        assert!(refusal(&image).is_some(), "accepted a prefix of {len} bytes");
    }
}

/// The lowest or highest bit of any header byte flipped, the checksum made right again: refused, or harmless because nobody
/// reads the field; in no case a panic, and never another register.
#[test]
fn bits_flipped_in_headers_are_refused_or_harmless() {
    let good = small_signed();
    let sections = Image::read(Cursor::new(&good), &mut Strict).unwrap().sections().to_vec();
    let registers = |image: &[u8]| {
        let mut image = Image::read(Cursor::new(image), &mut Strict).ok()?;
        image.scan(&mut Strict).ok().map(|scan| scan.registers.unwrap())
    };
    let expected = registers(&good);
    let in_header = 0..544;
    let in_sections = sections.iter().flat_map(|section| {
        let start = usize::try_from(section.offset).unwrap();
        start..start + 12
    });
    let mut refused = 0;
    for at in in_header.chain(in_sections) {
        for bit in [0, 7] {
            let image = changed(&good, at, &[good[at] ^ 1 << bit]);
            eif_builder::replay::reader(&image);
            match registers(&image) {
                None => refused += 1,
                Some(registers) => {
                    let is_unread = matches!(at, 7..=0x19) || matches!(at, 0x21c..0x220);
                    assert!(is_unread, "byte {at:#x}, bit {bit} accepted");
                    assert_eq!(Some(registers), expected);
                }
            }
        }
    }
    assert!(refused > 300, "{refused}");
}

#[test]
fn signatures_that_are_wrong_are_named() {
    let inputs = Inputs::new();
    let image = small_signed();
    let mut image = Image::read(Cursor::new(&image), &mut Strict).unwrap();
    let registers = image.scan(&mut Strict).unwrap().registers.unwrap();
    let section = image.section(SectionKind::Signature).unwrap();
    let payload = image.small_payload(section).unwrap();
    let decode = |bytes: &[u8]| eif_builder::Signature::decode(bytes);
    decode(&payload).unwrap().verify(&registers.pcr0).unwrap();

    let mut trailing = payload.clone();
    trailing.push(0);
    assert_eq!(decode(&trailing).unwrap_err(), "1 bytes after the end of the section");
    for len in 0..payload.len() {
        assert!(decode(&payload[..len]).is_err(), "accepted a prefix of {len} bytes");
    }
    // The certificate as a byte string instead of an array of integers.
    let pem = decode(&payload).unwrap().certificate_pem().to_vec();
    let key = payload.windows(10).position(|window| window == b"\x69signature").unwrap();
    let [high, low] = u16::try_from(pem.len()).unwrap().to_be_bytes();
    let start = 1 + 1 + 1 + "signing_certificate".len();
    let byte_string = [&payload[..start], &[0x59, high, low], &pem, &payload[key..]].concat();
    assert_eq!(decode(&byte_string).unwrap_err(), "the section is not in the form that AWS's tools write");
    // The same, but for a number in two bytes where one is enough.
    let long = [&[0x98, 1], &payload[1..]].concat();
    assert_eq!(decode(&long).unwrap_err(), "the section is not in the form that AWS's tools write");
    let unknown = payload.iter().map(|byte| if *byte == b'_' { b'-' } else { *byte }).collect::<Vec<_>>();
    assert!(decode(&unknown).unwrap_err().starts_with("the section: unknown field `signing-certificate`"));
    assert_eq!(decode(&payload[..30]).unwrap_err(), "the section: ends too early");
    assert_eq!(decode(&[0x81, 0x1c]).unwrap_err(), "the section: no CBOR at byte 1");
    let two = [&[0x82], &payload[1..], &payload[1..]].concat();
    assert_eq!(decode(&two).unwrap_err(), "2 signatures, expected 1");

    let other = inputs.v1().measure().unwrap().registers;
    assert!(decode(&payload).unwrap().verify(&other.pcr0).unwrap_err().starts_with("signs register 0 with"));
}
