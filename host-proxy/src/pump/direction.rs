//! One direction of a tunnel.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use transport::Stream;

use super::Throttle;
use super::packets::SmallPackets;
use super::pipe::{Lease, PIPE_SIZE};

/// Size of the copy buffer. Larger ones leave the second-level cache, smaller ones cost system calls.
const BUFFER: usize = 256 << 10;
/// Read at a time while stalled directions hold more than [`STALLED_BUDGET`] together.
const SMALL_BUFFER: usize = 16 << 10;
/// Bytes that all stalled directions may hold before reads become small.
const STALLED_BUDGET: usize = 64 << 20;
/// A read of this size is bulk: worth two system calls and a pipe.
const BULK: usize = 32 << 10;
/// Moved in one poll before other tunnels get their turn.
const TURN: usize = 4 << 20;
/// System calls in one poll before other tunnels get their turn.
const STEPS: usize = 64;
thread_local! {
    /// The one copy buffer of this worker; borrowed only within a poll.
    static COPY: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Bytes read and not yet written, over all directions.
static STALLED: AtomicUsize = AtomicUsize::new(0);

#[derive(Debug)]
pub(super) struct Direction {
    state: State,
    /// Read and not yet written.
    rest: Rest,
    may_splice: bool,
    spliced: bool,
    /// Whether the last spliced move was large.
    bulk: bool,
    throttled: bool,
    /// The reader was lost on the way.
    discarded: bool,
    /// Counted where the reader is on vsock.
    packets: SmallPackets,
}

#[derive(Debug)]
enum State {
    Copying,
    Splicing(Option<Lease>),
    Ending,
    Discarding,
    Done,
    ReadFailed,
}

impl Direction {
    /// A direction in which `early` is to be written before anything is read.
    pub(super) fn new(early: Vec<u8>, may_splice: bool) -> Self {
        Self {
            state: State::Copying,
            rest: Rest::new(early),
            may_splice,
            spliced: false,
            bulk: false,
            throttled: false,
            discarded: false,
            packets: SmallPackets::new(),
        }
    }

    pub(super) fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    pub(super) fn read_failed(&self) -> bool {
        matches!(self.state, State::ReadFailed)
    }

    pub(super) fn is_discarding(&self) -> bool {
        matches!(self.state, State::Discarding)
    }

    pub(super) fn was_discarding(&self) -> bool {
        self.discarded
    }

    pub(super) fn is_throttled(&self) -> bool {
        self.throttled
    }

    pub(super) fn has_spliced(&self) -> bool {
        self.spliced
    }

    /// Moves what can be moved now, and registers the task for what is missing. `is_last` says that the other direction
    /// is done.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut Stream,
        to: &mut Stream,
        moved: &mut u64,
        mut throttle: Option<&mut Throttle>,
        is_last: bool,
    ) {
        self.throttled = false;
        let mut turn = 0usize;
        for _ in 0..STEPS {
            let step = match &mut self.state {
                State::Copying | State::Splicing(_) if !self.rest.is_empty() => self.flush(cx, to),
                State::Copying => self.copy(cx, from, to, throttle.as_deref_mut()),
                State::Splicing(_) => self.splice(cx, from, to, throttle.as_deref_mut()),
                // The close that follows is an end too, for nothing is left unread on either side.
                State::Ending if is_last => {
                    self.state = State::Done;
                    return;
                }
                State::Ending => match Pin::new(&mut *to).poll_shutdown(cx) {
                    // A reader that is gone already needs no end.
                    Poll::Ready(_) => {
                        self.state = State::Done;
                        return;
                    }
                    Poll::Pending => return,
                },
                State::Discarding => self.discard(cx, from),
                State::Done | State::ReadFailed => return,
            };
            let Poll::Ready(step) = step else { return };
            *moved += step as u64;
            turn += step;
            if turn >= TURN {
                break;
            }
        }
        cx.waker().wake_by_ref();
    }

    /// Writes what an earlier turn could not.
    fn flush(&mut self, cx: &mut Context<'_>, to: &mut Stream) -> Poll<usize> {
        match Pin::new(to).poll_write(cx, self.rest.bytes()) {
            Poll::Ready(Ok(n)) if n > 0 => {
                self.rest.advance(n);
                Poll::Ready(n)
            }
            Poll::Ready(_) => self.writing_failed(),
            Poll::Pending => Poll::Pending,
        }
    }

    /// One read and its writes; ready with the bytes written.
    fn copy(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut Stream,
        to: &mut Stream,
        throttle: Option<&mut Throttle>,
    ) -> Poll<usize> {
        let Some(limit) = self.read_limit(BUFFER, throttle.as_deref(), to) else { return Poll::Pending };
        COPY.with_borrow_mut(|buffer| {
            if buffer.is_empty() {
                buffer.resize(BUFFER, 0);
            }
            let limit = if STALLED.load(Ordering::Relaxed) > STALLED_BUDGET {
                limit.min(SMALL_BUFFER)
            } else {
                limit
            };
            let mut read = ReadBuf::new(&mut buffer[..limit]);
            match Pin::new(&mut *from).poll_read(cx, &mut read) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(_)) => return self.reading_failed(),
                Poll::Ready(Ok(())) => {}
            }
            let bytes = read.filled();
            if bytes.is_empty() {
                self.state = State::Ending;
                return Poll::Ready(0);
            }
            if let Some(throttle) = throttle {
                throttle.spend(bytes.len() as u64);
            }
            if self.may_splice && bytes.len() >= BULK {
                self.state = State::Splicing(None);
            }
            if to.is_vsock() {
                self.packets.note(bytes.len());
            }
            self.write_now(cx, bytes, to)
        })
    }

    /// Writes what was just read; what the socket does not take now is kept.
    fn write_now(&mut self, cx: &mut Context<'_>, bytes: &[u8], to: &mut Stream) -> Poll<usize> {
        let mut done = 0;
        while done < bytes.len() {
            match Pin::new(&mut *to).poll_write(cx, &bytes[done..]) {
                Poll::Ready(Ok(n)) if n > 0 => done += n,
                Poll::Ready(_) => return self.writing_failed(),
                Poll::Pending => {
                    self.rest = Rest::new(bytes[done..].to_vec());
                    break;
                }
            }
        }
        Poll::Ready(done)
    }

    /// One move into the pipe or out of it; ready with the bytes that left it.
    fn splice(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut Stream,
        to: &mut Stream,
        throttle: Option<&mut Throttle>,
    ) -> Poll<usize> {
        let limit = self.read_limit(PIPE_SIZE, throttle.as_deref(), to);
        let State::Splicing(slot) = &mut self.state else { return Poll::Ready(0) };
        if let Some(lease) = slot.as_mut().filter(|lease| lease.held() > 0) {
            return match lease.drain(to) {
                Ok(n) if n > 0 => {
                    if lease.held() == 0 && !self.bulk {
                        self.state = State::Copying;
                    }
                    Poll::Ready(n)
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait(to.poll_write_ready(cx)),
                _ => self.writing_failed(),
            };
        }
        let Some(limit) = limit else {
            *slot = None;
            return Poll::Pending;
        };
        if slot.is_none() {
            *slot = Lease::take();
        }
        let Some(lease) = slot else {
            // All pipes are in use: this turn is copied.
            self.state = State::Copying;
            return self.copy(cx, from, to, throttle);
        };
        match lease.fill(from, limit) {
            Ok(0) => {
                self.state = State::Ending;
                Poll::Ready(0)
            }
            Ok(n) => {
                self.spliced = true;
                // Small moves cost less as copies: the bulk is over.
                self.bulk = n >= BULK / 2;
                if let Some(throttle) = throttle {
                    throttle.spend(n as u64);
                }
                Poll::Ready(0)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // Nothing to move: the pipe goes back, and more of the bulk is waited for without one.
                *slot = None;
                wait(from.poll_read_ready(cx))
            }
            Err(_) => self.reading_failed(),
        }
    }

    /// Reads and drops, so that the writer is not held up by a reader that is gone.
    fn discard(&mut self, cx: &mut Context<'_>, from: &mut Stream) -> Poll<usize> {
        COPY.with_borrow_mut(|buffer| {
            if buffer.is_empty() {
                buffer.resize(BUFFER, 0);
            }
            let mut read = ReadBuf::new(&mut buffer[..SMALL_BUFFER]);
            match Pin::new(&mut *from).poll_read(cx, &mut read) {
                Poll::Pending => Poll::Pending,
                Poll::Ready(Ok(())) if !read.filled().is_empty() => Poll::Ready(0),
                Poll::Ready(_) => {
                    self.state = State::Done;
                    Poll::Ready(0)
                }
            }
        })
    }

    fn writing_failed(&mut self) -> Poll<usize> {
        self.rest = Rest::default();
        self.discarded = true;
        self.state = State::Discarding;
        Poll::Ready(0)
    }

    fn reading_failed(&mut self) -> Poll<usize> {
        self.state = State::ReadFailed;
        Poll::Ready(0)
    }

    /// How much may be read now; `None` when the direction has to wait for the timer.
    fn read_limit(&mut self, most: usize, throttle: Option<&Throttle>, to: &Stream) -> Option<usize> {
        let allowed = match throttle {
            Some(throttle) => usize::try_from(throttle.tokens).unwrap_or(most),
            None => most,
        };
        if allowed == 0 || (to.is_vsock() && self.packets.must_wait()) {
            self.throttled = true;
            return None;
        }
        Some(allowed.min(most))
    }
}

/// Ready means "try again", whatever the readiness says: the next system call has the error.
fn wait(ready: Poll<io::Result<()>>) -> Poll<usize> {
    ready.map(|_| 0)
}

/// Bytes that wait for the writer, counted in [`STALLED`].
#[derive(Debug, Default)]
struct Rest {
    bytes: Vec<u8>,
    at: usize,
}

impl Rest {
    fn new(bytes: Vec<u8>) -> Self {
        STALLED.fetch_add(bytes.len(), Ordering::Relaxed);
        Self { bytes, at: 0 }
    }

    fn is_empty(&self) -> bool {
        self.at == self.bytes.len()
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[self.at..]
    }

    fn advance(&mut self, n: usize) {
        self.at += n;
        if self.is_empty() {
            *self = Self::default();
        }
    }
}

impl Drop for Rest {
    fn drop(&mut self) {
        STALLED.fetch_sub(self.bytes.len(), Ordering::Relaxed);
    }
}
