//! Counters, in Prometheus's text format. The first two names are upstream's, in upstream's form.

mod histogram;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub(crate) use self::histogram::Histogram;
use crate::breaker::Breaker;

/// What the server has done since it started.
#[derive(Default)]
pub(crate) struct Metrics {
    attestation_requests: AtomicU64,
    attestation_failures: AtomicU64,
    /// By method (one of a fixed set of names) and status.
    requests: Mutex<BTreeMap<(&'static str, u16), u64>>,
    /// By method.
    durations: Mutex<BTreeMap<&'static str, Histogram>>,
    /// By stable error name.
    refusals: Mutex<BTreeMap<&'static str, u64>>,
    pub(crate) connections: AtomicU64,
    pub(crate) connections_refused: AtomicU64,
    pub(crate) handshakes_failed: AtomicU64,
    /// Requests sent away because too many were open.
    pub(crate) requests_shed: AtomicU64,
}

/// What others know at the moment.
#[derive(Default)]
pub(crate) struct Gauges {
    /// Verifications and derivations that wait, and that run.
    pub(crate) waiting: usize,
    pub(crate) running: usize,
    /// Decisions of the authoriser.
    pub(crate) decisions: BTreeMap<&'static str, u64>,
    /// How long the authoriser took, when it was asked.
    pub(crate) decision_time: Histogram,
    /// Whom the server asks.
    pub(crate) dependencies: Vec<Dependency>,
}

/// Somebody the server asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Dependency {
    pub(crate) name: &'static str,
    /// Questions without an answer, in a row.
    pub(crate) failures: u32,
    /// Whether it is not asked at the moment.
    pub(crate) paused: bool,
    /// What an operator should look at.
    pub(crate) trouble: Option<String>,
}

impl Dependency {
    /// Somebody of whom only the breaker knows.
    pub(crate) fn of(name: &'static str, breaker: &Breaker) -> Self {
        Self { name, failures: breaker.failures(), paused: breaker.is_open(), trouble: None }
    }

    pub(crate) fn is_good(&self) -> bool {
        self.failures == 0 && self.trouble.is_none()
    }
}

impl Metrics {
    /// A request to `/prpc/` was answered.
    pub(crate) fn answered(&self, method: &'static str, gated: bool, status: u16, took: Duration) {
        if gated {
            self.attestation_requests.fetch_add(1, Ordering::Relaxed);
            if status >= 400 {
                self.attestation_failures.fetch_add(1, Ordering::Relaxed);
            }
        }
        *lock(&self.requests).entry((method, status)).or_default() += 1;
        lock(&self.durations).entry(method).or_default().record(took);
    }

    /// Keys were refused, for the reason of that name.
    pub(crate) fn refused(&self, name: &'static str) {
        *lock(&self.refusals).entry(name).or_default() += 1;
    }

    pub(crate) fn render(&self, gauges: &Gauges) -> String {
        let mut text = Text::default();
        let counters = [
            (
                "dstack_kms_attestation_requests_total",
                "Total number of KMS attestation requests.",
                &self.attestation_requests,
            ),
            (
                "dstack_kms_attestation_failures_total",
                "Total number of failed KMS attestation requests.",
                &self.attestation_failures,
            ),
            (
                "keyferry_kms_connections_refused_total",
                "Connections closed because too many were open.",
                &self.connections_refused,
            ),
            (
                "keyferry_kms_handshakes_failed_total",
                "TLS handshakes that failed or took too long.",
                &self.handshakes_failed,
            ),
            (
                "keyferry_kms_requests_shed_total",
                "Requests sent away because too many were open.",
                &self.requests_shed,
            ),
        ];
        for (name, help, value) in counters {
            text.family(name, "counter", help, [(String::new(), value.load(Ordering::Relaxed))]);
        }
        let connections = self.connections.load(Ordering::Relaxed);
        text.family("keyferry_kms_connections", "gauge", "Open connections.", [(String::new(), connections)]);
        text.family(
            "keyferry_kms_requests_total",
            "counter",
            "Answered requests by method and status.",
            lock(&self.requests).iter().map(|((method, status), count)| {
                (format!("{{method=\"{method}\",status=\"{status}\"}}"), *count)
            }),
        );
        text.histograms(
            "keyferry_kms_request_duration_seconds",
            "Time from a request's head to its answer.",
            lock(&self.durations).iter().map(|(method, it)| (format!("method=\"{method}\""), it.clone())),
        );
        text.family(
            "keyferry_kms_refusals_total",
            "counter",
            "Refused requests by reason.",
            lock(&self.refusals).iter().map(|(reason, count)| (format!("{{reason=\"{reason}\"}}"), *count)),
        );
        text.gauges(gauges);
        text.0
    }
}

#[derive(Default)]
struct Text(String);

