//! The dstack guest API on Unix sockets: what an app asks the agent for, in upstream's words (docs/guest-api.md).
//!
//! | module | what it holds |
//! | --- | --- |
//! | `http` | connections, limits, deadlines, encodings |
//! | `calls` | one function a method |
//! | `keys` | keys by path, signatures |
//! | `certificates` | keys with a certificate from the KMS |
//! | `evidence` | quotes and attestations |
//! | `events` | what `EmitEvent` records in registers |
//! | `info` | `Info` and `Version` |
//!
//! Who can connect is the app: it may ask for every key of its own. There is no other authorisation, as there is none
//! between the app and the files it is given.

mod calls;
mod certificates;
mod events;
mod evidence;
mod http;
mod info;
mod keys;

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{Gid, Uid, chown};
use tokio::sync::Mutex;
use transport::{BindOptions, Endpoint, Listener};

use crate::GetKeys;
use crate::delivery::{Owner, Refresher, RingReader};
use crate::evidence::{EvidenceError, OwnDocument};
use crate::nsm::{AttestFields, Nsm};

/// What the SDKs look for in /var/run and in /run: current ones, and those of releases that knew the agent as tappd.
pub const SOCKETS: [&str; 2] = ["dstack.sock", "tappd.sock"];

/// Answers an app's questions.
pub struct GuestApi {
    keys: RingReader,
    nsm: Arc<dyn Nsm>,
    /// How the KMS is reached, for certificates.
    kms: Arc<GetKeys>,
    refresher: Refresher,
    events: Mutex<events::Log>,
    module_id: String,
    pcrs: info::Pcrs,
}

/// Why the guest API cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A socket cannot be listened on.
    #[error(transparent)]
    Bind(#[from] transport::Error),
    /// A socket cannot be given to the app's user.
    #[error("{}: cannot be given to user {user}", path.display())]
    Owner {
        /// The socket.
        path: PathBuf,
        /// The user's number.
        user: u32,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The NSM gave no document to take this enclave's registers from.
    #[error(transparent)]
    Evidence(#[from] EvidenceError),
}

/// Listens on these sockets; they are the app's user's alone, or this process's without one.
///
/// # Errors
/// [`StartError::Bind`], [`StartError::Owner`].
pub async fn bind(sockets: &[PathBuf], app: Option<Owner>) -> Result<Vec<Listener>, StartError> {
    let mut listeners = Vec::with_capacity(sockets.len());
    for path in sockets {
        let endpoint = Endpoint::Unix { path: path.clone() };
        let listener = Listener::bind(&endpoint, BindOptions::default()).await?;
        if let Some(owner) = app {
            give(path, owner)?;
        }
        listeners.push(listener);
    }
    Ok(listeners)
}

fn give(path: &Path, Owner { uid, gid }: Owner) -> Result<(), StartError> {
    chown(path, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).map_err(|error| StartError::Owner {
        path: path.to_owned(),
        user: uid,
        source: error.into(),
    })
}

/// Serves these sockets until dropped, which also ends all connections.
pub async fn serve(listeners: Vec<Listener>, api: Arc<GuestApi>) -> Infallible {
    http::serve(listeners, api).await
}

impl GuestApi {
    /// An API over these keys. Asks the NSM once for this enclave's registers.
    ///
    /// # Errors
    /// [`StartError::Evidence`].
    pub async fn new(
        keys: RingReader,
        nsm: Arc<dyn Nsm>,
        kms: Arc<GetKeys>,
        refresher: Refresher,
    ) -> Result<Self, StartError> {
        let document = OwnDocument::ask(&nsm, AttestFields::default(), kms.deadlines.nsm).await?;
        let decoded = document.decoded();
        let module_id = decoded.module_id().to_owned();
        let pcrs = decoded.pcrs().map(|(index, pcr)| (index.get(), pcr.to_string())).collect();
        Ok(Self { keys, nsm, kms, refresher, events: Mutex::default(), module_id, pcrs })
    }

    fn nsm_deadline(&self) -> Duration {
        self.kms.deadlines.nsm
    }
}

impl std::fmt::Debug for GuestApi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestApi").field("module_id", &self.module_id).finish_non_exhaustive()
    }
}
