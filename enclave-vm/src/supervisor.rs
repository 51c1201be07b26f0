//! The thread that starts an enclave's processes, watches them and ends them.

use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{ChildStdout, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use tracing::{debug, warn};

use crate::arguments::{self, Boot, Qemu};
use crate::console::{Event, GuestEnd, Sink, Watcher};
use crate::image::BootImage;
use crate::machine::{Memory, init_of, kernel_speaks};
use crate::process::{self, Process};
use crate::state::{EnclaveState, Home, Phase};
use crate::vm::{BootTime, Ending, Launch, Shared};
use crate::{Error, nsm};

/// How long vhost-device-vsock has to make its socket.
const VSOCK_START: Duration = Duration::from_secs(10);
/// Between two looks for that socket.
const VSOCK_LOOK: Duration = Duration::from_millis(5);
/// How long QEMU has to notice by itself that the guest is done; some never do.
const QEMU_LEAVES: Duration = Duration::from_secs(2);
/// How long the rest of the console may take on its way into the sinks, for example a terminal that is paused.
const DRAIN: Duration = Duration::from_secs(2);

/// The processes of an enclave and what is known of it.
pub(crate) struct Supervisor {
    // Ended in this order when starting fails half way.
    qemu: Process,
    vsock: Process,
    /// Disconnected when the console is read to its end and written out.
    console: Receiver<()>,
    home: Home,
    state: EnclaveState,
    started: Instant,
    boot_deadline: Option<Duration>,
    lifetime: Option<Duration>,
}

impl Supervisor {
    /// Starts everything, on the thread that is to outlive it.
    pub(crate) fn start(launch: Launch, memory: Memory, shared: &Arc<Shared>) -> Result<Self, Error> {
        let Launch { mut home, image, image_path, debug, config, tools, vsock: vsock_path, consoles } =
            launch;
        let (speaks, init) = (kernel_speaks(image.command_line()), init_of(image.command_line()));
        let machine = image.machine();
        let mut state = EnclaveState {
            name: home.name().clone(),
            phase: Phase::Booting,
            pid: std::process::id(),
            image: image_path,
            machine: machine.to_string(),
            debug,
            cpus: config.cpus,
            memory_mib: memory.mib(),
            cid: config.cid.get(),
            vsock: vsock_path.clone(),
            console: home.console(),
            nsm_root: None,
        };
        if let BootImage::Parts { nsm, .. } = &image {
            let path = home.nsm_root();
            write_private(&path, nsm.root_pem().as_bytes())?;
            state.nsm_root = Some(path);
        }
        home.write_state(&state)?;

        let socket = home.path().join("vhost-vsock");
        let arguments = arguments::vsock(config.cid, &socket, &vsock_path)?;
        let mut vsock = Process::spawn(&tools.vhost_device_vsock, &arguments, Stdio::null(), &[])?;
        let vsock_socket = connect(&mut vsock, &socket)?;

        let mut inherit: Vec<OwnedFd> = vec![vsock_socket];
        let mut nsm_wait = None;
        let (append, command_line, arguments);
        let boot = match image {
            BootImage::Parts { parts, nsm } => {
                let (nsm_socket, wait) = nsm::Device::start(nsm, home.path())?.into_parts();
                nsm_wait = Some(wait);
                command_line = config.command_line(&parts.command_line)?;
                let (kernel, ramdisks): (OwnedFd, OwnedFd) =
                    (parts.kernel.into_file()?.into(), parts.ramdisks.into_file()?.into());
                let numbers = [&kernel, &ramdisks, &nsm_socket].map(AsRawFd::as_raw_fd);
                inherit.extend([kernel, ramdisks, nsm_socket]);
                let [kernel, ramdisks, nsm] = numbers;
                Boot::Microvm {
                    kernel,
                    ramdisks,
                    command_line: &command_line,
                    nsm,
                    nsm_device: tools.nsm_device,
                }
            }
            BootImage::File { ref path, ref parent_role, ref parent_instance, ref command_line, .. } => {
                config.command_line(command_line)?;
                append = config.appended();
                let (role, instance) = (parent_role.as_deref(), parent_instance.as_deref());
                Boot::NitroEnclave { image: path, append: &append, role, instance }
            }
        };
        arguments = arguments::qemu(&Qemu {
            name: &state.name.to_string(),
            firmware: &tools.firmware,
            memory,
            cpus: config.cpus,
            accelerator: config.accelerator,
            vsock: inherit[0].as_raw_fd(),
            boot,
        });
        debug!(qemu = %tools.qemu.display(), ?arguments, "starting the machine");
        let descriptors: Vec<_> = inherit.iter().map(AsFd::as_fd).collect();
        let started = Instant::now();
        let mut qemu = Process::spawn(&tools.qemu, &arguments, Stdio::piped(), &descriptors)?;
        // From here on QEMU's death alone closes these connections.
        drop(inherit);
        if let Some(wait) = nsm_wait {
            watch_nsm(wait, shared)?;
        }
        let watcher = Watcher::new(&init, config.ready_line.clone());
        let ready_with_init = config.ready_line.is_none();
        let console = Console { watcher, consoles, started, ready_with_init };
        let console = console.spawn(qemu.take_stdout(), shared)?;
        let boot_deadline = speaks.then_some(config.boot_timeout);
        Ok(Self { qemu, vsock, console, home, state, started, boot_deadline, lifetime: config.lifetime })
    }

    /// Watches until the enclave has ended, then removes all there is of it.
    pub(crate) fn run(mut self, shared: &Shared) -> Ending {
        let ending = self.watch(shared).unwrap_or_else(|error| Ending::Lost(error.to_string()));
        for process in [&mut self.qemu, &mut self.vsock] {
            if let Err(error) = process.end() {
                warn!(%error, "a process of the enclave could not be ended");
            }
        }
        self.drain();
        ending
    }

    fn watch(&mut self, shared: &Shared) -> Result<Ending, Error> {
        let mut over_since = None;
        loop {
            self.write_phase(shared)?;
            if let Some(ending) = self.look(shared, &mut over_since)? {
                return Ok(ending);
            }
            let now = self.started.elapsed();
            let deadlines = [over_since.map(|at| at + QEMU_LEAVES), self.boot_deadline, self.lifetime];
            // Nothing else can happen without a wake, but a missed one must not be for ever.
            let next = deadlines.into_iter().flatten().min().unwrap_or(now + Duration::from_secs(60));
            let mut watched = [
                PollFd::from_borrowed_fd(self.qemu.ended(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.vsock.ended(), PollFlags::IN),
                PollFd::new(shared.wake(), PollFlags::IN),
            ];
            process::wait(&mut watched, next.saturating_sub(now))
                .map_err(Error::file("watch", self.home.path()))?;
            shared.clear_wake();
        }
    }

    /// Whether it has ended, and how.
    fn look(&mut self, shared: &Shared, over_since: &mut Option<Duration>) -> Result<Option<Ending>, Error> {
        let now = self.started.elapsed();
        if let Some(status) = self.qemu.status()? {
            // Its last words may still be on their way through the console's thread.
            self.drain();
            let progress = shared.progress();
            if let Some(end) = progress.guest_end() {
                return Ok(Some(Ending::Guest(end)));
            }
            if status.success() {
                return Ok(Some(Ending::Guest(progress.as_reported(GuestEnd::Restarted))));
            }
            drop(progress);
            let complaint = self.qemu.complaint();
            return Ok(Some(Ending::Program { name: "QEMU", status: status.to_string(), complaint }));
        }
        let progress = shared.progress();
        if progress.stop {
            return Ok(Some(Ending::Stopped));
        }
        // A QEMU that ends closes its connection to the NSM first, and a guest's end may be followed by QEMU's.
        let over = match (progress.guest_end(), &progress.nsm_end) {
            (Some(end), _) => Some(Ending::Guest(end)),
            (None, Some(reason)) => Some(Ending::Nsm(reason.clone())),
            (None, None) => None,
        };
        if let Some(ending) = over {
            let since = *over_since.get_or_insert(now);
            return Ok((now >= since + QEMU_LEAVES).then_some(ending));
        }
        if progress.phase > Phase::Booting {
            self.boot_deadline = None;
        }
        if let Some(waited) = self.boot_deadline.filter(|&deadline| now >= deadline) {
            return Ok(Some(Ending::NotBooted { waited, console: progress.last_line.clone() }));
        }
        if let Some(lifetime) = self.lifetime.filter(|&lifetime| now >= lifetime) {
            return Ok(Some(Ending::LifetimeOver(lifetime)));
        }
        drop(progress);
        if let Some(status) = self.vsock.status()? {
            let complaint = self.vsock.complaint();
            return Ok(Some(Ending::Program {
                name: "vhost-device-vsock",
                status: status.to_string(),
                complaint,
            }));
        }
        Ok(None)
    }

    /// Makes the phase known to `keyferry enclave list`.
    fn write_phase(&mut self, shared: &Shared) -> Result<(), Error> {
        let phase = shared.progress().phase;
        if self.state.phase == phase {
            return Ok(());
        }
        self.state.phase = phase;
        self.home.write_state(&self.state)
    }

    fn drain(&self) {
        // Nothing is ever sent: this returns when the console's thread is done, or does not wait for it any longer.
        let _done_or_over = self.console.recv_timeout(DRAIN);
    }
}

/// What the console's thread needs.
struct Console {
    watcher: Watcher,
    consoles: Vec<Sink>,
    started: Instant,
    ready_with_init: bool,
}

impl Console {
    /// Reads `stdout` to its end on a thread of its own, so that a sink that does not take its bytes stops the guest's
    /// output and nothing else.
    fn spawn(mut self, stdout: Option<ChildStdout>, shared: &Arc<Shared>) -> Result<Receiver<()>, Error> {
        let (open, closed) = channel::<()>();
        let shared = Arc::clone(shared);
        let read = move || {
            let _open = open;
            let Some(mut stdout) = stdout else { return };
            let mut bytes = [0; 4096];
            while let Ok(len @ 1..) = stdout.read(&mut bytes) {
                self.take(&bytes[..len], &shared);
            }
        };
        let spawned = std::thread::Builder::new().name("enclave-console".to_owned()).spawn(read);
        spawned.map_err(|source| Error::Spawn { program: "the console thread".into(), source })?;
        Ok(closed)
    }

    fn take(&mut self, bytes: &[u8], shared: &Shared) {
        let events = self.watcher.feed(bytes);
        shared.progress().last_line.replace_range(.., self.watcher.last_line());
        for event in events {
            let wall = self.started.elapsed();
            shared.update(|progress| match event {
                Event::Init(guest) => {
                    progress.boot_time.get_or_insert(BootTime { wall, guest });
                    let phase = if self.ready_with_init { Phase::Ready } else { Phase::Running };
                    progress.phase = progress.phase.max(phase);
                }
                Event::Ready => progress.phase = Phase::Ready,
                Event::Reported(report) => progress.reported = Some(report),
                Event::End(end) => {
                    progress.guest_end.get_or_insert(end);
                }
            });
        }
        self.consoles.retain_mut(|sink| {
            let written = sink.write(bytes);
            written
                .inspect_err(|error| warn!(?sink, %error, "the console is not written there any more"))
                .is_ok()
        });
    }
}

/// Connects to vhost-device-vsock as soon as it listens. The connection goes to QEMU, so there is nothing to race for.
fn connect(vsock: &mut Process, socket: &Path) -> Result<OwnedFd, Error> {
    let start = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream.into()),
            Err(error) if start.elapsed() >= VSOCK_START => {
                debug!(%error, "vhost-device-vsock does not listen");
                return Err(Error::NoAnswer { what: "vhost-device-vsock".to_owned(), waited: VSOCK_START });
            }
            Err(_) if vsock.wait_ended(VSOCK_LOOK)? => {
                let status = vsock.end()?.to_string();
                let complaint = vsock.complaint();
                return Err(Error::Refused { program: "vhost-device-vsock".into(), status, complaint });
            }
            Err(_) => {}
        }
    }
}

/// Tells the supervisor when the NSM's connection to QEMU has ended.
fn watch_nsm(
    wait: impl FnOnce() -> Option<String> + Send + 'static,
    shared: &Arc<Shared>,
) -> Result<(), Error> {
    let shared = Arc::clone(shared);
    let watch = move || {
        if let Some(reason) = wait() {
            shared.update(|progress| progress.nsm_end = Some(reason));
        }
    };
    let spawned = std::thread::Builder::new().name("enclave-nsm".to_owned()).spawn(watch);
    spawned.map(drop).map_err(|source| Error::Spawn { program: "the NSM thread".into(), source })
}

fn write_private(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    use std::io::Write;

    let mut options = std::fs::OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(bytes)).map_err(Error::file("write", path))
}
