//! `kms-server`: a KMS that interoperates with dstack-kms.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use command_line::{Exit, Failure};

/// A KMS that interoperates with dstack-kms
#[derive(Parser)]
#[command(name = "kms-server", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: kms_server::command::Command,
    /// Logs as JSON, one object a line
    #[arg(long, global = true)]
    log_json: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let format =
        if cli.log_json { command_line::logs::LogFormat::Json } else { command_line::logs::LogFormat::Text };
    command_line::logs::install(format, "info");
    match run(cli.command) {
        Ok(()) => Exit::Done.into(),
        Err(failure) => failure.report(),
    }
}

fn run(command: kms_server::command::Command) -> Result<(), Failure> {
    let internal = |error| Failure::new(Exit::Internal, error);
    let runtime = tokio::runtime::Runtime::new().map_err(internal)?;
    runtime.block_on(async {
        let shutdown = command_line::signals::stop_token().map_err(internal)?;
        kms_server::command::run(command, shutdown).await
    })
}
