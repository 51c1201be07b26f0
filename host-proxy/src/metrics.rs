//! Counters in the OpenMetrics text format.

use std::sync::Arc;

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::record::Outcome;

/// Content type of [`Metrics::render`].
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Labels hold only names from the configuration and words from the code, never what a peer sent: a peer must not be
/// able to make new series.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndLabels {
    service: Name,
    rule: Name,
    end: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByteLabels {
    service: Name,
    rule: Name,
    direction: &'static str,
    path: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ServiceLabels {
    service: Name,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Name(Arc<str>);

impl EncodeLabelValue for Name {
    fn encode(&self, encoder: &mut LabelValueEncoder) -> Result<(), std::fmt::Error> {
        let text: &str = &self.0;
        text.encode(encoder)
    }
}

/// The proxy's counters.
pub(crate) struct Metrics {
    registry: Registry,
    connections: Family<EndLabels, Counter>,
    bytes: Family<ByteLabels, Counter>,
    open: Family<ServiceLabels, Gauge>,
    seconds: Histogram,
    accept_errors: Counter,
    reloads: Counter,
    no_rule: Arc<str>,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("host_proxy");
        let connections = Family::<EndLabels, Counter>::default();
        let bytes = Family::<ByteLabels, Counter>::default();
        let open = Family::<ServiceLabels, Gauge>::default();
        // 1 ms to about 4.6 hours.
        let seconds = Histogram::new(exponential_buckets(0.001, 4.0, 13));
        let accept_errors = Counter::default();
        let reloads = Counter::default();
        registry.register("connections", "Connections that are over, by why they ended", connections.clone());
        registry.register("bytes", "Bytes carried by connections that are over", bytes.clone());
        registry.register("open_connections", "Connections open now", open.clone());
        registry.register("connection_seconds", "Life of connections", seconds.clone());
        registry.register(
            "accept_errors",
            "Failed accepts, such as out of descriptors",
            accept_errors.clone(),
        );
        registry.register("reloads", "Configurations taken since the start", reloads.clone());
        Self { registry, connections, bytes, open, seconds, accept_errors, reloads, no_rule: "-".into() }
    }

    pub(crate) fn opened(&self, service: &Arc<str>) {
        self.open.get_or_create(&ServiceLabels { service: Name(Arc::clone(service)) }).inc();
    }

    pub(crate) fn closed(&self, outcome: &Outcome) {
        let service = || Name(Arc::clone(&outcome.service));
        let rule = || Name(Arc::clone(outcome.rule.as_ref().unwrap_or(&self.no_rule)));
        self.open.get_or_create(&ServiceLabels { service: service() }).dec();
        self.connections
            .get_or_create(&EndLabels { service: service(), rule: rule(), end: outcome.end })
            .inc();
        self.seconds.observe(outcome.duration.as_secs_f64());
        for (direction, bytes) in [("up", outcome.up), ("down", outcome.down)] {
            if bytes > 0 {
                let labels = ByteLabels { service: service(), rule: rule(), direction, path: outcome.path };
                self.bytes.get_or_create(&labels).inc_by(bytes);
            }
        }
    }

    pub(crate) fn accept_failed(&self) {
        self.accept_errors.inc();
    }

    pub(crate) fn reloaded(&self) {
        self.reloads.inc();
    }

    /// All of it as text.
    pub(crate) fn render(&self) -> String {
        let mut text = String::new();
        // Writing into a String does not fail.
        let _infallible = encode(&mut text, &self.registry);
        text
    }
}
