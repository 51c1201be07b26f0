//! A running enclave: what is started, who watches it, how it ends.
//!
//! ```text
//! caller ── Vm ──▶ supervisor thread ──▶ vhost-device-vsock, QEMU (they die with this thread)
//!                    ▲   ▲   ▲
//!        stop, wake ─┘   │   └─ console thread: reads QEMU's output, writes the sinks
//!                        └───── NSM threads: vhost-user
//!
//! Booting ─ kernel starts init ─▶ Running ─ ready line ─▶ Ready ─┐
//!    └───────────┴────────── guest, a child, a deadline or the caller ends it ──▶ Ending
//! ```
//!
//! The supervisor waits in one place, on descriptors and with a deadline. When it announces the ending, no process and
//! no file is left.

use std::fmt::{self, Display, Formatter};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::EventfdFlags;

use crate::Error;
use crate::console::{ExitReport, GuestEnd, Sink};
use crate::image::BootImage;
use crate::machine::{MachineConfig, Memory};
use crate::state::{Home, Phase};
use crate::supervisor::Supervisor;
use crate::tools::Tools;

/// What is to run.
pub struct Launch {
    /// Directory, name and lock of the enclave. Removed when the enclave has ended.
    pub home: Home,
    /// What is booted, on which machine.
    pub image: BootImage,
    /// File that it came from, as [`Registry::list`](crate::Registry::list) is to show it.
    pub image_path: PathBuf,
    /// Whether the registers given to the NSM are those of debug mode; told in the list and to nobody else.
    pub debug: bool,
    /// The machine.
    pub config: MachineConfig,
    /// The programs.
    pub tools: Tools,
    /// A connection of the guest to CID 2, port P, arrives at this path followed by `_P`; see [`Home::vsock`]. A
    /// connection into the guest is made to this path itself, with `CONNECT P` and a line feed as the first words.
    pub vsock: PathBuf,
    /// Where the console goes.
    pub consoles: Vec<Sink>,
}

/// How an enclave ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ending {
    /// The guest said that it is done.
    Guest(GuestEnd),
    /// The caller stopped it.
    Stopped,
    /// Its time was over.
    LifetimeOver(Duration),
    /// Its kernel did not start init in time.
    NotBooted {
        /// How long it had.
        waited: Duration,
        /// The last line of its console.
        console: String,
    },
    /// A program that it needs ended.
    Program {
        /// Which.
        name: &'static str,
        /// Exit code or signal.
        status: String,
        /// The end of its standard error.
        complaint: String,
    },
    /// The NSM's connection to QEMU ended.
    Nsm(String),
    /// Watching it failed.
    Lost(String),
}

impl Display for Ending {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Guest(end) => end.fmt(f),
            Self::Stopped => f.write_str("stopped"),
            Self::LifetimeOver(lifetime) => write!(f, "its time of {:.0} s was over", lifetime.as_secs_f64()),
            Self::NotBooted { waited, console } if console.is_empty() => {
                write!(f, "no init after {:.0} s, and nothing on the console", waited.as_secs_f64())
            }
            Self::NotBooted { waited, console } => {
                write!(f, "no init after {:.0} s; last on the console: {console}", waited.as_secs_f64())
            }
            Self::Program { name, status, complaint } => write!(f, "{name} ended with {status}: {complaint}"),
            Self::Nsm(reason) => write!(f, "the NSM device broke: {reason}"),
            Self::Lost(reason) => write!(f, "the enclave cannot be watched: {reason}"),
        }
    }
}

/// How long a guest took to start its init.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootTime {
    /// Since QEMU was started, by our clock.
    pub wall: Duration,
    /// Since the kernel was entered, by the guest's clock.
    pub guest: Duration,
}

/// A running enclave. Dropping it ends the enclave.
///
/// The methods that wait block the thread: from async code, call them where blocking is allowed.
pub struct Vm {
    shared: Arc<Shared>,
    supervisor: Option<JoinHandle<()>>,
    vsock: PathBuf,
}

/// Stops an enclave from anywhere, for example when a signal arrives.
#[derive(Clone)]
pub struct Stopper(Arc<Shared>);

impl Stopper {
    /// Asks the enclave to end. Returns at once; [`Vm::wait`] tells when it has.
    pub fn stop(&self) {
        self.0.update(|progress| progress.stop = true);
    }
}

