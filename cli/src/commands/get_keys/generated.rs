//! A project for an image that does nothing but fetch an app's keys, from what the command line says: kept in a folder, so
//! that the same image is measured, registered and run.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use age::secrecy::ExposeSecret;
use age::x25519::Identity;
use clap::Args;
use cloud_provisioners::Lock;
use cloud_provisioners::command::failure;
use command_line::{Exit, Failure};
use eif_builder::project::PROJECT_FILE;
use eif_builder::registry::Registry;
use enclave_agent::KmsUrl;
use enclave_agent::command::get_keys as agent;
use enclave_agent::output::{Existing, KeyFile};
use sha2::{Digest, Sha256};
use tokio::task::spawn_blocking;

use super::{internal, tell};
use crate::commands::keys;

/// Folders of such projects, one an app.
const FOLDER: &str = ".keyferry/get-keys";
/// Whoever opens the export.
const IDENTITY: &str = "operator.txt";
/// What the command line has where nothing was said.
const UNASKED_SKEW: Duration = Duration::from_secs(300);
/// The KMS's root CA.
const CA: &str = "kms-ca.pem";

/// What such an image is made of.
#[derive(Args, Clone, Debug)]
pub(super) struct PartArguments {
    /// With --host and without --project: kernel for the image
    #[arg(long, value_name = "FILE", env = "KEYFERRY_KERNEL")]
    kernel: Option<PathBuf>,
    /// With --host and without --project: a static enclave-agent for the image
    #[arg(long, value_name = "FILE", env = "KEYFERRY_AGENT")]
    agent: Option<PathBuf>,
}

/// A project's folder, and what opens its export.
pub(super) struct Generated {
    pub(super) folder: PathBuf,
    pub(super) identity: PathBuf,
    /// Nobody else works in the folder meanwhile.
    pub(super) lock: Lock,
}

impl PartArguments {
    /// Makes or finds the project for `fetch`. An identity that was given is used; else one is made once and kept.
    pub(super) async fn generate(
        &self,
        fetch: agent::FetchArguments,
        identity: Option<PathBuf>,
    ) -> Result<Generated, Failure> {
        let kernel =
            part(self.kernel.as_deref(), "a kernel for the image: --kernel FILE or KEYFERRY_KERNEL")?;
        let agent = part(self.agent.as_deref(), "a static enclave-agent: --agent FILE or KEYFERRY_AGENT")?;
        let generating = spawn_blocking(move || generate(&kernel, &agent, &fetch, identity));
        generating.await.map_err(internal)?
    }
}

/// Relative to the project it would be another file.
fn part(path: Option<&Path>, what: &str) -> Result<PathBuf, Failure> {
    let path = path.ok_or_else(|| {
        Failure::new(Exit::Usage, format!("without --project the image needs {what}"))
            .with_hint("scripts/get_keys.sh finds or builds what is needed")
    })?;
    fs::canonicalize(path).map_err(|error| usage(&path.display().to_string(), error))
}

fn usage(what: &str, error: impl std::fmt::Display) -> Failure {
    Failure::new(Exit::Usage, format!("{what}: {error}"))
}

fn generate(
    kernel: &Path,
    agent: &Path,
    fetch: &agent::FetchArguments,
    identity: Option<PathBuf>,
) -> Result<Generated, Failure> {
    let app_id = fetch.app_id.to_string();
    let folder = Path::new(FOLDER).join(&app_id);
    fs::create_dir_all(&folder).map_err(internal)?;
    let folder = fs::canonicalize(&folder).map_err(internal)?;
    let lock = Lock::directory(&folder).map_err(failure)?;
    let identity = match identity {
        Some(identity) => identity,
        None => kept_identity(&folder)?,
    };
    let recipients: Vec<String> = keys::recipients(&identity)?;
    let (url, replicas) = fetch.kms_urls.split_first().ok_or_else(|| usage("--kms-url", "missing"))?;
    // As it was given: a URL of ours ends in the path of the calls.
    let base = |url: &KmsUrl| url.to_string().trim_end_matches("/prpc").to_owned();
    let url = base(url);
    let trust = trust(&folder, fetch, &url)?;
    let replicas: Vec<String> = replicas.iter().map(base).collect();
    let mut text = format!(
        "# Written by keyferry get-keys --host.\n[image]\nbinary = {agent:?}\ncmd = [\"--version\"]\n\
         [boot]\nkernel = {kernel:?}\ninit = \"agent\"\nagent = {agent:?}\n\
         [kms]\nurl = \"{url}\"\nreplicas = {replicas:?}\napp_id = \"{app_id}\"\nrecipients = {recipients:?}\n{trust}"
    );
    if fetch.require_sealed {
        text.push_str("require_sealed = true\n");
    }
    // The agent in an image is stricter than the one on a command line, unless it was asked not to be.
    let skew = Duration::from(fetch.deadlines.max_clock_skew);
    if skew != UNASKED_SKEW {
        text.push_str(&format!("[agent]\nmax_clock_skew = \"{}s\"\n", skew.as_secs()));
    }
    let path = folder.join(PROJECT_FILE);
    fs::write(&path, text).map_err(|error| usage(&path.display().to_string(), error))?;
    Ok(Generated { folder, identity, lock })
}

/// An identity of this project's own: whoever has it opens what the enclave exports.
fn kept_identity(folder: &Path) -> Result<PathBuf, Failure> {
    let path = folder.join(IDENTITY);
    if !path.exists() {
        let text = Identity::generate().to_string();
        KeyFile::new(&path, Existing::Keep).write(text.expose_secret().as_bytes())?;
    }
    Ok(path)
}

/// What makes a server the KMS, as lines of `[kms]`.
fn trust(folder: &Path, fetch: &agent::FetchArguments, url: &str) -> Result<String, Failure> {
    let agent::TrustArguments { root_ca, kms_k256_pubkey, kms_policy, danger_accept_any_kms } = &fetch.trust;
    if kms_policy.is_some() {
        return Err(usage("--kms-policy", "needs a project, which names its collateral as well"));
    }
    if *danger_accept_any_kms {
        return Ok("danger_accept_any_kms = true\n".to_owned());
    }
    let mut lines = String::new();
    if let Some(key) = kms_k256_pubkey {
        lines = format!("k256_pubkey = \"{key}\"\n");
    }
    let pinned = folder.join(CA);
    match root_ca {
        Some(path) => {
            fs::copy(path, &pinned).map_err(|error| usage(&path.display().to_string(), error))?;
        }
        None if kms_k256_pubkey.is_some() => return Ok(lines),
        None if !pinned.exists() => fetch_ca(url, &pinned)?,
        None => {}
    }
    lines.push_str(&format!("kms_ca = \"{CA}\"\n"));
    Ok(lines)
}

/// Pins what the KMS shows the first time, and says so: later runs compare.
fn fetch_ca(url: &str, path: &Path) -> Result<(), Failure> {
    let certificate = Registry::new().and_then(|registry| registry.fetch_kms_ca(url)).map_err(|error| {
        Failure::new(Exit::NoAnswer, error)
            .with_hint("give the KMS's root CA with --root-ca, which is safer as well")
    })?;
    fs::write(path, &certificate).map_err(internal)?;
    let (_, der) = eif_builder::read_certificate(path).map_err(internal)?;
    tell(&format!(
        "warning: this is what {url} answers now; compare it with the KMS's own root CA:\n  SHA-256 {}",
        hex::encode(Sha256::digest(der))
    ));
    Ok(())
}
