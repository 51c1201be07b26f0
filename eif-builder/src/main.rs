//! The `eif-builder` command.

use std::io::{ErrorKind, Write};
use std::process::ExitCode;
use std::time::UNIX_EPOCH;

use clap::Parser;
use eif_builder::cli::{Command, Io, run};
use eif_builder::{Error, exit};

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
    let mut out = std::io::stdout().lock();
    let mut err = std::io::stderr().lock();
    let result = run(&cli.command, &mut Io { out: &mut out, err: &mut err, now })
        .and_then(|()| out.flush().map_err(exit::answer_not_taken));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads the answer may stop early.
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing is left to tell when even this cannot be written.
            let _ = exit::explain(&error, &mut err);
            ExitCode::from(error.exit_code())
        }
    }
}
