//! What pulling needs of the OCI distribution protocol: documents and blobs of one repository over HTTP.
//!
//! Every answer is bounded before it is kept, also those of the token service and of refusals, and every wait has a
//! deadline. A password goes nowhere in plain unless the registry itself is on this machine.

use std::time::Duration;

use http_auth::{ChallengeRef, parse_challenges};
use reqwest::header::{ACCEPT, CONTENT_TYPE, WWW_AUTHENTICATE};
use reqwest::{RequestBuilder, Response, StatusCode, Url};
use serde::Deserialize;
use zeroize::Zeroizing;

use crate::credentials::Credentials;
use crate::error::Error;
use crate::oci::MAX_DOCUMENT_LEN;

/// Longest wait for a connection.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest wait for the next bytes.
pub(crate) const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// Longest answer of a token service; tokens of large cloud registries have a few KiB.
const MAX_TOKEN_LEN: u64 = 256 << 10;
/// How much of a refusal is shown.
const MAX_REFUSAL_LEN: u64 = 1 << 10;

/// Manifest and index, in both families.
const DOCUMENTS: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
                         application/vnd.docker.distribution.manifest.list.v2+json, \
                         application/vnd.docker.distribution.manifest.v2+json";

/// A repository in a registry.
pub(crate) struct Repository {
    http: reqwest::Client,
    /// `https://registry/v2/name/`.
    base: Url,
    name: String,
    credentials: Credentials,
    authorization: Option<Authorization>,
}

/// What a registry wanted to see.
enum Authorization {
    /// User and password, as they are.
    Password,
    /// What the token service gave.
    Token(Zeroizing<String>),
}

impl Repository {
    /// Prepares to talk to a registry.
    ///
    /// As container engines do: a registry on this machine may speak plain HTTP, when it has no TLS. What it
    /// delivers is checked against digests all the same.
    pub(crate) async fn open(registry: &str, name: &str, credentials: Credentials) -> Result<Self, Error> {
        let is_local = matches!(host_of(registry), "localhost" | "127.0.0.1" | "[::1]");
        let http = client().https_only(!is_local).build().map_err(|error| failed(registry, &error))?;
        let url = |scheme: &str| {
            Url::parse(&format!("{scheme}://{registry}/v2/{name}/"))
                .map_err(|error| Error::input(registry, error))
        };
        let mut base = url("https")?;
        if is_local && http.get(base.clone()).send().await.is_err_and(|error| error.is_connect()) {
            base = url("http")?;
        }
        Ok(Self { http, base, name: name.to_owned(), credentials, authorization: None })
    }

    /// A manifest or index by tag or digest, as the registry sends it.
    pub(crate) async fn document(&mut self, reference: &str) -> Result<Vec<u8>, Error> {
        let url = self.url("manifests", reference)?;
        let response = self.get(&url, Some(DOCUMENTS)).await?;
        bounded(response, MAX_DOCUMENT_LEN, url.as_str()).await
    }

    /// A blob by digest: `take` gets it piece by piece. The caller checks length and digest.
    pub(crate) async fn blob(
        &mut self,
        digest: &str,
        mut take: impl FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let url = self.url("blobs", digest)?;
        let mut response = self.get(&url, None).await?;
        while let Some(bytes) = response.chunk().await.map_err(|error| failed(url.as_str(), &error))? {
            take(&bytes)?;
        }
        Ok(())
    }

    fn url(&self, kind: &str, reference: &str) -> Result<Url, Error> {
        self.base.join(&format!("{kind}/{reference}")).map_err(|error| Error::input(reference, error))
    }

    /// Asks, and asks once more with what the registry wants to see.
    async fn get(&mut self, url: &Url, accept: Option<&'static str>) -> Result<Response, Error> {
        let mut response = self.send(url, accept).await?;
        if response.status() == StatusCode::UNAUTHORIZED {
            self.authorization = Some(self.authorize(url, &response).await?);
            response = self.send(url, accept).await?;
        }
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        // A refusal that is longer than what is shown, or that ends early, is still a refusal.
        let reason = bounded(response, MAX_REFUSAL_LEN, url.as_str()).await.unwrap_or_default();
        Err(refusal(url.as_str(), status, &reason))
    }

    async fn send(&self, url: &Url, accept: Option<&'static str>) -> Result<Response, Error> {
        let mut request = self.http.get(url.clone());
        if let Some(kinds) = accept {
            request = request.header(ACCEPT, kinds);
        }
        // On a redirect to another host (the usual way to a blob store) reqwest leaves these headers out.
        request = match (&self.authorization, &self.credentials) {
            (Some(Authorization::Token(token)), _) => request.bearer_auth(&**token),
            (Some(Authorization::Password), Credentials::Password(user, password)) => {
                request.basic_auth(user, Some(&**password))
            }
            _ => request,
        };
        request.send().await.map_err(|error| failed(url.as_str(), &error))
    }

