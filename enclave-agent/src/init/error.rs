//! Why an enclave does not come up, and how that ends.

use std::io;
use std::path::PathBuf;

use command_line::Exit;

use super::process_file::ProcessError;
use crate::config::ConfigError;
use crate::delivery::ParseRecipientError;
use crate::network::NetworkError;
use crate::nsm::NsmError;
use crate::service::StartError;

/// Why an enclave does not come up, or does not go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InitError {
    /// A file of the image.
    #[error("{}: cannot read", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The measured configuration.
    #[error("{}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<ConfigError>,
    },
    /// What the image runs.
    #[error("{}", path.display())]
    Process {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ProcessError,
    },
    /// The kernel command line.
    #[error("keyferry.parent_cid={text}: not the context id of a parent")]
    ParentCid {
        /// The value, shortened.
        text: String,
    },
    /// The app's root could not be entered.
    #[error("cannot make {} the root", path.display())]
    Root {
        /// The directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A file system, directory or link could not be made.
    #[error("cannot make the {kind} {at}")]
    Mount {
        /// What it is.
        kind: &'static str,
        /// Where.
        at: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The NSM driver could not be inserted.
    #[error("{path}: cannot insert the module")]
    Module {
        /// The file.
        path: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The loopback interface stayed down.
    #[error("cannot bring up the loopback interface")]
    Loopback(#[source] io::Error),
    /// The security module could not be opened, or gave no randomness.
    #[error(transparent)]
    Nsm(#[from] NsmError),
    /// The kernel did not take the module's randomness.
    #[error("cannot seed the kernel's randomness")]
    Entropy(#[source] io::Error),
    /// The app's network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A recipient of the export is none.
    #[error("recipients")]
    Recipient(#[source] ParseRecipientError),
    /// There are no keys, or they did not get where they should.
    #[error(transparent)]
    Service(#[from] StartError),
    /// The app could not be started.
    #[error("{program}: cannot start")]
    Start {
        /// The program.
        program: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The app ended in another way than with 0.
    #[error("{program}: {how}")]
    App {
        /// The program.
        program: String,
        /// Its exit status or signal.
        how: String,
    },
    /// The runtime, a signal or a descriptor.
    #[error("{what}")]
    System {
        /// What was wanted.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

impl InitError {
    /// How the enclave ends for it.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Service(error) => error.exit(),
            Self::Recipient(_) | Self::Config { .. } | Self::Process { .. } | Self::ParentCid { .. } => {
                Exit::Usage
            }
            Self::Nsm(NsmError::TimedOut { .. }) => Exit::NoAnswer,
            _ => Exit::Internal,
        }
    }

    /// What happened, with its causes.
    pub fn reason(&self) -> String {
        command_line::chain(self)
    }
}
