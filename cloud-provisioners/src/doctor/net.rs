//! Small questions to services: bounded, in time, and with the reason when there is no answer.

use std::time::Duration;

use reqwest::{Client, Method, Url};
use serde_json::Value;

use crate::{Deadline, Error, http};

/// One question.
const ASK: Duration = Duration::from_secs(10);
/// The longest answer that is read: a revocation list, a health page, a contract's code.
const LONGEST: usize = 1 << 20;

/// Which certificates a service may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Certificates {
    /// One that is valid for its name.
    Verified,
    /// Any: the programs that use this service do not look either, and only whether it answers is asked.
    DangerAny,
}

/// Asks.
pub(super) struct Net {
    verified: Client,
    any: Client,
}

impl Net {
    pub(super) fn new() -> Result<Self, Error> {
        let builder = || {
            Client::builder()
                .connect_timeout(Duration::from_secs(5))
                .timeout(ASK)
                .redirect(reqwest::redirect::Policy::none())
                .user_agent(concat!("keyferry/", env!("CARGO_PKG_VERSION")))
        };
        let verified = builder().build().map_err(Error::HttpClient)?;
        let any = builder().tls_danger_accept_invalid_certs(true).build().map_err(Error::HttpClient)?;
        Ok(Self { verified, any })
    }

    /// The client that checks certificates.
    pub(super) fn client(&self) -> &Client {
        &self.verified
    }

    /// Status and body of `GET url`, or why there is none.
    pub(super) async fn get(&self, url: &Url, certificates: Certificates) -> Result<(u16, Vec<u8>), String> {
        let client = match certificates {
            Certificates::Verified => &self.verified,
            Certificates::DangerAny => &self.any,
        };
        self.ask(url, client.request(Method::GET, url.clone())).await
    }

    /// The result of a JSON-RPC call.
    pub(super) async fn rpc(&self, url: &Url, method: &str, parameters: Value) -> Result<Value, String> {
        let body = serde_json::json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": parameters});
        let request = self.verified.request(Method::POST, url.clone());
        let request = request.header("content-type", "application/json").body(body.to_string());
        let (status, body) = self.ask(url, request).await?;
        let answer: Value = serde_json::from_slice(&body).map_err(|_| format!("status {status}, no JSON"))?;
        match answer.get("result") {
            Some(result) => Ok(result.clone()),
            None => {
                Err(answer["error"]["message"].as_str().unwrap_or("an answer without a result").to_owned())
            }
        }
    }

    async fn ask(&self, url: &Url, request: reqwest::RequestBuilder) -> Result<(u16, Vec<u8>), String> {
        let told =
            |error: reqwest::Error| format!("{}: {}", shown(url), command_line::chain(&error.without_url()));
        let answer = request.send().await.map_err(told)?;
        let status = answer.status().as_u16();
        let body = http::body("answer", answer, LONGEST, Deadline::within(ASK)).await;
        body.map(|body| (status, body)).map_err(|error| format!("{}: {error}", shown(url)))
    }
}

/// An address without what may be a key: user, password, path and query of RPC endpoints hold them.
pub(super) fn shown(url: &Url) -> String {
    url.origin().ascii_serialization()
}
