//! `pull`: OS images.

use clap::Args;
use command_line::{Exit, Failure, print_line};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::failure;
use super::site::Site;
use crate::Error;
use crate::project::expand;
use crate::pull::{Source, pull};

/// Arguments of `pull`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  keyferry kms pull dstack-cloud-0.6.0
  keyferry kms pull https://images.example.com/dstack-0.6.0-uki.tar.gz --sha256 $DIGEST

The image goes into the first of image_search_paths.")]
pub struct Pull {
    /// Name of a released image, or address of an archive
    #[arg(value_name = "IMAGE|URL")]
    image: String,
    /// SHA-256 that the archive must have, 64 hex digits; needed for an address
    #[arg(long, value_name = "HEX", value_parser = digest)]
    sha256: Option<[u8; 32]>,
    /// Answer as JSON
    #[arg(long)]
    json: bool,
}

fn digest(text: &str) -> Result<[u8; 32], String> {
    let mut bytes = [0; 32];
    hex::decode_to_slice(text, &mut bytes).map_err(|_| "expected 64 hex digits".to_owned())?;
    Ok(bytes)
}

pub(super) async fn run(arguments: Pull) -> Result<(), Failure> {
    let source = Source::parse(&arguments.image).map_err(failure)?;
    if !source.is_release && arguments.sha256.is_none() {
        let failure = Failure::new(Exit::Usage, "an address needs --sha256: anybody could answer there");
        return Err(failure.with_hint("take the digest from whoever published the image"));
    }
    let site = Site::read()?;
    let images = site.settings.image_search_paths.first().ok_or_else(|| {
        let problem = "is empty in the global settings".to_owned();
        failure(Error::Setting { setting: "image_search_paths", problem })
    })?;
    // A relative path starts at a project; there is none here.
    if !images.starts_with(['/', '~']) {
        let problem = format!("begins with {images}, expected an absolute path to fetch images to");
        return Err(failure(Error::Setting { setting: "image_search_paths", problem }));
    }
    let images = expand(images, &site.home, &site.home);
    let bar = ProgressBar::no_length().with_message(source.image.clone());
    if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {eta}") {
        bar.set_style(style);
    }
    let progress = |done, total: Option<u64>| {
        if let Some(total) = total {
            bar.set_length(total);
        }
        bar.set_position(done);
    };
    let pulled = pull(&source, arguments.sha256, &images, progress).await;
    bar.finish_and_clear();
    let pulled = pulled.map_err(failure)?;
    let archive = hex::encode(pulled.archive_sha256);
    let directory = pulled.directory.display().to_string();
    if arguments.json {
        let answer = json!({
            "version": 1,
            "image": source.image,
            "directory": directory,
            "archiveSha256": archive,
            "osImageHash": pulled.os_image_hash,
        });
        print_line(&answer.to_string());
    } else {
        print_line(&format!(
            "{directory}\n  SHA-256 of the archive           {archive}\n  \
             OS_IMAGE_HASH (by its own files) {}",
            pulled.os_image_hash
        ));
    }
    Ok(())
}
