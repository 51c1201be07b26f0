//! How long things took, in fixed buckets.

use std::fmt::Write as _;
use std::time::Duration;

/// Upper bounds, in milliseconds and as Prometheus has them, in seconds.
const BOUNDS: [(u64, &str); 14] = [
    (1, "0.001"),
    (2, "0.002"),
    (5, "0.005"),
    (10, "0.01"),
    (20, "0.02"),
    (50, "0.05"),
    (100, "0.1"),
    (250, "0.25"),
    (500, "0.5"),
    (1_000, "1"),
    (2_500, "2.5"),
    (5_000, "5"),
    (10_000, "10"),
    (30_000, "30"),
];

#[derive(Debug, Clone, Default)]
pub(crate) struct Histogram {
    /// By bucket, the last one for what is longer than every bound.
    counts: [u64; BOUNDS.len() + 1],
    sum: Duration,
}

impl Histogram {
    pub(crate) fn record(&mut self, took: Duration) {
        let bucket = BOUNDS.iter().position(|(bound, _)| took <= Duration::from_millis(*bound));
        self.counts[bucket.unwrap_or(BOUNDS.len())] += 1;
        self.sum = self.sum.saturating_add(took);
    }

    /// Writes the series; `labels` is empty or `name="value"`.
    pub(super) fn write(&self, text: &mut String, name: &str, labels: &str) {
        let comma = if labels.is_empty() { "" } else { "," };
        let bounds = BOUNDS.iter().map(|(_, bound)| *bound).chain(["+Inf"]);
        let mut total = 0;
        for (count, bound) in self.counts.iter().zip(bounds) {
            total += count;
            // Writing to a string cannot fail.
            let _infallible = writeln!(text, "{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {total}");
        }
        let braces = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
        let _infallible = writeln!(text, "{name}_sum{braces} {}", self.sum.as_secs_f64());
        let _infallible = writeln!(text, "{name}_count{braces} {total}");
    }
}
