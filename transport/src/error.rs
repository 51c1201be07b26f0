//! Why a connection or a listener could not be had.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::Endpoint;

/// Why a connection or a listener could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// `vsock:any:PORT` names no peer; it is an address to listen on.
    #[error("{endpoint}: an address to listen on, not one to connect to")]
    NotConnectable {
        /// What was to be connected to.
        endpoint: Endpoint,
    },
    /// The host name of a `tcp:` endpoint could not be resolved.
    #[error("{endpoint}: cannot resolve the host name")]
    Resolve {
        /// What was to be connected to.
        endpoint: Endpoint,
        /// The resolver's answer.
        source: io::Error,
    },
    /// The connection was refused, or failed on the way.
    #[error("{endpoint}: cannot connect")]
    Connect {
        /// What was to be connected to.
        endpoint: Endpoint,
        /// The last address's failure.
        source: io::Error,
    },
    /// Nothing answered before the deadline.
    #[error("{endpoint}: no connection within {after:?}")]
    TimedOut {
        /// What was to be connected to.
        endpoint: Endpoint,
        /// The deadline that passed.
        after: Duration,
    },
    /// The socket could not be bound.
    #[error("{endpoint}: cannot listen")]
    Bind {
        /// What was to be listened on.
        endpoint: Endpoint,
        /// The system's answer.
        source: io::Error,
    },
    /// Another process answers on the Unix socket.
    #[error("{}: another process is listening on this socket", path.display())]
    SocketInUse {
        /// The socket file.
        path: PathBuf,
    },
    /// The path of a Unix listener exists and is not a socket, so it is not ours to replace.
    #[error("{}: exists and is not a socket", path.display())]
    NotASocket {
        /// The file in the way.
        path: PathBuf,
    },
    /// Accepting failed; the listener itself is still good.
    #[error("{endpoint}: cannot accept a connection")]
    Accept {
        /// The listener's address.
        endpoint: Endpoint,
        /// The system's answer.
        source: io::Error,
    },
}

impl Error {
    /// The system's error below this one, when there is one.
    pub fn io(&self) -> Option<&io::Error> {
        match self {
            Self::Resolve { source, .. }
            | Self::Connect { source, .. }
            | Self::Bind { source, .. }
            | Self::Accept { source, .. } => Some(source),
            Self::NotConnectable { .. }
            | Self::TimedOut { .. }
            | Self::SocketInUse { .. }
            | Self::NotASocket { .. } => None,
        }
    }

    /// Whether the deadline passed, as opposed to an answer that says no.
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::TimedOut { .. })
    }
}
