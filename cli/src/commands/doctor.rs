//! `keyferry doctor`: what stands in the way of a machine.

use clap::Subcommand;
use command_line::{Exit, Failure};

/// Look at a machine before something is put on it: what is missing, why, and what to do
#[derive(Subcommand)]
pub(crate) enum Command {
    TdxHost(cloud_provisioners::doctor::command::TdxHost),
}

/// Runs a command of `keyferry doctor`.
pub(crate) async fn run(command: Command) -> Result<Exit, Failure> {
    match command {
        Command::TdxHost(arguments) => cloud_provisioners::doctor::command::tdx_host(arguments).await?,
    }
    Ok(Exit::Done)
}
