//! A KMS over the network: HTTP while it is set up, TLS under its root afterwards.

use std::error::Error as StdError;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use std::{fmt, io};

use command_line::chain;
use kms_protocol::wire::webhook::bounded_reason;
use kms_protocol::wire::{
    AttestationInfoResponse, BootstrapRequest, BootstrapResponse, Encoding, ErrorBody, GetMetaResponse,
    OnboardRequest, OnboardResponse, WireMessage,
};
use ratls::client::{ClientConfigBuilder, PinnedRoot, ServerTrust};
use reqwest::header::HeaderValue;
use reqwest::{Method, RequestBuilder, Response, header};
use serde::Deserialize;
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::node::{Authoriser, Front, Node, NodeError, Place, Served};

/// For TCP and TLS, which a KMS does without asking anybody.
const CONNECT: Duration = Duration::from_secs(5);
/// For a question that is answered from memory.
const PROBE: Duration = Duration::from_secs(10);
/// For a question for which the KMS attests, asks its authoriser or another KMS.
const WORK: Duration = Duration::from_secs(120);
/// Longest answer: a bootstrap record with a TDX quote and its log has some 100 kB in hex.
const LONGEST_ANSWER: usize = 4 << 20;

/// Where the token goes that a KMS may ask for while it is set up.
const TOKEN: &str = "x-onboard-token";

/// Asks over the network, straight and not through a proxy of the environment: the answers decide whom to trust.
#[derive(Clone, Default)]
pub struct HttpNode {
    token: Option<Zeroizing<String>>,
}

/// Without the token.
impl fmt::Debug for HttpNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpNode").finish_non_exhaustive()
    }
}

impl HttpNode {
    /// With the token that the KMS asks those who set it up for (`core.onboard.token`), if it does.
    #[must_use]
    pub fn new(token: Option<Zeroizing<String>>) -> Self {
        Self { token }
    }

    /// A question to a KMS that is being set up.
    fn setting_up(&self, verb: Method, url: String, allowed: Duration) -> Result<RequestBuilder, NodeError> {
        let request = plain(allowed)?.request(verb, url);
        let Some(token) = &self.token else { return Ok(request) };
        let mut value = HeaderValue::from_str(token)
            .map_err(|_| NodeError::Answer("the token has characters that no token has".to_owned()))?;
        value.set_sensitive(true);
        Ok(request.header(TOKEN, value))
    }

    async fn call<M: WireMessage>(
        &self,
        place: &Place,
        method: &str,
        body: Vec<u8>,
        allowed: Duration,
    ) -> Result<M, NodeError> {
        let url = format!("http://{}/prpc/Onboard.{method}?json", place.address);
        let request = self.setting_up(Method::POST, url, allowed)?;
        let request = request.header(header::CONTENT_TYPE, "application/json").body(body);
        let (status, body) = send(request, allowed).await?;
        decode(status, &body)
    }
}

impl Node for HttpNode {
    async fn resolve(&self, domain: &str) -> Result<Vec<IpAddr>, String> {
        // The port plays no part in it.
        let found = timeout(PROBE, tokio::net::lookup_host((domain, 0))).await;
        let found = found.map_err(|_| format!("no answer within {} s", PROBE.as_secs()))?;
        let mut addresses: Vec<_> = found.map_err(|error| error.to_string())?.map(|it| it.ip()).collect();
        addresses.sort();
        addresses.dedup();
        Ok(addresses)
    }

    async fn front(&self, place: &Place) -> Front {
        let page = async {
            let request = plain(PROBE)?.get(format!("http://{}/", place.address));
            send(request, PROBE).await
        };
        let why = match page.await {
            Ok((200, _)) => return Front::Onboarding,
            Ok((status, _)) => format!("HTTP answers {status}"),
            Err(error) => error.to_string(),
        };
        match self.meta(place, None).await {
            Ok(_) => Front::Serving,
            Err(NodeError::Unreachable(_)) => Front::Nothing(why),
            Err(error) => Front::Nothing(error.to_string()),
        }
    }

    async fn authoriser(&self, place: &Place) -> Authoriser {
        /// What kms-server's setup page asks for; upstream's has none.
        #[derive(Deserialize)]
        struct Status {
            authoriser: Option<Light>,
        }
        #[derive(Deserialize)]
        struct Light {
            kind: String,
            good: bool,
            trouble: String,
        }
        let asked = async {
            let url = format!("http://{}/status", place.address);
            send(self.setting_up(Method::GET, url, PROBE)?, PROBE).await
        };
        match asked.await {
            Ok((200, body)) => match serde_json::from_slice::<Status>(&body) {
                Ok(Status { authoriser: Some(Light { good: true, .. }) }) => Authoriser::Ready,
                Ok(Status { authoriser: Some(Light { kind, trouble, .. }) }) => {
                    let trouble = if trouble.is_empty() { "not heard of yet".to_owned() } else { trouble };
                    Authoriser::NotYet(bounded_reason(&format!("{kind}: {trouble}")))
                }
                Ok(Status { authoriser: None }) | Err(_) => Authoriser::Unknown,
            },
            Ok(_) => Authoriser::Unknown,
            Err(error) => Authoriser::NotYet(error.to_string()),
        }
    }

    async fn attestation_info(&self, place: &Place) -> Result<AttestationInfoResponse, NodeError> {
        self.call(place, "GetAttestationInfo", b"{}".to_vec(), WORK).await
    }

    async fn bootstrap(&self, place: &Place) -> Result<BootstrapResponse, NodeError> {
        let request = BootstrapRequest { domain: place.domain.clone() };
        self.call(place, "Bootstrap", request.encode_body(Encoding::Json), WORK).await
    }

