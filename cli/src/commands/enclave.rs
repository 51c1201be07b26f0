//! `keyferry enclave`: runs enclave images on this machine.

mod background;
pub(super) mod image;
mod manage;
pub(super) mod run;

use std::io::{self, Write};
use std::time::Duration;

use clap::Subcommand;
use command_line::{Exit, Failure};
use enclave_vm::{Error, Registry};

/// Enclave images in a local virtual machine.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Boot an enclave image in a virtual machine, with an NSM that signs under a local root.
    ///
    /// The console goes to standard output. Connections of the guest to CID 2, port P, arrive at a Unix socket, the
    /// --vsock path followed by _P, where host-proxy can listen. Ends with the guest: as its init says on the console
    /// (keyferry: exit N: reason), else 0 when it restarted or halted, 1 when its kernel panicked or the machine broke,
    /// 4 when it did not come up or was not done in time.
    #[command(after_help = "Examples:
  keyferry enclave run app.eif --root-dir nsm
  keyferry enclave run app.eif --root-dir nsm --vsock \"$PWD/v\" --timeout 300
  keyferry enclave run app.eif --machine nitro-enclave")]
    Run(Box<run::Run>),
    /// Make the root that local security modules sign under, and print the path of its certificate.
    ///
    /// `keyferry enclave run --root-dir` signs under it, and a verifier that is to believe those documents takes the
    /// certificate as its trust anchor. A root that is there already stays.
    Root(manage::Root),
    /// Show what an enclave wrote to its console, and with --follow what it writes until it ends.
    Console(manage::Console),
    /// List the enclaves that run. Removes what is left of those whose runner was killed.
    List(manage::List),
    /// End an enclave and remove all that belongs to it.
    Stop(manage::Stop),
}

/// Carries out `command`. What was asked for goes to `stdout`, everything else to `stderr`.
pub(crate) fn run(
    command: Command,
    stdout: &mut impl Write,
    stderr: &mut impl Write,
) -> Result<Exit, Failure> {
    match command {
        Command::Run(arguments) => run::run(*arguments, stdout, stderr),
        Command::Root(arguments) => manage::root(&arguments, stdout),
        Command::Console(arguments) => manage::console(&arguments, &registry(), stdout),
        Command::List(arguments) => manage::list(&arguments, &registry(), stdout),
        Command::Stop(arguments) => manage::stop(&arguments, &registry(), stdout),
    }
}

pub(super) fn registry() -> Registry {
    Registry::in_environment(std::env::var_os("XDG_RUNTIME_DIR").as_deref())
}

/// How a failure of the library ends the command.
pub(super) fn failure(error: Error) -> Failure {
    let exit = match &error {
        Error::Machine(_)
        | Error::Name { .. }
        | Error::Exists { .. }
        | Error::Unknown { .. }
        | Error::Path { .. } => Exit::Usage,
        Error::NoAnswer { .. } | Error::NotYet { .. } => Exit::NoAnswer,
        Error::Ended { ending } => run::exit_of(ending),
        _ => Exit::Internal,
    };
    let hint = error.hint();
    let failure = Failure::new(exit, error);
    match hint {
        Some(hint) => failure.with_hint(hint),
        None => failure,
    }
}

/// A failure to write the answer. A reader that has gone away has seen enough.
fn write_failure(error: io::Error) -> Result<Exit, Failure> {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Ok(Exit::Done),
        _ => Err(Failure::new(Exit::Internal, error)),
    }
}

/// Seconds as people write them on a command line.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: u64 = text.parse().map_err(|_| "expected a number of seconds".to_owned())?;
    if (1..=31_536_000).contains(&seconds) {
        Ok(Duration::from_secs(seconds))
    } else {
        Err("expected 1 second to one year".to_owned())
    }
}
