//! `keyferry chain`: arguments, and what is printed.
//!
//! `docs/chain.md` maps the Hardhat tasks to these commands. There is no `kms:upgrade`: an upgrade replaces the rules
//! everybody relies on, and belongs into the tool that checks storage layouts.

mod args;
mod local;
mod reading;
mod writing;

use std::env;
use std::io::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use command_line::{Exit, Failure};

pub use args::Command;

#[cfg(any(feature = "aws-kms", feature = "gcp-kms"))]
use crate::keys::KeyServiceError;
use crate::rpc::{Endpoints, Limits};
use crate::{Error, Result};

/// Version of the JSON documents printed.
const JSON_VERSION: u8 = 1;

/// Runs a command to its end. `out` gets the answer.
///
/// # Errors
/// Everything the command could not do, with the exit code for it.
pub fn run(command: Command, out: &mut dyn Write) -> Result<Exit, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|error| Failure::new(Exit::Internal, error))?;
    runtime.block_on(async {
        tokio::select! {
            done = dispatch(command, out) => done,
            _ = tokio::signal::ctrl_c() => Ok(Exit::Interrupted),
        }
    })
}

async fn dispatch(command: Command, out: &mut dyn Write) -> Result<Exit, Failure> {
    match command {
        Command::Status(it) => reading::status(it, out).await,
        Command::Explain(it) => reading::explain(it, out).await,
        Command::Watch(it) => reading::watch(it, out).await,
        Command::Doctor(it) => reading::doctor(it, out).await,
        Command::Local(it) => local::run(it, out).await,
        write => writing::run(write, out).await,
    }
}

/// Seconds since 1970.
#[expect(
    clippy::disallowed_methods,
    reason = "this is the outermost layer; below it the clock is an argument"
)]
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn endpoints(network: &args::Network) -> Result<Endpoints> {
    let count = network.rpc_url.len();
    if count == 0 {
        return Err(Error::Usage("no endpoint; give --rpc-url, or set RPC_URL".to_owned()));
    }
    let limits = Limits { deadline: Duration::from_secs(network.timeout), ..Limits::default() };
    let endpoints = Endpoints::new(&network.rpc_url, network.agree.unwrap_or(count / 2 + 1), limits, now)?;
    let endpoints = endpoints.with_max_head_age(Duration::from_secs(network.max_head_age));
    Ok(match network.chain_id {
        Some(id) => endpoints.on_chain(id),
        None => endpoints,
    })
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let exit = exit_of(&error);
        let hint = error.hint();
        let failure = Failure::new(exit, error);
        match hint {
            Some(hint) => failure.with_hint(hint),
            None => failure,
        }
    }
}

fn exit_of(error: &Error) -> Exit {
    match error {
        Error::Usage(_)
        | Error::Danger { .. }
        | Error::Key { .. }
        | Error::EndpointAddress { .. }
        | Error::Agreement { .. }
        | Error::Artifact { .. }
        | Error::BootInfo { .. } => Exit::Usage,
        Error::Reverted { .. }
        | Error::Failed { .. }
        | Error::FeeCap { .. }
        | Error::NoBaseFee { .. }
        | Error::Funds { .. }
        | Error::ForeignPending { .. }
        | Error::WrongChain { .. }
        | Error::Stale { .. }
        | Error::Disagreement { .. }
        | Error::Proof { .. }
        | Error::NoContract { .. }
        | Error::Replaced { .. } => Exit::Refused,
        Error::TooFewAnswers { first, .. } => exit_of(first),
        Error::NotConfirmed { .. } => Exit::NoAnswer,
        #[cfg(any(feature = "aws-kms", feature = "gcp-kms"))]
        Error::KeyService(error) => match error {
            KeyServiceError::NoAnswer { .. } | KeyServiceError::Unreachable { .. } => Exit::NoAnswer,
            KeyServiceError::Malformed { .. } => Exit::Internal,
            _ => Exit::Refused,
        },
        other if other.is_transient() => Exit::NoAnswer,
        _ => Exit::Internal,
    }
}

fn printed(result: std::io::Result<()>) -> Result<Exit, Failure> {
    match result {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::new(Exit::Internal, error))
        }
        _ => Ok(Exit::Done),
    }
}

fn print_json(out: &mut dyn Write, mut document: serde_json::Value) -> std::io::Result<()> {
    document["version"] = JSON_VERSION.into();
    writeln!(out, "{document}")?;
    out.flush()
}

fn variable(name: &str) -> Option<std::ffi::OsString> {
    env::var_os(name)
}
