//! `keyferry host`: the EC2 host of an enclave. All of it lives in the crate `cloud-provisioners`.

use command_line::{Exit, Failure};

pub(crate) use cloud_provisioners::command::host::Command;

/// Runs a command of `keyferry host`.
pub(crate) async fn run(command: Command) -> Result<Exit, Failure> {
    cloud_provisioners::command::host::run(command).await?;
    Ok(Exit::Done)
}
