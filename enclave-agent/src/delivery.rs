//! Where the keys go once they are released.
//!
//! ```text
//!               ┌─▶ file on a tmpfs, 0600, replaced in one step     the app reads it
//! Keys ─▶ Ring ─┼─▶ sealed memory file, inherited at start          the app reads a descriptor
//!               ├─▶ guest API socket                                the app asks
//!               └─▶ export over vsock, encrypted to recipients      the operator opens it
//! ```
//!
//! The first three stay inside the enclave. The fourth leaves it, and only encrypted to recipients of the measured
//! configuration, or in plain where that says `danger_export_plaintext`.
//!
//! **Renewal.** [`Rotation`] fetches the keys again on a schedule and on request. New keys replace the old ones in the
//! [`Ring`] in one step, then the file is replaced in one step, then the export is sent again. A descriptor keeps what
//! it was made with; the next start of the app gets a new one. An app that keeps keys in memory learns of new ones by
//! watching the file (its inode changes) or by asking the guest API again.

mod age;
mod descriptor;
mod export;
mod file;
mod ring;
mod rotation;

pub use age::{EVIDENCE_STANZA, ParseRecipientError, Recipient, SealError, seal};
pub use descriptor::descriptor;
pub use export::{EXPORT_TAG, Export, Form};
pub use file::{Owner, TmpfsFile};
pub use ring::{Ring, RingReader};
pub use rotation::{RefreshError, Refresher, Renewal, Rotation};

use std::io;
use std::sync::Arc;
use std::time::Duration;

use command_line::Exit;
use tokio::task::spawn_blocking;
use transport::Endpoint;

use crate::Keys;
use crate::evidence::EvidenceError;
use crate::nsm::Nsm;
use crate::output::OutputError;

/// Ways for the keys to go, besides the guest API and the descriptor, which are asked for.
#[derive(Debug, Default)]
pub struct Delivery {
    /// The file for the app.
    pub file: Option<TmpfsFile>,
    /// The way out of the enclave.
    pub export: Option<Export>,
}

/// Why keys did not get where they should.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The directory of the file is on something that may reach a disk.
    #[error("{directory}: not on a tmpfs, so the keys could reach a disk")]
    NotMemory {
        /// The directory.
        directory: String,
    },
    /// The file could not be written.
    #[error(transparent)]
    File(#[from] OutputError),
    /// The kernel made no memory file.
    #[error("cannot make a memory file for the keys")]
    Descriptor(#[source] io::Error),
    /// The keys could not be written as text.
    #[error("cannot write the keys")]
    Encode(#[source] kms_protocol::app_keys::Error),
    /// The keys could not be encrypted.
    #[error("cannot encrypt the keys")]
    Seal(#[from] SealError),
    /// The NSM gave no evidence for the export.
    #[error("evidence for the export")]
    Evidence(#[from] EvidenceError),
    /// The receiver could not be reached.
    #[error("export")]
    Connect(#[from] transport::Error),
    /// The exchange with the receiver broke.
    #[error("export to {to}: the exchange broke")]
    Exchange {
        /// The receiver.
        to: Endpoint,
        /// How.
        source: io::Error,
    },
    /// The receiver did not take the message.
    #[error("export to {to}")]
    NotTaken {
        /// The receiver.
        to: Endpoint,
        /// What it said.
        source: transport::delivery::Error,
    },
    /// No answer in time, however often it was tried.
    #[error("export to {to}: not taken within {after:?}")]
    TimedOut {
        /// The receiver.
        to: Endpoint,
        /// The deadline that passed.
        after: Duration,
    },
    /// A call did not finish.
    #[error("the delivery did not finish")]
    Aborted,
}

impl Error {
    /// How a program that fails with this ends.
    pub fn exit(&self) -> Exit {
        match self {
            Self::NotMemory { .. } => Exit::Usage,
            Self::Connect(_) | Self::Exchange { .. } | Self::TimedOut { .. } => Exit::NoAnswer,
            Self::NotTaken { .. } => Exit::Refused,
            Self::File(_)
            | Self::Descriptor(_)
            | Self::Encode(_)
            | Self::Seal(_)
            | Self::Evidence(_)
            | Self::Aborted => Exit::Internal,
        }
    }

    /// The next step, where it is known.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::NotMemory { .. } => "choose a directory on a tmpfs, such as /run or /dev/shm",
            Self::Connect(_) | Self::Exchange { .. } | Self::TimedOut { .. } => {
                "start the receiver on the parent: host-proxy --receive, see its --help"
            }
            Self::NotTaken { .. } => "look at the receiver's log: its file or its limit may be the reason",
            _ => return None,
        })
    }
}

impl Delivery {
    /// Finds out before keys are fetched what would keep them from being delivered.
    ///
    /// # Errors
    /// [`Error::NotMemory`], [`Error::File`].
    pub fn check(&self) -> Result<(), Error> {
        self.file.as_ref().map_or(Ok(()), TmpfsFile::check)
    }

    /// Writes the file, then sends the export. The file is there even if the export fails.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn deliver(&self, keys: &Arc<Keys>, nsm: &Arc<dyn Nsm>) -> Result<(), Error> {
        if let Some(file) = self.file.clone() {
            let keys = Arc::clone(keys);
            spawn_blocking(move || file.write(&keys)).await.map_err(|_| Error::Aborted)??;
        }
        match &self.export {
            Some(export) => export.send(keys, nsm).await,
            None => Ok(()),
        }
    }
}
