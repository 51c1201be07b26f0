//! The NSM as the guest's driver sees it: a virtio device (id 33) that this process implements over vhost-user.
//!
//! ```text
//! guest's nsm driver ── virtio queue in shared memory ──▶ queue::RequestQueue ──▶ Emulator
//!         ▲ kick, interrupt                                    ▲
//!        QEMU ────────── vhost-user socket ──────────▶ backend::Backend
//! ```
//!
//! QEMU is ours and trusted to set the device up; the guest is not. What the guest controls is the queue in its
//! memory, and only [`queue`] reads that.

mod backend;
mod queue;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use nsm_emulator::Emulator;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::GuestMemoryAtomic;

use self::backend::{Backend, POLL_EVENT, memory_to_come};
use crate::Error;

/// What answers the requests of a guest.
pub(crate) trait Module: Send + Sync {
    /// The answer to one request, at most `capacity` bytes where that is possible at all.
    fn answer(&self, request: &[u8], capacity: usize) -> Vec<u8>;
}

impl Module for Emulator {
    fn answer(&self, request: &[u8], capacity: usize) -> Vec<u8> {
        self.process_within(request, capacity)
    }
}

/// The device, ready for a QEMU that gets [`Device::socket`] as the far end of its vhost-user connection.
pub(crate) struct Device {
    /// The connection to hand to QEMU. The device ends when nobody holds it any more.
    pub(crate) socket: OwnedFd,
    daemon: VhostUserDaemon<Backend>,
}

impl Device {
    /// Starts the device's threads. `directory` holds a socket for the moment that connecting takes: both ends of
    /// the connection are made here, so nobody else can be at the other one and nothing waits to be connected.
    pub(crate) fn start(module: Arc<dyn Module>, directory: &Path) -> Result<Self, Error> {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| Error::Nsm { source };
        let backend = Backend::new(module).map_err(|error| failed(error.into()))?;
        let poll = backend.poll_timer();
        let mut daemon =
            VhostUserDaemon::new("nsm".to_owned(), backend, GuestMemoryAtomic::new(memory_to_come()))
                .map_err(|error| failed(error.to_string().into()))?;
        for handler in daemon.get_epoll_handlers() {
            handler
                .register_listener(poll, vmm_sys_util::epoll::EventSet::IN, POLL_EVENT)
                .map_err(|error| failed(error.into()))?;
        }
        let path = directory.join("nsm");
        let listener = UnixListener::bind(&path).map_err(|error| failed(error.into()))?;
        let started = match path.to_str() {
            Some(text) => daemon.start_client(text).map_err(|error| failed(error.to_string().into())),
            None => Err(Error::Path { path: path.clone(), what: "bytes that are not UTF-8" }),
        };
        std::fs::remove_file(&path).map_err(|error| failed(error.into()))?;
        started?;
        // The connection is in the listener's backlog already, so this does not wait.
        let (socket, _) = listener.accept().map_err(|error| failed(error.into()))?;
        Ok(Self { socket: socket.into(), daemon })
    }

    /// Splits into QEMU's end and a closure that returns when the device has ended, with the reason if that is
    /// anything but QEMU's hanging up.
    pub(crate) fn into_parts(mut self) -> (OwnedFd, impl FnOnce() -> Option<String> + Send) {
        let wait = move || self.daemon.wait().err().map(|error| error.to_string());
        (self.socket, wait)
    }
}
