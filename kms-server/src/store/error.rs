//! What can be wrong with a directory of keys.

use std::path::PathBuf;

/// Why the directory of keys cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Another process uses the directory.
    #[error("{} is in use by another process", path.display())]
    Locked {
        /// The directory.
        path: PathBuf,
    },
    /// There are no keys yet.
    #[error("{} holds no keys", path.display())]
    NotBootstrapped {
        /// The directory.
        path: PathBuf,
    },
    /// There are root keys already.
    #[error("{} holds root keys already; they are never overwritten", path.display())]
    AlreadyBootstrapped {
        /// The directory.
        path: PathBuf,
    },
    /// One root key is there, the other is not.
    #[error("{} holds {present} but not {missing}; restore it from a backup", path.display())]
    HalfRoots {
        /// The directory.
        path: PathBuf,
        /// The root key that is there.
        present: &'static str,
        /// The one that is not.
        missing: &'static str,
    },
    /// Files that only exist beside root keys, without them: root keys have been lost.
    #[error("{} holds {present} but no root keys; restore them from a backup, or move {present} away", path.display())]
    Orphan {
        /// The directory.
        path: PathBuf,
        /// The file that is there.
        present: &'static str,
    },
    /// An interrupted bootstrap and the directory disagree.
    #[error("{} differs from the copy of an interrupted bootstrap in {}", path.display(), staged.display())]
    Conflict {
        /// The file in the directory.
        path: PathBuf,
        /// What the bootstrap would have put there.
        staged: PathBuf,
    },
    /// A file of keys or certificates is not PEM.
    #[error("{what} is not PEM: {source}")]
    Pem {
        /// Which.
        what: &'static str,
        /// Why.
        source: pem_rfc7468::Error,
    },
    /// A key file does not hold a key of the expected kind.
    #[error("{name} does not hold the expected key")]
    KeyFile {
        /// Which.
        name: &'static str,
        /// Why.
        source: kms_protocol::derive::Error,
    },
    /// root-k256.key has the wrong length.
    #[error("root-k256.key does not hold a key")]
    K256Length(#[from] kms_protocol::derive::SecretLength),
    /// A key that is none.
    #[error("a key in memory is unusable")]
    Key(#[source] kms_protocol::derive::Error),
    /// A certificate and its key do not belong together.
    #[error("{certificate} is not for the key in {key}; the files come from different directories")]
    Mismatch {
        /// The certificate's file.
        certificate: &'static str,
        /// The key's file.
        key: &'static str,
    },
    /// A certificate cannot be read.
    #[error("{name} is not a certificate")]
    Certificate {
        /// Which.
        name: &'static str,
    },
    /// A file holds something else than it should.
    #[error("{name} is not valid: {reason}")]
    Content {
        /// Which.
        name: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A certificate cannot be issued.
    #[error("cannot issue a certificate")]
    Issue(#[source] ratls::Error),
    /// The operating system gives no random numbers.
    #[error("no random bytes from the operating system")]
    Random,
}
