//! The KMS whose keys are taken over.
//!
//! The source is judged before anything is asked of it: its certificate must carry evidence for its own key, the
//! evidence must verify, and the authoriser must know it as a KMS. A second connection shows our own evidence; the
//! source must show the same key there, so nobody else can answer. What comes back must be the root key of the CA that
//! the source named on the first.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::Method;
use kms_protocol::cert::Usage;
use kms_protocol::report_data;
use kms_protocol::runtime_events::Moment;
use kms_protocol::wire::webhook::bounded_reason;
use kms_protocol::wire::{
    Encoding, ErrorBody, GetKmsKeyRequest, GetTempCaCertResponse, KmsKeyResponse, WireMessage,
};
use ratls::client::{ClientConfigBuilder, PinnedRoot, PresentedServer, ServerTrust};
use ratls::issue::{self, Ca, KeyPair};
use ratls::{CertificateDer, UnixTime};
use rustls_pki_types::ServerName;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use transport::Stream;
use zeroize::Zeroizing;

use crate::agent::AgentError;
use crate::attest;
use crate::authorise::decider::Decider;
use crate::authorise::{Purpose, Refusal};
use crate::client::{self, Ask, Url};
use crate::own::{self, Own};
use crate::store::{self, NewKeys};
use command_line::chain;

/// Longest answer.
const MAX_ANSWER: usize = 1 << 20;

/// Another KMS.
pub(super) struct Source {
    url: Url,
    /// For each connection with its request.
    deadline: Duration,
}

