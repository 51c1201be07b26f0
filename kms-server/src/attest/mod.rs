//! From a client's certificate to a client whose evidence was verified (reference §5.2, §6.1 to §6.4).
//!
//! Nothing in the certificate but its key and the attestation in it means anything: the CA that signed it gives its
//! key to everybody. The key is bound by report data, report data by what the platform signed.
//!
//! | platform | what signs | what ties the image to it |
//! | --- | --- | --- |
//! | Nitro Enclaves | the NSM, under AWS's root | PCR0 to PCR2 are the image hash |
//! | TDX | the CPU, under Intel's root | MRTD and RTMR0 to RTMR2 are listed for the image hash ([`references`]) |
//! | TDX at Google | the CPU, and a virtual TPM under Google's root | the TPM's log measures the boot image, and the configuration leads from there to the image hash |
//!
//! Debug guests are refused on all of them, whatever the settings say.

mod cache;
mod collateral;
mod error;
mod gcp;
mod legacy;
pub mod references;

pub use error::{CollateralError, Error};

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use attestation::tdx::{CollateralKey, ReportData, TcbStatus, VerifiedQuote};
use attestation::tpm::{self, VerifiedTpmQuote};
use attestation::{AppraisedDocument, OsImageHash, Pcr, PcrIndex, Policy, TrustAnchor, UnixMillis};
use kms_protocol::attestation_encoding::{
    Attestation, Config, PlatformEvidence, RuntimeEvent, Stack, TpmPlatform, TpmQuote, VersionedAttestation,
};
use kms_protocol::cert::CertificateContents;
use kms_protocol::nitro::{self, DeviceIdRule};
use kms_protocol::runtime_events::{self, Moment};
use kms_protocol::tdx::{self, GCP_FIRMWARE_PCR0, GCP_IMAGE_EVENT, Tcb, TdRegisters};
use kms_protocol::wire::webhook::BootInfo;
use kms_protocol::{AppId, InstanceId, report_data};
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

use self::cache::Need;
use self::collateral::Pccs;
use self::gcp::GcpPki;
use self::references::References;
use crate::client::{self, Url};
use crate::metrics::Dependency;
use crate::offload::{Busy, Offload};
use crate::{rpc, sealed};

/// Instances whose chain is remembered as verified.
const CACHED_CHAINS: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// What evidence is verified against.
#[derive(Debug, Clone)]
pub struct Trust {
    /// Another root for NSM documents than AWS's, PEM.
    pub nitro_root: Option<String>,
    /// Another root for TDX quotes than Intel's, DER.
    pub tdx_root: Option<Vec<u8>>,
    /// Another root for TPM quotes than Google's, DER.
    pub gcp_tpm_root: Option<Vec<u8>>,
    /// Where Intel's collateral comes from.
    pub(crate) pccs: Url,
    /// Hosts that certificates and lists of Google's virtual TPMs come from.
    pub gcp_places: Vec<String>,
    /// For everything that one verification has to fetch from one place.
    pub fetch_timeout: Duration,
    /// Measurements of TDX images.
    pub references: References,
}

