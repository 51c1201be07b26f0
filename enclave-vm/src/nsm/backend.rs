//! The device as vhost-user describes it to QEMU, and the moments at which its queue is looked at.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use tracing::{debug, warn};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringMutex, VringT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use super::Module;
use super::queue::RequestQueue;

/// The device's only queue.
const REQUESTS: u16 = 0;
/// Event of the poll timer. 0 is the queue, 1 belongs to the daemon.
pub(super) const POLL_EVENT: u64 = 2;
/// virtio-mmio in QEMU always has room for this many descriptors, whatever the device asks for.
const MAX_QUEUE_SIZE: usize = 1024;
/// Until the first kick arrives. The driver asks for randomness while it probes, before QEMU has told us of the
/// queue, and that kick is lost.
const POLL_AT_FIRST: Duration = Duration::from_millis(20);
/// Afterwards: for a guest that was cut off after [`ROUNDS`], and in case a kick is lost once more.
const POLL_LATER: Duration = Duration::from_millis(500);

/// How often the queue is emptied before the thread looks at other events. A driver that waits for its answers, as
/// Linux does, never needs a second one.
const ROUNDS: usize = 4;

/// The memory of the guest, from which QEMU's first message is still to come.
pub(super) fn memory_to_come() -> GuestMemoryMmap {
    GuestMemoryMmap::new()
}

/// The vhost-user side of the device; a handle, cloned by the daemon.
#[derive(Clone)]
pub(super) struct Backend {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    timer: OwnedFd,
}

struct State {
    requests: RequestQueue,
    memory: Option<GuestMemoryAtomic<GuestMemoryMmap>>,
    kicked: bool,
    /// The guest's rings made no sense; nothing is served before the device is reset.
    broken: bool,
}

impl Backend {
    pub(super) fn new(module: Arc<dyn Module>) -> io::Result<Self> {
        let timer = rustix::time::timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        )?;
        arm(&timer, POLL_AT_FIRST)?;
        let state = State { requests: RequestQueue::new(module), memory: None, kicked: false, broken: false };
        Ok(Self { shared: Arc::new(Shared { state: Mutex::new(state), timer }) })
    }

    /// Becomes readable when the queue is to be looked at; lives as long as the backend.
    pub(super) fn poll_timer(&self) -> RawFd {
        self.shared.timer.as_raw_fd()
    }

    /// A panic while the state was held spoils no invariant of it: at worst a request goes unanswered.
    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, vring: &VringMutex) -> io::Result<()> {
        let mut state = self.state();
        let state = &mut *state;
        let mut vring = vring.get_mut();
        if !vring.get_queue().ready() {
            state.requests.reset();
            state.broken = false;
            return Ok(());
        }
        let Some(memory) = state.memory.as_ref().filter(|_| vring.is_enabled() && !state.broken) else {
            return Ok(());
        };
        let memory = memory.memory();
        for _ in 0..ROUNDS {
            let round = vring
                .disable_notification()
                .and_then(|()| state.requests.serve(&*memory, vring.get_queue_mut()))
                .and_then(|used| Ok((used, vring.enable_notification()?, vring.needs_notification()?)));
            match round {
                Ok((used, more, notify)) => {
                    if used > 0 && notify {
                        vring.signal_used_queue()?;
                    }
                    if !more {
                        break;
                    }
                }
                Err(error) => {
                    warn!(%error, "the guest broke the queue of its NSM; it gets no more answers");
                    state.broken = true;
                    break;
                }
            }
        }
        Ok(())
    }

    fn on_timer(&self) -> io::Result<()> {
        let mut expirations = [0; 8];
        match rustix::io::read(&self.shared.timer, &mut expirations) {
            // Re-armed between the event and here.
            Err(rustix::io::Errno::AGAIN) | Ok(_) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn on_kick(&self) -> io::Result<()> {
        let first = !std::mem::replace(&mut self.state().kicked, true);
        if first { arm(&self.shared.timer, POLL_LATER) } else { Ok(()) }
    }
}

fn arm(timer: &OwnedFd, interval: Duration) -> io::Result<()> {
    let interval = Timespec::try_from(interval).map_err(io::Error::other)?;
    let setting = Itimerspec { it_interval: interval, it_value: interval };
    rustix::time::timerfd_settime(timer, TimerfdTimerFlags::empty(), &setting)?;
    Ok(())
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
    }

    /// The daemon sets it on the queue itself.
    fn set_event_idx(&self, _enabled: bool) {}

    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        self.state().memory = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)
            .inspect_err(|error| debug!(%error, "the NSM's thread cannot be told to end"))
            .ok()
    }

    fn handle_event(
        &self,
        event: u16,
        _set: EventSet,
        vrings: &[Self::Vring],
        _thread_id: usize,
    ) -> io::Result<()> {
        match event {
            REQUESTS => self.on_kick()?,
            _ => self.on_timer()?,
        }
        match vrings {
            [requests] => self.serve(requests),
            _ => Err(io::Error::other("the device has one queue")),
        }
    }
}