    /// What answers the registry's challenge.
    async fn authorize(&self, url: &Url, refused: &Response) -> Result<Authorization, Error> {
        let wanted = refused.headers().get_all(WWW_AUTHENTICATE);
        let wanted: Vec<&str> = wanted.iter().filter_map(|value| value.to_str().ok()).collect();
        let challenges: Vec<ChallengeRef<'_>> =
            wanted.iter().filter_map(|value| parse_challenges(value).ok()).flatten().collect();
        let find =
            |scheme: &str| challenges.iter().find(|challenge| challenge.scheme.eq_ignore_ascii_case(scheme));
        if let Some(challenge) = find("Bearer") {
            return self.token(url, challenge).await;
        }
        match (find("Basic"), &self.credentials) {
            (Some(_), Credentials::Password(..)) => Ok(Authorization::Password),
            (Some(_), _) => Err(refusal(url.as_str(), refused.status(), b"wants a user name and a password")),
            (None, _) => {
                Err(refusal(url.as_str(), refused.status(), b"wants something else than Basic or Bearer"))
            }
        }
    }

    /// Exchanges what we have for a token (distribution spec, token authentication; RFC 6749 for identity tokens).
    async fn token(&self, registry: &Url, challenge: &ChallengeRef<'_>) -> Result<Authorization, Error> {
        #[derive(Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
        }
        let parameter = |name: &str| {
            let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.to_unescaped())
        };
        let realm = parameter("realm").unwrap_or_default();
        let mut service = Url::parse(&realm)
            .map_err(|error| Error::Registry(format!("{registry}: token service {realm:?}: {error}")))?;
        // The client refuses plain HTTP for all registries but local ones; those may not send us elsewhere.
        if service.scheme() != "https" && !is_loopback(&service) {
            let reason = format!("{registry}: the token service {realm} would see the password in plain");
            return Err(Error::Registry(reason));
        }
        let scope = parameter("scope").unwrap_or_else(|| format!("repository:{}:pull", self.name));
        let mut query = vec![("scope", scope)];
        query.extend(parameter("service").map(|name| ("service", name)));
        let request: RequestBuilder = match &self.credentials {
            Credentials::Identity(token) => {
                query.push(("grant_type", "refresh_token".to_owned()));
                query.push(("client_id", env!("CARGO_PKG_NAME").to_owned()));
                let mut form = Url::clone(&service);
                form.query_pairs_mut().clear().extend_pairs(&query).append_pair("refresh_token", token);
                let body = form.query().unwrap_or_default().to_owned();
                self.http.post(service).header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(body)
            }
            Credentials::Password(user, password) => {
                service.query_pairs_mut().extend_pairs(&query);
                self.http.get(service).basic_auth(user, Some(&**password))
            }
            Credentials::Anonymous => {
                service.query_pairs_mut().extend_pairs(&query);
                self.http.get(service)
            }
        };
        let response = request.send().await.map_err(|error| failed(&realm, &error))?;
        let status = response.status();
        let is_success = status.is_success();
        let limit = if is_success { MAX_TOKEN_LEN } else { MAX_REFUSAL_LEN };
        let body = bounded(response, limit, &realm).await;
        if !is_success {
            return Err(refusal(&format!("{realm}: no token"), status, &body.unwrap_or_default()));
        }
        let body = Zeroizing::new(body?);
        let answer: Answer = serde_json::from_slice(&body)
            // The position only: the text around it may be the token.
            .map_err(|error| Error::Registry(format!("{realm}: no token in column {}", error.column())))?;
        let token = answer.token.or(answer.access_token).map(|token| Authorization::Token(token.into()));
        token.ok_or_else(|| Error::Registry(format!("{realm}: an answer without a token")))
    }
}

/// A client with our deadlines.
pub(crate) fn client() -> reqwest::ClientBuilder {
    reqwest::Client::builder().connect_timeout(CONNECT_TIMEOUT).read_timeout(READ_TIMEOUT)
}

/// The whole answer, unless it is longer than `max`.
pub(crate) async fn bounded(mut response: Response, max: u64, object: &str) -> Result<Vec<u8>, Error> {
    let limit = |actual| Error::Limit { object: object.to_owned(), unit: "bytes", actual, max };
    if let Some(announced) = response.content_length().filter(|len| *len > max) {
        return Err(limit(announced));
    }
    let mut body = Vec::new();
    while let Some(bytes) = response.chunk().await.map_err(|error| failed(object, &error))? {
        body.extend_from_slice(&bytes);
        if body.len() as u64 > max {
            return Err(limit(body.len() as u64));
        }
    }
    Ok(body)
}

/// A failed exchange, with its causes; a peer that was silent for too long has a name of its own.
pub(crate) fn failed(object: &str, error: &reqwest::Error) -> Error {
    if error.is_timeout() {
        let limit = if error.is_connect() { CONNECT_TIMEOUT } else { READ_TIMEOUT };
        return Error::Timeout { object: object.to_owned(), seconds: limit.as_secs() };
    }
    Error::Registry(format!("{object}: {}", command_line::chain(error)))
}

fn refusal(object: &str, status: StatusCode, reason: &[u8]) -> Error {
    let text = format!("{object}: {status} {}", shown(reason));
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Error::RegistryDenied(text),
        _ => Error::Registry(text),
    }
}

/// A peer's words, without what could move a terminal's cursor.
fn shown(text: &[u8]) -> String {
    String::from_utf8_lossy(text).chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn host_of(registry: &str) -> &str {
    match registry.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => registry,
    }
}

fn is_loopback(url: &Url) -> bool {
    matches!(url.host_str(), Some("localhost" | "127.0.0.1" | "[::1]"))
}
