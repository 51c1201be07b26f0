//! The content of an attestation, whichever encoding it came in.

/// Name of the event after which the system counts as booted: identity events after it are not looked at.
const SYSTEM_READY: &str = "system-ready";
const APP_ID: &str = "app-id";
const INSTANCE_ID: &str = "instance-id";
const KEY_PROVIDER: &str = "key-provider";
const COMPOSE_HASH: &str = "compose-hash";

/// Evidence of a platform, with what the stack on top of it claims.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attestation {
    /// What the platform signed.
    pub platform: PlatformEvidence,
    /// Events the stack recorded. On Nitro nothing signs them.
    pub runtime_events: Vec<RuntimeEvent>,
    /// What the evidence is bound to.
    pub report_data: [u8; 64],
    /// JSON text of the VM configuration; unsigned. See [`Config`].
    pub config: String,
    /// Which stack wrote it.
    pub stack: Stack,
}

/// The stack that wrote an attestation.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Stack {
    /// The usual one.
    #[default]
    Dstack,
    /// A pod; V1 only. Report data follows from the payload, so it cannot bind a TLS key.
    DstackPod {
        /// What report data is the `app-data` hash of.
        report_data_payload: String,
    },
}

/// Evidence of one platform, undecoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PlatformEvidence {
    /// TDX on bare metal.
    Tdx(TdxEvidence),
    /// TDX on Google Cloud, with the quote of the virtual TPM.
    GcpTdx(TdxEvidence, TpmQuote),
    /// AWS Nitro Enclave: the `COSE_Sign1` bytes as the NSM returned them.
    NitroEnclave {
        /// The attestation document.
        nsm_quote: Vec<u8>,
    },
    /// AMD SEV-SNP.
    SevSnp {
        /// The attestation report.
        report: Vec<u8>,
        /// DER certificates.
        cert_chain: Vec<Vec<u8>>,
        /// The measured configuration, JSON text.
        mr_config: String,
    },
    /// AWS NitroTPM.
    AwsNitroTpm {
        /// The attestation document.
        attestation_doc: Vec<u8>,
    },
}

impl PlatformEvidence {
    /// The name the platform has in V1.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Tdx(_) => "tdx",
            Self::GcpTdx(..) => "gcp-tdx",
            Self::NitroEnclave { .. } => "nitro-enclave",
            Self::SevSnp { .. } => "sev-snp",
            Self::AwsNitroTpm { .. } => "aws-nitro-tpm",
        }
    }

    /// What the platform signed: the quote, report or document.
    #[must_use]
    pub fn signed(&self) -> &[u8] {
        match self {
            Self::Tdx(tdx) | Self::GcpTdx(tdx, _) => &tdx.quote,
            Self::NitroEnclave { nsm_quote } => nsm_quote,
            Self::SevSnp { report, .. } => report,
            Self::AwsNitroTpm { attestation_doc } => attestation_doc,
        }
    }

    /// The NSM document, on Nitro Enclaves.
    #[must_use]
    pub fn nsm_quote(&self) -> Option<&[u8]> {
        match self {
            Self::NitroEnclave { nsm_quote } => Some(nsm_quote),
            _ => None,
        }
    }

    /// The TDX evidence, on either TDX platform.
    #[must_use]
    pub fn tdx(&self) -> Option<&TdxEvidence> {
        match self {
            Self::Tdx(tdx) | Self::GcpTdx(tdx, _) => Some(tdx),
            _ => None,
        }
    }
}

/// A TDX quote with its event log.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TdxEvidence {
    /// The quote.
    pub quote: Vec<u8>,
    /// The events, maybe only those of the last register.
    pub event_log: Vec<TdxEvent>,
}

/// One event of a TDX event log.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TdxEvent {
    /// Index of the register, from 0.
    pub imr: u32,
    /// Type of the event.
    pub event_type: u32,
    /// Digest that extended the register; may be blanked.
    pub digest: Vec<u8>,
    /// Name.
    pub event: String,
    /// Payload.
    pub event_payload: Vec<u8>,
}

/// A TPM quote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TpmQuote {
    /// The signed `TPMS_ATTEST`.
    pub message: Vec<u8>,
    /// Signature over it.
    pub signature: Vec<u8>,
    /// Quoted PCRs.
    pub pcr_values: Vec<PcrValue>,
    /// Certificate of the signing key, DER.
    pub ak_cert: Vec<u8>,
    /// Where it was made.
    pub platform: TpmPlatform,
    /// Events of the boot.
    pub event_log: Vec<TpmEvent>,
}

