//! Asking others over HTTP: one connection, one deadline for all of it, an answer of bounded size, no redirects.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::header::{HOST, USER_AGENT};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use transport::Endpoint;

/// An `http://` or `https://` URL without user name and query, split once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseUrl {
    endpoint: Endpoint,
    /// Host and port as in the URL, for the `Host` header.
    authority: String,
    /// Set for `https`.
    server_name: Option<ServerName<'static>>,
    /// Ends with a slash.
    path: String,
}

impl BaseUrl {
    /// Splits the URL.
    ///
    /// # Errors
    ///
    /// What was expected instead, for a message.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let uri: hyper::Uri = text.parse().map_err(|_| "a URL such as http://auth-api:8000")?;
        let authority = uri.authority().ok_or("a URL with a host")?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        let (server_name, default_port) = match uri.scheme_str() {
            Some("http") => (None, 80),
            Some("https") => {
                let name = ServerName::try_from(host.to_owned());
                (Some(name.map_err(|_| "a URL with a host name or an address")?), 443)
            }
            _ => return Err("an http:// or https:// URL"),
        };
        // Neither belongs into messages, and both like to hold secrets.
        if authority.as_str().contains('@') {
            return Err("a URL without a user name");
        }
        if uri.query().is_some() {
            return Err("a URL without a query");
        }
        let port = authority.port_u16().unwrap_or(default_port);
        let endpoint = format!("tcp:{}:{port}", authority.host())
            .parse()
            .map_err(|_| "a URL with a host name or an address")?;
        let mut path = uri.path().to_owned();
        if !path.ends_with('/') {
            path.push('/');
        }
        Ok(Self { endpoint, authority: authority.to_string(), server_name, path })
    }

    /// Whether questions go over TLS.
    #[must_use]
    pub fn is_https(&self) -> bool {
        self.server_name.is_some()
    }

    /// Scheme, host and port: the part that may be shown.
    #[must_use]
    pub fn name(&self) -> String {
        let scheme = if self.is_https() { "https" } else { "http" };
        format!("{scheme}://{}", self.authority)
    }
}

