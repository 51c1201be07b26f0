//! What can go wrong while the emulator is set up or serves.

/// A failure of the emulator itself. What a *request* did wrong is a [`crate::ErrorCode`] in the answer instead.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A register outside 0..=31 was given a start value.
    #[error("PCR{index} does not exist: the module has registers 0 to 31")]
    PcrIndex {
        /// The index asked for.
        index: u8,
    },
    /// The module id is not of the form `i-<17 hex>-enc<16 hex>`.
    #[error("module id {module_id:?} is not of the form i-<hex>-enc<hex>, at most 64 characters")]
    ModuleId {
        /// What was given.
        module_id: String,
    },
    /// A certificate or a key of the local chain could not be made.
    #[error("cannot make the {what} of the local certificate chain")]
    Pki {
        /// Which certificate.
        what: &'static str,
        /// Why.
        source: rcgen::Error,
    },
    /// The certificate of a kept root is not PEM.
    #[error("the certificate of the local root is not PEM")]
    RootPem,
    /// A kept root cannot be read or written.
    #[error("the local root: {}", path.display())]
    RootFile {
        /// The file or directory.
        path: std::path::PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A leaf key that was just made cannot sign.
    #[error("the leaf key of the local certificate chain cannot sign")]
    Sign,
    /// The operating system's random number generator failed.
    #[error("no random bytes from the operating system")]
    Random,
    /// The time is outside what certificates can express.
    #[error("the clock reads {millis} ms since 1970, outside of the local root's validity (2020 to 2049)")]
    Clock {
        /// Milliseconds since the Unix epoch.
        millis: u64,
    },
}
