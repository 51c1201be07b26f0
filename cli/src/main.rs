//! `keyferry`: one command for the whole trip.

#![forbid(unsafe_code)]

use std::future::Future;
use std::io::{self, BufWriter};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::{Parser, Subcommand};
use command_line::{Exit, Failure};

mod commands;

/// Carries application keys from a dstack KMS into AWS Nitro Enclaves.
#[derive(Parser)]
#[command(name = "keyferry", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show the whole trip on this machine: KMS, proxy, agent, and three refusals
    Demo(commands::demo::Arguments),
    /// Prove this enclave to a dstack KMS and fetch the app's keys; with --project, boot the enclave for it here
    GetKeys(commands::get_keys::Arguments),
    #[command(subcommand)]
    Attestation(commands::attestation::Command),
    /// Register images and apps on the dstack contracts, and see what they decide
    #[command(subcommand)]
    Chain(commands::chain::Command),
    /// Build, measure and inspect enclave images
    #[command(subcommand)]
    Eif(eif_builder::cli::Command),
    #[command(subcommand)]
    Kms(commands::kms::Command),
    KmsImage(commands::kms_image::Arguments),
    #[command(subcommand)]
    Doctor(commands::doctor::Command),
    #[command(subcommand)]
    Enclave(commands::enclave::Command),
    /// Stand up the EC2 host of an enclave, make it ready, look into it, and take it down
    #[command(subcommand)]
    Host(commands::host::Command),
    #[command(subcommand)]
    Keys(commands::keys::Command),
    /// Run the enclave's way out on its parent
    Proxy(host_proxy::args::HostProxy),
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(exit) => exit.into(),
        Err(failure) => failure.report(),
    }
}

fn run(command: Command) -> Result<Exit, Failure> {
    match command {
        Command::Demo(arguments) => block_on(commands::demo::run(arguments)),
        Command::GetKeys(arguments) => block_on(commands::get_keys::run(arguments)),
        Command::Attestation(command) => {
            commands::attestation::run(command, &mut BufWriter::new(io::stdout().lock()), &mut io::stderr())
        }
        Command::Doctor(command) => {
            command_line::logs::install(command_line::logs::LogFormat::Text, "warn");
            block_on(commands::doctor::run(command))
        }
        Command::Enclave(command) => {
            command_line::logs::install(command_line::logs::LogFormat::Text, "warn");
            commands::enclave::run(command, &mut io::stdout(), &mut io::stderr())
        }
        Command::Host(command) => {
            command_line::logs::install(command_line::logs::LogFormat::Text, "warn,cloud_provisioners=info");
            block_on(commands::host::run(command))
        }
        Command::Keys(command) => commands::keys::run(command),
        Command::Chain(command) => commands::chain::run(command),
        Command::Eif(command) => {
            #[expect(clippy::disallowed_methods, reason = "the outermost layer reads the clock once")]
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            eif_builder::cli::run_here(&command, i64::try_from(now.as_secs()).unwrap_or(i64::MAX))
        }
        Command::KmsImage(arguments) => commands::kms_image::run(arguments),
        Command::Kms(command) => {
            command_line::logs::install(command_line::logs::LogFormat::Text, "info");
            block_on(commands::kms::run(command))
        }
        Command::Proxy(arguments) => {
            command_line::logs::install(arguments.run.log_format.into(), "info");
            host_proxy::run(arguments)
        }
    }
}

fn block_on(work: impl Future<Output = Result<Exit, Failure>>) -> Result<Exit, Failure> {
    let runtime = tokio::runtime::Runtime::new().map_err(|error| Failure::new(Exit::Internal, error))?;
    runtime.block_on(work)
}
