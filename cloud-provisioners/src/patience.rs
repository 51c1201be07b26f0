//! Waiting with an end: deadlines, and pauses that grow and scatter.

use std::time::Duration;

use tokio::time::Instant;

/// A moment after which nobody waits any longer.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    end: Instant,
    allowed: Duration,
}

impl Deadline {
    /// The moment `allowed` from now.
    #[must_use]
    pub fn within(allowed: Duration) -> Self {
        Self { end: Instant::now() + allowed, allowed }
    }

    /// How long was allowed in all, for messages.
    #[must_use]
    pub fn allowed(&self) -> Duration {
        self.allowed
    }

    /// What is left, or nothing.
    #[must_use]
    pub fn left(&self) -> Duration {
        self.end.saturating_duration_since(Instant::now())
    }

    /// Whether it has passed.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.left().is_zero()
    }
}

/// Pauses between attempts: each up to twice the one before, at most `longest`, each scattered over its upper half so
/// that many clients do not return together.
#[derive(Clone, Debug)]
pub(crate) struct Pauses {
    next: Duration,
    longest: Duration,
}

impl Pauses {
    /// Pauses from `first` to `longest`.
    pub(crate) fn new(first: Duration, longest: Duration) -> Self {
        Self { next: first, longest }
    }

    /// Waits for the next pause, or until the deadline when that comes first. Cancel safe.
    pub(crate) async fn pause(&mut self, deadline: Deadline) {
        let mut byte = [0];
        // Without randomness the pause is merely not scattered.
        let scatter = aws_lc_rs::rand::fill(&mut byte).map_or(1.0, |()| 0.5 + f64::from(byte[0]) / 510.0);
        let pause = self.next.mul_f64(scatter);
        self.next = (self.next * 2).min(self.longest);
        tokio::time::sleep(pause.min(deadline.left())).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_to_their_longest_and_end_with_the_deadline() {
        let deadline = Deadline::within(Duration::from_secs(60));
        let mut pauses = Pauses::new(Duration::from_secs(1), Duration::from_secs(4));
        let mut taken = Vec::new();
        while !deadline.passed() {
            let before = Instant::now();
            pauses.pause(deadline).await;
            taken.push(before.elapsed().as_secs_f64());
        }
        assert!((0.5..=1.0).contains(&taken[0]) && (1.0..=2.0).contains(&taken[1]), "{taken:?}");
        assert!(taken[2..taken.len() - 1].iter().all(|pause| (2.0..=4.0).contains(pause)), "{taken:?}");
    }
}