    async fn onboard(&self, place: &Place, source: &str) -> Result<OnboardResponse, NodeError> {
        let request = OnboardRequest { source_url: source.to_owned(), domain: place.domain.clone() };
        self.call(place, "Onboard", request.encode_body(Encoding::Json), WORK).await
    }

    async fn finish(&self, place: &Place) -> Result<(), NodeError> {
        // The one form that every generation knows.
        let url = format!("http://{}/finish", place.address);
        match send(self.setting_up(Method::GET, url, PROBE)?, PROBE).await? {
            (200..=299, _) => Ok(()),
            (status, body) => Err(refused(status, &body)),
        }
    }

    async fn meta(&self, place: &Place, root: Option<&PinnedRoot>) -> Result<Served, NodeError> {
        let trust = match root {
            Some(root) => ServerTrust::pinned_root(root.clone()),
            // What it says is believed only once evidence in it verified.
            None => ServerTrust::danger_accept_any_kms(),
        };
        let builder = ClientConfigBuilder::new(trust).with_alpn(&["http/1.1"]);
        let tls = builder.build().map_err(|error| NodeError::Unreachable(chain(&error)))?;
        let client = client(PROBE)
            .tls_backend_preconfigured(tls)
            .tls_info(true)
            .resolve(&place.domain, place.address)
            .https_only(true)
            .build()
            .map_err(|error| NodeError::Unreachable(chain(&error)))?;
        let url = format!("https://{}:{}/prpc/GetMeta?json", place.domain, place.address.port());
        let request = client.post(url).header(header::CONTENT_TYPE, "application/json").body("null");
        let answer = respond(request).await?;
        let certificate = answer.extensions().get::<reqwest::tls::TlsInfo>();
        let certificate = certificate.and_then(|info| info.peer_certificate()).unwrap_or_default().to_vec();
        let status = answer.status().as_u16();
        let meta: GetMetaResponse = decode(status, &read(answer, PROBE).await?)?;
        Ok(Served { meta, certificate })
    }
}

fn client(allowed: Duration) -> reqwest::ClientBuilder {
    reqwest::Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(CONNECT)
        .timeout(allowed)
        .user_agent(concat!("keyferry/", env!("CARGO_PKG_VERSION")))
}

fn plain(allowed: Duration) -> Result<reqwest::Client, NodeError> {
    client(allowed).build().map_err(|error| NodeError::Unreachable(chain(&error)))
}

async fn respond(request: reqwest::RequestBuilder) -> Result<Response, NodeError> {
    request.send().await.map_err(|error| match certificate_error(&error) {
        Some(why) => NodeError::Identity(why),
        // A KMS that hangs behind its authoriser is another trouble than a closed port.
        None if error.is_timeout() && !error.is_connect() => {
            NodeError::Unreachable("takes connections and does not answer in time".to_owned())
        }
        None => NodeError::Unreachable(chain(&error.without_url())),
    })
}

async fn send(request: reqwest::RequestBuilder, allowed: Duration) -> Result<(u16, Vec<u8>), NodeError> {
    let answer = respond(request).await?;
    let status = answer.status().as_u16();
    Ok((status, read(answer, allowed).await?))
}

/// Reads a body, bounded in size and time.
async fn read(mut answer: Response, allowed: Duration) -> Result<Vec<u8>, NodeError> {
    let body = async {
        let mut body = Vec::new();
        while let Some(chunk) =
            answer.chunk().await.map_err(|error| NodeError::Unreachable(chain(&error.without_url())))?
        {
            if body.len() + chunk.len() > LONGEST_ANSWER {
                return Err(NodeError::Answer(format!("it is longer than {LONGEST_ANSWER} bytes")));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    };
    let late = || NodeError::Unreachable(format!("no whole answer within {} s", allowed.as_secs()));
    timeout(allowed, body).await.map_err(|_| late())?
}

fn decode<M: WireMessage>(status: u16, body: &[u8]) -> Result<M, NodeError> {
    if !(200..300).contains(&status) {
        return Err(refused(status, body));
    }
    M::decode_body(Encoding::Json, body).map_err(|error| NodeError::Answer(bounded_reason(&chain(&error))))
}

fn refused(status: u16, body: &[u8]) -> NodeError {
    let text = ErrorBody::sniff(body).unwrap_or_else(|| String::from_utf8_lossy(body).into_owned());
    NodeError::Refused { status, text: bounded_reason(text.trim()) }
}

/// Why rustls did not accept the server's certificate, when that is what went wrong.
fn certificate_error(error: &reqwest::Error) -> Option<String> {
    let mut current: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(found) = current {
        if let Some(rustls::Error::InvalidCertificate(why)) = rustls_error(found) {
            return Some(chain(&rustls::Error::InvalidCertificate(why.clone())));
        }
        current = found.source();
    }
    None
}

/// rustls's error, which travels inside of one or more I/O errors.
fn rustls_error<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a rustls::Error> {
    if let Some(found) = error.downcast_ref::<rustls::Error>() {
        return Some(found);
    }
    let inner = error.downcast_ref::<io::Error>()?.get_ref()?;
    rustls_error(inner)
}

/// An origin for an address and a name: `https://NAME:PORT`.
pub(super) fn origin(domain: &str, address: SocketAddr) -> String {
    format!("https://{domain}:{}", address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_kms_that_hangs_is_told_from_one_that_is_not_there() {
        // It takes connections, as the kernel does for it, and never reads from one.
        let listener = std::net::TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let allowed = Duration::from_millis(200);
        let ask = async || send(plain(allowed).unwrap().get(&url), allowed).await.unwrap_err().to_string();
        assert_eq!(ask().await, "takes connections and does not answer in time");
        drop(listener);
        assert!(ask().await.contains("refused"));
    }
}
