//! `explain`: which rule of a policy decides about somebody, without asking a server.

use std::path::PathBuf;

use attestation::{OsImageHash, Pcr, PcrIndex};
use clap::Args;
use command_line::{Exit, Failure, print_line};
use kms_protocol::AppId;
use kms_protocol::wire::webhook::{BootInfo, TEE_VARIANT_NITRO, bounded_reason};

use crate::authorise::policy::Policy;
use crate::authorise::{Purpose, Question};

/// Arguments of `explain`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  kms-server explain --policy policy.toml --app-id 1111…1111 --image 7f98…3326
  kms-server explain --policy policy.toml --app-id 1111…1111 --pcr 0=eb7d… --pcr 1=0343… --pcr 2=d7b0… --pcr 3=…
  kms-server explain --policy policy.toml --boot-info body.json          # as an upstream KMS sends it
  kms-server explain --policy policy.toml --boot-info body.json --kms    # may it be a KMS?")]
pub struct Explain {
    /// The policy
    #[arg(long, value_name = "FILE")]
    pub policy: PathBuf,
    /// Whose keys an enclave asks for
    #[arg(long, value_name = "HEX", conflicts_with = "boot_info", required_unless_present = "boot_info")]
    pub app_id: Option<AppId>,
    /// OS_IMAGE_HASH of the enclave's image
    #[arg(long, value_name = "HEX", conflicts_with = "boot_info")]
    pub image: Option<String>,
    /// A register of the enclave; 0, 1 and 2 together are its image
    #[arg(long = "pcr", value_name = "N=HEX", value_parser = register)]
    pub registers: Vec<(PcrIndex, Pcr)>,
    /// Everything about who asks, as the webhook contract has it
    #[arg(long, value_name = "FILE")]
    pub boot_info: Option<PathBuf>,
    /// Ask whether it may be a KMS with the same root keys
    #[arg(long)]
    pub kms: bool,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

fn register(text: &str) -> Result<(PcrIndex, Pcr), String> {
    let (index, value) = text.split_once('=').ok_or("expected N=HEX")?;
    let index = index.parse().ok().and_then(PcrIndex::new).ok_or("expected a register from 0 to 31")?;
    Ok((index, value.parse().map_err(|_| "expected 96 hexadecimal digits")?))
}

/// A no.
#[derive(Debug, thiserror::Error)]
#[error("the policy refuses: {0}")]
struct Refused(String);

/// Carries out the command.
///
/// # Errors
///
/// 3 when the policy refuses, 2 when it or the question cannot be read.
pub(super) fn run(arguments: Explain) -> Result<(), Failure> {
    let policy = Policy::load(&arguments.policy).map_err(|error| Failure::new(Exit::Usage, error))?;
    let json = arguments.json;
    let explanation = policy.explain(&question(arguments)?);
    if json {
        let text =
            serde_json::to_string(&explanation).map_err(|error| Failure::new(Exit::Internal, error))?;
        print_line(&text);
    } else {
        print_line(&explanation.to_string());
    }
    if explanation.allowed {
        Ok(())
    } else {
        Err(Failure::new(Exit::Refused, Refused(bounded_reason(&explanation.reason))))
    }
}

fn question(arguments: Explain) -> Result<Question, Failure> {
    let Explain { app_id, image, registers, boot_info, kms, .. } = arguments;
    let usage = |text: String| Failure::new(Exit::Usage, text);
    let boot_info = match (boot_info, app_id) {
        (Some(file), _) => {
            let text = std::fs::read(&file)
                .map_err(|error| usage(format!("cannot read {}: {error}", file.display())))?;
            BootInfo::from_json(&text).map_err(|error| Failure::new(Exit::Usage, error))?
        }
        (None, Some(app)) => enclave(app, hash(image.as_deref(), &registers).map_err(usage)?),
        (None, None) => return Err(usage("name the app with --app-id".into())),
    };
    let purpose = if kms { Purpose::Kms } else { Purpose::App };
    Ok(Question { purpose, boot_info, registers, evidence: None })
}

/// What a KMS knows of an enclave with that image.
fn enclave(app: AppId, image: OsImageHash) -> BootInfo {
    let image = image.as_bytes().to_vec();
    BootInfo {
        tee_variant: TEE_VARIANT_NITRO.into(),
        mr_aggregated: image.clone(),
        mr_system: image.clone(),
        compose_hash: image.clone(),
        os_image_hash: image,
        app_id: app.as_bytes().to_vec(),
        ..BootInfo::default()
    }
}

/// From the registers, or as given; both must agree.
fn hash(image: Option<&str>, registers: &[(PcrIndex, Pcr)]) -> Result<OsImageHash, String> {
    let pcr = |index| registers.iter().find(|(known, _)| *known == index).map(|(_, pcr)| pcr);
    let measured = match [PcrIndex::IMAGE, PcrIndex::KERNEL, PcrIndex::APPLICATION].map(pcr) {
        [Some(zero), Some(one), Some(two)] => Some(attestation::os_image_hash(zero, one, two)),
        _ => None,
    };
    let Some(image) = image else {
        return measured.ok_or_else(|| "name the image with --image, or with --pcr 0=, 1= and 2=".into());
    };
    let mut bytes = [0; 32];
    hex::decode_to_slice(image.strip_prefix("0x").unwrap_or(image), &mut bytes)
        .map_err(|_| format!("--image {image:?} is not 64 hexadecimal digits"))?;
    let given = OsImageHash::new(bytes);
    match measured {
        Some(measured) if measured != given => {
            Err(format!("--image is {given}, but the registers give {measured}"))
        }
        _ => Ok(given),
    }
}