/// Why there are no keys from the source.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("source_url is not usable: expected {0}")]
    Url(&'static str),
    #[error("source KMS {}", chain(.0))]
    Client(client::Error),
    #[error("TLS: {}", chain(.0))]
    Tls(ratls::Error),
    #[error("Source KMS did not present a usable TLS certificate: {}", chain(.0))]
    Certificate(ratls::Error),
    #[error("Source KMS certificate is for {0:?}, expected \"kms:rpc\"")]
    Usage(String),
    #[error("Source KMS certificate does not contain attestation")]
    NoEvidence,
    #[error("Source KMS attestation: {0}")]
    Evidence(attest::Error),
    #[error("Source KMS is not allowed for onboarding: {0}")]
    Refused(Refusal),
    #[error("the source KMS showed another key on the second connection")]
    OtherKey,
    #[error("the source KMS refused {method}: {text}")]
    Answer { method: &'static str, text: String },
    #[error("the source KMS gave an unexpected answer to {method}: {text}")]
    Unexpected { method: &'static str, text: String },
    #[error("Invalid keys: {0}")]
    Keys(String),
    #[error(transparent)]
    Own(#[from] own::Error),
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error("{}", chain(.0))]
    Store(store::Error),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.url.fmt(f)
    }
}

impl Source {
    /// Takes a base URL with or without `/prpc`.
    pub(super) fn new(url: &str, deadline: Duration) -> Result<Self, Error> {
        let url = url.trim_end_matches('/');
        let url = Url::parse(url.strip_suffix("/prpc").unwrap_or(url)).map_err(Error::Url)?;
        if !url.tls {
            return Err(Error::Url("an https:// URL"));
        }
        Ok(Self { url: url.join("prpc"), deadline })
    }

    /// Its keys.
    pub(super) async fn keys(&self, own: &Own, decider: &Decider) -> Result<NewKeys, Error> {
        let trust = ClientConfigBuilder::new(ServerTrust::danger_accept_any_kms());
        let (stream, server) = self.connect(trust.build().map_err(Error::Tls)?).await?;
        self.judge(&server, own, decider).await?;
        let temp_ca: GetTempCaCertResponse = self.ask(stream, "GetTempCaCert", b"null".to_vec()).await?;
        let root = PinnedRoot::from_pem(&temp_ca.ca_cert).map_err(Error::Certificate)?;

        let (certificate, key) = self.certificate(&temp_ca, own).await?;
        let config = trust.build_with_certificate(&certificate, &key).map_err(Error::Tls)?;
        let request = GetKmsKeyRequest { vm_config: own.agent.vm_config().await? };
        let (stream, again) = self.connect(config).await?;
        // Anybody may stand between us and the source; only the source has the key that its evidence speaks for.
        if again.spki_der() != server.spki_der() {
            return Err(Error::OtherKey);
        }
        let body = request.encode_body(Encoding::Json);
        let answer: KmsKeyResponse = self.ask(stream, "GetKmsKey", body).await?;
        accept(&answer, &root)
    }

    /// Whether that server is a KMS that may give us keys.
    async fn judge(&self, server: &PresentedServer, own: &Own, decider: &Decider) -> Result<(), Error> {
        let contents = server.contents();
        // Upstream's earlier generations do not say what a certificate is for.
        if contents.usage.as_ref().is_some_and(|usage| *usage != Usage::KmsRpc) {
            let usage = contents.usage.as_ref().map(|usage| bounded_reason(usage.as_str()));
            return Err(Error::Usage(usage.unwrap_or_default()));
        }
        let certificate: &CertificateDer<'_> = server.der();
        let evidence = own.attester.certificate(certificate.to_vec(), (own.clock)()).await;
        let evidence = evidence.map_err(Error::Evidence)?.ok_or(Error::NoEvidence)?;
        let client = evidence.into_client("", Moment::Now).map_err(Error::Evidence)?;
        let question = own::question(Purpose::Kms, &client);
        decider.decide(question).await.map(|_| ()).map_err(Error::Refused)
    }

    /// A certificate of the source's temporary CA with our own evidence.
    async fn certificate(
        &self,
        temp_ca: &GetTempCaCertResponse,
        own: &Own,
    ) -> Result<(issue::Certificate, KeyPair), Error> {
        let ca = Ca::from_pem("temp CA of the source", &temp_ca.temp_ca_cert, &temp_ca.temp_ca_key);
        let ca = ca.map_err(Error::Certificate)?;
        let key = KeyPair::generate().map_err(Error::Tls)?;
        let evidence = own.agent.attest(&report_data::ratls_cert(&key.spki_der())).await?;
        let now = UnixTime::since_unix_epoch(Duration::from_millis((own.clock)().0));
        let certificate = issue::client_certificate(&key, &evidence.encoded, Some(&ca), now);
        Ok((certificate.map_err(Error::Tls)?, key))
    }

    async fn connect(
        &self,
        config: rustls::ClientConfig,
    ) -> Result<(TlsStream<Stream>, PresentedServer), Error> {
        let host = || client::Error::Name(self.url.host.clone());
        let name = ServerName::try_from(self.url.host.clone()).map_err(|_| Error::Client(host()))?;
        let work = async {
            let stream = self.url.endpoint.connect(self.deadline).await.map_err(client::Error::Connect)?;
            let connector = TlsConnector::from(Arc::new(config));
            connector.connect(name, stream).await.map_err(client::Error::Tls)
        };
        let stream =
            timeout(self.deadline, work).await.unwrap_or(Err(client::Error::Deadline(self.deadline)));
        let stream = stream.map_err(Error::Client)?;
        let server =
            PresentedServer::from_peer(stream.get_ref().1.peer_certificates()).map_err(Error::Certificate)?;
        Ok((stream, server))
    }

    async fn ask<M: WireMessage>(
        &self,
        stream: TlsStream<Stream>,
        method: &'static str,
        body: Vec<u8>,
    ) -> Result<M, Error> {
        let ask = Ask {
            method: Method::POST,
            authority: self.url.authority.clone(),
            path: format!("{}/{method}?json", self.url.path),
            body: Bytes::from(body),
            limit: MAX_ANSWER,
        };
        let answer = timeout(self.deadline, client::exchange(stream, ask)).await;
        let answer = answer.unwrap_or(Err(client::Error::Deadline(self.deadline))).map_err(Error::Client)?;
        // It may hold keys.
        let body = Zeroizing::new(answer.body.to_vec());
        if !answer.status.is_success() {
            let text = ErrorBody::sniff(&body).unwrap_or_else(|| answer.status.to_string());
            return Err(Error::Answer { method, text: bounded_reason(&text) });
        }
        let decoded = M::decode_body(Encoding::Json, &body);
        decoded.map_err(|error| Error::Unexpected { method, text: bounded_reason(&chain(&error)) })
    }
}

/// The keys, if there is one set and it is the one of the CA that the source named before.
fn accept(answer: &KmsKeyResponse, root: &PinnedRoot) -> Result<NewKeys, Error> {
    let [set] = answer.keys.as_slice() else {
        return Err(Error::Keys(format!("{} sets, expected one", answer.keys.len())));
    };
    let keys = NewKeys::received(&set.ca_key, &set.k256_key, &answer.temp_ca_key);
    let keys = keys.map_err(|error| Error::Keys(chain(&error)))?;
    if keys.ca_spki().map_err(Error::Store)? != root.spki_der() {
        return Err(Error::Keys("the root key is not the key of the source's root CA".into()));
    }
    Ok(keys)
}
