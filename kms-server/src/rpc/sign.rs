//! `SignCert`: certificates under an app's own CA (reference §7.5).

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use kms_protocol::app_info::AppInfo;
use kms_protocol::attestation_encoding::{Attestation, VersionedAttestation};
use kms_protocol::csr::{CertificateRequest, RequestVersion};
use kms_protocol::report_data;
use kms_protocol::runtime_events::Moment;
use kms_protocol::wire::{SignCertRequest, SignCertResponse};
use ratls::UnixTime;
use ratls::issue::{self, AppLeaf, Ca, KeyPair};
use sha2::{Digest as _, Sha256};
use tracing::info;
use x509_parser::prelude::FromDer as _;
use x509_parser::x509::SubjectPublicKeyInfo;

use super::{Error, Kms};
use crate::attest::{AttestedClient, legacy_attestation};
use crate::authorise::Purpose;

impl Kms {
    pub(super) async fn sign_cert(
        self: &Arc<Self>,
        request: SignCertRequest,
    ) -> Result<SignCertResponse, Error> {
        self.ensure_self_allowed().await?;
        let SignCertRequest { api_version, csr, signature, vm_config } = request;
        if !(1..=2).contains(&api_version) {
            return Err(Error::ApiVersion(api_version));
        }
        let kms = Arc::clone(self);
        // Two parsers and a signature: beside the async threads.
        let parsed = self.offload.run(move || kms.parse_csr(api_version, &csr, &signature)).await?;
        let (csr, attestation) = parsed?;
        let expected = report_data::ratls_cert(&csr.pubkey);
        let now = (self.clock)();
        let evidence = self.attester.evidence(attestation, expected, now).await.map_err(Error::CsrQuote)?;
        let client = evidence.into_client(&vm_config, Moment::Boot)?;
        self.ensure_release(&client)?;
        self.authorise(Purpose::App, &client).await.map_err(Error::Refused)?;
        info!(app = %client.app_id, image = %client.os_image_hash, subject = ?csr.subject, "signed a certificate");
        let now = UnixTime::since_unix_epoch(Duration::from_millis(now.0));
        let kms = Arc::clone(self);
        self.offload.run(move || kms.issue(&client, csr, now)).await?
    }

    fn parse_csr(
        &self,
        api_version: u32,
        csr: &[u8],
        signature: &[u8],
    ) -> Result<(CertificateRequest, Attestation), Error> {
        let request = CertificateRequest::decode(api_version, csr).map_err(Error::Csr)?;
        // Upstream verifies over its own encoding of what it read, so another encoding of the same never passed.
        let (rest, key) = SubjectPublicKeyInfo::from_der(&request.pubkey).map_err(|_| Error::CsrSignature)?;
        if !rest.is_empty() || request.encode() != csr {
            return Err(Error::CsrSignature);
        }
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &key.subject_public_key.data)
            .verify(csr, signature)
            .map_err(|_| Error::CsrSignature)?;
        if let Some(name) = request.subject_alt_names.iter().find(|name| self.is_own_name(name)) {
            return Err(Error::OwnName(name.clone()));
        }
        let attestation = match &request.version {
            RequestVersion::V1 { quote, event_log } => {
                legacy_attestation(quote.clone(), event_log).map_err(Error::CsrQuote)?
            }
            RequestVersion::V2 { attestation, .. } => {
                VersionedAttestation::decode(attestation).map_err(Error::Csr)?.into_attestation()
            }
        };
        Ok((request, attestation))
    }

    /// Whether a certificate for that name could be taken for this KMS's. Clients of upstream's look at nothing but the
    /// name and the root.
    fn is_own_name(&self, name: &str) -> bool {
        let own = self.identity.domain.as_str();
        let name = name.trim_end_matches('.');
        if let (Ok(name), Ok(own)) = (name.parse::<IpAddr>(), own.parse::<IpAddr>()) {
            return name.to_canonical() == own.to_canonical();
        }
        if let Some(parent) = name.strip_prefix("*.") {
            return own.split_once('.').is_some_and(|(_, rest)| rest.eq_ignore_ascii_case(parent));
        }
        name.eq_ignore_ascii_case(own)
    }

    fn issue(
        &self,
        client: &AttestedClient,
        csr: CertificateRequest,
        now: UnixTime,
    ) -> Result<SignCertResponse, Error> {
        let identity = &self.identity;
        let root_key = KeyPair::from_scalar("root CA", identity.roots.ca()).map_err(Error::Issue)?;
        let root = Ca::new("root CA", identity.root_ca.clone(), root_key).map_err(Error::Issue)?;
        let app_key = KeyPair::from_scalar("App CA", &identity.roots.app_ca_key(&client.app_id)?)
            .map_err(Error::Issue)?;
        let app_ca = issue::app_ca(&root, &app_key, &client.app_id, now).map_err(Error::Issue)?;
        let app_ca_pem = app_ca.pem();
        let app_ca = Ca::new("App CA", app_ca.der().clone(), app_key).map_err(Error::Issue)?;
        let leaf = leaf(client, csr);
        let leaf = issue::app_leaf(&app_ca, &client.app_id, &leaf, now).map_err(Error::Issue)?;
        Ok(SignCertResponse { certificate_chain: vec![leaf.pem(), app_ca_pem, identity.root_ca_pem.clone()] })
    }
}

fn leaf(client: &AttestedClient, csr: CertificateRequest) -> AppLeaf {
    let CertificateRequest {
        pubkey,
        org_name,
        subject,
        subject_alt_names,
        usage_server_auth,
        usage_client_auth,
        ext_quote,
        version,
    } = csr;
    let (app_info, not_before, not_after, attestation) = match version {
        RequestVersion::V1 { .. } => (false, None, None, client.attestation.encode_v0().ok()),
        RequestVersion::V2 { ext_app_info, not_before, not_after, attestation } => {
            (ext_app_info, not_before, not_after, Some(attestation))
        }
    };
    AppLeaf {
        spki_der: pubkey,
        organisation: org_name,
        subject,
        names: subject_alt_names,
        server_auth: usage_server_auth,
        client_auth: usage_client_auth,
        app_info: app_info.then(|| app_info_of(client).encode()),
        attestation: attestation.filter(|_| ext_quote),
        not_before,
        not_after,
    }
}

/// Who the certificate is for. Upstream reads it from the unverified request, where there is no device id.
fn app_info_of(client: &AttestedClient) -> AppInfo {
    let info = &client.boot_info;
    let scripts = client
        .attestation
        .runtime_events
        .iter()
        .take_while(|event| event.event != "system-ready")
        .filter(|event| event.event == "init-script-hash")
        .map(|event| event.payload.clone());
    AppInfo {
        app_id: info.app_id.clone(),
        compose_hash: info.compose_hash.clone(),
        instance_id: info.instance_id.clone(),
        device_id: Sha256::digest(b"").to_vec(),
        mr_system: info.mr_system.clone(),
        mr_aggregated: info.mr_aggregated.clone(),
        os_image_hash: info.os_image_hash.clone(),
        key_provider_info: info.key_provider_info.clone(),
        init_script_hashes: Some(scripts.collect()),
    }
}
