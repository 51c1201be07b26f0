//! How long to wait for whom, and how often to try again.

use std::str::FromStr;
use std::time::Duration;

use tokio::time::Instant;

/// How long each step may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    /// One TCP, Unix or vsock connection, and the proxy's answer on it.
    pub connect: Duration,
    /// One TLS handshake.
    pub handshake: Duration,
    /// One request and its whole answer.
    pub request: Duration,
    /// One attestation document.
    pub nsm: Duration,
    /// Everything together, pauses between attempts included.
    pub total: Duration,
}

impl Default for Deadlines {
    /// Upstream's 5 s to connect and 60 s for a request; 10 s for a handshake, 30 s for the NSM, 120 s in all.
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            handshake: Duration::from_secs(10),
            request: Duration::from_secs(60),
            nsm: Duration::from_secs(30),
            total: Duration::from_secs(120),
        }
    }
}

/// How often to start over after the network failed or the KMS was busy; a refusal is never asked again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// Attempts in all, at least one.
    pub attempts: u32,
    /// Upper limit of the first pause; it doubles with each.
    pub first_pause: Duration,
    /// Upper limit of every pause.
    pub longest_pause: Duration,
}

impl Default for Retry {
    /// Five attempts, pauses up to 0.25, 0.5, 1 and 2 s, never over 5 s.
    fn default() -> Self {
        Self { attempts: 5, first_pause: Duration::from_millis(250), longest_pause: Duration::from_secs(5) }
    }
}

impl Retry {
    /// The pause before attempt `next` (the second is 2): a random part of a doubling limit, so that many enclaves
    /// started together do not come back together, and never less than the KMS asked for.
    pub(crate) fn pause(&self, next: u32, asked: Option<Duration>, random: u16) -> Duration {
        let doubled =
            self.first_pause.saturating_mul(1_u32.checked_shl(next.saturating_sub(2)).unwrap_or(u32::MAX));
        let limit = doubled.min(self.longest_pause);
        // Between half of the limit and all of it.
        let jittered = limit / 2 + limit / 2 * u32::from(random) / u32::from(u16::MAX);
        jittered.max(asked.unwrap_or_default())
    }
}

/// The end of the whole run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RunEnd {
    end: Instant,
    pub(crate) total: Duration,
}

impl RunEnd {
    pub(crate) fn after(total: Duration) -> Self {
        Self { end: Instant::now() + total, total }
    }

    pub(crate) fn instant(self) -> Instant {
        self.end
    }

    /// Whether a pause would still leave time for something.
    pub(crate) fn allows(self, pause: Duration) -> bool {
        Instant::now() + pause < self.end
    }
}

/// A duration on the command line: `5`, `5s`, `500ms`, `2m`. Zero is no deadline that anything could meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DurationArg(pub Duration);

/// Why a text is no duration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a time such as 30, 30s, 500ms or 2m, up to 24 hours")]
pub struct ParseDurationError;

impl FromStr for DurationArg {
    type Err = ParseDurationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const DAY: Duration = Duration::from_secs(24 * 3600);
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = match &text[digits.len()..] {
            "ms" => Duration::from_millis(1),
            "" | "s" => Duration::from_secs(1),
            "m" => Duration::from_secs(60),
            "h" => Duration::from_secs(3600),
            _ => return Err(ParseDurationError),
        };
        let plain = digits.bytes().all(|b| b.is_ascii_digit());
        let count: u32 = digits.parse().ok().filter(|_| plain).ok_or(ParseDurationError)?;
        let duration = unit.checked_mul(count).ok_or(ParseDurationError)?;
        if duration.is_zero() || duration > DAY { Err(ParseDurationError) } else { Ok(Self(duration)) }
    }
}

impl From<DurationArg> for Duration {
    fn from(arg: DurationArg) -> Self {
        arg.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        for (text, ms) in [("5", 5000), ("5s", 5000), ("500ms", 500), ("2m", 120_000), ("1h", 3_600_000)] {
            assert_eq!(text.parse(), Ok(DurationArg(Duration::from_millis(ms))), "{text}");
        }
        for wrong in ["", "s", "0", "0ms", "-1", "+1", "1.5", "5 s", "5d", "25h", "4294967296", "1s1s"] {
            assert_eq!(wrong.parse::<DurationArg>(), Err(ParseDurationError), "{wrong}");
        }
    }

    #[test]
    fn pauses_double_up_to_their_limit() {
        let retry = Retry::default();
        let longest: Vec<u128> = (2..9).map(|next| retry.pause(next, None, u16::MAX).as_millis()).collect();
        assert_eq!(longest, [250, 500, 1000, 2000, 4000, 5000, 5000]);
        let shortest: Vec<u128> = (2..9).map(|next| retry.pause(next, None, 0).as_millis()).collect();
        assert_eq!(shortest, [125, 250, 500, 1000, 2000, 2500, 2500]);
        assert_eq!(retry.pause(u32::MAX, None, 0), retry.longest_pause / 2);
    }

    #[test]
    fn the_kms_can_ask_for_a_longer_pause() {
        let asked = Some(Duration::from_secs(7));
        assert_eq!(Retry::default().pause(2, asked, u16::MAX), Duration::from_secs(7));
    }
}
