//! What can go wrong, and what to try next.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// A local enclave could not be prepared, started, watched or stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A program that is needed is not there, or cannot do what it is needed for.
    #[error("cannot boot an enclave on this machine: {}", missing.join("; "))]
    Tools {
        /// One entry for each part that is missing.
        missing: Vec<String>,
    },
    /// A program could not be started.
    #[error("cannot start {}", program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A child process could not be waited for or ended.
    #[error("cannot wait for {}", program.display())]
    Wait {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A program ended when it should have answered or gone on.
    #[error("{} ended with {status}: {complaint}", program.display())]
    Refused {
        /// The program.
        program: PathBuf,
        /// Exit code or signal.
        status: String,
        /// The end of its standard error.
        complaint: String,
    },
    /// Something did not happen in time.
    #[error("no answer from {what} within {:.1} s", waited.as_secs_f64())]
    NoAnswer {
        /// Who was asked.
        what: String,
        /// How long.
        waited: Duration,
    },
    /// The NSM device could not be set up.
    #[error("cannot set up the NSM device")]
    Nsm {
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A path that a tool takes as text is none, or has a character that the tool gives a meaning.
    #[error("{}: a path with {what} cannot be passed on", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// What is in the way.
        what: &'static str,
    },
    /// A file or directory could not be read, written or removed.
    #[error("cannot {action} {}", path.display())]
    File {
        /// Verb.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The image's parts could not be copied to where QEMU reads them.
    #[error("cannot copy the {part} of the image to a temporary file")]
    Spool {
        /// Kernel or ramdisks.
        part: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The machine asked for cannot be.
    #[error(transparent)]
    Machine(#[from] crate::MachineError),
    /// The name cannot be a directory's.
    #[error("name {name:?}: expected 1 to 40 of a-z, 0-9 and -, starting with a letter or digit")]
    Name {
        /// What was given.
        name: String,
    },
    /// There is an enclave of that name already.
    #[error("an enclave named {name} is running")]
    Exists {
        /// The name.
        name: String,
    },
    /// There is no enclave of that name.
    #[error("no enclave named {name} is running")]
    Unknown {
        /// The name.
        name: String,
    },
    /// The state directory is not ours alone.
    #[error("{}: expected a directory that belongs to user {uid} and that nobody else can write to", path.display())]
    StateDirectory {
        /// The directory.
        path: PathBuf,
        /// Who runs this.
        uid: u32,
    },
    /// The state file of a running enclave cannot be understood.
    #[error("{}: not the state of an enclave", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// The enclave is not as far as asked in time, and runs on.
    #[error("the enclave is not {phase} after {:.0} s", waited.as_secs_f64())]
    NotYet {
        /// What was waited for.
        phase: crate::Phase,
        /// How long.
        waited: Duration,
    },
    /// The enclave ended before it was as far as asked.
    #[error("the enclave ended: {ending}")]
    Ended {
        /// How.
        ending: crate::Ending,
    },
}

impl Error {
    /// The next step, where one is known.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Tools { .. } => {
                "run `scripts/enclave-vm-tools.sh`, or install QEMU 10.2 or newer and \
                 `cargo install --locked vhost-device-vsock --version 0.3.0`"
            }
            Self::Machine(error) => return error.hint(),
            Self::Exists { .. } => {
                "choose another name with `--name`, or stop it with `keyferry enclave stop`"
            }
            Self::Unknown { .. } => "see `keyferry enclave list`",
            Self::Ended { ending: crate::Ending::NotBooted { .. } } => {
                "allow more with `--boot-timeout`, and see whether the image has an /init and its command line a console"
            }
            Self::Path { .. } => "use a directory without such characters",
            _ => return None,
        };
        Some(hint.to_owned())
    }

    pub(crate) fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { action, path, source }
    }
}
