//! `keyferry host`: the EC2 host of an enclave. All of it lives in the crate `cloud-provisioners`.

use clap::Subcommand;
use cloud_provisioners::command::{host, host_access};
use command_line::{Exit, Failure};

/// What is done through EC2, and what over SSH.
#[derive(Subcommand)]
pub(crate) enum Command {
    #[command(flatten)]
    Machine(host::Command),
    #[command(flatten)]
    Access(host_access::Command),
}

/// Runs a command of `keyferry host`.
pub(crate) async fn run(command: Command) -> Result<Exit, Failure> {
    match command {
        Command::Machine(command) => host::run(command).await.map(|()| Exit::Done),
        Command::Access(command) => host_access::run(command, host_proxy::UNIT).await,
    }
}
