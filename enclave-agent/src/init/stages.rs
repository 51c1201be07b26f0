//! From a prepared system to the end of the app.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, symlink};
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
use crate::config::{self, AgentConfig, Delivery as Way};
use crate::delivery::{self, Export, Form, Owner, Recipient, Renewal, RingReader, TmpfsFile};
use crate::guest_api;
use crate::network::{AppNetwork, NetworkError};
use crate::nsm::{self, Nsm, NsmError, NsmSource};
use crate::service::{Service, Settings};
use crate::{Deadlines, GetKeys, Proxy, Retry, SealedRelease, Step};

/// How long the security module may take to appear after the kernel started.
const NSM_APPEARS: Duration = Duration::from_secs(10);
/// Between two looks at it; the kernel tells nobody when it makes a device.
const NSM_LOOK: Duration = Duration::from_millis(20);
/// For one call of the module.
const NSM_CALL: Duration = Duration::from_secs(30);
/// What only lives as long as the enclave, and where older programs look for it.
const RUN: &str = "/run";
const VAR_RUN: &str = "/var/run";
/// The app's keys, in the directory of what only lives as long as the enclave.
const KEYS_FILE: &str = "keyferry/app_keys.json";
/// Tells the app the number of the descriptor that it inherits.
const KEYS_FD: &str = "KEYFERRY_KEYS_FD";
/// For an export, attempts included.
const EXPORT: Duration = Duration::from_secs(60);

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
    let mut heartbeat = JoinSet::new();
    heartbeat.spawn(beat(enclave.parent.clone()));
    let end = boot(enclave, role).await;
    // To nitro-cli an enclave that ends without its heartbeat has not booted, whatever its console says. It is bounded.
    while heartbeat.join_next().await.is_some() {}
    end
}

async fn boot(enclave: Enclave, role: Role) -> Result<(), InitError> {
    let Enclave { config, process, nsm, parent } = enclave;
    let mut signals =
        Signals::watch().map_err(|source| InitError::System { what: "cannot watch signals", source })?;
    for danger in config.dangers() {
        say(&format!("warning: {danger} is set in the measured configuration"));
    }
    let nsm = open(&nsm).await?;
    let directory = match role {
        Role::First => {
            seed(&nsm).await?;
            link_run()?;
            PathBuf::from(RUN)
        }
        Role::Guest(directory) => directory,
    };
    let network = AppNetwork::start(&config.network, &parent).await?;
    let restart = config.restart;
    let inherits = config.delivery.contains(&Way::Descriptor);
    let settings = settings(&config, &parent, &process, &directory)?;
    let service = Service::start(settings, request(config, &parent)?, nsm, &mut narrate).await?;
    let keys = inherits.then(|| service.keys().clone());
    let mut background = JoinSet::new();
    background.spawn(async move { match service.run(report).await {} });
    let program = process.args.first().cloned().unwrap_or_default();
    say(&format!("starting {program}"));
    let start = || start(&process, network.environment(), keys.as_ref());
    let end = app::supervise(restart, &mut signals, start).await;
    match end.map_err(|source| InitError::Start { program: program.clone(), source })? {
        end if end.is_success() => Ok(()),
        end => Err(InitError::App { program, how: end.to_string() }),
    }
}

/// Tells the parent that this enclave runs. What the parent makes of it is its own affair.
async fn beat(parent: Parent) {
    match heartbeat::send(&parent).await {
        Ok(()) => say("the parent answered the heartbeat"),
        Err(error) => say(&format!("warning: the parent gave no heartbeat: {}", command_line::chain(&error))),
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
            say(&format!("{}; again in {} ms", command_line::chain(error), pause.as_millis()));
        }
        Step::Released { .. } => say("the KMS released the keys"),
        Step::Connected { .. } | Step::TempCa { .. } => {}
    }
}

/// Where the keys of a configuration go. What the way there needs is made here.
fn settings(
    config: &AgentConfig,
    parent: &Parent,
    process: &ProcessFile,
    directory: &Path,
) -> Result<Settings, InitError> {
    let app = Owner { uid: process.uid, gid: process.gid };
    let mut settings = Settings { app: Some(app), refresh: config.fetch.refresh, ..Settings::default() };
    for way in &config.delivery {
        match way {
            Way::Files => {
                let path = directory.join(KEYS_FILE);
                make_directory(&path)?;
                settings.delivery.file = Some(TmpfsFile::new(path, Some(app)));
            }
            Way::GuestApi => {
                settings.sockets = guest_api::SOCKETS.map(|name| directory.join(name)).to_vec();
            }
            // Made anew for each start of the app.
            Way::Descriptor => {}
        }
    }
    settings.delivery.export = config.export.as_ref().map(|it| export(it, parent)).transpose()?;
    Ok(settings)
}

fn export(config: &config::Export, parent: &Parent) -> Result<Export, InitError> {
    let form = match &config.form {
        config::ExportForm::DangerPlaintext => Form::DangerPlaintext,
        config::ExportForm::Sealed(recipients) => {
            let parsed: Result<Vec<Recipient>, _> = recipients.iter().map(|it| it.parse()).collect();
            Form::Sealed(parsed.map_err(InitError::Recipient)?)
        }
    };
    let to = parent.port(config.port).map_err(NetworkError::Address)?;
    Ok(Export { to, form, deadline: EXPORT, nsm_deadline: NSM_CALL })
}

/// Lets what is looked for in /var/run be found in /run. An image that has its own /var/run keeps it: the SDKs look in
/// both.
fn link_run() -> Result<(), InitError> {
    let failed = |source| InitError::System { what: "cannot link /var/run to /run", source };
    fs::create_dir_all("/var").map_err(failed)?;
    match symlink(RUN, VAR_RUN) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(failed(error)),
        _ => Ok(()),
    }
}

fn make_directory(file: &Path) -> Result<(), InitError> {
    let Some(directory) = file.parent() else { return Ok(()) };
    let failed = |source| InitError::System { what: "cannot make the directory of the keys", source };
    fs::create_dir_all(directory).map_err(failed)?;
    // The app's user has to get at its file.
    fs::set_permissions(directory, Permissions::from_mode(0o755)).map_err(failed)
}

fn report(renewal: Renewal<'_>) {
    match renewal {
        Renewal::Step(step) => narrate(step),
        Renewal::Done { changed } => {
            say(if changed {
                "the KMS gave other keys than before"
            } else {
                "the keys are the same as before"
            });
        }
        Renewal::NotFetched(error) => say(&format!("warning: no new keys: {}", command_line::chain(error))),
        Renewal::NotDelivered(error) => {
            say(&format!("warning: new keys did not get everywhere: {}", command_line::chain(error)));
        }
    }
}

fn start(
    process: &ProcessFile,
    additions: &[(String, String)],
    keys: Option<&RingReader>,
) -> io::Result<Pid> {
    let descriptor = keys.map(|keys| delivery::descriptor(&keys.current())).transpose();
    let descriptor = descriptor.map_err(io::Error::other)?;
    let number = descriptor.as_ref().map(|it| (KEYS_FD.to_owned(), it.as_raw_fd().to_string()));
    let additions: Vec<_> = additions.iter().cloned().chain(number).collect();
    let child = process.command(&additions).spawn()?;
    // The app has its copy now.
    drop(descriptor);
    i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or_else(|| io::ErrorKind::InvalidData.into())
}
