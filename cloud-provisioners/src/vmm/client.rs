//! A client of the VMM's HTTP API: `POST /prpc/METHOD?json`, and `GET /logs`.

use std::path::Path;
use std::time::Duration;

use reqwest::{Method, StatusCode, Url};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::json;
use zeroize::Zeroizing;

use super::types::{
    Configuration, GuestImage, Id, ImageList, InfoResponse, Machine, Made, Meta, PortMapping, Resources,
    StatusRequest, StatusResponse, Update, Version,
};
use crate::{Deadline, http};

/// Making a machine copies its disk; nothing takes longer.
const ATTEMPT: Duration = Duration::from_secs(120);
const CONNECT: Duration = Duration::from_secs(5);
/// A list of machines holds each one's compose file.
const LONGEST_ANSWER: usize = 64 << 20;
/// A log is asked for by lines, and lines may be long.
const LONGEST_LOG: usize = 16 << 20;

/// Why the VMM did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The address cannot be one.
    #[error("VMM address {address:?}: {problem}")]
    Address {
        /// The address.
        address: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The file with the token cannot be read.
    #[error("{}: cannot read the VMM's token", path.display())]
    Token {
        /// The file.
        path: std::path::PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A token would go over a network in the clear.
    #[error("VMM {address}: plain HTTP to another machine would show the token")]
    TokenInClear {
        /// The address.
        address: String,
    },
    /// It does not answer.
    #[error("VMM {address}: {call}: {problem}")]
    Unreachable {
        /// Its address.
        address: String,
        /// What was asked.
        call: String,
        /// The reason.
        problem: String,
    },
    /// It wants a token, or another one.
    #[error("VMM {address}: {call}: not authorised")]
    Unauthorised {
        /// Its address.
        address: String,
        /// What was asked.
        call: String,
    },
    /// It refused.
    #[error("VMM {address}: {call}: {message}")]
    Refused {
        /// Its address.
        address: String,
        /// What was asked.
        call: String,
        /// Its words.
        message: String,
    },
    /// It answers something else than its RPC says.
    #[error("VMM {address}: {call}: the answer is not that of a dstack-vmm: {problem}")]
    Answer {
        /// Its address.
        address: String,
        /// What was asked.
        call: String,
        /// What is wrong.
        problem: String,
    },
}

impl Error {
    /// The next step, when one is known.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Token { .. } => None,
            Self::Address { .. } => Some("write http://HOST:PORT, https://HOST or unix:PATH".into()),
            Self::TokenInClear { .. } => Some(
                "use https, or a tunnel: ssh -L 9080:127.0.0.1:9080 HOST, and http://127.0.0.1:9080".into(),
            ),
            Self::Unreachable { .. } => Some(
                "systemctl status dstack-vmm on the host; `keyferry doctor tdx-host` says what is missing"
                    .into(),
            ),
            Self::Unauthorised { .. } => {
                Some("give --vmm-token-file, or set DSTACK_VMM_TOKEN to one of [auth] tokens".into())
            }
            Self::Refused { message, .. } => refusal_hint(message).map(str::to_owned),
            Self::Answer { .. } => Some("is the address that of another service?".into()),
        }
    }

    /// Whether nobody answered.
    #[must_use]
    pub fn is_no_answer(&self) -> bool {
        matches!(self, Self::Unreachable { .. })
    }

    /// Whether it said no.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::Unauthorised { .. })
    }
}

/// What to do about what a VMM says.
fn refusal_hint(message: &str) -> Option<&'static str> {
    [
        ("Port mapping is disabled", "set [cvm.port_mapping] enabled = true in the VMM's configuration"),
        (
            "Port mapping is not allowed",
            "add the port to [cvm.port_mapping] range in the VMM's configuration",
        ),
        ("duplicate host port mapping", "publish each port of the host once"),
        ("host port mapping conflicts", "another machine has that port: `keyferry kms vmm list`"),
        (
            "Failed to load image",
            "`keyferry kms pull IMAGE --bare-metal --into DIR` into the VMM's image directory",
        ),
        (
            "No space left on device",
            "make room on the host: `keyferry doctor tdx-host` says how much is free and where",
        ),
        ("Invalid name", "use letters, digits, - and _"),
        ("unable to set guest cid", "change [cvm] cid_start in the VMM's configuration"),
    ]
    .into_iter()
    .find_map(|(text, hint)| message.contains(text).then_some(hint))
}

/// What the VMM answers to a refused call.
#[derive(Deserialize)]
struct Refusal {
    error: String,
}

/// A client of one VMM.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    base: Url,
    /// As the caller wrote it.
    address: String,
    /// Whether it is on this machine, as far as its address tells.
    local: bool,
    token: Option<Zeroizing<String>>,
}

