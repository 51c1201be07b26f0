//! AWS's image format library, driven as its own command line tool drives it.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

use aws_nitro_enclaves_image_format::defs::{EifBuildInfo, EifIdentityInfo};
use aws_nitro_enclaves_image_format::utils::eif_reader::EifReader;
use aws_nitro_enclaves_image_format::utils::eif_signer::SignKeyData;
use aws_nitro_enclaves_image_format::utils::{EifBuilder, get_pcrs};
use eif_builder::metadata::{BuildMetadata, Metadata};
use eif_builder::{Arch, Ramdisk, Recipe, Signer};
use sha2::{Digest, Sha384};

/// What both builders get.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// Kernel file.
    pub kernel: PathBuf,
    /// Kernel command line.
    pub cmdline: String,
    /// Ramdisk files.
    pub ramdisks: Vec<PathBuf>,
    /// For Graviton.
    pub aarch64: bool,
    /// Custom metadata.
    pub custom: serde_json::Value,
    /// Key and certificate.
    pub signer: Option<(PathBuf, PathBuf)>,
}

/// Builds with the reference: write, then measure, as `eif_build` does. Returns its registers.
pub fn reference_build(inputs: &Inputs, output: &Path) -> BTreeMap<String, String> {
    let mut file =
        OpenOptions::new().read(true).write(true).create(true).truncate(true).open(output).unwrap();
    let identity = EifIdentityInfo {
        img_name: "image".into(),
        img_version: "1".into(),
        build_info: EifBuildInfo {
            build_time: "1970-01-01T00:00:00+00:00".into(),
            build_tool: "peers".into(),
            build_tool_version: "1".into(),
            img_os: "Linux".into(),
            img_kernel: "6".into(),
        },
        docker_info: serde_json::Value::Null,
        custom_info: inputs.custom.clone(),
    };
    let signer = inputs
        .signer
        .as_ref()
        .map(|(key, certificate)| SignKeyData::new(key.to_str().unwrap(), certificate).unwrap());
    let is_signed = signer.is_some();
    let flags = u16::from(inputs.aarch64);
    let mut builder =
        EifBuilder::new(&inputs.kernel, inputs.cmdline.clone(), signer, Sha384::new(), flags, identity);
    for ramdisk in &inputs.ramdisks {
        builder.add_ramdisk(ramdisk);
    }
    builder.write_to(&mut file);
    builder.measure();
    get_pcrs(
        &mut builder.image_hasher,
        &mut builder.bootstrap_hasher,
        &mut builder.customer_app_hasher,
        &mut builder.certificate_hasher,
        Sha384::new(),
        is_signed,
    )
    .unwrap()
}

/// Reads and measures with the reference, as `nitro-cli describe-eif` does. Also whether it likes the checksum.
pub fn reference_read(image: &Path) -> (BTreeMap<String, String>, bool) {
    let mut reader = EifReader::from_eif(image.to_str().unwrap().to_owned()).unwrap();
    let crc = reader.check_crc();
    (reader.get_measurements().unwrap(), crc)
}

/// The same image by our builder.
pub fn recipe(inputs: &Inputs) -> Recipe {
    Recipe {
        arch: if inputs.aarch64 { Arch::Aarch64 } else { Arch::X86_64 },
        kernel: inputs.kernel.clone(),
        cmdline: inputs.cmdline.clone().into_bytes(),
        metadata: Metadata {
            image_name: "image".into(),
            image_version: "1".into(),
            build_metadata: BuildMetadata {
                build_time: "1970-01-01T00:00:00+00:00".into(),
                build_tool: "peers".into(),
                build_tool_version: "1".into(),
                operating_system: "Linux".into(),
                kernel_version: "6".into(),
            },
            docker_info: serde_json::Value::Null,
            custom_metadata: inputs.custom.clone(),
        },
        ramdisks: inputs.ramdisks.iter().cloned().map(Ramdisk::File).collect(),
        signer: inputs
            .signer
            .as_ref()
            .map(|(key, certificate)| Signer::from_files(key, certificate).unwrap()),
        allow_empty_ramdisk: true,
    }
}
