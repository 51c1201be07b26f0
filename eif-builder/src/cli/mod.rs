//! The commands, shared by the `eif-builder` binary and the `keyferry eif` noun.

mod args;
mod build;
mod inspect;
mod measure;
mod pack;
mod report;
mod sign;

use std::io::{self, ErrorKind, Write};

pub use args::*;

use command_line::{Exit, Failure};

use crate::Error;

/// What a command may talk to, beside the files it is given.
pub struct Io<'a> {
    /// The answer goes here.
    pub out: &'a mut dyn Write,
    /// Warnings and progress go here.
    pub err: &'a mut dyn Write,
    /// Seconds since the epoch, for the validity of certificates. Never reaches an image.
    pub now: i64,
}

impl std::fmt::Debug for Io<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Io").field("now", &self.now).finish_non_exhaustive()
    }
}

/// Runs a command on the process's own streams. `now` is in seconds since the epoch.
///
/// # Errors
/// [`Failure`] with the exit code and, where one is known, the next step.
pub fn run_here(command: &Command, now: i64) -> Result<Exit, Failure> {
    end_on_interrupt().map_err(|error| Failure::new(Exit::Internal, error))?;
    let (mut out, mut err) = (io::stdout().lock(), io::stderr().lock());
    let taken = |source| Error::Io { action: "write", object: "the answer".into(), source };
    let result = run(command, &mut Io { out: &mut out, err: &mut err, now });
    match result.and_then(|()| out.flush().map_err(taken)) {
        Ok(()) => Ok(Exit::Done),
        // Whoever reads the answer may stop early.
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::BrokenPipe => Ok(Exit::Done),
        Err(error) => Err(failure(error)),
    }
}

/// SIGINT and SIGTERM end the program without leaving temporary files behind. Images have their final name only when
/// they are complete, so there is nothing else to tidy up.
fn end_on_interrupt() -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let stop = runtime.block_on(async { command_line::signals::stop_token() })?;
    std::thread::spawn(move || {
        runtime.block_on(stop.cancelled());
        crate::scratch::sweep();
        std::process::exit(Exit::Interrupted.code().into())
    });
    Ok(())
}

fn failure(error: Error) -> Failure {
    let (exit, hint) = (error.exit(), error.hint());
    let failure = Failure::new(exit, error);
    match hint {
        Some(hint) => failure.with_hint(hint),
        None => failure,
    }
}

/// Runs a command.
///
/// # Errors
/// See [`Error::exit`] for what they mean to a caller.
pub fn run(command: &Command, io: &mut Io<'_>) -> Result<(), Error> {
    match command {
        Command::Measure(args) => measure::run(args, io),
        Command::Build(args) => build::run(args, io),
        Command::Init(args) => build::init(args, io),
        Command::Lock(args) => build::lock(args, io),
        Command::Pack(args) => pack::run(args, io),
        Command::Describe(args) => inspect::describe(args, io),
        Command::Verify(args) => inspect::verify(args, io),
        Command::Extract(args) => inspect::extract(args, io),
        Command::Diff(args) => inspect::diff(args, io),
        Command::Sign(args) => sign::run(args, io),
        Command::Strip(args) => sign::strip(args, io),
    }
}
