//! `keyferry enclave console`, `list` and `stop`.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use command_line::{Exit, Failure};
use enclave_vm::{EnclaveState, Error, Name, PlainText, Registry};
use nsm_emulator::LocalRoot;
use serde::Serialize;

/// Between two looks at a console that is followed.
const LOOK: Duration = Duration::from_millis(100);

/// Arguments of `keyferry enclave console`.
#[derive(Args, Debug)]
pub(crate) struct Console {
    /// Name of the enclave.
    name: Name,
    /// Go on until the enclave ends.
    #[arg(long, short)]
    follow: bool,
}

/// Arguments of `keyferry enclave list`.
#[derive(Args, Debug)]
pub(crate) struct List {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Arguments of `keyferry enclave stop`.
#[derive(Args, Debug)]
pub(crate) struct Stop {
    /// Name of the enclave.
    name: Name,
    /// How long its runner has before it is killed.
    #[arg(long, value_name = "SECONDS", default_value = "20", value_parser = super::seconds)]
    grace: Duration,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Arguments of `keyferry enclave root`.
#[derive(Args, Debug)]
pub(crate) struct Root {
    /// Where certificate and key are kept: root.pem and root-key.pem.
    directory: PathBuf,
}

/// What `list --json` prints.
#[derive(Serialize)]
struct Listing<'a> {
    version: u8,
    enclaves: &'a [EnclaveState],
}

/// What `stop --json` prints.
#[derive(Serialize)]
struct Stopped<'a> {
    version: u8,
    stopped: &'a Name,
}

pub(super) fn root(arguments: &Root, stdout: &mut impl Write) -> Result<Exit, Failure> {
    LocalRoot::open(&arguments.directory).map_err(|error| Failure::new(Exit::Internal, error))?;
    let written = writeln!(stdout, "{}", arguments.directory.join("root.pem").display());
    written.map_or_else(super::write_failure, |()| Ok(Exit::Done))
}

pub(super) fn list(arguments: &List, registry: &Registry, stdout: &mut impl Write) -> Result<Exit, Failure> {
    let enclaves = registry.list().map_err(super::failure)?;
    let written = if arguments.json {
        json(stdout, &Listing { version: 1, enclaves: &enclaves })
    } else {
        table(stdout, &enclaves)
    };
    written.map_or_else(super::write_failure, |()| Ok(Exit::Done))
}

pub(super) fn stop(arguments: &Stop, registry: &Registry, stdout: &mut impl Write) -> Result<Exit, Failure> {
    registry.stop(&arguments.name, arguments.grace).map_err(super::failure)?;
    let written = if arguments.json {
        json(stdout, &Stopped { version: 1, stopped: &arguments.name })
    } else {
        writeln!(stdout, "stopped {}", arguments.name)
    };
    written.map_or_else(super::write_failure, |()| Ok(Exit::Done))
}

pub(super) fn console(
    arguments: &Console,
    registry: &Registry,
    stdout: &mut impl Write,
) -> Result<Exit, Failure> {
    let state = registry.find(&arguments.name).map_err(super::failure)?;
    let mut shown = Shown::open(&state.console)?;
    let mut result = shown.copy(stdout);
    if arguments.follow && result.is_ok() {
        result = follow(&state, registry, &mut shown, stdout)?;
    }
    result.and_then(|()| stdout.flush()).map_or_else(super::write_failure, |()| Ok(Exit::Done))
}

/// Copies until the enclave has ended.
fn follow(
    state: &EnclaveState,
    registry: &Registry,
    shown: &mut Shown,
    stdout: &mut impl Write,
) -> Result<io::Result<()>, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let runtime = runtime.map_err(|error| Failure::new(Exit::Internal, error))?;
    loop {
        // In this order: what the enclave wrote before it ended is still read.
        let ended = match registry.find(&state.name) {
            Ok(now) => now.pid != state.pid,
            Err(Error::Unknown { .. }) => true,
            Err(error) => return Err(super::failure(error)),
        };
        if let Err(error) = shown.copy(stdout).and_then(|()| stdout.flush()) {
            return Ok(Err(error));
        }
        if ended {
            return Ok(Ok(()));
        }
        runtime.block_on(async { tokio::time::sleep(LOOK).await });
    }
}

/// A console file that is read as it grows, and that may be started anew in between.
struct Shown {
    path: std::path::PathBuf,
    file: File,
    text: PlainText,
}

impl Shown {
    fn open(path: &Path) -> Result<Self, Failure> {
        let file = File::open(path).map_err(|source| {
            super::failure(Error::File { action: "read", path: path.to_owned(), source })
        })?;
        Ok(Self { path: path.to_owned(), file, text: PlainText::default() })
    }

    /// Copies what is there now.
    fn copy(&mut self, stdout: &mut impl Write) -> io::Result<()> {
        self.copy_rest(stdout)?;
        // A file that was full has been renamed; what is at its path now goes on where it ended.
        match File::open(&self.path) {
            Ok(now) if now.metadata()?.ino() != self.file.metadata()?.ino() => {
                self.copy_rest(stdout)?;
                self.file = now;
                self.copy_rest(stdout)
            }
            Ok(_) => Ok(()),
            // The enclave has ended, and its files are gone.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn copy_rest(&mut self, stdout: &mut impl Write) -> io::Result<()> {
        let mut bytes = vec![0; 64 << 10];
        loop {
            let len = self.file.read(&mut bytes)?;
            if len == 0 {
                return Ok(());
            }
            stdout.write_all(self.text.of(&bytes[..len]).as_bytes())?;
        }
    }
}

fn table(stdout: &mut impl Write, enclaves: &[EnclaveState]) -> io::Result<()> {
    if enclaves.is_empty() {
        return writeln!(stdout, "no enclave is running");
    }
    let width = enclaves.iter().map(|it| it.name.to_string().len()).max().unwrap_or(0).max("NAME".len());
    writeln!(stdout, "{:width$}  PHASE    PID      CID  VCPUS  MEMORY     MACHINE        IMAGE", "NAME")?;
    for it in enclaves {
        let debug = if it.debug { " (debug)" } else { "" };
        let memory = format!("{} MiB", it.memory_mib);
        let (phase, pid, cid, cpus, machine) = (it.phase.to_string(), it.pid, it.cid, it.cpus, &it.machine);
        write!(
            stdout,
            "{:width$}  {phase:7}  {pid:<7}  {cid:<3}  {cpus:<5}  {memory:<9}  ",
            it.name.to_string()
        )?;
        writeln!(stdout, "{machine:13}  {}{debug}", it.image.display())?;
    }
    Ok(())
}

/// Prints one JSON document.
pub(super) fn json(stdout: &mut impl Write, document: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer_pretty(&mut *stdout, document)?;
    writeln!(stdout)
}
