//! One call to Google: signed, bounded, repeated, and in time.

use std::time::Duration;

use reqwest::{Method, Response, StatusCode, Url, header};
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use uuid::Uuid;
use zeroize::Zeroizing;

use super::Credentials;
use super::error::{Error, Reason, refusal};
use crate::patience::{Deadline, Pauses};

/// No answer used here is longer: a serial port keeps 1 MiB, a page of a list has 500 entries.
const LONGEST_ANSWER: usize = 16 << 20;
/// One attempt of a call; `wait` on an operation blocks for up to two minutes.
const ATTEMPT: Duration = Duration::from_secs(150);
const CONNECT: Duration = Duration::from_secs(10);
/// A token is asked for again this long after it was made; Google's live an hour.
const TOKEN_LIFE: Duration = Duration::from_secs(50 * 60);

/// Where the services are.
#[derive(Clone, Debug)]
pub struct Endpoints {
    /// Compute Engine, `https://compute.googleapis.com/compute/v1/`.
    pub compute: Url,
    /// Cloud Storage, `https://storage.googleapis.com/`.
    pub storage: Url,
    /// IAM credentials, `https://iamcredentials.googleapis.com/`.
    pub iam_credentials: Url,
}

impl Default for Endpoints {
    fn default() -> Self {
        let google = |address| Url::parse(address).expect("a literal address");
        Self {
            compute: google("https://compute.googleapis.com/compute/v1/"),
            storage: google("https://storage.googleapis.com/"),
            iam_credentials: google("https://iamcredentials.googleapis.com/"),
        }
    }
}

/// A client for one project.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    pub(super) endpoints: Endpoints,
    credentials: Credentials,
    pub(super) project: String,
}

/// An operation as the API answers it.
#[derive(Debug, Deserialize)]
struct Operation {
    name: String,
    status: String,
    error: Option<OperationErrors>,
}

#[derive(Debug, Deserialize)]
struct OperationErrors {
    #[serde(default)]
    errors: Vec<OperationError>,
}

#[derive(Debug, Deserialize)]
struct OperationError {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

impl Client {
    /// A client for `project`.
    ///
    /// # Errors
    ///
    /// [`Error::HttpClient`] when TLS cannot be set up.
    pub fn new(project: &str, endpoints: Endpoints, credentials: Credentials) -> Result<Self, Error> {
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT)
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("keyferry/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(Error::HttpClient)?;
        Ok(Self { http, endpoints, credentials, project: project.to_owned() })
    }

    /// The project.
    #[must_use]
    pub fn project(&self) -> &str {
        &self.project
    }

    /// An address below the project's part of Compute Engine.
    pub(super) fn compute_url(&self, path: &[&str]) -> Url {
        let mut url = self.endpoints.compute.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(["projects", &self.project]).extend(path);
        }
        url
    }

    /// Reads something.
    pub(super) async fn get<T: DeserializeOwned>(
        &self,
        call: &str,
        url: Url,
        deadline: Deadline,
    ) -> Result<T, Error> {
        parse(call, &self.call(call, &Method::GET, &url, None, deadline).await?)
    }

