//! `enclave-agent`: attested keys for what runs in an enclave.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use command_line::{Exit, Failure};
use enclave_agent::command::{self, Command};
use zeroizing_alloc::ZeroAlloc;

/// Wipes all memory when it is freed: TLS, HTTP and JSON leave parts of the keys in buffers that nobody else wipes.
#[global_allocator]
static ALLOCATOR: ZeroAlloc<std::alloc::System> = ZeroAlloc(std::alloc::System);

/// Attested keys for what runs in an enclave
#[derive(Parser)]
#[command(name = "enclave-agent", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

fn main() -> ExitCode {
    // The kernel gives its first process the words of its command line that it does not know itself: no arguments.
    if enclave_agent::init::is_first_process() {
        return enclave_agent::init::first_process();
    }
    let command = Cli::parse().command;
    match run(command) {
        Ok(()) => Exit::Done.into(),
        Err(failure) => failure.report(),
    }
}

fn run(command: Command) -> Result<(), Failure> {
    enclave_agent::forbid_core_dumps().map_err(|error| Failure::new(Exit::Internal, error))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Exit::Internal, error))?;
    let result = runtime.block_on(async {
        if let Command::Init(_) = &command {
            // Signals are for the app.
            return command::run(command).await;
        }
        tokio::select! {
            result = command::run(command) => result,
            _ = tokio::signal::ctrl_c() => Err(Failure::new(Exit::Interrupted, "interrupted")),
        }
    });
    // A module that hangs, or a resolver, holds a thread that cannot be ended; the process ends all the same.
    runtime.shutdown_timeout(Duration::ZERO);
    result
}
