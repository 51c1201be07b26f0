//! `pull`.

use std::path::PathBuf;

use clap::Args;
use command_line::{Exit, Failure, print_line};
use indicatif::{ProgressBar, ProgressStyle};
use reqwest::Url;
use serde_json::json;

use super::failure;
use super::site::Site;
use crate::project::expand;
use crate::pull::{Order, Progress, Source, Variant, fetch};

/// Arguments of `pull`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  keyferry kms pull dstack-cloud-0.6.0            for a Confidential VM of a cloud
  keyferry kms pull dstack-0.6.0 --bare-metal --into /var/lib/dstack/images
                                                  for a VMM on bare metal
  keyferry kms pull https://example.com/mine-1.0-uki.tar.gz --sha256 HEX

A download that was cut goes on when the command is run again.")]
pub struct Pull {
    /// A release, dstack-cloud-0.6.0, or the address of an archive
    pub image: String,
    /// The variant a VMM boots: kernel, initramfs and root file system
    #[arg(long)]
    pub bare_metal: bool,
    /// SHA-256 the archive must have; an address needs it
    #[arg(long, value_name = "HEX", value_parser = hash)]
    pub sha256: Option<Hash>,
    /// Directory of images; the first search path of the global settings when not given
    #[arg(long, value_name = "DIR")]
    pub into: Option<PathBuf>,
    /// Where releases are mirrored, instead of https://github.com
    #[arg(long, value_name = "URL", env = "KEYFERRY_MIRROR")]
    pub mirror: Option<Url>,
    /// Answer as JSON
    #[arg(long)]
    pub json: bool,
}

/// A SHA-256 hash on the command line.
#[derive(Clone, Copy, Debug)]
pub struct Hash([u8; 32]);

fn hash(text: &str) -> Result<Hash, String> {
    let bytes = hex::decode(text.trim_start_matches("0x")).ok();
    bytes.and_then(|it| it.try_into().ok()).map(Hash).ok_or_else(|| "expected 64 hex characters".to_owned())
}

/// Tells a download on standard error.
struct Teller(ProgressBar);

impl Progress for Teller {
    fn progress(&mut self, here: u64, total: Option<u64>) {
        if let Some(total) = total {
            self.0.set_length(total);
        }
        self.0.set_position(here);
    }
}

pub(super) async fn pull(arguments: Pull) -> Result<(), Failure> {
    let source: Source = arguments.image.parse().map_err(|error| failure(crate::Error::Pull(error)))?;
    let into = match arguments.into {
        Some(into) => into,
        None => {
            let site = Site::read()?;
            let here = PathBuf::from(".");
            let first = site.settings.image_search_paths.first().map(|path| expand(path, &site.home, &here));
            first.ok_or_else(|| {
                let failure = Failure::new(Exit::Usage, "image_search_paths is empty in the global settings");
                failure.with_hint("run `keyferry kms config-edit`, or give --into DIR")
            })?
        }
    };
    let variant = if arguments.bare_metal { Variant::BareMetal } else { Variant::Uki };
    let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {eta}");
    let bar = ProgressBar::no_length().with_message(source.name());
    let mut teller = Teller(bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())));
    let sha256 = arguments.sha256.map(|Hash(bytes)| bytes);
    let order = Order { source, variant, sha256, mirror: arguments.mirror, into };
    let fetched = fetch(&order, &mut teller).await;
    teller.0.finish_and_clear();
    let fetched = fetched.map_err(failure)?;
    if fetched.archive.is_none() {
        tracing::info!("the image is there already, and whole");
    } else if sha256.is_none() {
        tracing::warn!("the archive was compared with no hash; register only what a running guest reports");
    }
    let directory = fetched.directory.display().to_string();
    if arguments.json {
        let answer = json!({
            "image": order.source.name(),
            "directory": directory,
            "archiveSha256": fetched.archive,
            "osImageHash": fetched.hash,
        });
        print_line(&answer.to_string());
        return Ok(());
    }
    print_line(&format!("image: {directory}"));
    if let Some(archive) = &fetched.archive {
        print_line(&format!("SHA-256 of the archive: {archive}"));
    }
    print_line(&format!("OS_IMAGE_HASH (by the image's own files): 0x{}", fetched.hash));
    Ok(())
}
