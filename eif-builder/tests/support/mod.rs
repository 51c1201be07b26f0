//! The published test vectors: inputs and the values they must give.

#![allow(
    clippy::unwrap_used,
    dead_code,
    unreachable_pub,
    reason = "each test binary uses its own part; a set-up that fails is a failed test"
)]

pub mod images;
pub mod registry;

use std::path::{Path, PathBuf};

use eif_builder::metadata::{BuildMetadata, Metadata};
use eif_builder::{Arch, Ramdisk, Recipe, Signer};

pub const CMDLINE_X86: &str = "reboot=k panic=30 pci=off nomodules console=ttyS0 i8042.noaux i8042.nomux i8042.nopnp \
                               i8042.dumbkbd random.trust_cpu=on";
pub const CMDLINE_ARM: &str =
    "reboot=k panic=30 pci=off nomodules console=ttyS0 random.trust_cpu=on root=/dev/ram0";

pub const P384_KEY: &str =
    "ab85128e8267be92777e8ba97e33d9e77c4f1a54cd709c7eea5094be5ebb3b8211d6a5d60d90aafaa4f5e0457918a382";
pub const P256_KEY: &str = "556c78e3e2f22b4f90c4cf7898dc43f1ecdf04e1f13277f59b5ae1b53c4f3c65";
pub const P384_CERTIFICATE: &str = include_str!("../vectors/signer_p384.pem");
pub const P256_CERTIFICATE: &str = include_str!("../vectors/signer_p256.pem");

/// `n` bytes, byte i = (31·i + s) mod 251.
pub fn pattern(s: usize, n: usize) -> Vec<u8> {
    (0..n).map(|i| u8::try_from((31 * i + s) % 251).unwrap()).collect()
}

/// A folder with input files.
pub struct Inputs {
    pub folder: tempfile::TempDir,
}

impl Inputs {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    pub fn recipe(&self, id: &str, arch: Arch, kernel: &[u8], cmdline: &str, ramdisks: &[Vec<u8>]) -> Recipe {
        Recipe {
            arch,
            kernel: self.file("kernel", kernel),
            cmdline: cmdline.as_bytes().to_vec(),
            metadata: metadata(id),
            ramdisks: ramdisks
                .iter()
                .enumerate()
                .map(|(at, content)| Ramdisk::File(self.file(&format!("ramdisk{at}"), content)))
                .collect(),
            signer: None,
            allow_empty_ramdisk: false,
        }
    }

    /// The recipe of vector 1.
    pub fn v1(&self) -> Recipe {
        let ramdisks = [pattern(2, 65_536), pattern(3, 1_000_003)];
        self.recipe("vec1", Arch::X86_64, &pattern(1, 1 << 20), CMDLINE_X86, &ramdisks)
    }

    /// The recipe of vector 2.
    pub fn v2(&self) -> Recipe {
        self.recipe("vec2", Arch::Aarch64, &pattern(4, 1 << 20), CMDLINE_ARM, &[pattern(5, 4096)])
    }

    /// The recipe of vector 4.
    pub fn v4(&self) -> Recipe {
        let ramdisks = [pattern(6, 1), Vec::new(), pattern(8, 511), pattern(9, 512), pattern(10, 131_079)];
        let mut recipe = self.recipe("vec4", Arch::X86_64, &pattern(11, 1), "", &ramdisks);
        recipe.metadata.custom_metadata = eif_builder::metadata::parse_custom(
            "{\"b\":2,\"a\":{\"z\":[1,null,true],\"ü\":\"☃\"}}".as_bytes(),
        )
        .unwrap();
        recipe.allow_empty_ramdisk = true;
        recipe
    }

    pub fn p384(&self) -> Signer {
        use p384::pkcs8::EncodePrivateKey as _;
        let key = p384::SecretKey::from_slice(&hex::decode(P384_KEY).unwrap()).unwrap();
        self.signer(&key.to_pkcs8_pem(p384::pkcs8::LineEnding::LF).unwrap(), P384_CERTIFICATE)
    }

    pub fn p256(&self) -> Signer {
        let key = p256::SecretKey::from_slice(&hex::decode(P256_KEY).unwrap()).unwrap();
        self.signer(&key.to_sec1_pem(p256::pkcs8::LineEnding::LF).unwrap(), P256_CERTIFICATE)
    }

    fn signer(&self, key: &str, certificate: &str) -> Signer {
        let key = self.file("key.pem", key.as_bytes());
        let certificate = self.file("certificate.pem", certificate.as_bytes());
        Signer::from_files(&key, &certificate).unwrap()
    }

    /// Writes the image and returns its bytes.
    pub fn build(&self, recipe: &Recipe) -> Vec<u8> {
        let output = self.path("image.eif");
        recipe.write(&output).unwrap();
        std::fs::read(output).unwrap()
    }
}

/// The metadata of the vectors.
pub fn metadata(id: &str) -> Metadata {
    Metadata {
        image_name: id.into(),
        image_version: id.into(),
        build_metadata: BuildMetadata {
            build_time: "1970-01-01T00:00:00+00:00".into(),
            build_tool: "eif-vectors".into(),
            build_tool_version: "1".into(),
            operating_system: "Linux".into(),
            kernel_version: "6.6.79".into(),
        },
        docker_info: serde_json::Value::Null,
        custom_metadata: serde_json::Value::Null,
    }
}

pub fn sha256(bytes: &[u8]) -> String {
    hex::encode(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes))
}

/// Recomputes the checksum of an image that was tampered with.
pub fn fix_crc(image: &mut [u8]) {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&image[..544]);
    crc.update(&image[548..]);
    let crc = crc.finalize();
    image[544..548].copy_from_slice(&crc.to_be_bytes());
}

/// The `eif-builder` program.
pub fn program() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_eif-builder"))
}

/// A program that may be installed.
pub fn in_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
}

/// A path next to the repository, when it is there.
pub fn shared(path: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared").join(path);
    path.exists().then_some(path)
}