impl Vm {
    /// Starts an enclave. Returns when its machine runs, which says nothing of the guest yet.
    ///
    /// # Errors
    ///
    /// When the machine cannot be, or something cannot be started. Nothing is left behind then.
    pub fn start(launch: Launch) -> Result<Self, Error> {
        let memory = launch.config.check(launch.image.len(), total_memory())?;
        check_vsock(&launch.vsock)?;
        let shared = Arc::new(Shared::new()?);
        let vsock = launch.vsock.clone();
        let (started, start) = sync_channel(1);
        let supervisor = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name("enclave".to_owned()).spawn(move || {
                match Supervisor::start(launch, memory, &shared) {
                    Ok(supervisor) => {
                        // Nobody takes it only if the caller's thread is gone, and then the enclave is to end.
                        if started.send(Ok(())).is_err() {
                            shared.update(|progress| progress.stop = true);
                        }
                        let ending = supervisor.run(&shared);
                        shared.update(|progress| progress.ending = Some(ending));
                    }
                    Err(error) => drop(started.send(Err(error))),
                }
            })
        }
        .map_err(|source| Error::Spawn { program: "the supervisor thread".into(), source })?;
        // Everything that starting waits for has a deadline of its own.
        match start.recv() {
            Ok(Ok(())) => Ok(Self { shared, supervisor: Some(supervisor), vsock }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::Ended { ending: Ending::Lost("the supervisor thread panicked".to_owned()) }),
        }
    }

    /// Where a connection of the guest to CID 2 and `port` arrives: the Unix socket to listen on.
    #[must_use]
    pub fn vsock(&self, port: u32) -> PathBuf {
        vsock_path(&self.vsock, port)
    }

    /// A handle that stops the enclave.
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.shared))
    }

    /// How far the enclave is.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.shared.progress().phase
    }

    /// How long the guest took to start its init, once it has.
    #[must_use]
    pub fn boot_time(&self) -> Option<BootTime> {
        self.shared.progress().boot_time
    }

    /// Waits until the enclave is at least as far as `phase`.
    ///
    /// # Errors
    ///
    /// When it ends before, or is not there within `deadline`.
    pub fn wait_for(&self, phase: Phase, deadline: Duration) -> Result<(), Error> {
        let progress = self.shared.wait(deadline, |it| it.phase >= phase || it.ending.is_some());
        if progress.phase >= phase {
            return Ok(());
        }
        match progress.ending.clone() {
            Some(ending) => Err(Error::Ended { ending }),
            None => Err(Error::NotYet { phase, waited: deadline }),
        }
    }

    /// Waits until the enclave has ended, at most for `deadline`; how it did, or nothing if it still runs.
    #[must_use]
    pub fn wait(&self, deadline: Duration) -> Option<Ending> {
        self.shared.wait(deadline, |it| it.ending.is_some()).ending.clone()
    }

    /// Ends the enclave and tells how it ended, which may have been before.
    #[must_use]
    pub fn stop(mut self) -> Ending {
        self.end()
    }

    fn end(&mut self) -> Ending {
        self.stopper().stop();
        // The supervisor's way out has deadlines throughout.
        let panicked = self.supervisor.take().is_some_and(|supervisor| supervisor.join().is_err());
        match self.shared.progress().ending.clone() {
            Some(ending) if !panicked => ending,
            _ => Ending::Lost("the supervisor thread panicked".to_owned()),
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if self.supervisor.is_some() {
            self.end();
        }
    }
}

/// Path of the socket for connections of the guest to `port`, for sockets that start with `base`.
#[must_use]
pub fn vsock_path(base: &Path, port: u32) -> PathBuf {
    let mut path = base.as_os_str().to_owned();
    path.push(format!("_{port}"));
    path.into()
}

/// What the threads tell each other.
pub(crate) struct Shared {
    progress: Mutex<Progress>,
    changed: Condvar,
    wake: OwnedFd,
}

/// How far an enclave is. Written by the console thread, the NSM's thread, the caller and the supervisor.
pub(crate) struct Progress {
    pub(crate) phase: Phase,
    pub(crate) boot_time: Option<BootTime>,
    /// The kernel's last words; [`Progress::guest_end`] adds init's.
    pub(crate) guest_end: Option<GuestEnd>,
    /// Init's, the latest of them.
    pub(crate) reported: Option<ExitReport>,
    pub(crate) nsm_end: Option<String>,
    pub(crate) last_line: String,
    pub(crate) stop: bool,
    pub(crate) ending: Option<Ending>,
}

impl Progress {
    /// How the guest ended, once it has.
    pub(crate) fn guest_end(&self) -> Option<GuestEnd> {
        self.guest_end.clone().map(|end| self.as_reported(end))
    }

    /// An end by restart is the one that init spoke of, if it did.
    pub(crate) fn as_reported(&self, end: GuestEnd) -> GuestEnd {
        match (end, &self.reported) {
            (GuestEnd::Restarted, Some(report)) => GuestEnd::Reported(report.clone()),
            (end, _) => end,
        }
    }
}

impl Shared {
    fn new() -> Result<Self, Error> {
        let wake =
            rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|error| {
                Error::Spawn { program: "the supervisor thread".into(), source: error.into() }
            })?;
        let progress = Progress {
            phase: Phase::Booting,
            boot_time: None,
            guest_end: None,
            reported: None,
            nsm_end: None,
            last_line: String::new(),
            stop: false,
            ending: None,
        };
        Ok(Self { progress: Mutex::new(progress), changed: Condvar::new(), wake })
    }

    /// No update leaves the progress half written, so a panic elsewhere does not spoil it.
    pub(crate) fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the progress and wakes whoever waits for that, the supervisor included.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.progress());
        self.changed.notify_all();
        // Fails only when the counter is full, and then the supervisor is awake in any case.
        let _counter_full = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Becomes readable with every update.
    pub(crate) fn wake(&self) -> &OwnedFd {
        &self.wake
    }

    /// Takes note of all updates so far.
    pub(crate) fn clear_wake(&self) {
        // Fails only when there was none.
        let _none = rustix::io::read(&self.wake, &mut [0; 8]);
    }

    fn wait(&self, deadline: Duration, done: impl Fn(&Progress) -> bool) -> MutexGuard<'_, Progress> {
        let waited = self.changed.wait_timeout_while(self.progress(), deadline, |progress| !done(progress));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// What this computer has; no limit where it does not say.
fn total_memory() -> Memory {
    let info = rustix::system::sysinfo();
    let bytes = info.totalram.saturating_mul(u64::from(info.mem_unit));
    Memory::from_mib(bytes >> 20)
}

/// A socket's path has room for 107 bytes, and the longest port has ten digits.
fn check_vsock(base: &Path) -> Result<(), Error> {
    let bad = |what| Err(Error::Path { path: base.to_owned(), what });
    if base.as_os_str().len() + "_4294967295".len() > 107 {
        return bad("more than 96 bytes");
    }
    match base.symlink_metadata() {
        Ok(_) => bad("a file at its end"),
        Err(_) => Ok(()),
    }
}
