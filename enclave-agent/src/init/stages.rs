//! From a prepared system to the end of the app.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Pid;
use rustls::time_provider::DefaultTimeProvider;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::Enclave;
use super::app;
use super::cmdline::Parent;
use super::console::say;
use super::error::InitError;
use super::process_file::ProcessFile;
use super::signals::Signals;
use super::{entropy, heartbeat};
use crate::config::{AgentConfig, Delivery};
use crate::network::AppNetwork;
use crate::nsm::{self, Nsm, NsmError, NsmSource};
use crate::output::{Existing, KeyFile};
use crate::{Deadlines, GetKeys, Keys, Proxy, Retry, SealedRelease, Step, get_keys};

/// How long the security module may take to appear after the kernel started.
const NSM_APPEARS: Duration = Duration::from_secs(10);
/// Between two looks at it; the kernel tells nobody when it makes a device.
const NSM_LOOK: Duration = Duration::from_millis(20);
/// For one call of the module.
const NSM_CALL: Duration = Duration::from_secs(30);
/// The app's keys, in the directory of what only lives as long as the enclave.
const KEYS_FILE: &str = "keyferry/app_keys.json";

/// Whether this process owns the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// The kernel's first process: it seeds the kernel's randomness.
    First,
    /// A process among others, on a system that somebody else prepared; what would be in /run is in this directory.
    Guest(PathBuf),
}

/// Fetches the keys, hands them over, and runs the app until it ends.
///
/// # Errors
/// [`InitError`]; that of the app itself is [`InitError::App`].
pub async fn run(enclave: Enclave, role: Role) -> Result<(), InitError> {
    let Enclave { config, process, nsm, parent } = enclave;
    let mut signals =
        Signals::watch().map_err(|source| InitError::System { what: "cannot watch signals", source })?;
    for danger in config.dangers() {
        say(&format!("warning: {danger} is set in the measured configuration"));
    }
    let mut background = JoinSet::new();
    background.spawn(beat(parent.clone()));
    let nsm = open(&nsm).await?;
    let directory = match role {
        Role::First => {
            seed(&nsm).await?;
            PathBuf::from("/run")
        }
        Role::Guest(directory) => directory,
    };
    let network = AppNetwork::start(&config.network, &parent).await?;
    let AgentConfig { delivery, restart, .. } = &config;
    let (delivery, restart) = (delivery.clone(), *restart);
    let keys = get_keys(&request(config, &parent)?, &nsm, &mut narrate).await?;
    if delivery.contains(&Delivery::Files) {
        write_keys(&keys, &directory.join(KEYS_FILE), &process)?;
    }
    drop(keys);
    let program = process.args.first().cloned().unwrap_or_default();
    say(&format!("starting {program}"));
    let end = app::supervise(restart, &mut signals, || start(&process, network.environment())).await;
    match end.map_err(|source| InitError::Start { program: program.clone(), source })? {
        end if end.is_success() => Ok(()),
        end => Err(InitError::App { program, how: end.to_string() }),
    }
}

/// Tells the parent that this enclave runs. What the parent makes of it is its own affair.
async fn beat(parent: Parent) {
    match heartbeat::send(&parent).await {
        Ok(()) => say("the parent answered the heartbeat"),
        Err(error) => say(&format!("warning: the parent gave no heartbeat: {}", crate::error::chain(&error))),
    }
}

/// Opens the security module, which may appear a moment after init.
async fn open(source: &NsmSource) -> Result<Arc<dyn Nsm>, NsmError> {
    let end = Instant::now() + NSM_APPEARS;
    loop {
        match source.open() {
            Err(NsmError::Open { source, .. })
                if source.kind() == io::ErrorKind::NotFound && Instant::now() < end =>
            {
                sleep(NSM_LOOK).await;
            }
            opened => return opened,
        }
    }
}

/// Seeds the kernel's randomness; before this nothing may be generated.
async fn seed(nsm: &Arc<dyn Nsm>) -> Result<(), InitError> {
    let random = nsm::call(nsm, NSM_CALL, |nsm| nsm.random()).await?;
    entropy::add(&random).map_err(InitError::Entropy)
}

/// The trip for this image. Its first step compares the clock with the module's signed time.
fn request(config: AgentConfig, parent: &Parent) -> Result<GetKeys, InitError> {
    let AgentConfig { kms_urls, app_id, trust, fetch, network, .. } = config;
    let proxy = parent.port(network.proxy_port).map_err(crate::network::NetworkError::Address)?;
    Ok(GetKeys {
        kms_urls,
        app_id,
        trust,
        sealed: SealedRelease::required_if(fetch.require_sealed),
        proxy: Proxy::Endpoint(proxy),
        deadlines: Deadlines { total: fetch.timeout, ..Deadlines::default() },
        retry: Retry { attempts: fetch.attempts, ..Retry::default() },
        debug_mode: fetch.debug_mode,
        max_clock_skew: fetch.max_clock_skew,
        time: Arc::new(DefaultTimeProvider),
    })
}

fn narrate(step: Step<'_>) {
    match step {
        Step::Connecting { url, via } => say(&format!("asking {url} for keys, {via}")),
        Step::Attested { document } => say(&format!("attested as image {}", document.os_image_hash())),
        Step::Retrying { error, pause } => {
            say(&format!("{}; again in {} ms", crate::error::chain(error), pause.as_millis()));
        }
        Step::Released { .. } => say("the KMS released the keys"),
        Step::Connected { .. } | Step::TempCa { .. } => {}
    }
}

/// Writes the keys for the app's user.
fn write_keys(keys: &Keys, path: &Path, process: &ProcessFile) -> Result<(), InitError> {
    let file = |source| InitError::File { path: path.to_owned(), source };
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(file)?;
        fs::set_permissions(directory, Permissions::from_mode(0o755)).map_err(file)?;
    }
    let json = keys.to_json().map_err(|error| file(io::Error::other(error)))?;
    KeyFile::new(path, Existing::Replace).write(&json)?;
    chown(path, Some(process.uid), Some(process.gid)).map_err(file)
}

fn start(process: &ProcessFile, additions: &[(String, String)]) -> io::Result<Pid> {
    let child = process.command(additions).spawn()?;
    i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or_else(|| io::ErrorKind::InvalidData.into())
}
