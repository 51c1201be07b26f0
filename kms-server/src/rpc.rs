//! The methods of the KMS service: messages in, messages out, without HTTP.

use std::sync::Arc;

use attestation::UnixMillis;
use kms_protocol::derive::{
    Error as DeriveError, sign_app_key, sign_env_public_key_v0, sign_env_public_key_v1,
};
use kms_protocol::wire::webhook::BootInfo;
use kms_protocol::wire::{
    AppId, AppKeyResponse, GetAppKeyRequest, GetMetaResponse, GetTempCaCertResponse, PublicKeyResponse,
};
use tracing::info;

use crate::attest::{self, AttestedClient, Attester, ClientEvidence};
use crate::audit::Audit;
use crate::authorise::decider::Decider;
use crate::authorise::{Grant, Purpose, Question, Refusal};
use crate::metrics::{Gauges, Metrics};
use crate::offload::{Busy, Offload};
use crate::sealed::{self, SealedRelease};
use crate::store::Identity;

/// Reads the time.
pub type Clock = Arc<dyn Fn() -> UnixMillis + Send + Sync>;

/// The KMS behind its protocol.
pub(crate) struct Kms {
    pub(crate) identity: Identity,
    pub(crate) decider: Decider,
    pub(crate) audit: Option<Arc<Audit>>,
    pub(crate) attester: Attester,
    pub(crate) nitro_enclave_key_release: bool,
    pub(crate) sealed_release: SealedRelease,
    pub(crate) offload: Offload,
    pub(crate) metrics: Metrics,
    pub(crate) clock: Clock,
}

