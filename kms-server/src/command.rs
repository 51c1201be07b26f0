//! The command line, for the program of its own and for others that offer it as a subcommand.

mod audit;
mod auth_api;
mod explain;
mod look;

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, Subcommand};
use command_line::{Exit, Failure};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::SetupToken;
use crate::authorise;
use crate::config::{Config, Loaded};
use crate::notify::Notify;
use crate::server::StartError;
use crate::start::Opened;
use crate::store::{self, Domain, Store};

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serves keys until it is told to stop
    Serve(Serve),
    /// Reads the settings and what they name, says what is wrong with them, and changes nothing
    Check(Check),
    /// Makes the root keys of a new KMS; refuses where there are any
    Bootstrap(Bootstrap),
    /// Says what a directory of keys holds, and changes nothing
    Inspect(look::Inspect),
    /// Checks what a running KMS says about itself against its evidence
    Verify(look::Verify),
    /// Says which rule of a policy decides about somebody
    Explain(explain::Explain),
    /// Serves upstream's authorisation webhook, for a KMS that asks one
    AuthApi(auth_api::AuthApi),
    /// Checks the log of decisions
    #[command(subcommand)]
    Audit(audit::Audit),
}

/// Arguments of `serve`.
#[derive(Debug, Args)]
pub struct Serve {
    /// Settings that win over /etc/kms/kms.toml and ./kms.toml
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Arguments of `check`.
#[derive(Debug, Args)]
pub struct Check {
    /// Settings that win over /etc/kms/kms.toml and ./kms.toml
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Arguments of `bootstrap`.
#[derive(Debug, Args)]
pub struct Bootstrap {
    /// The directory to make the keys in (core.cert_dir)
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// The name clients will reach the KMS by
    #[arg(long, value_name = "NAME")]
    pub domain: Domain,
}

/// Carries out `command`. `serve` returns when `shutdown` is cancelled and open requests have ended.
///
/// # Errors
///
/// A [`Failure`] with its exit code: 2 for unusable settings, 3 where keys are refused to be overwritten, 1 otherwise.
pub async fn run(command: Command, shutdown: CancellationToken) -> Result<(), Failure> {
    match command {
        Command::Serve(arguments) => serve(arguments, shutdown).await,
        Command::Check(arguments) => check(arguments),
        Command::Bootstrap(arguments) => bootstrap(arguments).await,
        Command::Inspect(arguments) => look::run_inspect(arguments),
        Command::Verify(arguments) => look::run_verify(arguments).await,
        Command::Explain(arguments) => explain::run(arguments),
        Command::AuthApi(arguments) => auth_api::run(arguments, shutdown).await,
        Command::Audit(command) => audit::run(command),
    }
}

async fn serve(arguments: Serve, shutdown: CancellationToken) -> Result<(), Failure> {
    let Loaded { config, warnings, files } = load(arguments.config)?;
    for file in files {
        info!(file = %file.display(), "read settings");
    }
    for warning in warnings {
        warn!("{warning}");
    }
    let notify = Notify::from_environment(|name| std::env::var(name).ok());
    let opened = Opened::open(config, Arc::new(crate::server::system_clock)).await.map_err(start_failure)?;
    if opened.needs_onboarding().map_err(start_failure)? {
        let onboarding = opened.onboard().await.map_err(start_failure)?;
        if let Some(token) = onboarding.token() {
            show_token(token);
        }
        command_line::print_line(&format!("listening on tcp:{}", onboarding.address()));
        notify.ready();
        let stopped = tokio::select! {
            () = shutdown.cancelled() => true,
            () = onboarding.finished() => false,
            () = notify.feed_watchdog() => false,
        };
        onboarding.shutdown().await;
        if stopped {
            info!("stopped without keys");
            return Ok(());
        }
    }
    let server = opened.serve().await.map_err(start_failure)?;
    command_line::print_line(&format!("listening on tcp:{}", server.address()));
    notify.ready();
    let serving = async {
        tokio::select! {
            () = shutdown.cancelled() => {
                notify.stopping();
                server.shutdown().await;
            }
            () = server.stopped() => {}
        }
    };
    tokio::select! {
        () = serving => {}
        () = notify.feed_watchdog() => {}
    }
    info!("stopped");
    Ok(())
}

/// On the console and not in the log: whoever reads the log later need not know it.
#[expect(clippy::print_stderr, reason = "for the person at the console; standard output is for programs")]
fn show_token(token: &SetupToken) {
    eprintln!("setup token: {}", token.reveal());
}

fn check(arguments: Check) -> Result<(), Failure> {
    let Loaded { config, warnings, files } = load(arguments.config)?;
    authorise::from_config(config.authoriser).map_err(|error| Failure::new(Exit::Usage, error))?;
    for file in files {
        info!(file = %file.display(), "read settings");
    }
    for warning in &warnings {
        warn!("{warning}");
    }
    info!(warnings = warnings.len(), "the settings are usable");
    Ok(())
}

async fn bootstrap(arguments: Bootstrap) -> Result<(), Failure> {
    let Bootstrap { dir, domain } = arguments;
    let now = crate::server::system_clock();
    let made = tokio::task::spawn_blocking(move || {
        let store = Store::open(&dir)?;
        store.bootstrap(&domain, now)?;
        info!(directory = %dir.display(), %domain, "made new root keys; back up root-ca.key and root-k256.key");
        Ok::<_, store::Error>(())
    });
    made.await.map_err(|error| Failure::new(Exit::Internal, error))?.map_err(store_failure)
}

fn load(file: Option<PathBuf>) -> Result<Loaded, Failure> {
    Config::load(file.as_deref()).map_err(|error| Failure::new(Exit::Usage, error))
}

fn start_failure(error: StartError) -> Failure {
    match error {
        StartError::Store(error) => store_failure(error),
        StartError::Authoriser(_) | StartError::Audit(_) | StartError::Trust(_) => {
            Failure::new(Exit::Usage, error)
        }
        StartError::NotAllowed(own) | StartError::OwnEvidence(own) => own_failure(own),
        other => Failure::new(Exit::Internal, other),
    }
}

/// This machine cannot show what it is, or is not wanted.
fn own_failure(error: crate::own::Error) -> Failure {
    let hint = match &error {
        crate::own::Error::Agent(_) => {
            "outside of a confidential VM there is no guest agent: set core.enforce_self_authorization and \
             core.attest_rpc_cert to false there"
        }
        crate::own::Error::Evidence(_) => "see core.attestation for the roots and the collateral service",
        crate::own::Error::Refused(_) => "register this machine's measurements with the authoriser",
    };
    Failure::new(Exit::Refused, error).with_hint(hint)
}

fn store_failure(error: store::Error) -> Failure {
    match &error {
        store::Error::NotBootstrapped { path } => {
            let hint = format!("run `kms-server bootstrap --dir {} --domain NAME`", path.display());
            Failure::new(Exit::Usage, error).with_hint(hint)
        }
        store::Error::AlreadyBootstrapped { .. }
        | store::Error::HalfRoots { .. }
        | store::Error::Orphan { .. }
        | store::Error::Conflict { .. }
        | store::Error::Mismatch { .. } => Failure::new(Exit::Refused, error),
        store::Error::Locked { .. } => {
            Failure::new(Exit::Internal, error).with_hint("stop the other KMS that uses this directory")
        }
        _ => Failure::new(Exit::Internal, error),
    }
}
