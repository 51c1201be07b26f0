//! `keyferry chain`: registration and authorisation on the dstack contracts. All of it lives in the crate `chain`.

use std::io::{BufWriter, stdout};

use command_line::logs::{LogFormat, install};
use command_line::{Exit, Failure};

pub(crate) use chain::command::Command;

/// Runs a command of `keyferry chain`.
pub(crate) fn run(command: Command) -> Result<Exit, Failure> {
    install(LogFormat::Text, "warn");
    chain::command::run(command, &mut BufWriter::new(stdout()))
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::Command;

    #[derive(Parser)]
    struct Arguments {
        #[command(subcommand)]
        _command: Command,
    }

    #[test]
    fn the_arguments_do_not_contradict_each_other() {
        Arguments::command().debug_assert();
    }

    /// A secret in the argument list is visible to every user of the machine.
    #[test]
    fn no_argument_takes_a_key_or_a_password() {
        let command = Arguments::command();
        let arguments = command.get_subcommands().flat_map(|it| it.get_arguments());
        let secret = |name: &str| ["private-key", "key", "password", "mnemonic"].contains(&name);
        let mut named = arguments.filter_map(|it| it.get_long());
        assert_eq!(named.find(|it| secret(it)), None);
    }
}
