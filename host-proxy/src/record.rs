//! What is told of a connection when it is over: one log line, the metrics, and a caller's hook.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{info, warn};
use transport::Peer;

use crate::metrics::Metrics;
use crate::pump::Traffic;

/// A connection that is over.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The service's name in the configuration.
    pub service: Arc<str>,
    /// Who connected.
    pub peer: Peer,
    /// What was asked for, in its one spelling; what could not be read is not repeated.
    pub target: Option<String>,
    /// The rule that allowed it.
    pub rule: Option<Arc<str>>,
    /// The address that was connected to.
    pub address: Option<SocketAddr>,
    /// Bytes from the client to the target.
    pub up: u64,
    /// Bytes from the target to the client.
    pub down: u64,
    /// How bulk was moved: `copy` or `splice`.
    pub path: &'static str,
    /// From accept to close.
    pub duration: Duration,
    /// Why it ended, a stable word such as `finished`, `no-rule`, `idle-timeout`.
    pub end: &'static str,
    /// More about the end, for people.
    pub detail: Option<String>,
}

impl Outcome {
    /// Whether the proxy did what the peer asked, or its connection simply ended.
    pub fn is_served(&self) -> bool {
        matches!(self.end, "finished" | "probe")
    }
}

/// Called once for each connection when it is over; must not block.
pub type Observer = Arc<dyn Fn(&Outcome) + Send + Sync>;

/// What is known of a connection so far. Dropping it tells the outcome, so no way out is silent.
pub(crate) struct Record {
    pub(crate) target: Option<String>,
    pub(crate) rule: Option<Arc<str>>,
    pub(crate) address: Option<SocketAddr>,
    pub(crate) traffic: Traffic,
    pub(crate) end: &'static str,
    pub(crate) detail: Option<String>,
    service: Arc<str>,
    peer: Peer,
    started: Instant,
    tell: Arc<Tell>,
}

/// Whom outcomes are told to.
pub(crate) struct Tell {
    pub(crate) metrics: Metrics,
    pub(crate) observer: Option<Observer>,
}

impl Record {
    pub(crate) fn new(service: Arc<str>, peer: Peer, tell: Arc<Tell>) -> Self {
        tell.metrics.opened(&service);
        Self {
            target: None,
            rule: None,
            address: None,
            traffic: Traffic::default(),
            // What stands here when the task is dropped.
            end: "proxy-stopped",
            detail: None,
            service,
            peer,
            started: Instant::now(),
            tell,
        }
    }

    /// Notes the end, with more for people.
    pub(crate) fn fail(&mut self, end: &'static str, detail: impl ToString) {
        self.end = end;
        self.detail = Some(detail.to_string());
    }

    pub(crate) fn peer(&self) -> Peer {
        self.peer
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let outcome = Outcome {
            service: Arc::clone(&self.service),
            peer: self.peer,
            target: self.target.take(),
            rule: self.rule.take(),
            address: self.address,
            up: self.traffic.up,
            down: self.traffic.down,
            path: if self.traffic.spliced { "splice" } else { "copy" },
            duration: self.started.elapsed(),
            end: self.end,
            detail: self.detail.take(),
        };
        self.tell.metrics.closed(&outcome);
        log(&outcome);
        if let Some(observer) = &self.tell.observer {
            observer(&outcome);
        }
    }
}

fn log(outcome: &Outcome) {
    let Outcome { service, peer, target, rule, address, up, down, path, duration, end, detail } = outcome;
    let service: &str = service;
    let target = target.as_deref().unwrap_or("-");
    let rule = rule.as_deref().unwrap_or("-");
    let address = address.map(|address| address.to_string());
    let address = address.as_deref().unwrap_or("-");
    let ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let detail = detail.as_deref().unwrap_or("-");
    if outcome.is_served() {
        info!(service, %peer, target, rule, address, up, down, path, ms, end, "connection");
    } else {
        warn!(service, %peer, target, rule, address, up, down, path, ms, end, detail, "connection");
    }
}
