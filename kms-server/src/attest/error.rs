//! Why evidence is refused.

use attestation::OsImageHash;

use crate::breaker::Paused;
use crate::client;
use command_line::chain;

/// Why evidence is refused. The text goes to the client, in upstream's words where upstream has any.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The certificate's extensions cannot be read.
    #[error("invalid client certificate: {}", chain(.0))]
    Certificate(kms_protocol::cert::Error),
    /// The attestation cannot be decoded.
    #[error("invalid quote: {}", chain(.0))]
    Decode(kms_protocol::attestation_encoding::Error),
    /// The event log of a legacy certificate or request cannot be decoded.
    #[error("invalid quote: event log: {0}")]
    EventLog(String),
    /// The evidence is of a kind that is not verified here.
    #[error("invalid quote: evidence of platform {0} is not supported by this KMS")]
    Platform(&'static str),
    /// The attestation speaks for another key.
    #[error("invalid quote: report data mismatch")]
    ReportData,
    /// The attestation of a pod speaks for its own payload, so never for a key.
    #[error("invalid quote: report_data does not match report_data_payload")]
    Pod,
    /// The document speaks for another key than the attestation around it.
    #[error("invalid quote: NSM user_data does not match report_data")]
    UserData,
    /// The document's signature, chain, age or form is wrong.
    #[error("invalid quote: NSM attestation verification failed: {}", chain(.0))]
    Document(attestation::Error),
    /// PCR0 to PCR2 are zero.
    #[error("invalid quote: nitro enclave is in debug mode (PCR0/1/2 are zeroed); refusing to verify")]
    Debug,
    /// The TDX quote's signature, chain, TCB or form is wrong.
    #[error("invalid quote: failed to verify TDX quote: {}", chain(.0))]
    Tdx(attestation::tdx::Error),
    /// The TPM quote's signature, chain or event log is wrong.
    #[error("invalid quote: failed to verify TPM quote: {}", chain(.0))]
    Tpm(attestation::tpm::Error),
    /// The events are not the ones that the platform measured.
    #[error("invalid quote: {register} mismatch: the runtime events do not lead to the quoted value")]
    Events {
        /// `RTMR3` or `PCR14`.
        register: &'static str,
    },
    /// The TPM did not quote a register that is needed.
    #[error("invalid quote: PCR {0} not found in TPM quote")]
    NoPcr(u32),
    /// The TPM quote was made for another TDX quote.
    #[error("invalid quote: tpm qualified_data mismatch")]
    Qualifying,
    /// What is needed to verify a quote could not be fetched.
    #[error("invalid quote: collateral is not available: {0}")]
    Collateral(#[from] CollateralError),
    /// There is no room to verify in.
    #[error("too many requests; try again")]
    Busy,
    /// The configuration is not one.
    #[error("App not allowed: {}", chain(.0))]
    Config(kms_protocol::attestation_encoding::ConfigError),
    /// The configuration names another image than the one that was measured.
    #[error(
        "App not allowed: Failed to verify os image hash: Failed to verify os image hash: \
         os_image_hash mismatch: expected={}, computed={computed}",
        hex::encode(.claimed)
    )]
    ImageHash {
        /// What the client says.
        claimed: Vec<u8>,
        /// What its PCRs say.
        computed: OsImageHash,
    },
    /// The measured image is not the one that the configuration names, or nothing ties the two together.
    #[error("App not allowed: Failed to verify os image hash: {0}")]
    Image(String),
    /// The app id is missing or has a wrong length.
    #[error("App not allowed: app_id must be 20 bytes")]
    AppId,
    /// The instance id has a wrong length.
    #[error("App not allowed: instance_id must be 0 or 20 bytes")]
    InstanceId,
}

impl Error {
    /// A stable name for logs and metrics.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Certificate(error) => error.name(),
            Self::Decode(error) => error.name(),
            Self::EventLog(_) => "event-log",
            Self::Platform(_) => "platform-not-supported",
            Self::ReportData => "report-data-mismatch",
            Self::Pod => "pod-report-data",
            Self::UserData => "user-data-mismatch",
            Self::Document(error) => error.name(),
            Self::Debug => "debug-enclave",
            Self::Tdx(error) => error.name(),
            Self::Tpm(error) => error.name(),
            Self::Events { .. } => "runtime-events-mismatch",
            Self::NoPcr(_) => "tpm-pcr-missing",
            Self::Qualifying => "tpm-qualifying-data",
            Self::Collateral(_) => "collateral-unavailable",
            Self::Busy => "busy",
            Self::Config(_) => "config-not-valid",
            Self::ImageHash { .. } => "image-hash-mismatch",
            Self::Image(_) => "image-not-verified",
            Self::AppId => "app-id-length",
            Self::InstanceId => "instance-id-length",
        }
    }
}

/// Why collateral is not there. The addresses are the operator's, so they are for the log and not for the client.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CollateralError {
    /// Too many different kinds are being fetched.
    #[error("too many are being fetched")]
    Busy,
    /// The last attempt failed a moment ago.
    #[error("the last attempt failed less than {0} s ago")]
    Pause(u64),
    /// The service did not answer, or not usably.
    #[error("the service gave no usable answer")]
    Service,
    /// A certificate names a place that is not asked.
    #[error("the certificate names a place that is not Google's")]
    Place,
}

impl CollateralError {
    /// The service is not asked for a while.
    pub(super) fn paused(what: &str, paused: Paused) -> Self {
        tracing::debug!(what, %paused, "collateral is not fetched");
        Self::Service
    }

    /// Logs what happened and gives the client less.
    pub(super) fn service(what: &str, error: &client::Error) -> Self {
        tracing::warn!(what, error = chain(error), "collateral cannot be fetched");
        Self::Service
    }
}
