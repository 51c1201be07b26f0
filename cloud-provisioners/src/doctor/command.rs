//! `keyferry doctor tdx-host`.

use std::path::PathBuf;

use clap::Args;
use command_line::{Exit, Failure, print_line};
use reqwest::Url;
use serde_json::json;

use super::{Examination, Finding, Intended, Status, examine, recognise};
use crate::Error;
use crate::project::Project;
use crate::registry::{self, ImageName};
use crate::vmm;

/// The longest log that is read.
const LONGEST_LOG: u64 = 64 << 20;

/// Look at a bare-metal TDX host before a KMS is put on it
///
/// Each check tells what it found; where something is wrong also why it matters and what to do. Nothing is changed. What only
/// root can read is told as not checked.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  keyferry doctor tdx-host                          this host
  keyferry doctor tdx-host -C kms --image dstack-0.6.0 --port 12001
                                                    and the project, its images and its port
  keyferry doctor tdx-host --log serial.log         also what a log shows
  keyferry doctor tdx-host --json | jq '.findings[] | select(.status == \"fail\")'

Exit codes: 0 nothing stands in the way, 3 a check failed.")]
pub struct TdxHost {
    /// The project that is to be deployed here
    #[arg(short = 'C', long, value_name = "DIR")]
    directory: Option<PathBuf>,
    /// Name of the guest image that is to run
    #[arg(long, value_name = "NAME")]
    image: Option<String>,
    /// Digest its release has
    #[arg(long, value_name = "HEX", requires = "image")]
    image_digest: Option<String>,
    /// A container image the registry must have; those of the project when not given
    #[arg(long, value_name = "NAME")]
    container_image: Vec<ImageName>,
    /// A port of the host that must be free
    #[arg(long, value_name = "PORT")]
    port: Vec<u16>,
    /// Memory the machine gets, MiB
    #[arg(long, value_name = "MIB", default_value_t = 4096)]
    memory: u64,
    /// Disk the machine gets, GB
    #[arg(long, value_name = "GB", default_value_t = 20)]
    disk: u64,
    /// Address of the authorisation service
    #[arg(long, value_name = "URL")]
    auth_url: Option<Url>,
    /// Address of the chain's RPC
    #[arg(long, value_name = "URL", env = "ETH_RPC_URL", hide_env_values = true)]
    rpc_url: Option<Url>,
    /// The chain's id
    #[arg(long, value_name = "ID", requires = "rpc_url")]
    chain_id: Option<u64>,
    /// Address of the KMS contract
    #[arg(long, value_name = "0xHEX", requires = "rpc_url")]
    contract: Option<String>,
    #[command(flatten)]
    vmm: vmm::command::VmmArguments,
    /// The VMM's configuration
    #[arg(long, value_name = "FILE", default_value = "/etc/dstack/vmm.toml")]
    vmm_config: PathBuf,
    /// A log to look for known failures in; may be given more than once
    #[arg(long, value_name = "FILE")]
    log: Vec<PathBuf>,
    /// The directory that stands for /, where a host's file system is mounted elsewhere
    #[arg(long, value_name = "DIR", default_value = "/", env = "KEYFERRY_HOST_ROOT")]
    root: PathBuf,
    /// Answer as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the checks.
///
/// # Errors
///
/// A [`Failure`] with exit code 3 when a check failed, 2 for arguments that cannot be used.
pub async fn tdx_host(arguments: TdxHost) -> Result<(), Failure> {
    let usage = |error: Error| Failure::new(Exit::Usage, error);
    let client = arguments.vmm.client().map_err(|error| usage(error.into()))?;
    let (mut findings, mut logs) = (Vec::new(), Vec::new());
    let mut images = arguments.container_image;
    if let (true, Some(directory)) = (images.is_empty(), &arguments.directory) {
        let named = Project::open(directory).and_then(|project| {
            let app = project.app()?;
            Ok(registry::images_of(&project.docker_compose(&app)?, &project.pre_launch(&app)?))
        });
        for image in named.map_err(usage)? {
            match image {
                Ok(image) => images.push(image),
                Err(error) => findings.push(Finding::skipped("registry", error.to_string())),
            }
        }
    }
    for path in &arguments.log {
        logs.extend(known_failures(path).await.map_err(usage)?);
    }
    let examination = Examination {
        root: arguments.root,
        vmm_config: arguments.vmm_config,
        vmm: client,
        intended: Intended {
            guest_image: arguments.image,
            guest_digest: arguments.image_digest,
            images,
            ports: arguments.port,
            memory: arguments.memory,
            disk: arguments.disk,
            auth_url: arguments.auth_url,
            rpc_url: arguments.rpc_url,
            chain_id: arguments.chain_id,
            contract: arguments.contract,
            project: arguments.directory,
        },
    };
    let examined = examine(&examination).await.map_err(|error| Failure::new(Exit::Internal, error))?;
    findings.splice(0..0, examined);
    findings.extend(logs);
    report(&findings, arguments.json)
}

/// What a log shows, as findings.
async fn known_failures(path: &std::path::Path) -> Result<Vec<Finding>, Error> {
    use tokio::io::AsyncReadExt as _;
    let file = tokio::fs::File::open(path).await.map_err(Error::file("open", path))?;
    let mut text = Vec::new();
    file.take(LONGEST_LOG).read_to_end(&mut text).await.map_err(Error::file("read", path))?;
    let text = String::from_utf8_lossy(&text);
    let found = recognise(&text).into_iter();
    Ok(found.map(|(symptom, line)| Finding::fail("log", line, symptom.cause, symptom.remedy)).collect())
}

fn report(findings: &[Finding], json: bool) -> Result<(), Failure> {
    let count = |status| findings.iter().filter(|finding| finding.status == status).count();
    let (failed, warned) = (count(Status::Fail), count(Status::Warn));
    if json {
        print_line(&json!({"version": 1, "passed": failed == 0, "findings": findings}).to_string());
    } else {
        findings.iter().for_each(|finding| print_line(&finding.to_string()));
        print_line(&format!("{failed} failed, {warned} to look at, {} passed", count(Status::Pass)));
    }
    match failed {
        0 => Ok(()),
        _ => {
            let failure = Failure::new(Exit::Refused, format!("{failed} checks of this host failed"));
            Err(failure
                .with_hint("mend the first that failed and run this again: later ones may follow from it"))
        }
    }
}
