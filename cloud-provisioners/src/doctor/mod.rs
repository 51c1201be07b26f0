//! Looks at a bare-metal TDX host before a KMS is put on it: every link of the chain from the firmware to the registry, each
//! with what was found, why it matters and what to do.
//!
//! ```text
//! firmware ─▶ kernel, KVM, TDX module ─▶ SGX ─▶ QGSD, PCCS, registration ─▶ key provider
//!                                                                              │
//!             contract ◀─ auth service ◀─ registry ◀─ guest image ◀─ VMM ◀─────┘
//! ```
//!
//! Nothing is changed, nothing needs root; what only root can read is said to be not checked. All files are read below one
//! directory, so that the checks can be tried on a tree of files.

mod attestation;
pub mod command;
mod host;
mod machine;
mod net;
mod services;
mod settings;
mod symptoms;
mod vmm;

use std::fmt::{self, Display, Formatter};
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use tokio::time::timeout;

pub(crate) use symptoms::known;
pub use symptoms::{Symptom, recognise};

use crate::registry::ImageName;
use host::Host;
use settings::VmmSettings;

/// One check may take this long.
const ONE_CHECK: Duration = Duration::from_secs(20);

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it must be.
    Pass,
    /// Works now, or cannot be known from here; worth a look.
    Warn,
    /// A KMS will not run like this.
    Fail,
    /// Not looked at, for the reason in the finding.
    Skipped,
}

/// What one check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The check's name.
    pub check: &'static str,
    /// How it ended.
    pub status: Status,
    /// What was found.
    pub finding: String,
    /// Why it is so, or what follows from it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Finding {
    fn new(check: &'static str, status: Status, finding: impl Into<String>) -> Self {
        Self { check, status, finding: finding.into(), cause: None, remedy: None }
    }

    fn pass(check: &'static str, finding: impl Into<String>) -> Self {
        Self::new(check, Status::Pass, finding)
    }

    fn skipped(check: &'static str, why: impl Into<String>) -> Self {
        Self::new(check, Status::Skipped, why)
    }

    fn warn(check: &'static str, finding: impl Into<String>, cause: &str, remedy: impl Into<String>) -> Self {
        Self::new(check, Status::Warn, finding).because(cause, remedy)
    }

    fn fail(check: &'static str, finding: impl Into<String>, cause: &str, remedy: impl Into<String>) -> Self {
        Self::new(check, Status::Fail, finding).because(cause, remedy)
    }

    fn because(mut self, cause: &str, remedy: impl Into<String>) -> Self {
        self.cause = Some(cause.to_owned());
        self.remedy = Some(remedy.into());
        self
    }
}

impl Display for Finding {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let status = match self.status {
            Status::Pass => "ok",
            Status::Warn => "warn",
            Status::Fail => "FAIL",
            Status::Skipped => "-",
        };
        write!(f, "{status:<5} {:<22} {}", self.check, self.finding)?;
        if let Some(cause) = &self.cause {
            write!(f, "\n      cause: {cause}")?;
        }
        match &self.remedy {
            Some(remedy) => write!(f, "\n      remedy: {remedy}"),
            None => Ok(()),
        }
    }
}

/// The KMS that is to run on the host, as far as it is known.
#[derive(Clone, Debug, Default)]
pub struct Intended {
    /// Name of the guest image.
    pub guest_image: Option<String>,
    /// The digest its release has, hex.
    pub guest_digest: Option<String>,
    /// Container images the registry must have.
    pub images: Vec<ImageName>,
    /// Ports of the host that must be free.
    pub ports: Vec<u16>,
    /// Memory the machine gets, MiB.
    pub memory: u64,
    /// Disk the machine gets, GB.
    pub disk: u64,
    /// Address of the authorisation service.
    pub auth_url: Option<reqwest::Url>,
    /// Address of the chain's RPC.
    pub rpc_url: Option<reqwest::Url>,
    /// The chain's id.
    pub chain_id: Option<u64>,
    /// The KMS contract, `0x` and 40 hex digits.
    pub contract: Option<String>,
    /// The project whose compose is looked at.
    pub project: Option<PathBuf>,
}

/// What to look at.
#[derive(Clone, Debug)]
pub struct Examination {
    /// The directory that stands for `/`.
    pub root: PathBuf,
    /// Configuration of the VMM, below the root.
    pub vmm_config: PathBuf,
    /// Address of the VMM's API.
    pub vmm: crate::vmm::Client,
    /// What is to run there.
    pub intended: Intended,
}

/// Runs every check, in the order in which a failure of one explains those after it.
///
/// # Errors
///
/// [`crate::Error::HttpClient`] when TLS cannot be set up. What a check cannot find out is a finding.
pub async fn examine(examination: &Examination) -> Result<Vec<Finding>, crate::Error> {
    let host = Host::new(&examination.root);
    let settings = VmmSettings::read(&host, &examination.vmm_config);
    let net = net::Net::new()?;
    let intended = &examination.intended;
    let mut findings = machine::examine(&host, intended).await;
    findings.extend(within("pccs-host", attestation::host_collateral(&host, &net)).await);
    findings.extend(attestation::examine(&host, settings.as_ref().ok()));
    findings.extend(within("docker", services::docker(&host)).await);
    match &settings {
        Ok(settings) => {
            findings.extend(within("pccs-guest", attestation::guest_collateral(settings, &net)).await);
            findings.extend(within("key-provider", attestation::key_provider(&host, settings)).await);
            findings.extend(vmm::configuration(&host, settings));
            findings.push(vmm::guest_image(&host, settings, intended).await);
        }
        Err(problem) => findings.push(Finding::fail(
            "vmm-config",
            problem.clone(),
            "without it the VMM is not installed, or not where it is looked for",
            "install the VMM, or name its configuration with --vmm-config",
        )),
    }
    findings.extend(within("vmm", vmm::answers(&examination.vmm)).await);
    findings.extend(vmm::ports(&host, intended));
    for image in &intended.images {
        findings.extend(within("registry", services::registry(image, &net)).await);
    }
    findings.extend(services::compose(intended));
    if let Some(url) = &intended.auth_url {
        findings.extend(within("auth", services::authoriser(url, &net)).await);
    }
    if let Some(url) = &intended.rpc_url {
        findings.extend(within("chain", services::chain(url, intended, &net)).await);
    }
    Ok(findings)
}

/// A check with an end.
async fn within<T: IntoIterator<Item = Finding>>(
    check: &'static str,
    examination: impl Future<Output = T>,
) -> Vec<Finding> {
    match timeout(ONE_CHECK, examination).await {
        Ok(findings) => findings.into_iter().collect(),
        Err(_) => vec![Finding::fail(
            check,
            format!("no end after {} s", ONE_CHECK.as_secs()),
            "what is asked accepts the connection and then says nothing",
            "look at the log of the service; a restart hides the cause",
        )],
    }
}

/// Whether an address can be reached from other machines.
fn is_loopback(address: std::net::IpAddr) -> bool {
    address.is_loopback()
}
