//! Counters, in Prometheus's text format. The first two names are upstream's.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// What the server has done since it started.
#[derive(Default)]
pub(crate) struct Metrics {
    attestation_requests: AtomicU64,
    attestation_failures: AtomicU64,
    /// By method (one of a fixed set of names) and status.
    requests: Mutex<BTreeMap<(&'static str, u16), u64>>,
    /// By stable error name.
    refusals: Mutex<BTreeMap<&'static str, u64>>,
    pub(crate) connections: AtomicU64,
    pub(crate) connections_refused: AtomicU64,
    pub(crate) handshakes_failed: AtomicU64,
    pub(crate) authoriser_failures: AtomicU64,
}

impl Metrics {
    /// A request to `/prpc/` was answered.
    pub(crate) fn answered(&self, method: &'static str, gated: bool, status: u16) {
        if gated {
            self.attestation_requests.fetch_add(1, Ordering::Relaxed);
            if status >= 400 {
                self.attestation_failures.fetch_add(1, Ordering::Relaxed);
            }
        }
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        *requests.entry((method, status)).or_default() += 1;
    }

    /// Keys were refused, for the reason of that name.
    pub(crate) fn refused(&self, name: &'static str) {
        *self.refusals.lock().unwrap_or_else(PoisonError::into_inner).entry(name).or_default() += 1;
    }

    pub(crate) fn render(&self) -> String {
        let mut text = String::new();
        let mut single = |name: &str, kind: &str, help: &str, value: &AtomicU64| {
            let value = value.load(Ordering::Relaxed);
            // Writing to a string cannot fail.
            let _infallible = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n");
        };
        single(
            "dstack_kms_attestation_requests_total",
            "counter",
            "Total number of KMS attestation requests.",
            &self.attestation_requests,
        );
        single(
            "dstack_kms_attestation_failures_total",
            "counter",
            "Total number of failed KMS attestation requests.",
            &self.attestation_failures,
        );
        single("keyferry_kms_connections", "gauge", "Open connections.", &self.connections);
        single(
            "keyferry_kms_connections_refused_total",
            "counter",
            "Connections closed because too many were open.",
            &self.connections_refused,
        );
        single(
            "keyferry_kms_handshakes_failed_total",
            "counter",
            "TLS handshakes that failed or took too long.",
            &self.handshakes_failed,
        );
        single(
            "keyferry_kms_authoriser_failures_total",
            "counter",
            "Questions the authoriser gave no usable answer to.",
            &self.authoriser_failures,
        );
        labelled(
            &mut text,
            "keyferry_kms_requests_total",
            "Answered requests by method and status.",
            self.requests.lock().unwrap_or_else(PoisonError::into_inner).iter().map(
                |((method, status), count)| (format!("method=\"{method}\",status=\"{status}\""), *count),
            ),
        );
        labelled(
            &mut text,
            "keyferry_kms_refusals_total",
            "Refused requests by reason.",
            self.refusals
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .iter()
                .map(|(reason, count)| (format!("reason=\"{reason}\""), *count)),
        );
        text
    }
}

fn labelled(text: &mut String, name: &str, help: &str, series: impl Iterator<Item = (String, u64)>) {
    let _infallible = write!(text, "# HELP {name} {help}\n# TYPE {name} counter\n");
    for (labels, count) in series {
        let _infallible = writeln!(text, "{name}{{{labels}}} {count}");
    }
}
