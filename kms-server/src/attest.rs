//! From a client's certificate to a client whose evidence was verified (reference §5.2, §6.1 and §6.2).
//!
//! Nothing in the certificate but its key and the attestation in it means anything: the CA that signed it gives its
//! key to everybody. The key is bound by report data, report data by the document's signature.

use std::num::NonZeroUsize;

use attestation::{AppraisedDocument, OsImageHash, Policy, TrustAnchor, UnixMillis, Verifier};
use kms_protocol::attestation_encoding::{Attestation, Config, RuntimeEvent, VersionedAttestation};
use kms_protocol::cert::CertificateContents;
use kms_protocol::nitro::{self, DeviceIdRule};
use kms_protocol::wire::webhook::BootInfo;
use kms_protocol::{AppId, InstanceId, report_data};

use crate::text::chain;
use crate::{rpc, sealed};

/// Instances whose chain is remembered as verified.
const CACHED_CHAINS: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// A client whose evidence was verified, speaks for the key of this connection, and is no debug enclave.
pub struct ClientEvidence {
    document: AppraisedDocument,
    attestation: Attestation,
    digest: [u8; 32],
}

/// A client that asks for an app's keys, with everything checked that needs no authoriser.
pub struct AttestedClient {
    /// The verified document.
    pub document: AppraisedDocument,
    /// SHA-256 over the verified PCR0, PCR1 and PCR2.
    pub os_image_hash: OsImageHash,
    /// Whose keys it asks for; its own claim, which the authoriser judges.
    pub app_id: AppId,
    /// Which instance it says it is.
    pub instance_id: InstanceId,
    /// SHA-256 over the evidence as it came.
    pub evidence: [u8; 32],
}

/// Why evidence is refused. The text goes to the client, in upstream's words where upstream has any.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The certificate's extensions cannot be read.
    #[error("invalid client certificate: {}", chain(.0))]
    Certificate(kms_protocol::cert::Error),
    /// The attestation cannot be decoded.
    #[error("invalid quote: {}", chain(.0))]
    Decode(kms_protocol::attestation_encoding::Error),
    /// The evidence is of a kind that is not verified here.
    #[error("invalid quote: evidence of platform {0} is not supported by this KMS")]
    Platform(&'static str),
    /// The attestation speaks for another key.
    #[error("invalid quote: report data mismatch")]
    ReportData,
    /// The document speaks for another key than the attestation around it.
    #[error("invalid quote: NSM user_data does not match report_data")]
    UserData,
    /// The document's signature, chain, age or form is wrong.
    #[error("invalid quote: NSM attestation verification failed: {}", chain(.0))]
    Document(attestation::Error),
    /// PCR0 to PCR2 are zero.
    #[error("invalid quote: nitro enclave is in debug mode (PCR0/1/2 are zeroed); refusing to verify")]
    Debug,
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
            Self::Platform(_) => "platform-not-supported",
            Self::ReportData => "report-data-mismatch",
            Self::UserData => "user-data-mismatch",
            Self::Document(error) => error.name(),
            Self::Debug => "debug-enclave",
            Self::Config(_) => "config-not-valid",
            Self::ImageHash { .. } => "image-hash-mismatch",
            Self::AppId => "app-id-length",
            Self::InstanceId => "instance-id-length",
        }
    }
}

/// Verifies clients' evidence.
pub struct Attester {
    verifier: Verifier,
}

impl Attester {
    /// Verifies Nitro documents under AWS's root, or under `nitro_root` (PEM) in its place.
    ///
    /// # Errors
    ///
    /// When `nitro_root` is no usable root.
    pub fn new(nitro_root: Option<&str>) -> Result<Self, attestation::Error> {
        let anchor = match nitro_root {
            Some(pem) => TrustAnchor::from_pem(pem)?,
            None => TrustAnchor::aws_nitro_g1(),
        };
        Ok(Self { verifier: Verifier::new(anchor).with_chain_cache(CACHED_CHAINS) })
    }

