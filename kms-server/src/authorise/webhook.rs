//! The authorisation service behind upstream's webhook contract (reference §6.6).
//!
//! One request, one deadline for all of it, no retry, an answer of bounded size. The reason in it was written by
//! whoever deployed a contract, so it is cut between characters and stripped of control characters before it goes
//! anywhere.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::Method;
use kms_protocol::wire::webhook::{
    AuthInfo, BOOT_AUTH_APP, BOOT_AUTH_KMS, BootInfoKeys, BootResponse, bounded_reason,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use serde::de::DeserializeOwned;

use super::{Authoriser, Grant, Pending, Purpose, Question, Refusal};
use crate::client::{self, Url};
use command_line::chain;

/// Longest answer. A decision has three short fields; a longer answer is a fault or an attack.
const MAX_ANSWER: usize = 64 << 10;

/// Where the service is: an `http://` or `https://` URL without user name and query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebhookUrl(Url);

impl WebhookUrl {
    /// Splits the URL.
    ///
    /// # Errors
    ///
    /// What was expected instead, for a message.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let url = Url::parse(text)?;
        if url.path.contains('?') { Err("a URL without a query") } else { Ok(Self(url)) }
    }

    /// Whether questions go over TLS.
    #[must_use]
    pub fn is_https(&self) -> bool {
        self.0.tls
    }

    /// Scheme, host and port: the part that may be shown. The path may be a capability.
    #[must_use]
    pub fn name(&self) -> String {
        let scheme = if self.0.tls { "https" } else { "http" };
        format!("{scheme}://{}", self.0.authority)
    }
}

/// Where the service is, and how it is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebhookConfig {
    /// The base of its addresses.
    pub url: WebhookUrl,
    /// For one answer, from the connection attempt to the last byte.
    pub timeout: Duration,
    /// PEM file of the only roots an `https` service may have; the public ones when there is none.
    pub root_ca: Option<PathBuf>,
}

/// Why the service could not be trusted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrustError {
    /// The file of roots cannot be read, or is not PEM.
    #[error("cannot read certificates from {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: rustls_pki_types::pem::Error,
    },
    /// There is nobody to trust.
    #[error("no certificates in {}", path.display())]
    NoRoots {
        /// Which file.
        path: PathBuf,
    },
    /// A certificate cannot be a root, or TLS cannot be set up.
    #[error("cannot trust its certificates")]
    Tls(#[from] rustls::Error),
}

/// A client of the authorisation service.
pub struct Webhook {
    url: WebhookUrl,
    timeout: Duration,
    tls: Arc<rustls::ClientConfig>,
}

impl Webhook {
    /// Reads the roots it needs, so it belongs on a blocking thread.
    ///
    /// # Errors
    ///
    /// When an `https` service could not be trusted.
    pub fn new(config: WebhookConfig) -> Result<Self, TrustError> {
        let WebhookConfig { url, timeout, root_ca } = config;
        let tls = match root_ca {
            Some(path) => client::tls(roots(&path)?)?,
            None => client::public_tls()?,
        };
        Ok(Self { url, timeout, tls })
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        suffix: &str,
        body: Vec<u8>,
    ) -> Result<T, Refusal> {
        let unavailable =
            |what: &str| Refusal::unavailable(&format!("auth api {}/{suffix} {what}", self.url.name()));
        let url = self.url.0.join(suffix);
        let answer = client::send(&url, &self.tls, method, Bytes::from(body), MAX_ANSWER, self.timeout)
            .await
            .map_err(|error| unavailable(&chain(&error)))?;
        if !answer.status.is_success() {
            let text = format!("returned {}: {}", answer.status, String::from_utf8_lossy(&answer.body));
            return Err(unavailable(&text));
        }
        serde_json::from_slice(&answer.body)
            .map_err(|error| unavailable(&format!("gave an unexpected answer: {error}")))
    }
}

fn roots(path: &Path) -> Result<rustls::RootCertStore, TrustError> {
    let certificates = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|source| TrustError::Read { path: path.to_owned(), source })?;
    let mut roots = rustls::RootCertStore::empty();
    for certificate in certificates {
        roots.add(certificate)?;
    }
    if roots.is_empty() { Err(TrustError::NoRoots { path: path.to_owned() }) } else { Ok(roots) }
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
