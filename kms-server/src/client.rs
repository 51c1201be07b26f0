//! Requests to others: one at a time on a connection of its own, with one deadline for all of it and a bound on the
//! answer.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::header::{ACCEPT, CONTENT_TYPE, HOST, USER_AGENT};
use hyper::{HeaderMap, Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use transport::Endpoint;

use command_line::chain;

/// As upstream says it, for authorisation services that look at it.
const AGENT: &str = concat!("dstack-kms/", env!("CARGO_PKG_VERSION"));

/// An `http://` or `https://` URL, split once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Url {
    pub(crate) tls: bool,
    pub(crate) host: String,
    /// Host and port as in the URL, for the `Host` header.
    pub(crate) authority: String,
    pub(crate) endpoint: Endpoint,
    /// Path and query; starts with a slash.
    pub(crate) path: String,
}

impl Url {
    /// Splits the URL. The error says what was expected instead.
    pub(crate) fn parse(text: &str) -> Result<Self, &'static str> {
        let uri: hyper::Uri = text.parse().map_err(|_| "an http:// or https:// URL")?;
        let tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err("an http:// or https:// URL"),
        };
        let authority = uri.authority().ok_or("a URL with a host")?;
        if authority.as_str().contains('@') {
            return Err("a URL without a user name");
        }
        let port = authority.port_u16().unwrap_or(if tls { 443 } else { 80 });
        let endpoint = format!("tcp:{}:{port}", authority.host())
            .parse()
            .map_err(|_| "a URL with a host name or an address")?;
        Ok(Self {
            tls,
            host: authority.host().trim_matches(['[', ']']).to_owned(),
            authority: authority.to_string(),
            endpoint,
            path: uri.path_and_query().map_or("/", |path| path.as_str()).to_owned(),
        })
    }

    /// The same place with another path below this one's.
    pub(crate) fn join(&self, suffix: &str) -> Self {
        let path = format!("{}/{suffix}", self.path.trim_end_matches('/'));
        Self { path, ..self.clone() }
    }
}

impl std::fmt::Display for Url {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.authority, self.path)
    }
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// A request that is ready to be sent.
#[derive(Debug, Clone)]
pub(crate) struct Ask {
    pub(crate) method: Method,
    /// For the `Host` header.
    pub(crate) authority: String,
    pub(crate) path: String,
    pub(crate) body: Bytes,
    /// Longest answer that is read.
    pub(crate) limit: usize,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot be reached: {}", chain(.0))]
    Connect(transport::Error),
    #[error("TLS: {}", chain(.0))]
    Tls(std::io::Error),
    #[error("the host {0:?} is no name for TLS")]
    Name(String),
    #[error("cannot be asked: {0}")]
    Request(hyper::http::Error),
    #[error("broke off: {}", chain(.0))]
    Broken(hyper::Error),
    #[error("broke off its answer: {0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
    #[error("gave no answer within {0:?}")]
    Deadline(Duration),
    #[error("answered {0}")]
    Status(StatusCode),
}

/// Gets what `url` names, over TLS with `tls` when it says `https`. Not cancel safe, but nothing is left behind.
pub(crate) async fn get(
    url: &Url,
    tls: &Arc<rustls::ClientConfig>,
    limit: usize,
    deadline: Duration,
) -> Result<Answer, Error> {
    let answer = send(url, tls, Method::GET, Bytes::new(), limit, deadline).await?;
    if answer.status.is_success() { Ok(answer) } else { Err(Error::Status(answer.status)) }
}

/// Sends a request to what `url` names and gives the answer, whatever its status. Not cancel safe, but nothing is left
/// behind.
pub(crate) async fn send(
    url: &Url,
    tls: &Arc<rustls::ClientConfig>,
    method: Method,
    body: Bytes,
    limit: usize,
    deadline: Duration,
) -> Result<Answer, Error> {
    let ask = Ask { method, authority: url.authority.clone(), path: url.path.clone(), body, limit };
    let work = async {
        let stream = url.endpoint.connect(deadline).await.map_err(Error::Connect)?;
        if url.tls {
            let name = ServerName::try_from(url.host.clone()).map_err(|_| Error::Name(url.host.clone()))?;
            let stream =
                TlsConnector::from(Arc::clone(tls)).connect(name, stream).await.map_err(Error::Tls)?;
            exchange(stream, ask).await
        } else {
            exchange(stream, ask).await
        }
    };
    timeout(deadline, work).await.unwrap_or(Err(Error::Deadline(deadline)))
}

/// One request and its answer on a stream that is used for nothing else. The caller sets the deadline.
pub(crate) async fn exchange<S>(stream: S, ask: Ask) -> Result<Answer, Error>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let Ask { method, authority, path, body, limit } = ask;
    let mut request = Request::builder()
        .method(&method)
        .uri(path)
        .header(HOST, authority)
        .header(USER_AGENT, AGENT)
        .header(ACCEPT, "*/*");
    if method == Method::POST {
        request = request.header(CONTENT_TYPE, "application/json");
    }
    let request = request.body(Full::new(body)).map_err(Error::Request)?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(Error::Broken)?;
    let exchange = async {
        let response = sender.send_request(request).await.map_err(Error::Broken)?;
        let (parts, body) = response.into_parts();
        let body = Limited::new(body, limit).collect().await.map_err(Error::Body)?;
        Ok(Answer { status: parts.status, headers: parts.headers, body: body.to_bytes() })
    };
    // The connection lives exactly as long as the exchange: nothing is left behind when the deadline passes.
    tokio::pin!(exchange);
    tokio::select! {
        answer = &mut exchange => answer,
        ended = connection => {
            // The connection may end first with the whole answer already read.
            match (exchange.await, ended) {
                (Err(_), Err(error)) => Err(Error::Broken(error)),
                (answer, _) => answer,
            }
        }
    }
}

/// TLS to the public internet: Mozilla's roots, compiled in, so that an image needs no certificate files.
pub(crate) fn public_tls() -> Result<Arc<rustls::ClientConfig>, rustls::Error> {
    tls(rustls::RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.into() })
}

/// TLS to those whom these roots vouch for, and nobody else.
pub(crate) fn tls(roots: rustls::RootCertStore) -> Result<Arc<rustls::ClientConfig>, rustls::Error> {
    let config = rustls::ClientConfig::builder_with_provider(ratls::provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_split_once() {
        let url = Url::parse("https://pccs.example.com/base/").unwrap();
        assert_eq!((url.tls, url.host.as_str(), url.path.as_str()), (true, "pccs.example.com", "/base/"));
        assert_eq!(url.endpoint.to_string(), "tcp:pccs.example.com:443");
        assert_eq!(url.join("sgx/x?y=1").to_string(), "https://pccs.example.com/base/sgx/x?y=1");
        assert_eq!(Url::parse("http://127.0.0.1:81").unwrap().join("a").path, "/a");
        for text in ["", "ftp://a", "a/b", "http://", "http://u:p@a", "http://a b"] {
            assert!(Url::parse(text).is_err(), "{text:?}");
        }
    }
}