/// Without the token.
impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Client {
    /// A client of the VMM at `address`: `http://HOST:PORT`, `https://HOST` or `unix:PATH`.
    ///
    /// # Errors
    ///
    /// [`Error::Address`] for another address, [`Error::TokenInClear`] when a token would cross a network unencrypted.
    pub fn new(address: &str, token: Option<Zeroizing<String>>) -> Result<Self, Error> {
        let wrong = |problem: String| Error::Address { address: address.to_owned(), problem };
        let builder = reqwest::Client::builder()
            .connect_timeout(CONNECT)
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("keyferry/", env!("CARGO_PKG_VERSION")));
        let (builder, base) = match address.strip_prefix("unix:") {
            Some(path) => (builder.unix_socket(Path::new(path)), Url::parse("http://vmm/")),
            None => (builder, Url::parse(address)),
        };
        let base = base.map_err(|error| wrong(error.to_string()))?;
        if !matches!(base.scheme(), "http" | "https") || base.cannot_be_a_base() {
            return Err(wrong(format!("the scheme {} is none of http, https and unix", base.scheme())));
        }
        let local = address.starts_with("unix:") || is_local(&base);
        if token.is_some() && base.scheme() == "http" && !local {
            return Err(Error::TokenInClear { address: address.to_owned() });
        }
        let http = builder.build().map_err(|error| wrong(error.to_string()))?;
        Ok(Self { http, base, address: address.to_owned(), local, token })
    }

    /// Its address, as it was given.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Whether it is on this machine, or at the end of a tunnel that begins here.
    #[must_use]
    pub fn is_local(&self) -> bool {
        self.local
    }

    /// Its version.
    ///
    /// # Errors
    ///
    /// [`Error`], here and below: it does not answer, refuses, or is no VMM.
    pub async fn version(&self) -> Result<String, Error> {
        self.ask::<Version>("Version", &json!({})).await.map(|it| it.version)
    }

    /// The guest images it has.
    ///
    /// # Errors
    ///
    /// As [`Client::version`].
    pub async fn images(&self) -> Result<Vec<GuestImage>, Error> {
        self.ask::<ImageList>("ListImages", &json!({})).await.map(|it| it.images)
    }

    /// What one machine may have of it.
    pub(super) async fn resources(&self) -> Result<Resources, Error> {
        self.ask::<Meta>("GetMeta", &json!({})).await.map(|it| it.resources)
    }

    /// The machines of this name. The VMM finds more: it looks for the text anywhere.
    ///
    /// # Errors
    ///
    /// As [`Client::version`].
    pub async fn machines(&self, name: &str) -> Result<Vec<Machine>, Error> {
        let answer: StatusResponse = self.ask("Status", &StatusRequest { keyword: name }).await?;
        Ok(answer.vms.into_iter().filter(|machine| machine.name == name).collect())
    }

    /// Every machine.
    ///
    /// # Errors
    ///
    /// As [`Client::version`].
    pub async fn all_machines(&self) -> Result<Vec<Machine>, Error> {
        self.ask::<StatusResponse>("Status", &StatusRequest::default()).await.map(|it| it.vms)
    }

    /// A machine by its id, if it is there.
    ///
    /// # Errors
    ///
    /// As [`Client::version`].
    pub async fn machine(&self, id: &str) -> Result<Option<Machine>, Error> {
        let answer: InfoResponse = self.ask("GetInfo", &Id { id }).await?;
        Ok(answer.info.filter(|_| answer.found))
    }

    /// Makes a machine and starts it; its id. Not repeated when no answer comes: that would make a second one.
    ///
    /// # Errors
    ///
    /// As [`Client::version`].
    pub async fn create(&self, configuration: &Configuration) -> Result<String, Error> {
        let made: Made = self.ask("CreateVm", configuration).await?;
        match made.id.is_empty() {
            false => Ok(made.id),
            true => Err(self.answer("CreateVm", "no id".into())),
        }
    }

    /// Starts a machine.
    ///
    /// # Errors
    ///
    /// As [`Client::version`].
    pub async fn start(&self, id: &str) -> Result<(), Error> {
        self.act("StartVm", id).await
    }

    /// Stops a machine; its disk stays.
    ///
    /// # Errors
    ///
    /// As [`Client::version`].
    pub async fn stop(&self, id: &str) -> Result<(), Error> {
        self.act("StopVm", id).await
    }

    /// Asks a machine's guest to shut down; does not wait for it.
    ///
    /// # Errors
    ///
    /// As [`Client::version`].
    pub(super) async fn shut_down(&self, id: &str) -> Result<(), Error> {
        self.act("ShutdownVm", id).await
    }

    /// Publishes these ports of a machine when it starts the next time.
    ///
    /// # Errors
    ///
    /// As [`Client::version`].
    pub(super) async fn publish(&self, id: &str, ports: &[PortMapping]) -> Result<(), Error> {
        let update = Update { id, update_ports: true, ports };
        self.ask::<serde::de::IgnoredAny>("UpdateVm", &update).await.map(|_| ())
    }

    /// Removes a machine with its disk.
    ///
    /// # Errors
    ///
    /// As [`Client::version`].
    pub async fn remove(&self, id: &str) -> Result<(), Error> {
        self.act("RemoveVm", id).await
    }

    /// The last `lines` lines of a machine's console.
    ///
    /// # Errors
    ///
    /// As [`Client::version`].
    pub async fn log(&self, id: &str, lines: usize) -> Result<String, Error> {
        let mut url = self.url(&["logs"]);
        url.query_pairs_mut().extend_pairs([
            ("id", id),
            ("follow", "false"),
            ("ansi", "false"),
            ("lines", &lines.to_string()),
        ]);
        let request = self.http.request(Method::GET, url);
        let (status, body) = self.send("logs", request, LONGEST_LOG).await?;
        match status.is_success() {
            true => Ok(String::from_utf8_lossy(&body).into_owned()),
            false => Err(self.refusal("logs", status, &body)),
        }
    }

    async fn act(&self, method: &str, id: &str) -> Result<(), Error> {
        self.ask::<serde::de::IgnoredAny>(method, &Id { id }).await.map(|_| ())
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: &str,
        body: &(impl Serialize + Sync),
    ) -> Result<T, Error> {
        let mut url = self.url(&["prpc", method]);
        url.set_query(Some("json"));
        // May hold what is secret to the guest.
        let body = serde_json::to_vec(body).map_err(|error| self.answer(method, error.to_string()))?;
        let request = self.http.request(Method::POST, url);
        let request = request.header("content-type", "application/json").body(body);
        let (status, body) = self.send(method, request, LONGEST_ANSWER).await?;
        if !status.is_success() {
            return Err(self.refusal(method, status, &body));
        }
        // Methods without an answer send nothing, null or an empty object.
        let body = if body.is_empty() { b"{}".as_slice() } else { &body };
        serde_json::from_slice(body).map_err(|error| self.answer(method, error.to_string()))
    }

    fn url(&self, path: &[&str]) -> Url {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(path);
        }
        url
    }

    async fn send(
        &self,
        call: &str,
        request: reqwest::RequestBuilder,
        longest: usize,
    ) -> Result<(StatusCode, Vec<u8>), Error> {
        let failed = |problem: String| Error::Unreachable {
            address: self.address.clone(),
            call: call.to_owned(),
            problem,
        };
        let deadline = Deadline::within(ATTEMPT);
        let request = match &self.token {
            Some(token) => request.bearer_auth(token.as_str()),
            None => request,
        };
        let answer = request.timeout(deadline.left()).send().await;
        let answer = answer.map_err(|error| failed(command_line::chain(&error.without_url())))?;
        let status = answer.status();
        let body = http::body(call, answer, longest, deadline).await;
        body.map(|body| (status, body)).map_err(|error| failed(error.to_string()))
    }

    fn refusal(&self, call: &str, status: StatusCode, body: &[u8]) -> Error {
        let (address, call) = (self.address.clone(), call.to_owned());
        if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
            return Error::Unauthorised { address, call };
        }
        let said = serde_json::from_slice::<Refusal>(body).map(|it| it.error);
        let said = said.unwrap_or_else(|_| format!("status {status}: {}", String::from_utf8_lossy(body)));
        // The VMM tells a whole chain of causes on lines of their own.
        let message: String =
            said.chars().map(|it| if it.is_control() { ' ' } else { it }).take(500).collect();
        Error::Refused { address, call, message }
    }

    fn answer(&self, call: &str, problem: String) -> Error {
        Error::Answer { address: self.address.clone(), call: call.to_owned(), problem }
    }
}

fn is_local(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse().is_ok_and(|it: std::net::IpAddr| it.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_goes_only_where_nobody_listens_in() {
        let client = |address: &str| Client::new(address, Some(Zeroizing::new("t".into())));
        for address in
            ["http://127.0.0.1:9080", "http://localhost:9080", "http://[::1]:9080", "https://tdx.example"]
        {
            assert!(client(address).is_ok(), "{address}");
        }
        assert!(client("unix:/run/vmm.sock").is_ok());
        let refused = client("http://tdx.example:9080").unwrap_err();
        assert!(matches!(refused, Error::TokenInClear { .. }), "{refused}");
        assert!(Client::new("http://tdx.example:9080", None).is_ok());
        for address in ["tdx.example:9080", "ftp://x", "", "data:x"] {
            assert!(matches!(Client::new(address, None), Err(Error::Address { .. })), "{address}");
        }
        let debug = format!("{:?}", client("https://tdx.example").unwrap());
        assert!(!debug.contains("\"t\""), "{debug}");
    }
}
