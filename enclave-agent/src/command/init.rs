//! `init`: what the first process of an image does, on a system that somebody else prepared.

use std::path::PathBuf;

use clap::Args;
use command_line::Failure;
use tokio::task::spawn_blocking;

use super::get_keys::internal;
use crate::init::{self, Enclave, InitError, Parent, Role};
use crate::nsm::NsmSource;

/// Arguments of `init`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  Under another init, with the image's own configuration:
    enclave-agent init
  A configuration tried outside an enclave, with stand-ins for the module and for the parent's ports:
    enclave-agent init --config agent.toml --process process.json --nsm unix:/tmp/nsm.sock --parent unix:/tmp/v \\
        --run-dir /tmp/run")]
pub struct Arguments {
    /// The agent's measured configuration
    #[arg(long, value_name = "FILE", default_value = crate::config::PATH)]
    pub config: PathBuf,
    /// What to run
    #[arg(long, value_name = "FILE", default_value = init::PROCESS_PATH)]
    pub process: PathBuf,
    /// Security module: /dev/nsm, or unix:PATH of a stand-in
    #[arg(long, value_name = "NSM", default_value = "/dev/nsm")]
    pub nsm: NsmSource,
    /// The parent: vsock:CID, or unix:PATH for sockets PATH_PORT
    #[arg(long, value_name = "PARENT", default_value = "vsock:3")]
    pub parent: Parent,
    /// Directory for what lives only as long as the app
    #[arg(long, value_name = "DIRECTORY", default_value = "/run")]
    pub run_dir: PathBuf,
}

/// Runs the app until it ends.
///
/// # Errors
/// A [`Failure`] with its exit code.
pub async fn run(arguments: Arguments) -> Result<(), Failure> {
    let Arguments { config, process, nsm, parent, run_dir } = arguments;
    let failure = |error: InitError| Failure::new(error.exit(), error);
    let enclave =
        spawn_blocking(move || Enclave::read(&config, &process, nsm, parent)).await.map_err(internal)?;
    init::run(enclave.map_err(failure)?, Role::Guest(run_dir)).await.map_err(failure)
}
