//! Cloud KMS of Google Cloud, by its REST interface (`cloudkms` v1). Credentials come from where every Google tool takes
//! them (`GOOGLE_APPLICATION_CREDENTIALS`, `gcloud auth application-default login`, the instance's service account).

use std::sync::Arc;
use std::time::Duration;

use alloy::primitives::B256;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use gcp_auth::TokenProvider;
use k256::ecdsa::VerifyingKey;
use k256::pkcs8::DecodePublicKey;
use kms_protocol::wire::webhook::bounded_reason;
use reqwest::{Client, RequestBuilder, StatusCode, Url};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::sync::OnceCell;

use super::remote::{KeyService, KeyServiceError};
use crate::http;

/// The service. Another address comes from the variable that `gcloud` reads for the same purpose.
const SERVICE: &str = "https://cloudkms.googleapis.com/";
/// See [`SERVICE`].
pub(super) const SERVICE_VARIABLE: &str = "CLOUDSDK_API_ENDPOINT_OVERRIDES_CLOUDKMS";
const SCOPES: &[&str] = &["https://www.googleapis.com/auth/cloud-platform"];
/// Longest answer read, in bytes: a key or a signature has some hundred.
const MAX_ANSWER: usize = 64 << 10;
/// The only algorithm whose signatures a chain understands.
const ALGORITHM: &str = "EC_SIGN_SECP256K1_SHA256";
const CREDENTIALS_HINT: &str =
    "set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`";

/// A version of a key of Cloud KMS.
pub(super) struct GcpKey {
    service: Url,
    client: Client,
    /// Found when first needed, so that looking for them is inside of the deadline.
    credentials: OnceCell<Arc<dyn TokenProvider>>,
    path: String,
    name: String,
}

#[derive(Deserialize)]
struct PublicKey {
    #[serde(default)]
    pem: String,
    #[serde(default)]
    algorithm: String,
}

#[derive(Deserialize)]
struct Signed {
    #[serde(default)]
    signature: String,
}

#[derive(Deserialize)]
struct Failure {
    error: Status,
}

#[derive(Deserialize)]
struct Status {
    #[serde(default)]
    status: String,
    #[serde(default)]
    message: String,
}

impl GcpKey {
    /// The key version with this resource name, at the service's usual address or at `service`. Says what is wrong
    /// with either.
    pub(super) fn new(path: String, service: Option<&str>, deadline: Duration) -> Result<Self, String> {
        if !is_key_version(&path) {
            return Err(
                "expected projects/P/locations/L/keyRings/R/cryptoKeys/K/cryptoKeyVersions/V".to_owned()
            );
        }
        let service = Url::parse(service.unwrap_or(SERVICE)).ok();
        let service = service.filter(|it| matches!(it.scheme(), "http" | "https") && it.has_host());
        let service = service.ok_or_else(|| format!("{SERVICE_VARIABLE} is not an http or https URL"))?;
        let client = http::client(deadline).map_err(|error| error.to_string())?;
        let name = format!("Cloud KMS key {path}");
        Ok(Self { service, client, credentials: OnceCell::new(), path, name })
    }

    fn unreachable(&self, what: &'static str, problem: &str, hint: &'static str) -> KeyServiceError {
        let problem = bounded_reason(problem);
        KeyServiceError::Unreachable { key: self.name.clone(), what, problem, hint }
    }

    fn malformed(&self, what: &'static str, problem: impl Into<String>) -> KeyServiceError {
        KeyServiceError::Malformed { key: self.name.clone(), what, problem: problem.into() }
    }

    fn url(&self, suffix: &str) -> Url {
        let mut url = self.service.clone();
        url.set_path(&format!("{}/v1/{}{suffix}", self.service.path().trim_end_matches('/'), self.path));
        url
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        what: &'static str,
        request: RequestBuilder,
    ) -> Result<T, KeyServiceError> {
        let credentials = self.credentials.get_or_try_init(gcp_auth::provider).await;
        let token = match credentials {
            Ok(credentials) => credentials.token(SCOPES).await,
            Err(error) => Err(error),
        };
        let token = token.map_err(|error| self.unreachable(what, &error.to_string(), CREDENTIALS_HINT))?;
        let away = |error: reqwest::Error| {
            self.unreachable(what, &error.without_url().to_string(), "check the way to Cloud KMS")
        };
        let response = request.bearer_auth(token.as_str()).send().await.map_err(away)?;
        let status = response.status();
        let body = http::body(response, MAX_ANSWER).await.map_err(away)?;
        let body = body.ok_or_else(|| self.malformed(what, format!("more than {MAX_ANSWER} bytes")))?;
        match status.is_success() {
            true => serde_json::from_slice(&body).map_err(|error| self.malformed(what, error.to_string())),
            false => Err(self.refused(what, status, &body)),
        }
    }

