//! How many small packets may go to a vsock reader.
//!
//! A vsock sender knows how many bytes its reader still takes, and nothing of a second limit that Linux has had since
//! 6.12.92: packets that wait in the reader's queue, 455 with the usual buffer of 256 KiB. One more and the connection is
//! reset (ENOBUFS), however few bytes they hold (libkrun/libkrun#795). Kernels since 6.12.94 merge what they can, others
//! merge only packets of up to 128 bytes. A writer cannot see the queue, so it keeps the rate of small packets down: what
//! arrives while none may be sent is collected, and goes out as one larger packet.

use tokio::time::{Duration, Instant};

/// A packet of this size pays for its place: 256 of them use up the reader's buffer, and then the writer waits for the
/// reader as it always does.
const LARGE: usize = 1 << 10;
/// Small packets that may be sent at once, so that an ordinary exchange of small messages is never held up.
const BURST: u32 = 64;
/// Past the burst, one small packet in this time.
const INTERVAL: Duration = Duration::from_millis(10);

/// Small packets that may be sent now: a token bucket.
#[derive(Debug)]
pub(super) struct SmallPackets {
    spent: u32,
    /// When the last of `spent` was given back.
    paid: Option<Instant>,
}

impl SmallPackets {
    pub(super) const fn new() -> Self {
        Self { spent: 0, paid: None }
    }

    /// Whether a small packet has to wait. Costs a look at the clock only when many were sent.
    pub(super) fn must_wait(&mut self) -> bool {
        if self.spent < BURST {
            return false;
        }
        self.give_back();
        self.spent >= BURST
    }

    /// Notes a packet of this many bytes.
    pub(super) fn note(&mut self, len: usize) {
        if len >= LARGE {
            return;
        }
        if self.spent == 0 {
            self.paid = Some(Instant::now());
        } else if self.spent == BURST {
            self.give_back();
        }
        self.spent = self.spent.saturating_add(1);
    }

    fn give_back(&mut self) {
        let Some(paid) = self.paid else { return };
        let intervals = paid.elapsed().as_millis() / INTERVAL.as_millis();
        let back = u32::try_from(intervals).unwrap_or(u32::MAX).min(self.spent);
        self.spent -= back;
        self.paid = Some(paid + INTERVAL * back);
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    /// Sends packets of `len` bytes for as long as none has to wait.
    fn send(packets: &mut SmallPackets, len: usize, most: usize) -> usize {
        (0..most)
            .take_while(|_| {
                let may = !packets.must_wait();
                if may {
                    packets.note(len);
                }
                may
            })
            .count()
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_goes_out_and_then_one_packet_in_ten_milliseconds() {
        let mut packets = SmallPackets::new();
        assert_eq!(send(&mut packets, 200, 1000), 64);
        for _ in 0..10 {
            advance(Duration::from_millis(9)).await;
            assert_eq!(send(&mut packets, 200, 1000), 0);
            advance(Duration::from_millis(1)).await;
            assert_eq!(send(&mut packets, 200, 1000), 1);
        }
        // A quiet second is worth the whole burst again, and no more than that.
        advance(Duration::from_secs(1)).await;
        assert_eq!(send(&mut packets, 1, 1000), 64);
        advance(Duration::from_secs(3600)).await;
        assert_eq!(send(&mut packets, 1, 1000), 64);
    }

    #[tokio::test(start_paused = true)]
    async fn large_packets_never_wait() {
        let mut packets = SmallPackets::new();
        assert_eq!(send(&mut packets, 1 << 10, 1000), 1000);
    }

    /// The packets that wait in the queue of a reader who stopped, at the moment when its bytes stop the writer too.
    #[tokio::test(start_paused = true)]
    async fn a_flood_of_small_messages_fills_the_bytes_before_the_packets() {
        const MESSAGE: usize = 200;
        for every in [Duration::from_micros(20), Duration::from_micros(100), Duration::from_micros(500)] {
            let (mut packets, mut collected, mut queued, mut bytes) = (SmallPackets::new(), 0, 0, 0);
            while bytes < 256 << 10 {
                advance(every).await;
                collected += MESSAGE;
                if !packets.must_wait() {
                    packets.note(collected);
                    bytes += collected;
                    collected = 0;
                    queued += 1;
                }
            }
            assert!(queued < 455, "{queued} packets, a message every {every:?}");
        }
    }
}
