//! The guest agent of the machine this KMS runs on: where its own evidence comes from (reference §2.4).
//!
//! `POST /Attest?json {"report_data": hex}` gives an encoded attestation, `POST /Info?json null` an object whose
//! `vm_config` describes the machine.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use hyper::Method;
use kms_protocol::attestation_encoding::{self, Attestation, VersionedAttestation};
use kms_protocol::wire::webhook::bounded_reason;
use serde::Deserialize;
use tokio::time::timeout;
use transport::Endpoint;

use crate::client::{self, Answer, Ask, Url};

/// Where an agent listens unless told otherwise; the first that is there.
const SOCKETS: [&str; 2] = ["/var/run/dstack/dstack.sock", "/var/run/dstack.sock"];
/// Longest answer: an encoded attestation in hex, with its event log.
const MAX_ANSWER: usize = 4 << 20;

/// Where the agent is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentAddress {
    /// One of the usual sockets.
    Usual,
    /// Somewhere else.
    At {
        /// The socket.
        endpoint: Endpoint,
        /// Path below which the methods are; ends without a slash.
        base: String,
    },
}

/// Reads `unix:PATH`, `vsock:CID:PORT`, `http://HOST:PORT/BASE`; an empty text is [`AgentAddress::Usual`].
impl FromStr for AgentAddress {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        let expected = "unix:PATH, vsock:CID:PORT or http://HOST:PORT";
        if text.is_empty() {
            return Ok(Self::Usual);
        }
        if text.starts_with("http://") {
            let url = Url::parse(text).map_err(|_| expected)?;
            return Ok(Self::At { endpoint: url.endpoint, base: url.path.trim_end_matches('/').to_owned() });
        }
        let text = text.replacen("://", ":", 1);
        let endpoint = text.parse().map_err(|_| expected)?;
        Ok(Self::At { endpoint, base: String::new() })
    }
}

impl fmt::Display for AgentAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usual => write!(f, "{} or {}", SOCKETS[0], SOCKETS[1]),
            Self::At { endpoint, base } => write!(f, "{endpoint}{base}"),
        }
    }
}

/// A client of the agent.
#[derive(Debug, Clone)]
pub struct GuestAgent {
    address: AgentAddress,
    deadline: Duration,
}

/// Why the agent gave nothing usable.
#[derive(Debug, thiserror::Error)]
#[error("guest agent at {address} {what}")]
pub struct AgentError {
    address: AgentAddress,
    what: String,
}

#[derive(Deserialize)]
struct AttestAnswer {
    attestation: String,
}

#[derive(Deserialize)]
struct InfoAnswer {
    #[serde(default)]
    vm_config: String,
}

/// Evidence of this machine.
pub struct OwnEvidence {
    /// As the agent encoded it.
    pub encoded: Vec<u8>,
    /// Decoded.
    pub attestation: Attestation,
}

impl GuestAgent {
    /// A client that waits at most `deadline` for each answer.
    #[must_use]
    pub fn new(address: AgentAddress, deadline: Duration) -> Self {
        Self { address, deadline }
    }

    /// Evidence of this machine over that report data. It is decoded and compared with what was asked for, and not
    /// verified.
    ///
    /// # Errors
    ///
    /// [`AgentError`].
    pub async fn attest(&self, report_data: &[u8; 64]) -> Result<OwnEvidence, AgentError> {
        let body = format!("{{\"report_data\":\"{}\"}}", hex::encode(report_data));
        let answer: AttestAnswer = self.ask("Attest", body).await?;
        let encoded = hex::decode(answer.attestation.trim_start_matches("0x"))
            .map_err(|_| self.error("answered an attestation that is not hex"))?;
        let attestation = decode(&encoded)
            .map_err(|error| self.error(format!("answered an attestation that cannot be read: {error}")))?;
        if attestation.report_data != *report_data {
            return Err(self.error("answered an attestation for other report data"));
        }
        Ok(OwnEvidence { encoded, attestation })
    }

    /// The machine's configuration, JSON text; may be empty.
    ///
    /// # Errors
    ///
    /// [`AgentError`].
    pub async fn vm_config(&self) -> Result<String, AgentError> {
        self.ask::<InfoAnswer>("Info", "null".into()).await.map(|info| info.vm_config)
    }

    async fn ask<T: for<'de> Deserialize<'de>>(&self, method: &str, body: String) -> Result<T, AgentError> {
        let answer = timeout(self.deadline, self.exchange(method, body)).await;
        let answer = answer
            .map_err(|_| self.error(format!("gave no answer within {:?}", self.deadline)))?
            .map_err(|error| self.error(error.to_string()))?;
        if !answer.status.is_success() {
            let text = bounded_reason(&String::from_utf8_lossy(&answer.body));
            return Err(self.error(format!("refused {method}: {} {text}", answer.status)));
        }
        serde_json::from_slice(&answer.body)
            .map_err(|error| self.error(format!("gave an unexpected answer to {method}: {error}")))
    }

    async fn exchange(&self, method: &str, body: String) -> Result<Answer, client::Error> {
        let (endpoint, base) = match &self.address {
            AgentAddress::At { endpoint, base } => (endpoint.clone(), base.as_str()),
            AgentAddress::Usual => (Endpoint::Unix { path: usual_socket().into() }, ""),
        };
        let stream = endpoint.connect(self.deadline).await.map_err(client::Error::Connect)?;
        let ask = Ask {
            method: Method::POST,
            authority: "localhost".into(),
            path: format!("{base}/{method}?json"),
            body: Bytes::from(body),
            limit: MAX_ANSWER,
        };
        client::exchange(stream, ask).await
    }

    fn error(&self, what: impl Into<String>) -> AgentError {
        AgentError { address: self.address.clone(), what: what.into() }
    }
}

/// The first of the usual sockets that is there, else the last, so that the error names one.
fn usual_socket() -> &'static str {
    let [first, second] = SOCKETS;
    if Path::new(first).exists() { first } else { second }
}

fn decode(encoded: &[u8]) -> Result<Attestation, attestation_encoding::Error> {
    VersionedAttestation::decode(encoded).map(VersionedAttestation::into_attestation)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_upstreams() {
        let address = |text: &str| text.parse::<AgentAddress>();
        assert_eq!(address(""), Ok(AgentAddress::Usual));
        for (text, shown) in [
            ("unix:/run/a.sock", "unix:/run/a.sock"),
            ("http://127.0.0.1:8002", "tcp:127.0.0.1:8002"),
            ("http://127.0.0.1:8002/base/", "tcp:127.0.0.1:8002/base"),
            ("vsock:2:8000", "vsock:2:8000"),
            ("vsock://2:8000", "vsock:2:8000"),
        ] {
            assert_eq!(address(text).unwrap().to_string(), shown);
        }
        assert!(address("https://a").is_err() && address("/run/a.sock").is_err());
    }
}
