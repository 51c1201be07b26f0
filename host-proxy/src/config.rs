//! The validated configuration. Below this no code reads flags, files or the environment.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use transport::Endpoint;

use crate::error::Error;
use crate::limits::{Limits, TunnelLimits};
use crate::policy::RuleSet;
use crate::resolve::CacheTimes;

/// Everything the proxy needs to know.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Bounds for all services together.
    pub limits: Limits,
    /// How long DNS answers are kept.
    pub cache: CacheTimes,
    /// Where metrics and health are served.
    pub admin: Option<Endpoint>,
    /// Mode of the Unix sockets that are listened on.
    pub unix_mode: u32,
    /// How long open connections may go on after the stop.
    pub grace: Duration,
    /// What is listened on, and what is done there.
    pub services: Vec<Service>,
}

impl Config {
    /// A configuration with the default bounds.
    ///
    /// # Errors
    /// [`Error::NoService`], and [`Error::SameListener`] when two services listen on one address.
    pub fn new(services: Vec<Service>) -> Result<Self, Error> {
        let config = Self {
            limits: Limits::default(),
            cache: CacheTimes::default(),
            admin: None,
            unix_mode: 0o600,
            grace: Duration::from_secs(30),
            services,
        };
        config.check()?;
        Ok(config)
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.services.is_empty() {
            return Err(Error::NoService);
        }
        let zero = |endpoint: &Endpoint| matches!(endpoint, Endpoint::Tcp { port: 0, .. });
        for (at, service) in self.services.iter().enumerate() {
            let before = &self.services[..at];
            let same = before.iter().find(|other| other.listen == service.listen && !zero(&other.listen));
            if let Some(other) = same {
                return Err(Error::SameListener {
                    endpoint: service.listen.clone(),
                    first: other.name.to_string(),
                    second: service.name.to_string(),
                });
            }
        }
        Ok(())
    }
}

/// One address and what is done for those who connect there.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    /// Its name in logs and metrics.
    pub name: Arc<str>,
    /// Where it listens.
    pub listen: Endpoint,
    /// The vsock context ids that may connect; `None` is everybody who can.
    pub cids: Option<Vec<u32>>,
    /// Bounds for its connections.
    pub tunnel: TunnelLimits,
    /// What it does.
    pub kind: Kind,
}

impl Service {
    /// A CONNECT proxy with the default bounds.
    pub fn egress(name: &str, listen: Endpoint, rules: RuleSet) -> Self {
        let kind = Kind::Egress(Egress { rules: Arc::new(rules), plain_http: false });
        Self { name: name.into(), listen, cids: None, tunnel: TunnelLimits::default(), kind }
    }

    /// A fixed forward with the default bounds.
    pub fn forward(name: &str, listen: Endpoint, target: Endpoint, rules: RuleSet) -> Self {
        let kind = Kind::Forward(Forward { target, rules: Arc::new(rules), proxy_protocol: false });
        Self { name: name.into(), listen, cids: None, tunnel: TunnelLimits::default(), kind }
    }
}

/// What a service does.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// HTTP CONNECT with an allow-list.
    Egress(Egress),
    /// One fixed target.
    Forward(Forward),
    /// Takes one message per connection into a file.
    Receive(Receive),
    /// Answers the enclave's boot heartbeat.
    Heartbeat,
}

/// An allow-listing CONNECT proxy.
#[derive(Clone, Debug, PartialEq)]
pub struct Egress {
    /// The allow-list.
    pub rules: Arc<RuleSet>,
    /// Whether plain HTTP requests in absolute form are carried to targets that a rule opens.
    pub plain_http: bool,
}

/// A fixed forward.
#[derive(Clone, Debug, PartialEq)]
pub struct Forward {
    /// Where connections go.
    pub target: Endpoint,
    /// Opens addresses that are not public, for a target given by name.
    pub rules: Arc<RuleSet>,
    /// Whether the target is told the client's address with PROXY protocol version 2.
    pub proxy_protocol: bool,
}

/// A receiver of messages.
#[derive(Clone, Debug, PartialEq)]
pub struct Receive {
    /// The file that holds the last whole message.
    pub path: PathBuf,
    /// Largest message in bytes.
    pub max_bytes: u64,
    /// How a message's end is known.
    pub format: Format,
}

/// How a message's end is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Length and digest, see [`crate::service::receive`].
    Framed,
    /// The end of the stream, as the upstream demo sends it: a cut transfer looks like a whole one.
    Unframed,
}