/// Why there is no client.
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
    /// A certificate cannot be a root.
    #[error("cannot trust a certificate of {origin}")]
    Certificate {
        /// Whose.
        origin: String,
        /// Why.
        source: rustls::Error,
    },
    /// There is nobody to trust.
    #[error("no root certificates in {origin}, so no https server could be trusted")]
    NoRoots {
        /// Where.
        origin: String,
    },
    /// TLS cannot be set up.
    #[error("TLS cannot be set up")]
    Tls(#[source] rustls::Error),
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    #[error("gave no answer within {0:?}")]
    Deadline(Duration),
    #[error("cannot be reached")]
    Unreachable(#[source] transport::Error),
    #[error("cannot be asked over TLS")]
    Handshake(#[source] std::io::Error),
    #[error("cannot be asked")]
    Request(#[source] hyper::http::Error),
    #[error("broke off")]
    Broken(#[source] hyper::Error),
    #[error("gave an answer of more than {0} bytes")]
    TooLong(usize),
}

/// A client of one service.
pub(crate) struct Client {
    url: BaseUrl,
    tls: Option<TlsConnector>,
    agent: &'static str,
    /// From the connection attempt to the last byte of the answer.
    deadline: Duration,
    longest_answer: usize,
}

impl Client {
    /// Reads root certificates (`roots`, or the system's) when the URL is `https`, so it belongs on a blocking thread.
    pub(crate) fn new(
        url: BaseUrl,
        roots: Option<&Path>,
        agent: &'static str,
        deadline: Duration,
        longest_answer: usize,
    ) -> Result<Self, TrustError> {
        let tls = if url.is_https() { Some(connector(roots)?) } else { None };
        Ok(Self { url, tls, agent, deadline, longest_answer })
    }

    /// The service, fit to be shown.
    pub(crate) fn name(&self) -> String {
        self.url.name()
    }

    /// Asks once. Cancel safe: nothing is left behind.
    pub(crate) async fn ask(
        &self,
        method: Method,
        suffix: &str,
        content_type: Option<&'static str>,
        body: Vec<u8>,
    ) -> Result<(StatusCode, Bytes), FetchError> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{suffix}", self.url.path))
            .header(HOST, &self.url.authority)
            .header(USER_AGENT, self.agent)
            .header(hyper::header::ACCEPT, "*/*");
        if let Some(content_type) = content_type {
            request = request.header(hyper::header::CONTENT_TYPE, content_type);
        }
        let request = request.body(Full::new(Bytes::from(body))).map_err(FetchError::Request)?;
        let exchange = self.exchange(request);
        timeout(self.deadline, exchange).await.map_err(|_| FetchError::Deadline(self.deadline))?
    }

    async fn exchange(&self, request: Request<Full<Bytes>>) -> Result<(StatusCode, Bytes), FetchError> {
        let stream = self.url.endpoint.connect(self.deadline).await.map_err(FetchError::Unreachable)?;
        match (&self.tls, &self.url.server_name) {
            (Some(tls), Some(name)) => {
                let stream = tls.connect(name.clone(), stream).await.map_err(FetchError::Handshake)?;
                self.converse(stream, request).await
            }
            _ => self.converse(stream, request).await,
        }
    }

    async fn converse(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin,
        request: Request<Full<Bytes>>,
    ) -> Result<(StatusCode, Bytes), FetchError> {
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(FetchError::Broken)?;
        let exchange = async {
            let response = sender.send_request(request).await.map_err(FetchError::Broken)?;
            self.receive(response).await
        };
        // The connection lives exactly as long as the exchange: nothing is left behind when the deadline passes.
        tokio::pin!(exchange);
        tokio::select! {
            answer = &mut exchange => answer,
            ended = connection => {
                // The connection may end first with the whole answer already read.
                let answer = exchange.await;
                match (answer, ended) {
                    (Err(FetchError::Broken(_)), Err(error)) => Err(FetchError::Broken(error)),
                    (answer, _) => answer,
                }
            }
        }
    }

    async fn receive(
        &self,
        response: Response<hyper::body::Incoming>,
    ) -> Result<(StatusCode, Bytes), FetchError> {
        let status = response.status();
        let body = Limited::new(response.into_body(), self.longest_answer).collect().await;
        let body = body.map_err(|error| match error.downcast::<hyper::Error>() {
            Ok(error) => FetchError::Broken(*error),
            Err(error) => {
                debug_assert!(error.is::<LengthLimitError>(), "the other error there is");
                FetchError::TooLong(self.longest_answer)
            }
        })?;
        Ok((status, body.to_bytes()))
    }
}

fn connector(roots: Option<&Path>) -> Result<TlsConnector, TrustError> {
    let origin = roots.map_or_else(|| "the system's store".to_owned(), |path| path.display().to_string());
    let certificates = match roots {
        None => rustls_native_certs::load_native_certs().certs,
        Some(path) => CertificateDer::pem_file_iter(path)
            .and_then(Iterator::collect)
            .map_err(|source| TrustError::Read { path: path.to_owned(), source })?,
    };
    let mut store = rustls::RootCertStore::empty();
    for certificate in certificates {
        match store.add(certificate) {
            Ok(()) => {}
            // A system's store has relics that nobody can use; a file that was named has none.
            Err(_) if roots.is_none() => {}
            Err(source) => return Err(TrustError::Certificate { origin, source }),
        }
    }
    if store.is_empty() {
        return Err(TrustError::NoRoots { origin });
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(TrustError::Tls)?
        .with_root_certificates(store)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_split() {
        let url = BaseUrl::parse("http://auth-api:8000").unwrap();
        assert_eq!((url.path.as_str(), url.is_https()), ("/", false));
        assert_eq!(url.endpoint.to_string(), "tcp:auth-api:8000");
        let url = BaseUrl::parse("https://[2001:db8::1]/a/secret").unwrap();
        assert_eq!((url.path.as_str(), url.is_https()), ("/a/secret/", true));
        assert_eq!(url.endpoint.to_string(), "tcp:[2001:db8::1]:443");
        // The path may be a capability.
        assert_eq!(url.name(), "https://[2001:db8::1]");
        for text in
            ["", "auth-api:8000", "ftp://x", "http://", "http://u:p@x", "http://x/?k=v", "https://a_b c"]
        {
            assert!(BaseUrl::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn roots_that_are_none_are_errors() {
        let directory = tempfile::tempdir().unwrap();
        let empty = directory.path().join("empty.pem");
        std::fs::write(&empty, "").unwrap();
        assert!(matches!(connector(Some(&empty)), Err(TrustError::NoRoots { .. })));
        assert!(matches!(connector(Some(&directory.path().join("absent"))), Err(TrustError::Read { .. })));
    }
}
