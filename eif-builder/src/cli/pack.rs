//! `eif-builder pack`

use std::path::Path;

use serde_json::Value;

use super::{Io, MetadataArgs, PackArgs, SignerArgs, report};
use crate::error::{Error, IoContext};
use crate::metadata::{BuildMetadata, Metadata, kernel_from_config, parse_custom, rfc3339};
use crate::recipe::{Ramdisk, Recipe, check_kernel};
use crate::sign::Signer;

pub(super) fn run(args: &PackArgs, io: &mut Io<'_>) -> Result<(), Error> {
    let recipe = Recipe {
        arch: args.arch.into(),
        kernel: args.kernel.clone(),
        cmdline: args.cmdline.clone().into_bytes(),
        metadata: metadata(&args.metadata, &args.kernel, args.kernel_config.as_deref())?,
        ramdisks: args.ramdisks.iter().cloned().map(Ramdisk::File).collect(),
        signer: signer(&args.signer)?,
        allow_empty_ramdisk: args.allow_empty_ramdisk,
    };
    // The raw level packs what it is given; whether that boots is another question.
    if let Err(error) = check_kernel(&recipe.kernel, recipe.arch) {
        writeln!(io.err, "warning: {error}").context("write", "a warning")?;
    }
    let assembled = recipe.write(&args.output)?;
    report::print(io, &assembled.registers, args.json)
}

/// The metadata that the flags ask for.
pub(super) fn metadata(args: &MetadataArgs, kernel: &Path, config: Option<&Path>) -> Result<Metadata, Error> {
    let MetadataArgs {
        name,
        version,
        metadata,
        build_time,
        build_tool,
        build_tool_version,
        img_os,
        img_kernel,
        source_date_epoch,
    } = args.clone();
    let from_config = match config {
        Some(path) => Some(kernel_from_config(&std::fs::read_to_string(path).context("read", path)?)?),
        None => None,
    };
    let (config_os, config_kernel) = from_config.unzip();
    let custom_metadata = match &metadata {
        Some(path) => parse_custom(&std::fs::read(path).context("read", path)?)?,
        None => Value::Null,
    };
    let build_time = match build_time {
        Some(time) => time,
        None => rfc3339(source_date_epoch.unwrap_or(0))?,
    };
    let kernel_name = || kernel.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(Metadata {
        image_name: name.unwrap_or_else(kernel_name),
        image_version: version.unwrap_or_else(|| "1.0".into()),
        build_metadata: BuildMetadata {
            build_time,
            build_tool: build_tool.unwrap_or_else(|| env!("CARGO_PKG_NAME").into()),
            build_tool_version: build_tool_version.unwrap_or_else(|| env!("CARGO_PKG_VERSION").into()),
            operating_system: img_os.or(config_os).unwrap_or_else(|| "OS".into()),
            kernel_version: img_kernel.or(config_kernel).unwrap_or_else(|| "kernel".into()),
        },
        docker_info: Value::Null,
        custom_metadata,
    })
}

/// The signer that the flags ask for. Clap has checked that there are both or none.
pub(super) fn signer(args: &SignerArgs) -> Result<Option<Signer>, Error> {
    match (&args.private_key, &args.signing_certificate) {
        (Some(key), Some(certificate)) => Signer::from_files(key, certificate).map(Some),
        (None, None) => Ok(None),
        _ => Err(Error::input("signing", "needs both --signing-certificate and --private-key")),
    }
}
