//! The authorisation service behind upstream's webhook contract (reference §6.6).
//!
//! One request, one deadline for all of it, no retry, an answer of bounded size. The reason in it was written by
//! whoever deployed a contract, so it is cut between characters and stripped of control characters before it goes
//! anywhere.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::header::{ACCEPT, CONTENT_TYPE, HOST, USER_AGENT};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use kms_protocol::wire::webhook::{
    AuthInfo, BOOT_AUTH_APP, BOOT_AUTH_KMS, BootInfoKeys, BootResponse, bounded_reason,
};
use serde::de::DeserializeOwned;
use tokio::time::timeout;
use transport::Endpoint;

use super::{Authoriser, Grant, Pending, Purpose, Question, Refusal};
use crate::text::chain;

/// Longest answer. A decision has three short fields; a longer answer is a fault or an attack.
const MAX_ANSWER: usize = 64 << 10;
/// Sent as upstream does, for services that look at it.
const AGENT: &str = concat!("dstack-kms/", env!("CARGO_PKG_VERSION"));

/// Where the service is: an `http://` URL, split once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebhookUrl {
    endpoint: Endpoint,
    /// Host and port as in the URL, for the `Host` header.
    authority: String,
    /// Ends with a slash.
    path: String,
    text: String,
}

impl WebhookUrl {
    /// Splits the URL.
    ///
    /// # Errors
    ///
    /// What was expected instead, for a message.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let uri: hyper::Uri = text.parse().map_err(|_| "a URL such as http://auth-api:8000")?;
        if uri.scheme_str() != Some("http") {
            return Err("an http:// URL (put a TLS proxy on this host in front of a remote service)");
        }
        let authority = uri.authority().ok_or("a URL with a host")?;
        if authority.as_str().contains('@') {
            return Err("a URL without a user name");
        }
        if uri.query().is_some() {
            return Err("a URL without a query");
        }
        let port = authority.port_u16().unwrap_or(80);
        let endpoint = format!("tcp:{}:{port}", authority.host())
            .parse()
            .map_err(|_| "a URL with a host name or an address")?;
        let mut path = uri.path().to_owned();
        if !path.ends_with('/') {
            path.push('/');
        }
        Ok(Self { endpoint, authority: authority.to_string(), path, text: text.to_owned() })
    }
}

/// A client of the authorisation service.
pub struct Webhook {
    url: WebhookUrl,
    deadline: Duration,
}

impl Webhook {
    /// A client that waits at most `deadline` for each answer, from the connection attempt to the last byte.
    #[must_use]
    pub fn new(url: WebhookUrl, deadline: Duration) -> Self {
        Self { url, deadline }
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        suffix: &str,
        body: Vec<u8>,
    ) -> Result<T, Refusal> {
        let url = format!("{}{suffix}", self.url.text_with_slash(suffix));
        let unavailable =
            |what: String| Refusal::Unavailable(bounded_reason(&format!("auth api {url} {what}")));
        let answer = timeout(self.deadline, self.exchange(method, suffix, body)).await;
        let (status, body) = match answer {
            Ok(Ok(answer)) => answer,
            Ok(Err(reason)) => return Err(unavailable(reason)),
            Err(_) => return Err(unavailable(format!("gave no answer within {:?}", self.deadline))),
        };
        if !status.is_success() {
            return Err(unavailable(format!("returned {status}: {}", String::from_utf8_lossy(&body))));
        }
        serde_json::from_slice(&body)
            .map_err(|error| unavailable(format!("gave an unexpected answer: {error}")))
    }

    async fn exchange(
        &self,
        method: Method,
        suffix: &str,
        body: Vec<u8>,
    ) -> Result<(StatusCode, Bytes), String> {
        let request = Request::builder()
            .method(&method)
            .uri(format!("{}{suffix}", self.url.path))
            .header(HOST, &self.url.authority)
            .header(USER_AGENT, AGENT)
            .header(ACCEPT, "*/*");
        let request =
            if method == Method::POST { request.header(CONTENT_TYPE, "application/json") } else { request };
        let request = request
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| format!("cannot be asked: {error}"))?;
        let stream = self
            .url
            .endpoint
            .connect(self.deadline)
            .await
            .map_err(|error| format!("cannot be reached: {}", chain(&error)))?;
        let failed = |error: hyper::Error| format!("broke off: {}", chain(&error));
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
        let exchange = async {
            let response = sender.send_request(request).await.map_err(failed)?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER)
                .collect()
                .await
                .map_err(|error| format!("broke off its answer: {error}"))?;
            Ok((status, body.to_bytes()))
        };
        // The connection lives exactly as long as the exchange: nothing is left behind when the deadline passes.
        tokio::pin!(exchange);
        tokio::select! {
            answer = &mut exchange => answer,
            ended = connection => {
                // The connection may end first with the whole answer already read.
                let answer = exchange.await;
                match (answer, ended) {
                    (Err(_), Err(error)) => Err(failed(error)),
                    (answer, _) => answer,
                }
            }
        }
    }
}

impl WebhookUrl {
    /// The URL as it was written, with the slash that a suffix needs.
    fn text_with_slash(&self, suffix: &str) -> String {
        let slash = if suffix.is_empty() || self.text.ends_with('/') { "" } else { "/" };
        format!("{}{slash}", self.text)
    }
}

impl Authoriser for Webhook {
    fn kind(&self) -> &'static str {
        "webhook"
    }

    fn authorise<'a>(&'a self, question: &'a Question) -> Pending<'a, Result<Grant, Refusal>> {
        Box::pin(async move {
            let suffix = match question.purpose {
                Purpose::App => BOOT_AUTH_APP,
                Purpose::Kms => BOOT_AUTH_KMS,
            };
            let body = question.boot_info.to_json(BootInfoKeys::TeeVariant);
            let answer: BootResponse = self.ask(Method::POST, suffix, body).await?;
            if !answer.is_allowed {
                return Err(Refusal::denied(&answer.reason));
            }
            Ok(Grant { gateway_app_id: bounded_reason(&answer.gateway_app_id) })
        })
    }

    fn describe(&self) -> Pending<'_, Result<Option<AuthInfo>, Refusal>> {
        Box::pin(async move { self.ask(Method::GET, "", Vec::new()).await.map(Some) })
    }
}

#[cfg(test)]
mod tests;
