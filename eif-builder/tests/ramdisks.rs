//! Ramdisks: the published archives byte for byte, and the traps of Linux's unpacker.
#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]

mod support;

use eif_builder::cpio::{Entry, FileType, LinkGroup, Writer};
use eif_builder::read_ramdisk;
use eif_builder::tree::{Content, Inode, Kind, Limits, Tree};
use support::{CMDLINE_X86, Inputs, pattern, sha256};

fn add(archive: &mut Writer<Vec<u8>>, name: &str, kind: FileType, mode: u32, content: &[u8]) {
    let mut entry = Entry::new(name, kind, mode);
    entry.len = content.len() as u64;
    archive.entry(&entry, &mut &content[..]).unwrap();
}

fn bootstrap() -> Vec<u8> {
    let mut archive = Writer::new(Vec::new());
    add(&mut archive, "dev", FileType::Directory, 0o755, b"");
    add(&mut archive, "init", FileType::Regular, 0o755, &pattern(11, 4099));
    add(&mut archive, "nsm.ko", FileType::Regular, 0o755, &pattern(12, 2050));
    archive.finish().unwrap().0
}

/// linuxkit's archive for a container: trailing slashes as in the tar, hard links turned into symbolic ones, and
/// no entry for the parents `usr` and `lib`, which Linux would answer by leaving `h` out.
fn user() -> Vec<u8> {
    let mut archive = Writer::new(Vec::new()).without_parent_check();
    add(&mut archive, "rootfs", FileType::Directory, 0o755, b"");
    add(&mut archive, "rootfs/bin/", FileType::Directory, 0o755, b"");
    add(&mut archive, "rootfs/bin/app", FileType::Regular, 0o755, &pattern(13, 777));
    add(&mut archive, "rootfs/bin/app2", FileType::Symlink, 0o755, b"app");
    add(&mut archive, "rootfs/etc/", FileType::Directory, 0o755, b"");
    add(&mut archive, "rootfs/etc/mtab", FileType::Symlink, 0o777, b"/proc/mounts");
    add(&mut archive, "rootfs/usr/lib/h", FileType::Symlink, 0o644, b"../../bin/app");
    add(&mut archive, "cmd", FileType::Regular, 0o644, b"/bin/app\n--flag\n");
    add(&mut archive, "env", FileType::Regular, 0o644, b"PATH=/bin\nA=b\n");
    archive.finish().unwrap().0
}

#[test]
fn v6_linuxkit_archives_and_the_image_of_them() {
    let (bootstrap, user) = (bootstrap(), user());
    assert_eq!(bootstrap.len(), 6656);
    assert_eq!(sha256(&bootstrap), "11f95b348dbe93a7ad62e6faefa0e7eb091574336125f4b171f295bb3c0027bd");
    assert_eq!(user.len(), 2560);
    assert_eq!(sha256(&user), "509d1929b9e26a10e69745962df13226b99e95c35a56776b74cb07b64a31de0e");

    let inputs = Inputs::new();
    let recipe = inputs.recipe(
        "vec6",
        eif_builder::Arch::X86_64,
        &pattern(1, 1 << 20),
        CMDLINE_X86,
        &[bootstrap, user],
    );
    let image = inputs.build(&recipe);
    assert_eq!(image.len(), 1_058_759);
    assert_eq!(hex::encode(&image[544..548]), "07a887b5");
    assert_eq!(sha256(&image), "8c90dd4d7d68eb16ca5a4a781a9d460240a4f14c4c1a2de16b77b74c08bb4010");
    let registers = recipe.measure().unwrap().registers;
    assert_eq!(
        registers.os_image_hash().to_string(),
        "b6fadba7842ca01966534755b4904b9f07e3302df949d6115918c39cbec111e5"
    );
}

/// AWS's init through the builder gives the same boot ramdisk, hence AWS's PCR1.
#[test]
fn boot_ramdisk_for_aws_init_is_the_published_one() {
    let inputs = Inputs::new();
    let init = eif_builder::ramdisk::Init::Aws {
        init: inputs.file("init", &pattern(11, 4099)),
        nsm_ko: Some(inputs.file("nsm.ko", &pattern(12, 2050))),
    };
    let mut archive = Vec::new();
    init.boot_ramdisk().unwrap()(&mut archive).unwrap();
    assert_eq!(archive, bootstrap());
}

#[test]
fn trap_missing_parent_is_refused() {
    let mut archive = Writer::new(Vec::new());
    let error =
        archive.entry(&Entry::new("etc/hosts", FileType::Regular, 0o644), &mut std::io::empty()).unwrap_err();
    assert!(error.to_string().contains("Linux would skip it"), "{error}");
    add(&mut archive, "etc/", FileType::Directory, 0o755, b"");
    add(&mut archive, "etc/hosts", FileType::Regular, 0o644, b"");
}

