//! Moves the bytes of a tunnel.
//!
//! Each direction is a small state machine; one task polls both:
//!
//! ```text
//!          data             end of file            shut down
//! Copying ◀────▶ Splicing ─────────────▶ Ending ─────────────▶ Done
//!    │  writing fails
//!    └─────────────────────▶ Discarding: the reader is gone; what it had sent is still delivered the other way
//! ```
//!
//! - The end of one direction is passed on as a shutdown and leaves the other open for as long as it is used.
//! - A reset on one side becomes a reset on the other, where the socket knows resets (TCP).
//! - Nothing is read from one side while the other does not take it, so the kernel's own windows slow the sender. What
//!   is held of one direction is at most one buffer.
//! - An idle tunnel holds no buffer and no pipe: the copy buffer belongs to the thread, pipes to a small pool.
//! - Copying is the default. A direction that moves bulk between TCP and Unix sockets changes to splice(2) and back.
//!   On vsock it never does: the kernel copies there anyway.

mod direction;
mod packets;
mod pipe;

use std::future::{Future, poll_fn};
use std::num::NonZeroU64;
use std::task::Poll;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use transport::Stream;

use crate::limits::TunnelLimits;
use direction::Direction;

/// After the reader of one direction is gone and the other direction has ended: how long the writer may still take
/// what was sent to it before its connection is reset.
const LINGER: Duration = Duration::from_secs(1);
/// How soon a throttled direction is looked at again.
const THROTTLE_TICK: Duration = Duration::from_millis(2);
/// Longer than any connection; stands for "no deadline" in sums.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// What bounds a tunnel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    /// Longest time without a byte in either direction.
    pub(crate) idle: Duration,
    /// Longest life of the tunnel.
    pub(crate) total: Option<Duration>,
    /// Both directions together.
    pub(crate) bytes_per_second: Option<NonZeroU64>,
    /// Whether bulk may be spliced.
    pub(crate) splice: bool,
}

impl From<&TunnelLimits> for Options {
    fn from(limits: &TunnelLimits) -> Self {
        let TunnelLimits { idle, total, bytes_per_second, splice, .. } = *limits;
        Self { idle, total, bytes_per_second, splice }
    }
}

/// What went through a tunnel so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Traffic {
    /// Bytes from the client to the target.
    pub(crate) up: u64,
    /// Bytes from the target to the client.
    pub(crate) down: u64,
    /// Whether any of them were spliced.
    pub(crate) spliced: bool,
}

/// How a tunnel ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Both sides ended their direction and everything was delivered.
    Finished,
    /// The client's connection broke.
    ClientReset,
    /// The target's connection broke.
    TargetReset,
    /// No byte for too long.
    Idle,
    /// The tunnel's whole time was over.
    Total,
}

impl End {
    /// Stable name for logs and metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::ClientReset => "client-reset",
            Self::TargetReset => "target-reset",
            Self::Idle => "idle-timeout",
            Self::Total => "total-timeout",
        }
    }
}