/// Where a TPM quote was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TpmPlatform {
    /// Bare dstack.
    Dstack,
    /// Google Cloud.
    Gcp,
    /// Nitro Enclave.
    NitroEnclave,
    /// EC2 with NitroTPM.
    AwsEc2,
}

/// One quoted PCR of a TPM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PcrValue {
    /// Its index.
    pub index: u32,
    /// Name of the hash.
    pub algorithm: String,
    /// Its value.
    pub value: Vec<u8>,
}

/// One event of a TPM event log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TpmEvent {
    /// The PCR it extended.
    pub pcr_index: u32,
    /// With what.
    pub digest: Vec<u8>,
}

/// One event the stack recorded at run time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeEvent {
    /// Name.
    pub event: String,
    /// Payload.
    pub payload: Vec<u8>,
    /// 1, or 2 for events whose digest is taken over canonical JSON (V1 only).
    pub version: u8,
}

impl RuntimeEvent {
    /// An event of version 1.
    #[must_use]
    pub fn new(event: impl Into<String>, payload: impl Into<Vec<u8>>) -> Self {
        Self { event: event.into(), payload: payload.into(), version: 1 }
    }
}

impl Attestation {
    /// What a Nitro client sends (§4.6): the document, at most one `app-id` event, and the image hash as the
    /// configuration.
    #[must_use]
    pub fn nitro(
        nsm_quote: Vec<u8>,
        app_id: Option<&crate::AppId>,
        report_data: [u8; 64],
        os_image_hash: &[u8; 32],
    ) -> Self {
        let event = app_id.map(|app_id| RuntimeEvent::new(APP_ID, app_id.as_bytes().as_slice()));
        Self {
            platform: PlatformEvidence::NitroEnclave { nsm_quote },
            runtime_events: event.into_iter().collect(),
            report_data,
            config: Config::text_for(os_image_hash),
            stack: Stack::Dstack,
        }
    }

    /// Payload of the first event of that name before `system-ready`; empty when there is none.
    ///
    /// On Nitro Enclaves this is the client's own claim; authorisation is what makes it safe (§5.3).
    #[must_use]
    pub fn claimed(&self, name: &str) -> &[u8] {
        self.runtime_events
            .iter()
            .take_while(|event| event.event != SYSTEM_READY)
            .find(|event| event.event == name)
            .map_or(&[], |event| &event.payload)
    }

    /// The app id claimed; empty when absent.
    #[must_use]
    pub fn app_id(&self) -> &[u8] {
        self.claimed(APP_ID)
    }

    /// The instance id claimed; empty when absent.
    #[must_use]
    pub fn instance_id(&self) -> &[u8] {
        self.claimed(INSTANCE_ID)
    }

    /// The key provider claimed; empty when absent.
    #[must_use]
    pub fn key_provider(&self) -> &[u8] {
        self.claimed(KEY_PROVIDER)
    }

    /// The compose hash claimed; empty when absent.
    #[must_use]
    pub fn compose_hash(&self) -> &[u8] {
        self.claimed(COMPOSE_HASH)
    }
}

/// The part of the VM configuration that a KMS looks at (§5.4). Everything else in it is ignored.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Deserialize)]
#[serde(default)]
pub struct Config {
    /// Hash of the image, as claimed; empty when absent.
    #[serde(with = "plain_hex")]
    pub os_image_hash: Vec<u8>,
    /// Ties the boot image of a Google machine to the image hash.
    pub gcp_measurement: Option<crate::tdx::GcpMeasurement>,
}

/// A configuration that is not a JSON object, or whose image hash is not hex.
#[derive(Debug, thiserror::Error)]
#[error("VM configuration does not parse")]
pub struct ConfigError(#[source] serde_json::Error);

impl Config {
    /// The effective configuration: the one in the request if it has one, else the one in the attestation, else `{}`.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn effective(requested: &str, embedded: &str) -> Result<Self, ConfigError> {
        let text = [requested, embedded].into_iter().find(|text| !text.is_empty()).unwrap_or("{}");
        serde_json::from_str(text).map_err(ConfigError)
    }

    /// The text a client embeds for that image.
    #[must_use]
    pub fn text_for(os_image_hash: &[u8; 32]) -> String {
        format!("{{\"os_image_hash\":\"{}\"}}", hex::encode(os_image_hash))
    }
}

/// Hex without `0x`: unlike the messages, the configuration refuses the prefix.
mod plain_hex {
    use serde::{Deserialize, Deserializer, de::Error};

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        hex::decode(String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}
