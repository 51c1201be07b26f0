//! `nsm-emulator`: a Nitro Security Module behind a socket.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use command_line::{Exit, Failure};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

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
        let shutdown = CancellationToken::new();
        let mut terminate = signal(SignalKind::terminate()).map_err(internal)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(internal)?;
        let stop = shutdown.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            stop.cancel();
        });
        nsm_emulator::command::run(arguments, shutdown).await
    })
}