/// Moves bytes both ways until the tunnel ends, and closes both sockets the way it ended. `early` came from the client
/// before the tunnel stood. Dropping the future resets both sides.
pub(crate) async fn pump(
    mut client: Stream,
    mut target: Stream,
    early: Vec<u8>,
    options: Options,
    traffic: &mut Traffic,
) -> End {
    // From here on a close without a proper end is a reset: when this process dies, no side takes the cut for an end.
    arm_reset(&client, true);
    arm_reset(&target, true);
    let splice = options.splice && client.supports_try_io() && target.supports_try_io();
    let mut up = Direction::new(early, splice);
    let mut down = Direction::new(Vec::new(), splice);
    let mut throttle = options.bytes_per_second.map(Throttle::new);
    let started = Instant::now();
    let mut last = started;
    let total_end = started + options.total.unwrap_or(FOREVER);
    let mut linger_end = None;
    let timer = sleep_until((started + options.idle).min(total_end));
    tokio::pin!(timer);
    let end = poll_fn(|cx| {
        let before = (traffic.up, traffic.down);
        if let Some(throttle) = &mut throttle {
            throttle.refill();
        }
        up.poll(cx, &mut client, &mut target, &mut traffic.up, throttle.as_mut(), down.is_done());
        down.poll(cx, &mut target, &mut client, &mut traffic.down, throttle.as_mut(), up.is_done());
        traffic.spliced |= up.has_spliced() || down.has_spliced();
        if let Some(end) = settle(&up, &down) {
            return Poll::Ready(end);
        }
        let now = Instant::now();
        if before != (traffic.up, traffic.down) {
            last = now;
        }
        let mut wake = None;
        if linger_end.is_none() && half_dead(&up, &down) {
            linger_end = Some(now + LINGER);
            wake = linger_end;
        }
        if linger_end.is_some_and(|end| now >= end) {
            return Poll::Ready(if up.is_discarding() { End::TargetReset } else { End::ClientReset });
        }
        if now >= total_end {
            return Poll::Ready(End::Total);
        }
        if now >= last + options.idle {
            return Poll::Ready(End::Idle);
        }
        if up.is_throttled() || down.is_throttled() {
            wake = Some(now + THROTTLE_TICK);
        }
        if let Some(wake) = wake {
            timer.as_mut().reset(wake);
        }
        // The timer runs late on purpose: bytes move `last` on and leave the timer alone until it fires.
        while timer.as_mut().poll(cx).is_ready() {
            let next = (last + options.idle).min(total_end).min(linger_end.unwrap_or(total_end));
            timer.as_mut().reset(next.max(now + THROTTLE_TICK));
        }
        Poll::Pending
    })
    .await;
    if end == End::Finished {
        arm_reset(&client, false);
        arm_reset(&target, false);
    }
    end
}

/// Closes a connection so that its peer sees an error and not an end.
pub(crate) fn reset(stream: Stream) {
    arm_reset(&stream, true);
    drop(stream);
}

/// Whether the two directions together are at an end.
fn settle(up: &Direction, down: &Direction) -> Option<End> {
    if up.read_failed() {
        return Some(End::ClientReset);
    }
    if down.read_failed() {
        return Some(End::TargetReset);
    }
    if up.is_done() && down.is_done() {
        return Some(if up.was_discarding() {
            End::TargetReset
        } else if down.was_discarding() {
            End::ClientReset
        } else {
            End::Finished
        });
    }
    None
}

/// One reader is gone and nothing more will come from it.
fn half_dead(up: &Direction, down: &Direction) -> bool {
    (up.is_discarding() && down.is_done()) || (down.is_discarding() && up.is_done())
}

fn arm_reset(stream: &Stream, on: bool) {
    // Fails only on a connection that is already broken, and that one ends with an error anyway.
    let _broken = stream.set_reset_on_close(on);
}

/// A token bucket of a tenth of a second.
#[derive(Debug)]
pub(crate) struct Throttle {
    rate: u64,
    tokens: u64,
    refilled: Instant,
}

impl Throttle {
    fn new(rate: NonZeroU64) -> Self {
        Self { rate: rate.get(), tokens: rate.get() / 10 + 1, refilled: Instant::now() }
    }

    /// Adds what the time since the last call is worth.
    fn refill(&mut self) {
        let now = Instant::now();
        let micros = u64::try_from(now.duration_since(self.refilled).as_micros()).unwrap_or(u64::MAX);
        let fresh = self.rate.saturating_mul(micros) / 1_000_000;
        if fresh > 0 {
            self.tokens = self.tokens.saturating_add(fresh).min(self.rate / 10 + 1);
            self.refilled = now;
        }
    }

    fn spend(&mut self, bytes: u64) {
        self.tokens = self.tokens.saturating_sub(bytes);
    }
}
