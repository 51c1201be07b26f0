//! `GetMeta` and `GetTempCaCert`.

use kms_protocol::wire::{GetMetaResponse, GetTempCaCertResponse};

use super::{Error, Kms};

impl Kms {
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

    /// The key of the temporary CA is handed to everybody: what counts is the evidence in the certificates it signs.
    pub(super) async fn temp_ca_cert(&self) -> Result<GetTempCaCertResponse, Error> {
        self.ensure_self_allowed().await?;
        Ok(GetTempCaCertResponse {
            temp_ca_cert: self.identity.temp_ca_pem.clone(),
            temp_ca_key: self.identity.temp_ca_key_pem.to_string(),
            ca_cert: self.identity.root_ca_pem.clone(),
        })
    }
}