#[test]
fn trap_archives_end_on_a_multiple_of_four() {
    for len in 0..9 {
        let mut archive = Writer::new(Vec::new());
        add(&mut archive, "file", FileType::Regular, 0o644, &pattern(1, len));
        assert!(archive.finish().unwrap().0.len().is_multiple_of(512));
    }
}

#[test]
fn trap_misaligned_second_archive_is_found() {
    let mut two = bootstrap();
    two.push(0);
    two.extend(user());
    let error = read_ramdisk(two.as_slice(), &mut |_, _| Ok(())).unwrap_err();
    assert!(error.contains("Linux wants a multiple of 4"), "{error}");
}

#[test]
fn trap_pcr1_does_not_pin_init() {
    let inputs = Inputs::new();
    let mut replacing = Writer::new(Vec::new());
    add(&mut replacing, "init", FileType::Regular, 0o755, b"#!another init");
    let ramdisks = [bootstrap(), replacing.finish().unwrap().0];
    let kernel = pattern(1, 5000);
    let arch = eif_builder::Arch::X86_64;
    let honest =
        inputs.recipe("a", arch, &kernel, CMDLINE_X86, &[bootstrap(), user()]).measure().unwrap().registers;
    let replaced = inputs.recipe("a", arch, &kernel, CMDLINE_X86, &ramdisks).measure().unwrap().registers;
    assert_eq!(honest.pcr1, replaced.pcr1);
    assert_ne!(honest.pcr0, replaced.pcr0);
    assert_ne!(honest.pcr2, replaced.pcr2);
    assert_ne!(honest.os_image_hash(), replaced.os_image_hash());
}

#[test]
fn names_sizes_and_types_that_linux_drops_are_refused() {
    let refuse = |entry: &Entry, content: &[u8]| {
        let mut archive = Writer::new(Vec::new());
        archive.entry(entry, &mut &content[..]).unwrap_err().to_string()
    };
    let long = Entry::new("n".repeat(4096), FileType::Regular, 0o644);
    assert!(refuse(&long, b"").contains("name of 4096 bytes"));
    let mut large = Entry::new("large", FileType::Regular, 0o644);
    large.len = 1 << 32;
    assert!(refuse(&large, b"").contains("4294967296 bytes"));
    assert!(refuse(&Entry::new("s", FileType::Socket, 0o644), b"").contains("a socket"));
    assert!(refuse(&Entry::new("l", FileType::Symlink, 0o777), b"").contains("link target of 0 bytes"));
    assert!(refuse(&Entry::new("TRAILER!!!", FileType::Regular, 0o644), b"").contains("not a name"));
    let mut grown = Entry::new("grown", FileType::Regular, 0o644);
    grown.len = 3;
    assert!(refuse(&grown, b"four").contains("changed while it was read"));
    assert!(refuse(&grown, b"ab").contains("changed while it was read"));
}

#[test]
fn hard_links_share_an_inode_and_carry_their_content_once() {
    let mut tree = Tree::in_memory(Limits::default());
    tree.insert(b"z", Inode::new(Kind::File(Content::Bytes(b"content".to_vec())), 0o644)).unwrap();
    tree.link(b"a", b"z").unwrap();
    tree.insert(b"m", Inode::new(Kind::Directory, 0o755)).unwrap();
    let mut archive = Writer::new(Vec::new());
    tree.write_to(&mut archive, "").unwrap();
    let ramdisk = archive.finish().unwrap().0;
    let mut members = Vec::new();
    read_ramdisk(ramdisk.as_slice(), &mut |entry, content| {
        let mut bytes = Vec::new();
        content.read_to_end(&mut bytes)?;
        members.push((entry.name.clone(), entry.link_group, bytes));
        Ok(())
    })
    .unwrap();
    let group = Some(LinkGroup { inode: Some(721), links: 2 });
    assert_eq!(members[0], (b"a".to_vec(), group, b"content".to_vec()));
    assert_eq!(members[1].0, b"m");
    assert_eq!(members[2], (b"z".to_vec(), group, Vec::new()));
}

#[test]
fn every_truncation_of_an_archive_is_noticed() {
    let whole = bootstrap();
    // The padding behind the trailer may be missing.
    let end = whole.len() - whole.iter().rev().take_while(|byte| **byte == 0).count();
    for len in 1..end {
        assert!(read_ramdisk(&whole[..len], &mut |_, _| Ok(())).is_err(), "accepted a prefix of {len} bytes");
    }
}
