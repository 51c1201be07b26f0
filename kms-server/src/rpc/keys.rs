//! `GetAppKey`, `GetKmsKey`, `GetAppEnvEncryptPubKey`.

use std::sync::Arc;

use kms_protocol::derive::{sign_app_key, sign_env_public_key_v0, sign_env_public_key_v1};
use kms_protocol::runtime_events::Moment;
use kms_protocol::wire::{
    AppId, AppKeyResponse, GetAppKeyRequest, GetKmsKeyRequest, KmsKeyResponse, KmsKeys, PublicKeyResponse,
};
use tracing::info;

use super::{Error, Kms};
use crate::SealedRelease;
use crate::attest::{AttestedClient, ClientEvidence};
use crate::authorise::{Grant, Purpose};

impl Kms {
    pub(super) async fn app_key(
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
        self.release(evidence.ok_or(Error::NoAppAttestation)?, &request.vm_config).await
    }

    /// From verified evidence to keys, however the evidence came.
    pub(crate) async fn release(
        self: &Arc<Self>,
        evidence: ClientEvidence,
        vm_config: &str,
    ) -> Result<AppKeyResponse, Error> {
        self.ensure_self_allowed().await?;
        let client = evidence.into_client(vm_config, Moment::Now)?;
        self.ensure_release(&client)?;
        // Upstream asks before it checks the image; here the authoriser never hears of an image that was not measured.
        let grant = self.authorise(Purpose::App, &client).await.map_err(Error::AppRefused)?;
        info!(app = %client.app_id, image = %client.os_image_hash, module_id = client.module_id, "released app keys");
        let kms = Arc::clone(self);
        self.offload.run(move || kms.derive_app_keys(&client, grant)).await?
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

    /// The root keys, for another KMS that the authoriser knows.
    pub(super) async fn kms_key(
        self: &Arc<Self>,
        request: &GetKmsKeyRequest,
        evidence: Option<ClientEvidence>,
    ) -> Result<KmsKeyResponse, Error> {
        self.ensure_self_allowed().await?;
        let client = evidence.ok_or(Error::NoAttestation)?.into_client(&request.vm_config, Moment::Now)?;
        self.ensure_release(&client)?;
        self.authorise(Purpose::Kms, &client).await.map_err(Error::Refused)?;
        let (image, device) = (client.os_image_hash, hex::encode(&client.boot_info.device_id));
        info!(%image, device, tee = client.boot_info.tee_variant, "released the root keys to another KMS");
        let identity = &self.identity;
        let ca_key = crate::store::key_to_pem(identity.roots.ca()).map_err(Error::Store)?;
        Ok(KmsKeyResponse {
            temp_ca_key: identity.temp_ca_key_pem.to_string(),
            keys: vec![KmsKeys {
                ca_key: ca_key.to_string(),
                k256_key: identity.roots.k256().expose().to_vec(),
            }],
        })
    }

    pub(super) async fn env_encrypt_public_key(
        self: &Arc<Self>,
        request: &AppId,
    ) -> Result<PublicKeyResponse, Error> {
        self.ensure_self_allowed().await?;
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
}
