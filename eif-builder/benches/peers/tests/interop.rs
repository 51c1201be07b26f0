//! Images of ours read by AWS's library, images of theirs read by ours, on inputs that nobody chose.

use std::collections::BTreeMap;
use std::path::Path;

use aws_nitro_enclaves_image_format::utils::PcrSignatureChecker;
use eif_builder::{Image, Lenient, Problem, Registers, extend};
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

    fn file(&mut self, path: &Path, len: usize) {
        let bytes: Vec<u8> = (0..len).map(|_| u8::try_from(self.next(256)).unwrap()).collect();
        std::fs::write(path, bytes).unwrap();
    }

    /// Lengths around what matters to buffers, and any other.
    fn len(&mut self, below: u64) -> usize {
        match self.next(6) {
            0 => 0,
            1 => 1,
            2 => [511, 512, 513, 4095, 4096, 4097, 65_535, 65_536, 65_537][self.next(9)],
            3 => [524_287, 524_288, 524_289][self.next(3)],
            _ => self.next(below),
        }
    }

    fn inputs(&mut self, folder: &Path, most_ramdisks: u64) -> Inputs {
        let kernel = folder.join("kernel");
        let len = 1 + self.len(300_000);
        self.file(&kernel, len);
        let ramdisks = (0..1 + self.next(most_ramdisks))
            .map(|at| folder.join(format!("ramdisk{at}")))
            .collect::<Vec<_>>();
        for ramdisk in &ramdisks {
            let len = self.len(70_000);
            self.file(ramdisk, len);
        }
        let cmdline = match self.next(4) {
            0 => String::new(),
            // Ours ends at 64 KiB; Linux takes 2 KiB on x86_64.
            1 => "long ".repeat(self.next(13_107)),
            _ => {
                (0..self.next(200)).map(|_| char::from(b' ' + u8::try_from(self.next(95)).unwrap())).collect()
            }
        };
        let custom = match self.next(3) {
            0 => serde_json::Value::Null,
            1 => serde_json::json!({ "z": [1, null, { "ü": "☃" }], "a": self.next(1000), "A": -1.5 }),
            _ => serde_json::json!(["\u{1}\"\\", "x".repeat(self.next(300)), true]),
        };
        Inputs { kernel, cmdline, ramdisks, aarch64: self.next(2) == 1, custom, signer: None }
    }
}

/// Reads with ours and compares with the reference's own registers. Empty ramdisks are what strict reading refuses.
fn read_with_ours(image: &Path, expected: &BTreeMap<String, String>) -> Registers {
    let mut findings = Lenient::default();
    let mut image = Image::open(image, &mut findings).unwrap();
    let mut registers = image.scan(&mut findings).unwrap().registers.unwrap();
    let is_harmless = |problem: &Problem| matches!(problem, Problem::EmptyRamdisk { .. });
    assert!(findings.findings.iter().all(|finding| is_harmless(&finding.problem)), "{findings:?}");
    if let Some(signature) = image.signature().unwrap() {
        signature.verify(&registers.pcr0).unwrap();
        registers.pcr8 = Some(extend(signature.certificate_der()));
    }
    for (name, pcr) in [
        ("PCR0", Some(registers.pcr0)),
        ("PCR1", Some(registers.pcr1)),
        ("PCR2", Some(registers.pcr2)),
        ("PCR8", registers.pcr8),
    ] {
        assert_eq!(expected.get(name), pcr.map(|pcr| pcr.to_string()).as_ref(), "{name}");
    }
    registers
}

/// Cases per test; CASES in the environment asks for more, SEED for others.
fn cases() -> (usize, Cases) {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let seed = number("SEED").unwrap_or(0x1234_5678_9abc_def1).max(1);
    (usize::try_from(number("CASES").unwrap_or(60)).unwrap(), Cases(seed))
}

#[test]
fn both_tools_write_the_same_bytes_and_read_each_other() {
    let (count, mut cases) = cases();
    for case in 0..count {
        let folder = tempfile::tempdir().unwrap();
        let inputs = cases.inputs(folder.path(), 29);
        let (theirs, ours) = (folder.path().join("theirs.eif"), folder.path().join("ours.eif"));
        let expected = reference_build(&inputs, &theirs);
        let assembled = recipe(&inputs).write(&ours).unwrap();
        assert!(std::fs::read(&theirs).unwrap() == std::fs::read(&ours).unwrap(), "case {case}: {inputs:?}");

        let (read_by_them, crc) = reference_read(&ours);
        assert!(crc);
        assert_eq!(read_by_them, expected);
        assert_eq!(read_with_ours(&theirs, &expected), assembled.registers);
        assert_eq!(recipe(&inputs).measure().unwrap().registers, assembled.registers);
    }
}

/// Nonces differ, so signed images are compared by what they say.
#[test]
fn both_tools_accept_what_the_other_signed() {
    let (count, mut cases) = cases();
    for _ in 0..count.div_ceil(4) {
        let folder = tempfile::tempdir().unwrap();
        // Room for the signature among the 32 sections that an image may have.
        let mut inputs = cases.inputs(folder.path(), 28);
        let (key, certificate) = (folder.path().join("key.pem"), folder.path().join("certificate.pem"));
        std::fs::write(&key, KEY).unwrap();
        std::fs::write(&certificate, include_str!("../../../tests/vectors/signer_p384.pem")).unwrap();
        inputs.signer = Some((key, certificate));
        let (theirs, ours) = (folder.path().join("theirs.eif"), folder.path().join("ours.eif"));
        let expected = reference_build(&inputs, &theirs);
        let assembled = recipe(&inputs).write(&ours).unwrap();
        assert_eq!(read_with_ours(&theirs, &expected), assembled.registers);
        PcrSignatureChecker::from_eif(ours.to_str().unwrap()).unwrap().verify().unwrap();
        let (registers, crc) = reference_read(&ours);
        assert!(crc);
        assert_eq!(registers, expected);
    }
}

/// The published test signer, not a secret.
const KEY: &str = include_str!("signer_p384.key.pem");
