//! `nsm-emulator`: a Nitro Security Module behind a socket.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use command_line::{Exit, Failure};

/// Emulates a Nitro Security Module that signs under a local root
#[derive(Parser)]
#[command(name = "nsm-emulator", version)]
struct Cli {
    #[command(flatten)]
    arguments: nsm_emulator::command::Arguments,
}

fn main() -> ExitCode {
    let arguments = Cli::parse().arguments;
    command_line::logs::install(command_line::logs::LogFormat::Text, "info");
    match run(arguments) {
        Ok(()) => Exit::Done.into(),
        Err(failure) => failure.report(),
    }
}

fn run(arguments: nsm_emulator::command::Arguments) -> Result<(), Failure> {
    let internal = |error| Failure::new(Exit::Internal, error);
    let runtime = tokio::runtime::Runtime::new().map_err(internal)?;
    runtime.block_on(async {
        let shutdown = command_line::signals::stop_token().map_err(internal)?;
        nsm_emulator::command::run(arguments, shutdown).await
    })
}