/// Why evidence can never be verified with these settings.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrustError {
    /// The root for NSM documents is none.
    #[error("the root for Nitro documents cannot be used")]
    Nitro(#[source] attestation::Error),
    /// The root for TPM quotes is none.
    #[error("the root for TPM quotes cannot be used")]
    Tpm(#[source] tpm::Error),
    /// TLS to the services cannot be set up.
    #[error("TLS cannot be set up")]
    Tls(#[source] rustls::Error),
}

/// Evidence that was verified, speaks for the key of its connection, and is of no debug guest.
pub struct ClientEvidence {
    platform: Verified,
    attestation: Attestation,
    references: Arc<References>,
}

/// What the platform signed.
enum Verified {
    Nitro(Box<AppraisedDocument>),
    Tdx(VerifiedQuote),
    GcpTdx(VerifiedQuote, VerifiedTpmQuote),
}

impl From<Busy> for Error {
    fn from(_: Busy) -> Self {
        Self::Busy
    }
}

/// Someone who asks for keys or certificates, with everything checked that needs no authoriser.
pub struct AttestedClient {
    /// The hash of the image it runs, tied to what the platform measured.
    pub os_image_hash: OsImageHash,
    /// Whose keys it asks for. On Nitro Enclaves its own claim, which the authoriser judges.
    pub app_id: AppId,
    /// Which instance it says it is.
    pub instance_id: InstanceId,
    /// The registers of a Nitro document; empty on other platforms.
    pub registers: Vec<(PcrIndex, Pcr)>,
    /// The enclave's or machine's name, for logs; empty when it has none.
    pub module_id: String,
    /// What an authoriser is told about it.
    pub boot_info: BootInfo,
    /// The evidence, for certificates that show it.
    pub attestation: Attestation,
    /// SHA-256 over what the platform signed.
    pub evidence: [u8; 32],
}

/// Verifies evidence, beside the async threads, fetching what that takes.
pub struct Attester {
    nitro: attestation::Verifier,
    tdx: attestation::tdx::Verifier,
    tpm: tpm::Verifier,
    pccs: Pccs,
    gcp: GcpPki,
    references: Arc<References>,
    offload: Arc<Offload>,
}

/// How far one look at a certificate got.
enum Step {
    NoEvidence,
    Verified(Box<ClientEvidence>),
    /// Something has to be fetched first.
    Fetch(Box<Attestation>),
}

impl Attester {
    /// Whom it asks, and how they fare.
    pub(crate) fn dependencies(&self) -> [Dependency; 2] {
        [self.pccs.health(), self.gcp.health()]
    }

    /// Verifies under these anchors, on `offload`.
    ///
    /// # Errors
    ///
    /// [`TrustError`].
    pub(crate) fn new(trust: Trust, offload: Arc<Offload>) -> Result<Self, TrustError> {
        let anchor = match &trust.nitro_root {
            Some(pem) => TrustAnchor::from_pem(pem).map_err(TrustError::Nitro)?,
            None => TrustAnchor::aws_nitro_g1(),
        };
        let tpm = match &trust.gcp_tpm_root {
            Some(der) => tpm::Verifier::with_root(der).map_err(TrustError::Tpm)?,
            None => tpm::Verifier::default(),
        };
        let tdx = match &trust.tdx_root {
            Some(der) => attestation::tdx::Verifier::with_root(der),
            None => attestation::tdx::Verifier::new(),
        };
        let tls = client::public_tls().map_err(TrustError::Tls)?;
        Ok(Self {
            nitro: attestation::Verifier::new(anchor).with_chain_cache(CACHED_CHAINS),
            tdx,
            tpm,
            pccs: Pccs::new(trust.pccs, Arc::clone(&tls), trust.fetch_timeout),
            gcp: GcpPki::new(trust.gcp_places, tls, trust.fetch_timeout),
            references: Arc::new(trust.references),
            offload,
        })
    }

    /// Verifies the evidence in a certificate, which must speak for the certificate's key; `None` when there is none.
    ///
    /// # Errors
    ///
    /// [`Error`], with the text for the client.
    pub(crate) async fn certificate(
        self: &Arc<Self>,
        certificate: Vec<u8>,
        now: UnixMillis,
    ) -> Result<Option<ClientEvidence>, Error> {
        let attester = Arc::clone(self);
        let step = self.offload.run(move || {
            let Some((attestation, spki)) = evidence_in(&certificate)? else { return Ok(Step::NoEvidence) };
            attester.first_look(attestation, &report_data::ratls_cert(&spki), now)
        });
        match step.await?? {
            Step::NoEvidence => Ok(None),
            Step::Verified(evidence) => Ok(Some(*evidence)),
            Step::Fetch(attestation) => self.fetch_and_verify(*attestation, now).await.map(Some),
        }
    }

    /// Verifies evidence that must be over `report_data`.
    ///
    /// # Errors
    ///
    /// As [`certificate`](Self::certificate).
    pub(crate) async fn evidence(
        self: &Arc<Self>,
        attestation: Attestation,
        report_data: [u8; 64],
        now: UnixMillis,
    ) -> Result<ClientEvidence, Error> {
        let attester = Arc::clone(self);
        let step = self.offload.run(move || attester.first_look(attestation, &report_data, now));
        match step.await?? {
            // A first look at an attestation never finds none.
            Step::NoEvidence => Err(Error::Platform("none")),
            Step::Verified(evidence) => Ok(*evidence),
            Step::Fetch(attestation) => self.fetch_and_verify(*attestation, now).await,
        }
    }

    /// Everything that needs nothing from elsewhere.
    fn first_look(
        &self,
        attestation: Attestation,
        expected: &[u8; 64],
        now: UnixMillis,
    ) -> Result<Step, Error> {
        if attestation.report_data != *expected {
            return Err(Error::ReportData);
        }
        if let Stack::DstackPod { report_data_payload } = &attestation.stack
            && attestation.report_data != report_data::app_data(report_data_payload.as_bytes())
        {
            return Err(Error::Pod);
        }
        match &attestation.platform {
            PlatformEvidence::NitroEnclave { nsm_quote } => {
                let document = self.nitro(nsm_quote, &attestation.report_data, now)?;
                Ok(Step::Verified(Box::new(self.verified(Verified::Nitro(Box::new(document)), attestation))))
            }
            PlatformEvidence::Tdx(_) | PlatformEvidence::GcpTdx(..) => Ok(Step::Fetch(Box::new(attestation))),
            other @ (PlatformEvidence::SevSnp { .. } | PlatformEvidence::AwsNitroTpm { .. }) => {
                Err(Error::Platform(other.kind()))
            }
        }
    }

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
        let verified = self.nitro.verify(&document, now).map_err(Error::Document)?;
        if verified.is_debug() {
            return Err(Error::Debug.into());
        }
        let appraised = verified.appraise(binding).map_err(|error| match error {
            attestation::Error::Binding { .. } => rpc::Error::Sealed(sealed::Error::NotBound),
            other => Error::Document(other).into(),
        })?;
        let os_image_hash = appraised.os_image_hash();
        // In the form that the rest of the way knows; no report data binds anything here.
        let mut attestation = Attestation::nitro(document, Some(app_id), [0; 64], os_image_hash.as_bytes());
        if *instance_id != InstanceId::NONE {
            attestation.runtime_events.push(RuntimeEvent::new("instance-id", instance_id.as_bytes()));
        }
        Ok(self.verified(Verified::Nitro(Box::new(appraised)), attestation))
    }

    fn nitro(
        &self,
        nsm_quote: &[u8],
        user_data: &[u8; 64],
        now: UnixMillis,
    ) -> Result<AppraisedDocument, Error> {
        let verified = self.nitro.verify(nsm_quote, now).map_err(Error::Document)?;
        if verified.is_debug() {
            return Err(Error::Debug);
        }
        if verified.user_data() != Some(user_data.as_slice()) {
            return Err(Error::UserData);
        }
        let policy = Policy::any_image_that_caller_authorises().with_user_data(user_data);
        verified.appraise(&policy).map_err(Error::Document)
    }

    /// Verifies TDX evidence; once more with newly fetched collateral when what was remembered does not do.
    async fn fetch_and_verify(
        self: &Arc<Self>,
        attestation: Attestation,
        now: UnixMillis,
    ) -> Result<ClientEvidence, Error> {
        let attestation = Arc::new(attestation);
        let started = Instant::now();
        let verified = match self.with_collateral(&attestation, Need::Any, now).await {
            Err(
                Error::Tdx(attestation::tdx::Error::Unverified { .. }) | Error::Tpm(tpm::Error::Chain { .. }),
            ) => self.with_collateral(&attestation, Need::After(started), now).await?,
            other => other?,
        };
        Ok(self.verified(verified, Arc::unwrap_or_clone(attestation)))
    }

    async fn with_collateral(
        self: &Arc<Self>,
        attestation: &Arc<Attestation>,
        need: Need,
        now: UnixMillis,
    ) -> Result<Verified, Error> {
        let kind = attestation.platform.kind();
        let quote = &attestation.platform.tdx().ok_or(Error::Platform(kind))?.quote;
        let key = CollateralKey::of(quote).map_err(Error::Tdx)?;
        let collateral = self.pccs.collateral(key, need).await?;
        let chain = match &attestation.platform {
            PlatformEvidence::GcpTdx(_, tpm_quote) => self.gcp.chain(&tpm_quote.ak_cert, need).await?,
            _ => tpm::Chain::default(),
        };
        let (attester, attestation) = (Arc::clone(self), Arc::clone(attestation));
        let verify = move || {
            let quote = attester.tdx_quote(&attestation, &collateral, now)?;
            match &attestation.platform {
                PlatformEvidence::GcpTdx(evidence, tpm_quote) => {
                    let tpm_quote =
                        attester.tpm_quote(&attestation, &evidence.quote, tpm_quote, &chain, now)?;
                    Ok(Verified::GcpTdx(quote, tpm_quote))
                }
                _ => Ok(Verified::Tdx(quote)),
            }
        };
        self.offload.run(verify).await?
    }

    fn tdx_quote(
        &self,
        attestation: &Attestation,
        collateral: &attestation::tdx::Collateral,
        now: UnixMillis,
    ) -> Result<VerifiedQuote, Error> {
        let kind = attestation.platform.kind();
        let evidence = attestation.platform.tdx().ok_or(Error::Platform(kind))?;
        let quote = self.tdx.verify(&evidence.quote, collateral, now).map_err(Error::Tdx)?;
        if quote.tcb_status() == TcbStatus::Revoked {
            return Err(Error::Tdx(attestation::tdx::Error::TcbStatus { actual: TcbStatus::Revoked }));
        }
        let report = quote.report();
        if report.report_data != ReportData(attestation.report_data) {
            return Err(Error::ReportData);
        }
        if report.rtmrs[3].0 != runtime_events::rtmr3(&attestation.runtime_events, Moment::Now) {
            return Err(Error::Events { register: "RTMR3" });
        }
        Ok(quote)
    }

    fn tpm_quote(
        &self,
        attestation: &Attestation,
        tdx_quote: &[u8],
        quote: &TpmQuote,
        chain: &tpm::Chain,
        now: UnixMillis,
    ) -> Result<VerifiedTpmQuote, Error> {
        if quote.platform != TpmPlatform::Gcp {
            return Err(Error::Platform("another TPM than Google's"));
        }
        let parts = tpm::TpmQuote {
            message: &quote.message,
            signature: &quote.signature,
            pcrs: quote.pcr_values.iter().map(|pcr| (pcr.index, pcr.value.as_slice())).collect(),
            ak_cert: &quote.ak_cert,
            events: quote
                .event_log
                .iter()
                .map(|event| tpm::Event { pcr: event.pcr_index, digest: &event.digest })
                .collect(),
        };
        let verified = self.tpm.verify(&parts, chain, now).map_err(Error::Tpm)?;
        if verified.qualifying_data() != Sha256::digest(tdx_quote).as_slice() {
            return Err(Error::Qualifying);
        }
        let runtime = verified.pcr(14).ok_or(Error::NoPcr(14))?;
        if *runtime != runtime_events::pcr14(&attestation.runtime_events, Moment::Now) {
            return Err(Error::Events { register: "PCR14" });
        }
        Ok(verified)
    }

    fn verified(&self, platform: Verified, attestation: Attestation) -> ClientEvidence {
        ClientEvidence { platform, attestation, references: Arc::clone(&self.references) }
    }
}

/// The attestation in a certificate, in its current or its legacy form, and the certificate's key.
fn evidence_in(certificate: &[u8]) -> Result<Option<(Attestation, Vec<u8>)>, Error> {
    let contents = CertificateContents::decode(certificate).map_err(Error::Certificate)?;
    let attestation = match (contents.attestation, contents.legacy_quote) {
        (Some(encoded), _) => {
            VersionedAttestation::decode(&encoded).map_err(Error::Decode)?.into_attestation()
        }
        (None, Some(quote)) => {
            let log = contents.legacy_event_log.ok_or_else(|| Error::EventLog("it is missing".into()))?;
            legacy::attestation(quote, &log)?
        }
        (None, None) => return Ok(None),
    };
    Ok(Some((attestation, contents.spki_der)))
}

/// The attestation in a signing request of version 1.
///
/// # Errors
///
/// [`Error::EventLog`], [`Error::Tdx`].
pub(crate) fn legacy_attestation(quote: Vec<u8>, event_log: &[u8]) -> Result<Attestation, Error> {
    legacy::attestation(quote, event_log)
}

impl ClientEvidence {
    /// Name of the platform in `teeVariant`.
    pub(crate) fn tee_variant(&self) -> &'static str {
        match &self.platform {
            Verified::Nitro(_) => kms_protocol::wire::webhook::TEE_VARIANT_NITRO,
            Verified::Tdx(_) => tdx::TEE_VARIANT_TDX,
            Verified::GcpTdx(..) => tdx::TEE_VARIANT_GCP_TDX,
        }
    }

    /// The raw device id, whose hash the boot info holds.
    pub(crate) fn raw_device_id(&self) -> Vec<u8> {
        match &self.platform {
            Verified::Nitro(document) => DeviceIdRule::Upstream.raw(document.module_id()).as_bytes().to_vec(),
            Verified::Tdx(quote) | Verified::GcpTdx(quote, _) => quote.ppid().to_vec(),
        }
    }

    /// Checks what the client claims about itself against its evidence; `requested_config` is the request's
    /// `vm_config`.
    ///
    /// # Errors
    ///
    /// [`Error::ImageHash`] and [`Error::Image`] when the claimed image is not the measured one, and others about the
    /// claims.
    pub fn into_client(self, requested_config: &str, moment: Moment) -> Result<AttestedClient, Error> {
        let config = Config::effective(requested_config, &self.attestation.config).map_err(Error::Config)?;
        let (os_image_hash, boot_info) = self.boot_info(&config, moment)?;
        let app_id = AppId::try_from(self.attestation.app_id()).map_err(|_| Error::AppId)?;
        let instance_id =
            InstanceId::try_from(self.attestation.instance_id()).map_err(|_| Error::InstanceId)?;
        let (registers, module_id) = match &self.platform {
            Verified::Nitro(document) => {
                (document.pcrs().map(|(index, pcr)| (index, *pcr)).collect(), document.module_id().to_owned())
            }
            Verified::Tdx(_) | Verified::GcpTdx(..) => (Vec::new(), String::new()),
        };
        let attestation = self.attestation;
        let evidence = crate::audit::sha256(attestation.platform.signed());
        Ok(AttestedClient {
            os_image_hash,
            app_id,
            instance_id,
            registers,
            module_id,
            boot_info,
            attestation,
            evidence,
        })
    }

    fn boot_info(&self, config: &Config, moment: Moment) -> Result<(OsImageHash, BootInfo), Error> {
        let attestation = &self.attestation;
        match &self.platform {
            Verified::Nitro(document) => {
                let computed = document.os_image_hash();
                if config.os_image_hash != computed.as_bytes() {
                    // Somebody else's bytes: enough of them to see what went wrong.
                    let claimed = config.os_image_hash.iter().copied().take(64).collect();
                    return Err(Error::ImageHash { claimed, computed });
                }
                let mut info = nitro::boot_info(
                    computed.as_bytes(),
                    document.module_id(),
                    DeviceIdRule::Upstream,
                    attestation,
                );
                if moment == Moment::Boot {
                    info.key_provider_info.clear();
                }
                Ok((computed, info))
            }
            Verified::Tdx(quote) => {
                let registers = registers(quote);
                let hash = self.references.check(&config.os_image_hash, &registers).map_err(Error::Image)?;
                let info = tdx::tdx_boot_info(&registers, tcb(quote), &hash, attestation, moment);
                Ok((OsImageHash::new(hash), info))
            }
            Verified::GcpTdx(quote, tpm_quote) => {
                let pcr0 = tpm_quote.pcr(0).ok_or(Error::NoPcr(0))?;
                let pcr2 = tpm_quote.pcr(2).ok_or(Error::NoPcr(2))?;
                let hash = self.gcp_image(config, pcr0)?;
                let info = tdx::gcp_boot_info(pcr0, pcr2, tcb(quote), &hash, attestation, moment);
                Ok((OsImageHash::new(hash), info))
            }
        }
    }

    /// The image hash that a Google machine's measured boot leads to.
    fn gcp_image(&self, config: &Config, pcr0: &[u8; 32]) -> Result<[u8; 32], Error> {
        let refused = |what: String| Error::Image(what);
        if *pcr0 != GCP_FIRMWARE_PCR0 {
            return Err(refused(format!("PCR 0 mismatch: expected GCP OVMF v2, got {}", hex::encode(pcr0))));
        }
        let document = config
            .gcp_measurement
            .as_ref()
            .ok_or_else(|| refused("gcp tdx attestation requires vm_config.gcp_measurement".into()))?;
        let expected = document
            .boot_image_digest(&config.os_image_hash)
            .map_err(|error| refused(format!("gcp measurement material: {error}")))?;
        let PlatformEvidence::GcpTdx(_, tpm_quote) = &self.attestation.platform else {
            return Err(Error::Platform(self.attestation.platform.kind()));
        };
        // The log was replayed against the signed PCR2, so its events are the firmware's.
        let measured = tpm_quote.event_log.iter().filter(|event| event.pcr_index == 2).nth(GCP_IMAGE_EVENT);
        let measured = measured.ok_or_else(|| refused("Event 28 not found".into()))?;
        if measured.digest != expected {
            let (expected, actual) = (hex::encode(expected), hex::encode(&measured.digest));
            return Err(refused(format!("UKI hash mismatch: expected={expected}, actual={actual}")));
        }
        config
            .os_image_hash
            .as_slice()
            .try_into()
            .map_err(|_| refused("os_image_hash must be 32 bytes".into()))
    }
}

fn registers(quote: &VerifiedQuote) -> TdRegisters {
    let report = quote.report();
    let [rtmr0, rtmr1, rtmr2, _] = report.rtmrs;
    TdRegisters {
        mrtd: report.mrtd.0,
        rtmrs: [rtmr0.0, rtmr1.0, rtmr2.0],
        owner: [report.mr_config_id.0, report.mr_owner.0, report.mr_owner_config.0],
    }
}

fn tcb(quote: &VerifiedQuote) -> Tcb {
    Tcb {
        status: quote.tcb_status().to_string(),
        advisories: quote.advisories().to_vec(),
        ppid: quote.ppid().to_vec(),
    }
}

#[cfg(test)]
mod tests;
