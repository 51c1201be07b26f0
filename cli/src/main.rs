//! `keyferry`: one command for the whole trip.

#![forbid(unsafe_code)]

use std::io::{self, BufWriter};
use std::process::ExitCode;

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
    #[command(subcommand)]
    Attestation(commands::attestation::Command),
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(exit) => exit.into(),
        Err(failure) => failure.report(),
    }
}

fn run(command: Command) -> Result<Exit, Failure> {
    match command {
        Command::Attestation(command) => {
            commands::attestation::run(command, &mut BufWriter::new(io::stdout().lock()), &mut io::stderr())
        }
    }
}
