//! `keyferry-chain`: the same commands as `keyferry chain`.

#![forbid(unsafe_code)]

use std::io::{BufWriter, stdout};
use std::process::ExitCode;

use clap::Parser;
use command_line::logs::{LogFormat, install};

/// Registration and authorisation on the dstack contracts.
#[derive(Parser)]
#[command(name = "keyferry-chain", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: chain::command::Command,
}

fn main() -> ExitCode {
    install(LogFormat::Text, "warn");
    match chain::command::run(Arguments::parse().command, &mut BufWriter::new(stdout())) {
        Ok(exit) => exit.into(),
        Err(failure) => failure.report(),
    }
}