    fn refused(&self, what: &'static str, status: StatusCode, body: &[u8]) -> KeyServiceError {
        let said = serde_json::from_slice(body).map(|Failure { error }| error);
        let problem = match said {
            Ok(Status { status, message }) => format!("{status}: {message}"),
            Err(_) => format!("HTTP status {status}"),
        };
        let hint = match status {
            StatusCode::UNAUTHORIZED => CREDENTIALS_HINT,
            StatusCode::FORBIDDEN => {
                "the caller needs the roles cloudkms.publicKeyViewer and cloudkms.signer on this key"
            }
            StatusCode::NOT_FOUND => "check the key's name and its version",
            StatusCode::BAD_REQUEST => "check that the key version is enabled and of the right kind",
            _ => "check the key and the service's state",
        };
        KeyServiceError::Refused { key: self.name.clone(), what, problem: bounded_reason(&problem), hint }
    }
}

impl KeyService for GcpKey {
    fn name(&self) -> &str {
        &self.name
    }

    async fn public_key(&self) -> Result<VerifyingKey, KeyServiceError> {
        let what = "its public key";
        let PublicKey { pem, algorithm } = self.ask(what, self.client.get(self.url("/publicKey"))).await?;
        if algorithm != ALGORITHM {
            return Err(KeyServiceError::WrongKind {
                key: self.name.clone(),
                actual: bounded_reason(&algorithm),
                expected: ALGORITHM,
            });
        }
        VerifyingKey::from_public_key_pem(&pem).map_err(|error| self.malformed(what, error.to_string()))
    }

    async fn sign(&self, digest: &B256) -> Result<Vec<u8>, KeyServiceError> {
        let what = "a signature";
        // The field names the kind of digest the key signs; its 32 bytes are taken as they are.
        let body = json!({ "digest": { "sha256": STANDARD.encode(digest) } });
        let Signed { signature } =
            self.ask(what, self.client.post(self.url(":asymmetricSign")).json(&body)).await?;
        STANDARD.decode(signature).map_err(|error| self.malformed(what, error.to_string()))
    }
}

/// Whether `path` has the form that the interface's description asks for, with nothing that means more in a URL.
fn is_key_version(path: &str) -> bool {
    let names = ["projects", "locations", "keyRings", "cryptoKeys", "cryptoKeyVersions"];
    let parts: Vec<&str> = path.split('/').collect();
    let plain =
        |it: &str| !it.is_empty() && it.bytes().all(|it| it.is_ascii_alphanumeric() || b"-_.:".contains(&it));
    parts.len() == 2 * names.len()
        && parts.iter().all(|it| plain(it) && !matches!(*it, "." | ".."))
        && names.iter().zip(parts.iter().step_by(2)).all(|(name, part)| name == part)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "projects/p/locations/europe-west1/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1";

    #[test]
    fn only_full_names_of_key_versions_are_taken() {
        assert!(is_key_version(KEY));
        assert!(is_key_version(&KEY.replace("projects/p/", "projects/example.com:p/")));
        let bad = ["", "k", "projects/p", &KEY[..KEY.len() - 1], &KEY[..KEY.len() - 20]];
        for bad in bad
            .map(str::to_owned)
            .into_iter()
            .chain(["..", "a?b", "a#b", "a%2fb", "a b"].map(|it| KEY.replace("/r/", &format!("/{it}/"))))
        {
            assert!(!is_key_version(&bad), "{bad}");
        }
    }

    #[test]
    fn the_address_of_the_service_can_be_another() {
        let key = |service| GcpKey::new(KEY.to_owned(), service, Duration::from_secs(1));
        assert_eq!(
            key(None).unwrap().url(":asymmetricSign").as_str(),
            format!("https://cloudkms.googleapis.com/v1/{KEY}:asymmetricSign")
        );
        let local = key(Some("http://127.0.0.1:1/")).unwrap();
        assert_eq!(local.url("/publicKey").as_str(), format!("http://127.0.0.1:1/v1/{KEY}/publicKey"));
        assert!(key(Some("ftp://x/")).is_err() && key(Some("nonsense")).is_err());
    }
}