/// Why a method gives no answer. The text goes to the client.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("Unsupported API version: {0}")]
    ApiVersion(u32),
    #[error("App not allowed: No attestation provided")]
    NoAttestation,
    #[error(transparent)]
    Attest(#[from] attest::Error),
    #[error("App not allowed: key release to Nitro Enclaves is not enabled (core.nitro_enclave_key_release)")]
    ReleaseDisabled,
    #[error("App not allowed: this KMS releases app keys only sealed (GetAppKeySealed, core.sealed_release)")]
    SealedOnly,
    #[error(transparent)]
    Sealed(#[from] sealed::Error),
    #[error("App not allowed: {0}")]
    Refused(#[from] Refusal),
    #[error("app_id must be 20 bytes")]
    AppId,
    #[error("cannot derive keys: {0}")]
    Derive(#[from] DeriveError),
    #[error("too many requests; try again")]
    Busy,
}

impl From<Busy> for Error {
    fn from(_: Busy) -> Self {
        Self::Busy
    }
}

impl Error {
    /// A stable name for logs and metrics.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::ApiVersion(_) => "api-version",
            Self::NoAttestation => "no-attestation",
            Self::Attest(error) => error.name(),
            Self::ReleaseDisabled => "release-disabled",
            Self::SealedOnly => "sealed-only",
            Self::Sealed(error) => error.name(),
            Self::Refused(Refusal::Denied { .. }) => "denied",
            Self::Refused(Refusal::Unavailable(_)) => "authoriser-unavailable",
            Self::AppId => "app-id-length",
            Self::Derive(_) => "derivation",
            Self::Busy => "busy",
        }
    }
}

impl Kms {
    /// Verifies the evidence in a client's certificate, beside the async threads.
    pub(crate) async fn verify_client(
        self: &Arc<Self>,
        certificate: Vec<u8>,
    ) -> Result<Option<ClientEvidence>, Error> {
        let kms = Arc::clone(self);
        let now = (self.clock)();
        let verified = self.offload.run(move || kms.attester.verify(&certificate, now)).await?;
        Ok(verified?)
    }

    pub(crate) async fn app_key(
        self: &Arc<Self>,
        request: &GetAppKeyRequest,
        evidence: Option<ClientEvidence>,
    ) -> Result<AppKeyResponse, Error> {
        if request.api_version > 1 {
            return Err(Error::ApiVersion(request.api_version));
        }
        if self.sealed_release == SealedRelease::Require {
            return Err(Error::SealedOnly);
        }
        self.release(evidence.ok_or(Error::NoAttestation)?, &request.vm_config).await
    }

    /// From verified evidence to keys, however the evidence came.
    pub(crate) async fn release(
        self: &Arc<Self>,
        evidence: ClientEvidence,
        vm_config: &str,
    ) -> Result<AppKeyResponse, Error> {
        let (client, boot_info) = evidence.into_client(vm_config)?;
        if !self.nitro_enclave_key_release {
            return Err(Error::ReleaseDisabled);
        }
        // Upstream asks before it checks the image; here the authoriser never hears of an image that was not measured.
        let grant = self.authorise(&client, boot_info).await?;
        let app = client.app_id;
        info!(%app, image = %client.os_image_hash, module_id = client.document.module_id(), "released app keys");
        let kms = Arc::clone(self);
        self.offload.run(move || kms.derive_app_keys(&client, grant)).await?
    }

    async fn authorise(&self, client: &AttestedClient, boot_info: BootInfo) -> Result<Grant, Error> {
        let registers = client.document.pcrs().map(|(index, pcr)| (index, *pcr)).collect();
        let evidence = Some(client.evidence);
        let question = Question { purpose: Purpose::App, boot_info, registers, evidence };
        let answer = self.decider.decide(question).await;
        if let Err(refusal) = &answer {
            info!(app = %client.app_id, image = %client.os_image_hash, %refusal, "not authorised");
        }
        Ok(answer?)
    }

    fn derive_app_keys(&self, client: &AttestedClient, grant: Grant) -> Result<AppKeyResponse, Error> {
        let roots = &self.identity.roots;
        let (app, instance) = (&client.app_id, &client.instance_id);
        let k256_key = roots.app_k256_key(app)?;
        let k256_signature = sign_app_key(roots, app, &k256_key.public_key()?);
        Ok(AppKeyResponse {
            ca_cert: self.identity.root_ca_pem.clone(),
            disk_crypt_key: roots.disk_crypt_key(app, instance)?.expose().to_vec(),
            env_crypt_key: roots.env_crypt_key(app)?.expose().to_vec(),
            k256_key: k256_key.expose().to_vec(),
            k256_signature: k256_signature.as_bytes().to_vec(),
            tproxy_app_id: grant.gateway_app_id.clone(),
            gateway_app_id: grant.gateway_app_id,
            os_image_hash: client.os_image_hash.as_bytes().to_vec(),
        })
    }

    pub(crate) async fn env_encrypt_public_key(
        self: &Arc<Self>,
        request: &AppId,
    ) -> Result<PublicKeyResponse, Error> {
        let app = kms_protocol::AppId::try_from(request.app_id.as_slice()).map_err(|_| Error::AppId)?;
        let timestamp = (self.clock)().as_secs();
        let kms = Arc::clone(self);
        let derive = move || {
            let roots = &kms.identity.roots;
            let public_key = roots.env_crypt_key(&app)?.public_key();
            Ok(PublicKeyResponse {
                public_key: public_key.to_vec(),
                signature: sign_env_public_key_v0(roots, &app, &public_key).as_bytes().to_vec(),
                timestamp,
                signature_v1: sign_env_public_key_v1(roots, &app, timestamp, &public_key).as_bytes().to_vec(),
            })
        };
        self.offload.run(derive).await?
    }

    /// For `/health`: `OK`, and what an operator should look at, a line each.
    pub(crate) fn health(&self) -> String {
        let mut text = "OK".to_owned();
        for it in self.gauges().dependencies.into_iter().filter(|it| !it.is_good()) {
            if it.failures > 0 {
                let paused = if it.paused { ", and is not asked for a while" } else { "" };
                text.push_str(&format!(
                    "\n{}: {} questions in a row without an answer{paused}",
                    it.name, it.failures
                ));
            }
            if let Some(trouble) = it.trouble {
                text.push_str(&format!("\n{}: {trouble}", it.name));
            }
        }
        text
    }

    pub(crate) fn gauges(&self) -> Gauges {
        let (waiting, running) = self.offload.depth();
        let statistics = self.decider.statistics().clone();
        Gauges {
            waiting,
            running,
            decisions: statistics.decisions,
            decision_time: statistics.time,
            dependencies: vec![self.decider.health()],
        }
    }

    /// Answers at once, whatever the authoriser does.
    pub(crate) fn meta(&self) -> GetMetaResponse {
        let is_dev = self.decider.is_dev();
        let description = self.decider.description();
        let described = description.as_ref();
        GetMetaResponse {
            ca_cert: self.identity.root_ca_pem.clone(),
            allow_any_upgrade: is_dev,
            k256_pubkey: self.identity.roots.k256_public_key().as_bytes().to_vec(),
            bootstrap_info: self.identity.bootstrap_info.clone(),
            is_dev,
            gateway_app_id: described.map(|info| info.gateway_app_id.clone()),
            kms_contract_address: described.map(|info| info.kms_contract_addr.clone()),
            chain_id: described.map(|info| info.chain_id),
            app_auth_implementation: described.map(|info| info.app_implementation.clone()),
        }
    }

    pub(crate) fn temp_ca_cert(&self) -> GetTempCaCertResponse {
        GetTempCaCertResponse {
            temp_ca_cert: self.identity.temp_ca_pem.clone(),
            temp_ca_key: self.identity.temp_ca_key_pem.to_string(),
            ca_cert: self.identity.root_ca_pem.clone(),
        }
    }
}
