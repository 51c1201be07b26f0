//! Images with published bytes and registers.
#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]

mod support;

use std::io::Cursor;

use eif_builder::{Arch, Image, Lenient, Problem, Registers, SectionKind, Strict};
use support::{CMDLINE_ARM, CMDLINE_X86, Inputs, pattern, sha256};

struct Expected {
    pcr0: &'static str,
    pcr1: &'static str,
    pcr2: &'static str,
    hash: &'static str,
}

const V1: Expected = Expected {
    pcr0: "4c7bc53ec7b8383bdc11f0c8b6063cce9f156f5edd40bea5822674e040938135513ad8831e2f42990ad18222aa126bc7",
    pcr1: "e4007254028cd76e6766678f0930cbd465ae0b7c6186ac5500fd7389dc3195828184981cf036f456945ff96ef52f9205",
    pcr2: "deba0a401d9e12ed895deb1dc405c5317bab9755422b6e260787f59ae000a8fac37a8c7dbea550899eff52f6c46762ff",
    hash: "23b223268d978eb9f284bbd60f670f9c2f23a21e53bbfaaf2dc61ae929aaa584",
};

fn assert_registers(registers: &Registers, expected: &Expected) {
    assert_eq!(registers.pcr0.to_string(), expected.pcr0);
    assert_eq!(registers.pcr1.to_string(), expected.pcr1);
    assert_eq!(registers.pcr2.to_string(), expected.pcr2);
    assert_eq!(registers.os_image_hash().to_string(), expected.hash);
}

/// Reads an image strictly and measures it.
fn measure(image: &[u8]) -> Registers {
    let mut image = Image::read(Cursor::new(image), &mut Strict).unwrap();
    image.scan(&mut Strict).unwrap().registers.unwrap()
}

#[test]
fn pattern_is_the_published_one() {
    assert_eq!(hex::encode(&pattern(1, 1 << 20)[..8]), "01203f5e7d9cbbda");
    assert!(sha256(&pattern(1, 1 << 20)).starts_with("304e456d"));
    assert!(sha256(&pattern(14, 300_000)).starts_with("152255a9"));
}

#[test]
fn v1_two_ramdisks() {
    let inputs = Inputs::new();
    let recipe = inputs.v1();
    let image = inputs.build(&recipe);
    assert_eq!(image.len(), 2_115_082);
    assert_eq!(hex::encode(&image[544..548]), "57613c87");
    assert_eq!(sha256(&image), "004d68cdc91dc429a53c92bcdfe9f6a731f8d0d4fd7915a2da09e5d605a98493");
    assert_registers(&measure(&image), &V1);
    let measured = recipe.measure().unwrap();
    assert_registers(&measured.registers, &V1);
    assert_eq!((measured.len, measured.crc), (2_115_082, 0x5761_3c87));

    let image = Image::read(Cursor::new(&image), &mut Strict).unwrap();
    let places: Vec<_> = image.sections().iter().map(|section| (section.kind, section.offset)).collect();
    assert_eq!(
        places,
        [
            (SectionKind::Kernel, 548),
            (SectionKind::Cmdline, 1_049_136),
            (SectionKind::Metadata, 1_049_267),
            (SectionKind::Ramdisk, 1_049_519),
            (SectionKind::Ramdisk, 1_115_067),
        ]
    );
}

#[test]
fn v2_aarch64_with_a_single_ramdisk() {
    let inputs = Inputs::new();
    let image = inputs.build(&inputs.v2());
    assert_eq!(image.len(), 1_053_592);
    assert_eq!(sha256(&image), "6f20109ad29cbf9f9e156c2320e29ac57188a64d8092e0a28c2520145a93e078");
    let expected = Expected {
        pcr0: "fd9225fa6efaea54ce0c19944ed2bd160a6e58f4c41cda5465c79ccdadad33cc56ef6881b355eb3863ccf64c5e1e7fd1",
        pcr1: "fd9225fa6efaea54ce0c19944ed2bd160a6e58f4c41cda5465c79ccdadad33cc56ef6881b355eb3863ccf64c5e1e7fd1",
        pcr2: "21b9efbc184807662e966d34f390821309eeac6802309798826296bf3e8bec7c10edb30948c90ba67310f7b964fc500a",
        hash: "dd7ecf6b71c4f73e2d76512d697fd003565c80addf79a3afc9af39f49538f0f6",
    };
    assert_registers(&measure(&image), &expected);
}

