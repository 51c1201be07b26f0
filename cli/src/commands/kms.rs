//! `keyferry kms`: a KMS on this machine, and the machines one runs on.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use attestation::UnixMillis;
use clap::{Parser, Subcommand};
use cloud_provisioners::bring_up::{Cause, Measured, Pending, Registrar, Verifier};
use cloud_provisioners::command::Surroundings;
use command_line::{Exit, Failure};
use kms_protocol::wire::webhook::BootInfo;
use kms_server::Config;
use kms_server::verify::Judge;

/// Run a KMS, or stand one up on a Confidential VM
#[derive(Subcommand)]
pub(crate) enum Command {
    #[command(flatten)]
    Server(kms_server::command::Command),
    #[command(flatten)]
    Machine(Box<cloud_provisioners::command::Command>),
}

/// Runs a command of `keyferry kms`.
pub(crate) async fn run(command: Command) -> Result<Exit, Failure> {
    match command {
        Command::Server(command) => {
            let stop = command_line::signals::stop_token();
            let stop = stop.map_err(|error| Failure::new(Exit::Internal, error))?;
            kms_server::command::run(command, stop).await?;
        }
        Command::Machine(command) => cloud_provisioners::command::run(*command, &Here).await?,
    }
    Ok(Exit::Done)
}

/// This program: it has both the code that verifies evidence and the one that writes to chains.
struct Here;

impl Surroundings for Here {
    fn verifier(&self, trust: Option<&Path>) -> Result<Box<dyn Verifier>, Failure> {
        let loaded = Config::load(trust).map_err(|error| Failure::new(Exit::Usage, error))?;
        let judge = Judge::new(loaded.config.trust).map_err(|error| Failure::new(Exit::Usage, error))?;
        Ok(Box::new(Attestations(judge)))
    }

    fn registrar(&self, yes: bool) -> Box<dyn Registrar> {
        Box::new(Contract { yes })
    }
}

struct Attestations(Judge);

impl Verifier for Attestations {
    fn evidence<'a>(
        &'a self,
        encoded: &'a [u8],
        report_data: [u8; 64],
    ) -> Pending<'a, Result<BootInfo, Cause>> {
        Box::pin(async move { Ok(self.0.evidence(encoded, report_data, now()).await?) })
    }

    fn certificate<'a>(&'a self, der: &'a [u8]) -> Pending<'a, Result<Option<BootInfo>, Cause>> {
        Box::pin(async move { Ok(self.0.certificate(der, now()).await?) })
    }
}

#[expect(clippy::disallowed_methods, reason = "the outermost layer reads the clock")]
fn now() -> UnixMillis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMillis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// The KMS contract, written to by the very commands of `keyferry chain`, so that plan, journal and signers are theirs.
struct Contract {
    yes: bool,
}

#[derive(Parser)]
struct ChainLine {
    #[command(subcommand)]
    command: chain::command::Command,
}

impl Contract {
    fn write(yes: bool, name: &str, value: &str) -> Result<(), Cause> {
        let line = ["keyferry chain", name, value].into_iter().chain(yes.then_some("--yes"));
        let ChainLine { command } = ChainLine::try_parse_from(line)?;
        // Standard output is for the answer of the command that registers on the way.
        let mut told = Vec::new();
        let done = chain::command::run(command, &mut told);
        for line in String::from_utf8_lossy(&told).lines() {
            tracing::info!("{line}");
        }
        match done {
            Ok(Exit::Done) => Ok(()),
            Ok(_) => Err(format!("{name} was interrupted").into()),
            Err(failure) => Err(failure.to_string().trim_start_matches("error: ").into()),
        }
    }
}

impl Registrar for Contract {
    fn register<'a>(&'a self, measured: &'a Measured) -> Pending<'a, Result<bool, Cause>> {
        Box::pin(async move {
            let (yes, values) = (self.yes, measured.registrations());
            let work = move || values.iter().try_for_each(|(name, value)| Self::write(yes, name, value));
            // The commands bring a runtime of their own.
            tokio::task::spawn_blocking(work).await??;
            Ok(true)
        })
    }
}
