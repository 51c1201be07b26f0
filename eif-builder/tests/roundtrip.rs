//! What is written reads back, whatever it is.
#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]

use std::io::{Cursor, Read};

use eif_builder::cpio::{Entry, FileType, Writer};
use eif_builder::format::{Header, SectionHeader};
use eif_builder::{Arch, Assembler, HeaderFlags, Image, SectionKind, Strict, read_ramdisk};
use proptest::collection::vec;
use proptest::prelude::*;

fn header() -> impl Strategy<Value = Header> {
    let words =
        (2_u16..=4, any::<u16>(), any::<u64>(), any::<u64>(), any::<u16>(), any::<u16>(), any::<u32>());
    (words, vec(any::<u64>(), 32), vec(any::<u64>(), 32), any::<u32>()).prop_map(
        |(words, offsets, sizes, crc)| {
            let (version, flags, default_mem, default_cpus, reserved, num_sections, unused) = words;
            Header {
                version,
                flags: HeaderFlags(flags),
                default_mem,
                default_cpus,
                reserved,
                num_sections,
                offsets: offsets.try_into().unwrap(),
                sizes: sizes.try_into().unwrap(),
                unused,
                crc,
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn headers(header in header()) {
        prop_assert_eq!(Header::decode(&header.encode()).unwrap(), header);
    }

    #[test]
    fn section_headers(code: u16, flags: u16, size: u64) {
        let header = SectionHeader { code, flags, size };
        prop_assert_eq!(SectionHeader::decode(&header.encode()), header);
    }

    #[test]
    fn images(
        kernel in vec(any::<u8>(), 0..3000),
        cmdline in vec(any::<u8>(), 0..200),
        ramdisks in vec(vec(any::<u8>(), 1..2000), 1..29),
        is_arm: bool,
    ) {
        let arch = if is_arm { Arch::Aarch64 } else { Arch::X86_64 };
        let mut assembler = Assembler::writing(arch, Cursor::new(Vec::new())).unwrap();
        assembler.bytes(SectionKind::Kernel, &kernel).unwrap();
        assembler.bytes(SectionKind::Cmdline, &cmdline).unwrap();
        assembler.bytes(SectionKind::Metadata, b"{}").unwrap();
        for ramdisk in &ramdisks {
            assembler.bytes(SectionKind::Ramdisk, ramdisk).unwrap();
        }
        let (assembled, output) = assembler.finish(None).unwrap();
        let bytes = output.unwrap().into_inner();
        prop_assert_eq!(bytes.len() as u64, assembled.len);
        let mut image = Image::read(Cursor::new(bytes), &mut Strict).unwrap();
        prop_assert_eq!(image.header().flags.arch(), arch);
        prop_assert_eq!(image.scan(&mut Strict).unwrap().registers.unwrap(), assembled.registers);
        for (section, expected) in image.ramdisks().into_iter().zip(&ramdisks) {
            let mut payload = Vec::new();
            image.payload(section).unwrap().read_to_end(&mut payload).unwrap();
            prop_assert_eq!(&payload, expected);
        }
    }

    #[test]
    fn archives(files in vec(("[a-z]{1,40}", vec(any::<u8>(), 0..600), 0_u32..0o10000, any::<u32>()), 0..20)) {
        let mut archive = Writer::new(Vec::new());
        let mut expected = Vec::new();
        for (name, content, mode, owner) in files {
            let mut entry = Entry::new(name, FileType::Regular, mode);
            (entry.uid, entry.len) = (owner, content.len() as u64);
            archive.entry(&entry, &mut content.as_slice()).unwrap();
            expected.push((entry, content));
        }
        let (ramdisk, len) = archive.finish().unwrap();
        prop_assert_eq!(ramdisk.len() as u64, len);
        let mut found = Vec::new();
        read_ramdisk(ramdisk.as_slice(), &mut |entry, content| {
            let mut bytes = Vec::new();
            content.read_to_end(&mut bytes)?;
            found.push((entry.clone(), bytes));
            Ok(())
        }).unwrap();
        prop_assert_eq!(found, expected);
    }
}
