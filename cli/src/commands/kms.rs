//! `keyferry kms`: a KMS on this machine, and the machines one runs on.

use clap::Subcommand;
use command_line::{Exit, Failure};

/// Run a KMS, or stand one up on a Confidential VM
#[derive(Subcommand)]
pub(crate) enum Command {
    #[command(flatten)]
    Server(kms_server::command::Command),
    #[command(flatten)]
    Machine(cloud_provisioners::command::Command),
}

/// Runs a command of `keyferry kms`.
pub(crate) async fn run(command: Command) -> Result<Exit, Failure> {
    match command {
        Command::Server(command) => {
            let stop = command_line::signals::stop_token();
            let stop = stop.map_err(|error| Failure::new(Exit::Internal, error))?;
            kms_server::command::run(command, stop).await?;
        }
        Command::Machine(command) => cloud_provisioners::command::run(command).await?,
    }
    Ok(Exit::Done)
}
