//! The agent's command line, for its own program and for others that offer the same subcommands.

pub mod attest;
pub mod get_keys;
pub mod init;
pub mod serve;

use clap::Subcommand;
use command_line::Failure;

/// The agent's subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Prove this enclave to a dstack KMS and fetch the app's keys
    GetKeys(get_keys::Arguments),
    /// Fetch the keys of an image's measured configuration and run its app, as the image's init does
    ///
    /// As the kernel's first process, the program does this by itself, mounts what programs expect and restarts the
    /// machine at the end. This command is for images with another init, and for trying a configuration.
    Init(init::Arguments),
    /// Fetch the app's keys, hand them out and keep them new, until stopped
    Serve(serve::Arguments),
    /// Print an attestation of this enclave for given report data
    Attest(attest::Arguments),
}

/// Runs a subcommand; the answer goes to standard output.
///
/// # Errors
/// A [`Failure`] with its exit code and, where the next step is known, a hint.
pub async fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::GetKeys(arguments) => get_keys::run(arguments).await,
        Command::Init(arguments) => init::run(arguments).await,
        Command::Serve(arguments) => serve::run(arguments).await,
        Command::Attest(arguments) => attest::run(arguments).await,
    }
}