    /// Reads something that may not be there.
    pub(super) async fn find<T: DeserializeOwned>(
        &self,
        call: &str,
        url: Url,
        deadline: Deadline,
    ) -> Result<Option<T>, Error> {
        match self.get(call, url, deadline).await {
            Ok(found) => Ok(Some(found)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Changes something and waits until the change is done. `operations` is the path of the operations it belongs to:
    /// `["global"]` or `["zones", ZONE]`. `body` of `None` is an empty body.
    pub(super) async fn change(
        &self,
        call: &str,
        method: Method,
        mut url: Url,
        body: Option<&(impl Serialize + Sync)>,
        operations: &[&str],
        deadline: Deadline,
    ) -> Result<(), Error> {
        // One id for every repetition: Google carries the change out once.
        let mut id = [0; 16];
        aws_lc_rs::rand::fill(&mut id).map_err(|_| Error::Random)?;
        let id = uuid::Builder::from_random_bytes(id).into_uuid();
        url.query_pairs_mut().append_pair("requestId", &Uuid::to_string(&id));
        let body = body.map(serde_json::to_vec).transpose();
        let body =
            body.map_err(|error| Error::Answer { call: call.to_owned(), problem: error.to_string() })?;
        let answer = self.call(call, &method, &url, body.as_deref(), deadline).await?;
        self.finish(call, parse(call, &answer)?, operations, deadline).await
    }

    /// Waits for an operation. It goes on when a wait is cut, so only the deadline ends this.
    async fn finish(
        &self,
        call: &str,
        mut operation: Operation,
        operations: &[&str],
        deadline: Deadline,
    ) -> Result<(), Error> {
        while operation.status != "DONE" {
            if deadline.passed() {
                return Err(Error::Deadline { call: call.to_owned(), allowed: deadline.allowed() });
            }
            let path = [operations, &["operations", &operation.name, "wait"]].concat();
            let answer = self.call(call, &Method::POST, &self.compute_url(&path), None, deadline).await?;
            operation = parse(call, &answer)?;
        }
        match operation.error.map(|error| error.errors).unwrap_or_default().into_iter().next() {
            None => Ok(()),
            Some(OperationError { code, message }) => {
                Err(Error::Operation { call: call.to_owned(), code, message })
            }
        }
    }

    /// Makes a call until it succeeds, is refused for good, or the deadline passes.
    pub(super) async fn call(
        &self,
        call: &str,
        method: &Method,
        url: &Url,
        json: Option<&[u8]>,
        deadline: Deadline,
    ) -> Result<Vec<u8>, Error> {
        let mut pauses = Pauses::new(Duration::from_millis(500), Duration::from_secs(10));
        loop {
            let error = match self.attempt(call, method, url, json, deadline).await {
                Ok(body) => return Ok(body),
                Err(error) if is_final(&error) => return Err(error),
                Err(error) => error,
            };
            tracing::debug!(call, %error, "repeating a call");
            pauses.pause(deadline).await;
            if deadline.passed() {
                return Err(error);
            }
        }
    }

    async fn attempt(
        &self,
        call: &str,
        method: &Method,
        url: &Url,
        json: Option<&[u8]>,
        deadline: Deadline,
    ) -> Result<Vec<u8>, Error> {
        let token = self.token(deadline).await?;
        let mut request = self.http.request(method.clone(), url.clone()).bearer_auth(token.as_str());
        request = match json {
            Some(body) => request.header(header::CONTENT_TYPE, "application/json").body(body.to_vec()),
            None if *method == Method::POST => request.header(header::CONTENT_LENGTH, 0),
            None => request,
        };
        let answer = self.send(call, request, deadline).await?;
        let status = answer.status();
        let body = read(call, answer, deadline).await?;
        if status.is_success() { Ok(body) } else { Err(refusal(call, status.as_u16(), &body)) }
    }

    /// A request with the caller's token.
    pub(super) async fn request(
        &self,
        method: Method,
        url: Url,
        deadline: Deadline,
    ) -> Result<reqwest::RequestBuilder, Error> {
        let token = self.token(deadline).await?;
        Ok(self.http.request(method, url).bearer_auth(token.as_str()))
    }

    /// Sends a request and waits for the head of the answer.
    pub(super) async fn send(
        &self,
        call: &str,
        request: reqwest::RequestBuilder,
        deadline: Deadline,
    ) -> Result<Response, Error> {
        let sent = request.timeout(deadline.left().min(ATTEMPT)).send().await;
        // The address may hold an upload session, which is as good as a token.
        sent.map_err(|source| Error::Unreachable { call: call.to_owned(), source: source.without_url() })
    }

    async fn token(&self, deadline: Deadline) -> Result<Zeroizing<String>, Error> {
        let late = |_| Error::Deadline { call: "access token".to_owned(), allowed: deadline.allowed() };
        let Some(impersonation) = self.credentials.impersonation() else {
            return timeout(deadline.left(), self.credentials.own_token(false)).await.map_err(late)?;
        };
        let mut current = impersonation.current.lock().await;
        match current.as_ref() {
            Some((token, renewal)) if !renewal.passed() => Ok(Zeroizing::clone(token)),
            _ => {
                let own =
                    timeout(deadline.left(), impersonation.caller.own_token(true)).await.map_err(late)??;
                let token = self.impersonate(&impersonation.account, &own, deadline).await?;
                *current = Some((Zeroizing::clone(&token), Deadline::within(TOKEN_LIFE)));
                Ok(token)
            }
        }
    }

    /// Asks for a token of another account. Source: iamcredentials v1, `generateAccessToken`.
    async fn impersonate(
        &self,
        account: &str,
        own: &str,
        deadline: Deadline,
    ) -> Result<Zeroizing<String>, Error> {
        #[derive(Serialize)]
        struct Ask {
            scope: &'static [&'static str],
            lifetime: &'static str,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Given {
            access_token: String,
        }
        let call = format!("impersonate {account}");
        let mut url = self.endpoints.iam_credentials.clone();
        let account = format!("{account}:generateAccessToken");
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(["v1", "projects", "-", "serviceAccounts", &account]);
        }
        let ask = Ask { scope: Credentials::scopes(), lifetime: "3600s" };
        let body = serde_json::to_vec(&ask);
        let body = body.map_err(|error| Error::Answer { call: call.clone(), problem: error.to_string() })?;
        let request =
            self.http.post(url).bearer_auth(own).header(header::CONTENT_TYPE, "application/json").body(body);
        let answer = self.send(&call, request, deadline).await?;
        let status = answer.status();
        let body = Zeroizing::new(read(&call, answer, deadline).await?);
        match status.is_success() {
            true => parse::<Given>(&call, &body).map(|given| Zeroizing::new(given.access_token)),
            false => Err(refusal(&call, status.as_u16(), &body)),
        }
    }
}

/// Whether repeating cannot help.
pub(super) fn is_final(error: &Error) -> bool {
    match error {
        Error::Unreachable { source, .. } => source.is_builder(),
        Error::Refused { status, reason, .. } => {
            *reason != Reason::RateLimit
                && !StatusCode::from_u16(*status).is_ok_and(|it| it.is_server_error())
        }
        _ => true,
    }
}

/// Reads an answer's body, bounded in size and time.
pub(super) async fn read(call: &str, mut answer: Response, deadline: Deadline) -> Result<Vec<u8>, Error> {
    let mut body = Vec::new();
    loop {
        let chunk = timeout(deadline.left(), answer.chunk()).await;
        let chunk =
            chunk.map_err(|_| Error::Deadline { call: call.to_owned(), allowed: deadline.allowed() })?;
        let chunk = chunk
            .map_err(|source| Error::Unreachable { call: call.to_owned(), source: source.without_url() })?;
        let Some(chunk) = chunk else { return Ok(body) };
        if body.len() + chunk.len() > LONGEST_ANSWER {
            let problem = format!("the answer is longer than {LONGEST_ANSWER} bytes");
            return Err(Error::Answer { call: call.to_owned(), problem });
        }
        body.extend_from_slice(&chunk);
    }
}

/// Reads a JSON answer.
pub(super) fn parse<T: DeserializeOwned>(call: &str, body: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(|error| {
        let json = serde_json::from_slice::<IgnoredAny>(body).is_ok();
        let what = if json { "JSON of another shape" } else { "no JSON" };
        Error::Answer { call: call.to_owned(), problem: format!("the answer is {what}: {error}") }
    })
}