impl Text {
    fn family(
        &mut self,
        name: &str,
        kind: &str,
        help: &str,
        series: impl IntoIterator<Item = (String, u64)>,
    ) {
        // Writing to a string cannot fail.
        let _infallible = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        for (labels, value) in series {
            let _infallible = writeln!(self.0, "{name}{labels} {value}");
        }
    }

    fn histograms(&mut self, name: &str, help: &str, series: impl IntoIterator<Item = (String, Histogram)>) {
        let _infallible = write!(self.0, "# HELP {name} {help}\n# TYPE {name} histogram\n");
        for (labels, histogram) in series {
            histogram.write(&mut self.0, name, &labels);
        }
    }

    fn gauges(&mut self, gauges: &Gauges) {
        let Gauges { waiting, running, decisions, decision_time, dependencies } = gauges;
        self.family(
            "keyferry_kms_verifications",
            "gauge",
            "Verifications and derivations by state.",
            [("waiting", waiting), ("running", running)]
                .map(|(state, count)| (format!("{{state=\"{state}\"}}"), *count as u64)),
        );
        self.family(
            "keyferry_kms_authoriser_decisions_total",
            "counter",
            "Decisions about who may have keys, by outcome.",
            decisions.iter().map(|(outcome, count)| (format!("{{outcome=\"{outcome}\"}}"), *count)),
        );
        self.histograms(
            "keyferry_kms_authoriser_duration_seconds",
            "Time the authoriser took for an answer.",
            [(String::new(), decision_time.clone())],
        );
        let label = |it: &Dependency| format!("{{name=\"{}\"}}", it.name);
        self.family(
            "keyferry_kms_dependency_up",
            "gauge",
            "Whether the last question to it was answered and nothing about it needs a look.",
            dependencies.iter().map(|it| (label(it), u64::from(it.is_good()))),
        );
        self.family(
            "keyferry_kms_dependency_failures",
            "gauge",
            "Questions in a row that it did not answer.",
            dependencies.iter().map(|it| (label(it), u64::from(it.failures))),
        );
        self.family(
            "keyferry_kms_dependency_paused",
            "gauge",
            "Whether it is not asked for a while because it gave no answers.",
            dependencies.iter().map(|it| (label(it), u64::from(it.paused))),
        );
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a scraper reads: every line is a comment or `name{labels} number`, and no series is there twice.
    fn parse(text: &str) -> BTreeMap<String, f64> {
        let mut series = BTreeMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(series.insert(name.to_owned(), value.parse().unwrap()).is_none(), "{name} twice");
        }
        series
    }

    #[test]
    fn everything_is_there_in_a_form_that_scrapers_read() {
        let metrics = Metrics::default();
        metrics.answered("GetAppKey", true, 200, Duration::from_millis(3));
        metrics.answered("GetAppKey", true, 503, Duration::from_secs(12));
        metrics.answered("GetMeta", false, 200, Duration::from_micros(80));
        metrics.refused("denied");
        let dependency = |name, failures| Dependency { name, failures, paused: false, trouble: None };
        let gauges = Gauges {
            waiting: 3,
            running: 2,
            decisions: [("allowed", 1)].into(),
            dependencies: vec![dependency("authoriser", 0), dependency("pccs", 7)],
            ..Gauges::default()
        };
        let text = metrics.render(&gauges);
        let series = parse(&text);
        for (name, value) in [
            ("dstack_kms_attestation_requests_total", 2.0),
            ("dstack_kms_attestation_failures_total", 1.0),
            ("keyferry_kms_requests_total{method=\"GetAppKey\",status=\"503\"}", 1.0),
            ("keyferry_kms_request_duration_seconds_bucket{method=\"GetAppKey\",le=\"0.005\"}", 1.0),
            ("keyferry_kms_request_duration_seconds_bucket{method=\"GetAppKey\",le=\"+Inf\"}", 2.0),
            ("keyferry_kms_request_duration_seconds_count{method=\"GetMeta\"}", 1.0),
            ("keyferry_kms_refusals_total{reason=\"denied\"}", 1.0),
            ("keyferry_kms_verifications{state=\"waiting\"}", 3.0),
            ("keyferry_kms_authoriser_decisions_total{outcome=\"allowed\"}", 1.0),
            ("keyferry_kms_authoriser_duration_seconds_bucket{le=\"+Inf\"}", 0.0),
            ("keyferry_kms_dependency_up{name=\"authoriser\"}", 1.0),
            ("keyferry_kms_dependency_up{name=\"pccs\"}", 0.0),
            ("keyferry_kms_dependency_failures{name=\"pccs\"}", 7.0),
        ] {
            assert_eq!(series.get(name), Some(&value), "{name} in\n{text}");
        }
        // Upstream's scrapers look for these lines.
        assert!(text.starts_with(
            "# HELP dstack_kms_attestation_requests_total Total number of KMS attestation requests.\n\
             # TYPE dstack_kms_attestation_requests_total counter\n"
        ));
    }
}