#[test]
fn v3_signed_with_p384_reproduces_itself() {
    let inputs = Inputs::new();
    let mut recipe = inputs.v1();
    recipe.signer = Some(inputs.p384());
    recipe.metadata = support::metadata("vec3");
    let bytes = inputs.build(&recipe);
    assert_eq!(inputs.build(&recipe), bytes, "two signatures of one image differ");

    let mut image = Image::read(Cursor::new(&bytes), &mut Strict).unwrap();
    let registers = image.scan(&mut Strict).unwrap().registers.unwrap();
    assert_registers(&registers, &V1);
    let signature = image.signature().unwrap().unwrap();
    signature.verify(&registers.pcr0).unwrap();
    assert_eq!(
        eif_builder::extend(signature.certificate_der()).to_string(),
        "974d9f83e4887356331db1643d02320dce1200ae6f5845c8da4f6ebd5bbae4c80aa2566d38b07ef104e7085126570261"
    );
    let other = signature.verify(&registers.pcr1).unwrap_err();
    assert!(other.starts_with("signs register 0 with 4c7bc53e"), "{other}");
}

#[test]
fn v4_empty_ramdisk_needs_leave_and_lenience() {
    let inputs = Inputs::new();
    let mut recipe = inputs.v4();
    let bytes = inputs.build(&recipe);
    assert_eq!(bytes.len(), 133_026);
    assert_eq!(sha256(&bytes), "d529b3456bb1e42df64cb925bfff3047d6578e348b7be1e8d0c173e82ce04220");
    let expected = Expected {
        pcr0: "e9f2595c86865c719be158c171693d4b26d2db0411a1f0ce38bb58802244f20fb3f6725d327541d664f30cea63101451",
        pcr1: "0d7cffdf00c91d8933ce86e3a42d7394d855f359d8b5c376eff3dc3df088367b61c47def92aab2525670c8c5e783e7d6",
        pcr2: "c39acb373911cfb499f5561fc2e6682644a2e5606203a36a70966ac6efc03e438efe90f8da5cc3468db6e35babe24c65",
        hash: "d6f2aa009eb65f568bc456c4d60e41910f76882a9affd61f063eee6eab72cf5b",
    };
    let mut lenient = Lenient::default();
    let mut image = Image::read(Cursor::new(&bytes), &mut lenient).unwrap();
    assert_registers(&image.scan(&mut lenient).unwrap().registers.unwrap(), &expected);
    assert_eq!(lenient.findings.len(), 1);
    assert_eq!(lenient.findings[0].problem, Problem::EmptyRamdisk { slot: 4 });

    let refused = Image::read(Cursor::new(&bytes), &mut Strict).unwrap_err();
    assert!(refused.to_string().contains("empty ramdisk"), "{refused}");
    recipe.allow_empty_ramdisk = false;
    assert!(recipe.measure().unwrap_err().to_string().contains("empty ramdisk"));
}

#[test]
fn v5_aarch64_signed_with_p256() {
    let inputs = Inputs::new();
    let ramdisks = [pattern(5, 4096), pattern(14, 300_000)];
    let mut recipe = inputs.recipe("vec5", Arch::Aarch64, &pattern(4, 1 << 20), CMDLINE_ARM, &ramdisks);
    recipe.signer = Some(inputs.p256());
    let bytes = inputs.build(&recipe);
    let expected = Expected {
        pcr0: "cc29fbcfccafbfdc1a37f8632fcf43602c96da8685116f4daa48c1b8a2ce8df255353f469dda9d906689ea36d9134366",
        pcr1: "fd9225fa6efaea54ce0c19944ed2bd160a6e58f4c41cda5465c79ccdadad33cc56ef6881b355eb3863ccf64c5e1e7fd1",
        pcr2: "ac308c27d8ef60445dcdbe1faf6822c24f0d7077f570764e2520725f6515c63c9b8863815abbb4725d0aed86745f1104",
        hash: "2f00101d3522ec8919bd58677323c458fbf7d50f8404652a7fa710b36cc79207",
    };
    let mut image = Image::read(Cursor::new(&bytes), &mut Strict).unwrap();
    let registers = image.scan(&mut Strict).unwrap().registers.unwrap();
    assert_registers(&registers, &expected);
    let signature = image.signature().unwrap().unwrap();
    signature.verify(&registers.pcr0).unwrap();
    assert_eq!(
        recipe.measure().unwrap().registers.pcr8.unwrap().to_string(),
        "b1298c0d5e900f70d701e6cd70a8cabdef4427193ce2361b1e4cc0c9e6e4709b2def00cf1e11777def657ea450ac04a3"
    );
}

#[test]
fn cmdlines_are_the_published_ones() {
    assert_eq!((CMDLINE_X86.len(), CMDLINE_ARM.len()), (119, 84));
}