    /// Verifies the evidence in a client's certificate; `None` when there is none. Takes up to several milliseconds of
    /// computing.
    ///
    /// # Errors
    ///
    /// [`Error`], with the text for the client.
    pub fn verify(&self, certificate: &[u8], now: UnixMillis) -> Result<Option<ClientEvidence>, Error> {
        let contents = CertificateContents::decode(certificate).map_err(Error::Certificate)?;
        let Some(encoded) = contents.attestation else {
            if contents.has_legacy_quote {
                return Err(Error::Platform("tdx"));
            }
            return Ok(None);
        };
        let attestation = VersionedAttestation::decode(&encoded).map_err(Error::Decode)?.into_attestation();
        if attestation.report_data != report_data::ratls_cert(&contents.spki_der) {
            return Err(Error::ReportData);
        }
        let kind = attestation.platform.kind();
        let document = attestation.platform.nsm_quote().ok_or(Error::Platform(kind))?;
        let verified = self.verifier.verify(document, now).map_err(Error::Document)?;
        if verified.is_debug() {
            return Err(Error::Debug);
        }
        if verified.user_data() != Some(attestation.report_data.as_slice()) {
            return Err(Error::UserData);
        }
        let policy = Policy::any_image_that_caller_authorises().with_user_data(&attestation.report_data);
        let document = verified.appraise(&policy).map_err(Error::Document)?;
        let digest = crate::audit::sha256(&encoded);
        Ok(Some(ClientEvidence { document, attestation, digest }))
    }
}

impl Attester {
    /// Verifies a document that came in a request instead of a certificate (sealed release): it must meet `binding`,
    /// which speaks of the ids. Takes up to several milliseconds of computing.
    ///
    /// # Errors
    ///
    /// [`sealed::Error::NotBound`](crate::sealed::Error) or [`Error`], with the text for the client.
    pub(crate) fn verify_bound(
        &self,
        document: Vec<u8>,
        binding: &Policy,
        app_id: &AppId,
        instance_id: &InstanceId,
        now: UnixMillis,
    ) -> Result<ClientEvidence, rpc::Error> {
        let verified = self.verifier.verify(&document, now).map_err(Error::Document)?;
        if verified.is_debug() {
            return Err(Error::Debug.into());
        }
        let appraised = verified.appraise(binding).map_err(|error| match error {
            attestation::Error::Binding { .. } => rpc::Error::Sealed(sealed::Error::NotBound),
            other => Error::Document(other).into(),
        })?;
        let os_image_hash = appraised.os_image_hash();
        let digest = crate::audit::sha256(&document);
        // In the form that the rest of the way knows; no report data binds anything here.
        let mut attestation = Attestation::nitro(document, Some(app_id), [0; 64], os_image_hash.as_bytes());
        if *instance_id != InstanceId::NONE {
            attestation.runtime_events.push(RuntimeEvent::new("instance-id", instance_id.as_bytes()));
        }
        Ok(ClientEvidence { document: appraised, attestation, digest })
    }
}

impl ClientEvidence {
    /// Checks what the client claims about itself against its evidence; `requested_config` is the request's
    /// `vm_config`. Gives the client and what an authoriser is told about it.
    ///
    /// # Errors
    ///
    /// [`Error::ImageHash`] when the claimed image is not the measured one, and others about the claims.
    pub fn into_client(self, requested_config: &str) -> Result<(AttestedClient, BootInfo), Error> {
        let Self { document, attestation, digest } = self;
        let computed = document.os_image_hash();
        let config = Config::effective(requested_config, &attestation.config).map_err(Error::Config)?;
        if config.os_image_hash != computed.as_bytes() {
            // Somebody else's bytes: enough of them to see what went wrong.
            let claimed = config.os_image_hash.into_iter().take(64).collect();
            return Err(Error::ImageHash { claimed, computed });
        }
        let app_id = AppId::try_from(attestation.app_id()).map_err(|_| Error::AppId)?;
        let instance_id = InstanceId::try_from(attestation.instance_id()).map_err(|_| Error::InstanceId)?;
        let boot_info =
            nitro::boot_info(computed.as_bytes(), document.module_id(), DeviceIdRule::Upstream, &attestation);
        Ok((
            AttestedClient { document, os_image_hash: computed, app_id, instance_id, evidence: digest },
            boot_info,
        ))
    }
}
