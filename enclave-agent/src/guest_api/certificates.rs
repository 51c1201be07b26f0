//! Keys with a certificate from the KMS (`SignCert`): leaf, the app's CA, the KMS's root CA.
//!
//! What the KMS answers is checked before the app sees it: the leaf is for the key it asked about, the CA is this app's,
//! and the root is the one that was trusted when the keys came.

use kms_protocol::csr::{CertificateRequest, RequestVersion};
use kms_protocol::report_data;
use kms_protocol::wire::guest::{DeriveKeyArgs, GetTlsKeyArgs, GetTlsKeyResponse};
use kms_protocol::wire::{Method, SignCertRequest, SignCertResponse, json};
use ratls::client::PinnedRoot;
use ratls::issue::KeyPair;
use ratls::verify_app_chain;

use super::GuestApi;
use super::http::Failure;
use crate::trip::call_once;

/// Version of the signing request that carries a versioned attestation.
const REQUEST_VERSION: u32 = 2;
/// Most alternative names, and longest name, that are passed on.
const MAX_NAMES: usize = 64;
const MAX_NAME: usize = 253;

impl GuestApi {
    /// A fresh key.
    pub(super) async fn tls_key(&self, args: GetTlsKeyArgs) -> Result<GetTlsKeyResponse, Failure> {
        let key = KeyPair::generate().map_err(|error| Failure::internal(&error))?;
        self.certify(key, args).await
    }

    /// A key of the path, or a fresh one.
    pub(super) async fn derive_key(&self, args: DeriveKeyArgs) -> Result<GetTlsKeyResponse, Failure> {
        let DeriveKeyArgs {
            path,
            subject,
            alt_names,
            usage_ra_tls,
            usage_server_auth,
            usage_client_auth,
            random_seed,
        } = args;
        let key = if random_seed {
            KeyPair::generate()
        } else {
            let scalar = self.keys.current().app_keys().k256_key.path_p256(&path);
            let scalar = scalar.map_err(|error| Failure::internal(&error))?;
            KeyPair::from_scalar("key by path", &scalar)
        };
        let certificate = GetTlsKeyArgs {
            subject,
            alt_names,
            usage_ra_tls,
            usage_server_auth,
            usage_client_auth,
            ..GetTlsKeyArgs::default()
        };
        self.certify(key.map_err(|error| Failure::internal(&error))?, certificate).await
    }

    async fn certify(&self, key: KeyPair, args: GetTlsKeyArgs) -> Result<GetTlsKeyResponse, Failure> {
        check(&args)?;
        let spki = key.spki_der();
        let report_data = report_data::ratls_cert(&spki);
        let document = self.document(report_data).await?;
        let attestation = self
            .attestation(&document, report_data)
            .encode_v0()
            .map_err(|error| Failure::internal(&error))?;
        let request = CertificateRequest {
            pubkey: spki.clone(),
            org_name: None,
            subject: args.subject,
            subject_alt_names: args.alt_names,
            usage_server_auth: args.usage_server_auth,
            usage_client_auth: args.usage_client_auth,
            ext_quote: args.usage_ra_tls,
            version: RequestVersion::V2 {
                ext_app_info: args.with_app_info,
                not_before: args.not_before,
                not_after: args.not_after,
                attestation,
            },
        };
        let csr = request.encode();
        let signature = key.sign(&csr).map_err(|error| Failure::internal(&error))?;
        let certificate_chain = self.sign_cert(csr, signature, &spki).await?;
        Ok(GetTlsKeyResponse { key: key.to_pem().to_string(), certificate_chain })
    }

    async fn sign_cert(&self, csr: Vec<u8>, signature: Vec<u8>, spki: &[u8]) -> Result<Vec<String>, Failure> {
        let request =
            SignCertRequest { api_version: REQUEST_VERSION, csr, signature, vm_config: String::new() };
        let keys = self.keys.current();
        let upstream = |error: ratls::Error| Failure::upstream(&error);
        let root = PinnedRoot::from_pem(&keys.app_keys().ca_cert).map_err(upstream)?;
        let answer = call_once(&self.kms, &self.nsm, &root, Method::SignCert, json::encode(&request))
            .await
            .map_err(|error| Failure::upstream(&error))?;
        let SignCertResponse { certificate_chain } =
            json::decode(&answer).map_err(|error| Failure::upstream(&error))?;
        let now = self.kms.time.current_time().ok_or_else(|| Failure::internal(&crate::Error::Clock))?;
        verify_app_chain(&certificate_chain, &root, keys.app_id(), spki, now)
            .map_err(|error| Failure::upstream(&error))?;
        Ok(certificate_chain)
    }
}

fn check(args: &GetTlsKeyArgs) -> Result<(), Failure> {
    if let (Some(not_before), Some(not_after)) = (args.not_before, args.not_after)
        && not_before >= not_after
    {
        return Err(Failure::bad("not_before must be earlier than not_after"));
    }
    if args.alt_names.len() > MAX_NAMES {
        let count = args.alt_names.len();
        return Err(Failure::bad(format!("{count} alternative names, expected at most {MAX_NAMES}")));
    }
    if args.alt_names.iter().chain([&args.subject]).any(|name| name.len() > MAX_NAME) {
        return Err(Failure::bad(format!("a name has more than {MAX_NAME} bytes")));
    }
    Ok(())
}
