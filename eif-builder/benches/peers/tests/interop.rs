//! Images of ours read by AWS's library, images of theirs read by ours, on inputs that nobody chose.

use std::path::Path;

use eif_builder::{Image, Strict};
use eif_peers::{Inputs, recipe, reference_build, reference_read};

/// A generator with a fixed seed: the same cases on every run.
struct Cases(u64);

impl Cases {
    fn next(&mut self, below: u64) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % below).unwrap()
    }

    fn file(&mut self, path: &Path, below: u64) {
        let len = 1 + self.next(below);
        let bytes: Vec<u8> = (0..len).map(|_| u8::try_from(self.next(256)).unwrap()).collect();
        std::fs::write(path, bytes).unwrap();
    }

    fn inputs(&mut self, folder: &Path) -> Inputs {
        let kernel = folder.join("kernel");
        self.file(&kernel, 300_000);
        let ramdisks =
            (0..1 + self.next(29)).map(|at| folder.join(format!("ramdisk{at}"))).collect::<Vec<_>>();
        for ramdisk in &ramdisks {
            self.file(ramdisk, 70_000);
        }
        let cmdline = "x".repeat(self.next(200));
        Inputs { kernel, cmdline, ramdisks, aarch64: self.next(2) == 1 }
    }
}

#[test]
fn both_tools_write_the_same_bytes_and_read_each_other() {
    let mut cases = Cases(0x1234_5678_9abc_def1);
    for _ in 0..25 {
        let folder = tempfile::tempdir().unwrap();
        let inputs = cases.inputs(folder.path());
        let (theirs, ours) = (folder.path().join("theirs.eif"), folder.path().join("ours.eif"));
        let expected = reference_build(&inputs, &theirs);
        let assembled = recipe(&inputs).write(&ours).unwrap();
        assert!(std::fs::read(&theirs).unwrap() == std::fs::read(&ours).unwrap(), "{inputs:?}");

        let (read_by_them, crc) = reference_read(&ours);
        assert!(crc);
        assert_eq!(read_by_them, expected);
        let mut image = Image::open(&theirs, &mut Strict).unwrap();
        let registers = image.scan(&mut Strict).unwrap().registers.unwrap();
        assert_eq!(registers, assembled.registers);
        for (name, pcr) in [("PCR0", registers.pcr0), ("PCR1", registers.pcr1), ("PCR2", registers.pcr2)] {
            assert_eq!(expected[name], pcr.to_string());
        }
    }
}

#[test]
fn our_signature_satisfies_their_checker() {
    use aws_nitro_enclaves_image_format::utils::PcrSignatureChecker;

    let folder = tempfile::tempdir().unwrap();
    let mut cases = Cases(7);
    let mut inputs = cases.inputs(folder.path());
    // Room for the signature among the 32 sections an image may have.
    inputs.ramdisks.truncate(4);
    let (key, certificate) = (folder.path().join("key.pem"), folder.path().join("certificate.pem"));
    std::fs::write(&key, KEY).unwrap();
    std::fs::write(&certificate, include_str!("../../../tests/vectors/signer_p384.pem")).unwrap();
    let mut recipe = recipe(&inputs);
    recipe.signer = Some(eif_builder::Signer::from_files(&key, &certificate).unwrap());
    let image = folder.path().join("signed.eif");
    let assembled = recipe.write(&image).unwrap();
    let mut checker = PcrSignatureChecker::from_eif(image.to_str().unwrap()).unwrap();
    checker.verify().unwrap();
    let (registers, crc) = reference_read(&image);
    assert!(crc);
    assert_eq!(registers["PCR8"], assembled.registers.pcr8.unwrap().to_string());
}

/// The published test signer, not a secret.
const KEY: &str = include_str!("signer_p384.key.pem");
