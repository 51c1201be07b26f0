//! The authorisation service behind upstream's webhook contract (reference §6.6).
//!
//! One request, one deadline for all of it, no retry, an answer of bounded size. The reason in it was written by
//! whoever deployed a contract, so it is cut between characters and stripped of control characters before it goes
//! anywhere.

use std::path::PathBuf;
use std::time::Duration;

use hyper::Method;
use kms_protocol::wire::webhook::{
    AuthInfo, BOOT_AUTH_APP, BOOT_AUTH_KMS, BootInfoKeys, BootResponse, bounded_reason,
};
use serde::de::DeserializeOwned;

use super::{Authoriser, Grant, Pending, Purpose, Question, Refusal};
use crate::fetch::{BaseUrl, Client, TrustError};
use crate::text::chain;

/// Longest answer. A decision has three short fields; a longer answer is a fault or an attack.
const MAX_ANSWER: usize = 64 << 10;
/// Sent as upstream does, for services that look at it.
const AGENT: &str = concat!("dstack-kms/", env!("CARGO_PKG_VERSION"));

/// Where the service is, and how it is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebhookConfig {
    /// The base of its addresses.
    pub url: BaseUrl,
    /// For one answer, from the connection attempt to the last byte.
    pub timeout: Duration,
    /// PEM file of the only roots an `https` service may have; the system's when there is none.
    pub root_ca: Option<PathBuf>,
}

/// A client of the authorisation service.
pub struct Webhook {
    client: Client,
}

impl Webhook {
    /// Reads the roots it needs, so it belongs on a blocking thread.
    ///
    /// # Errors
    ///
    /// When an `https` service could not be trusted.
    pub fn new(config: WebhookConfig) -> Result<Self, TrustError> {
        let WebhookConfig { url, timeout, root_ca } = config;
        Ok(Self { client: Client::new(url, root_ca.as_deref(), AGENT, timeout, MAX_ANSWER)? })
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        suffix: &str,
        body: Vec<u8>,
    ) -> Result<T, Refusal> {
        let unavailable =
            |what: &str| Refusal::unavailable(&format!("auth api {}/{suffix} {what}", self.client.name()));
        let content_type = (method == Method::POST).then_some("application/json");
        let (status, body) = self
            .client
            .ask(method, suffix, content_type, body)
            .await
            .map_err(|error| unavailable(&chain(&error)))?;
        if !status.is_success() {
            return Err(unavailable(&format!("returned {status}: {}", String::from_utf8_lossy(&body))));
        }
        serde_json::from_slice(&body)
            .map_err(|error| unavailable(&format!("gave an unexpected answer: {error}")))
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
