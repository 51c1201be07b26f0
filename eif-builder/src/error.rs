//! Everything that can go wrong, and what to do about it.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};

use command_line::Exit;

use crate::problem::Finding;

/// Why an image could not be read, built or accepted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The image deviates from the format.
    #[error("{0}")]
    Format(Finding),
    /// The operating system refused.
    #[error("cannot {action} {object}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// With which file or stream.
        object: String,
        /// The answer.
        source: io::Error,
    },
    /// A path that should name a regular file does not.
    #[error("{} is not a regular file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// An input that cannot become part of an image that boots.
    #[error("{object}: {reason}")]
    Input {
        /// Which input.
        object: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A container layer that cannot be applied.
    #[error("layer {layer}, entry {entry:?}: {reason}")]
    Layer {
        /// Digest or position of the layer.
        layer: String,
        /// Name of the entry.
        entry: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Too much of something that others control.
    #[error("{object} has {actual} {unit}, at most {max} are allowed")]
    Limit {
        /// Which object.
        object: String,
        /// What was counted.
        unit: &'static str,
        /// How much there is.
        actual: u64,
        /// How much may be there.
        max: u64,
    },
    /// The content is not the one that was pinned.
    #[error("{object} has digest {actual}, expected {expected}")]
    Digest {
        /// Which object.
        object: String,
        /// The pinned digest.
        expected: String,
        /// The digest of what came.
        actual: String,
    },
    /// The measurement is not the registered one.
    #[error("{0}")]
    Refused(String),
    /// The registry did not deliver.
    #[error("registry: {0}")]
    Registry(String),
    /// The registry or its token service did not let us in.
    #[error("registry: {0}")]
    RegistryDenied(String),
    /// A peer did not answer in time.
    #[error("no answer from {object} within {seconds} s")]
    Timeout {
        /// Who was asked.
        object: String,
        /// How long we waited.
        seconds: u64,
    },
    /// A hashing thread ended early: a bug.
    #[error("internal: the measuring thread ended early")]
    Worker,
}

impl Error {
    /// An [`Error::Input`].
    pub(crate) fn input(object: impl Display, reason: impl Display) -> Self {
        Self::Input { object: object.to_string(), reason: reason.to_string() }
    }

    /// How a command ends with this error.
    pub fn exit(&self) -> Exit {
        match self {
            // A path that was given and is not there is a mistake of the caller's.
            Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => Exit::Usage,
            Self::Worker | Self::Io { .. } | Self::Registry(_) => Exit::Internal,
            Self::NotAFile { .. } | Self::Input { .. } => Exit::Usage,
            Self::Format(_)
            | Self::Layer { .. }
            | Self::Limit { .. }
            | Self::Digest { .. }
            | Self::RegistryDenied(_)
            | Self::Refused(_) => Exit::Refused,
            Self::Timeout { .. } => Exit::NoAnswer,
        }
    }

    /// The next step, when one is known.
    pub fn hint(&self) -> Option<&'static str> {
        use crate::problem::Problem;
        Some(match self {
            Self::Format(Finding { problem: Problem::UnknownFlags { .. }, .. }) => {
                "how such images are measured is not public; compare with what the platform reports"
            }
            Self::Format(Finding { problem: Problem::Magic { .. } | Problem::TooShort { .. }, .. }) => {
                "is this an enclave image? `eif-builder describe FILE` tells what is readable"
            }
            Self::Format(_) => "`eif-builder verify FILE` lists everything that is wrong with the file",
            Self::NotAFile { .. } => "give the path of a file",
            Self::RegistryDenied(_) => {
                "`docker login REGISTRY` writes what is read here: $DOCKER_CONFIG/config.json, else ~/.docker/config.json"
            }
            Self::Timeout { .. } => "check the address and the network",
            _ => return None,
        })
    }
}

/// Names the object of a failed system call.
pub(crate) trait IoContext<T> {
    /// Wraps the error, if there is one, as "cannot `action` `object`".
    fn context(self, action: &'static str, object: impl Object) -> Result<T, Error>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn context(self, action: &'static str, object: impl Object) -> Result<T, Error> {
        self.map_err(|source| unwrap_own(source, action, object))
    }
}

/// Our own errors travel through `std::io` interfaces (a tar reader, a `Write`); they come out as they went in.
fn unwrap_own(source: io::Error, action: &'static str, object: impl Object) -> Error {
    match source.downcast::<Error>() {
        Ok(own) => own,
        Err(source) => Error::Io { action, object: object.name(), source },
    }
}

/// What an error message can name.
pub(crate) trait Object {
    /// The text for the message.
    fn name(&self) -> String;
}

impl Object for &str {
    fn name(&self) -> String {
        (*self).to_owned()
    }
}

impl Object for &Path {
    fn name(&self) -> String {
        self.display().to_string()
    }
}

impl Object for &PathBuf {
    fn name(&self) -> String {
        self.display().to_string()
    }
}

impl Object for &String {
    fn name(&self) -> String {
        (*self).clone()
    }
}
