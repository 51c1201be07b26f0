//! `keyferry`: one command for the whole trip.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::exit::Exit;

mod commands;
mod exit;

/// Carries application keys from a dstack KMS into AWS Nitro Enclaves.
#[derive(Parser)]
#[command(name = "keyferry", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {}

#[expect(clippy::print_stderr, reason = "the last word on an error goes to the terminal")]
fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments.command) {
        Ok(exit) => exit.into(),
        Err(error) => {
            eprintln!("error: {error:#}");
            Exit::Internal.into()
        }
    }
}

fn run(command: Command) -> anyhow::Result<Exit> {
    match command {}
}
