//! The `eif-builder` command.

use std::process::ExitCode;
use std::time::UNIX_EPOCH;

use clap::Parser;
use eif_builder::cli::{Command, run_here};

/// Build, measure and inspect AWS Nitro enclave images: reproducibly, without Docker, AWS or root.
#[derive(Parser)]
#[command(name = "eif-builder", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    #[expect(clippy::disallowed_methods, reason = "the outermost layer reads the clock once")]
    let now = std::time::SystemTime::now();
    let now =
        now.duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX));
    match run_here(&cli.command, now) {
        Ok(exit) => exit.into(),
        Err(failure) => failure.report(),
    }
}
