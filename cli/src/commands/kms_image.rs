//! `keyferry kms-image`: the KMS as a container image, made without an engine.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use command_line::{Exit, Failure, print_line};
use eif_builder::Arch;
use eif_builder::oci_pack::{PackedFile, PackedImage, write_layout};
use eif_builder::source::check_static;

/// Whom the KMS runs as; there is no user database in the image.
const USER: u32 = 65532;

/// Packs a static kms-server into an OCI image layout; the same program gives the same digest
#[derive(Args)]
#[command(after_help = "Examples:
  keyferry kms-image --program target/x86_64-unknown-linux-gnu/release/kms-server --output kms-image
  skopeo copy oci:kms-image docker://registry.example.com/keyferry-kms:0.1.0

The image listens on port 8000, keeps its keys in /kms/certs and reads /kms/kms.toml and /etc/kms/kms.toml.")]
pub(crate) struct Arguments {
    /// A statically linked kms-server
    #[arg(long, value_name = "FILE")]
    program: PathBuf,
    /// The folder to make
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Name of the image in the layout
    #[arg(long, value_name = "NAME", default_value = concat!("keyferry-kms:", env!("CARGO_PKG_VERSION")))]
    tag: String,
    /// PEM file of certificate authorities for https endpoints of a chain or a webhook
    #[arg(long, value_name = "FILE")]
    ca_bundle: Option<PathBuf>,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: Arguments) -> Result<Exit, Failure> {
    let Arguments { program, output, tag, ca_bundle, json } = arguments;
    let usage = |error: eif_builder::Error| Failure::new(Exit::Usage, error);
    check_static(&program, Arch::X86_64).map_err(|error| {
        usage(error).with_hint(
            "build it with RUSTFLAGS=\"-C target-feature=+crt-static\" --target x86_64-unknown-linux-gnu",
        )
    })?;
    let read = |path: PathBuf, mode| {
        std::fs::read(&path)
            .map(|contents| PackedFile { contents, mode })
            .map_err(|error| Failure::new(Exit::Usage, format!("cannot read {}: {error}", path.display())))
    };
    let mut files = BTreeMap::from([("/usr/bin/kms-server".to_owned(), read(program, 0o755)?)]);
    if let Some(bundle) = ca_bundle {
        files.insert("/etc/ssl/certs/ca-certificates.crt".to_owned(), read(bundle, 0o644)?);
    }
    let packed = write_layout(&output, &image(files), &tag, Arch::X86_64).map_err(usage)?;
    if json {
        let answer = serde_json::json!({
            "version": 1, "digest": packed.digest, "layer_len": packed.layer_len, "tag": tag,
        });
        print_line(&answer.to_string());
    } else {
        print_line(&format!("{}: {tag}, {} bytes", packed.digest, packed.layer_len));
    }
    Ok(Exit::Done)
}

fn image(files: BTreeMap<String, PackedFile>) -> PackedImage {
    let private = (0o700, USER);
    PackedImage {
        files,
        // A new volume takes over the owner of the folder it covers.
        folders: [("/kms".to_owned(), private), ("/kms/certs".to_owned(), private)].into(),
        entrypoint: vec!["/usr/bin/kms-server".into()],
        cmd: vec!["serve".into(), "--config".into(), "/kms/kms.toml".into()],
        env: vec!["PATH=/usr/bin".into()],
        user: format!("{USER}:{USER}"),
        ports: vec!["8000/tcp".into()],
        volumes: vec!["/kms".into()],
        labels: BTreeMap::from([
            ("org.opencontainers.image.title".to_owned(), "keyferry-kms".to_owned()),
            ("org.opencontainers.image.version".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
            ("org.opencontainers.image.licenses".to_owned(), env!("CARGO_PKG_LICENSE").to_owned()),
        ]),
    }
}
