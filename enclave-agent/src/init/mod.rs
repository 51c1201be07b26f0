//! The agent as the enclave's init: from the kernel's first process to the app, and to the enclave's end.
//!
//! ```text
//! config, process ─▶ chroot, mounts ─▶ loopback ─▶ NSM ─▶ randomness ─▶ keys ─▶ delivery ─▶ app ─▶ end
//!                                                   └─ heartbeat to the parent, at the same time
//! ```
//!
//! Nothing is generated before the kernel's randomness came from the NSM, nothing is sent but the heartbeat before the
//! clock was compared with the NSM's signed time (the trip's first step, each time), and the app is not started before
//! it can have its keys. Every step has a deadline on the monotonic clock; one that fails ends the enclave with its
//! reason on the console. The parent's part is small: without its heartbeat the boot goes on (the answer proves
//! nothing), without its proxy there are no keys. Nothing sets the clock: there is no network time here.
//!
//! Not as the first process, `enclave-agent init` leaves the system as it is and does the rest.

mod app;
mod cmdline;
mod console;
mod entropy;
mod error;
mod heartbeat;
mod loopback;
mod mounts;
mod process_file;
mod signals;
mod stages;

pub use cmdline::Parent;
pub use console::{EXIT_LINE, report};
pub use error::InitError;
pub use process_file::{ProcessError, ProcessFile};
pub use stages::{Role, run};

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use command_line::Exit;

use crate::config::{self, AgentConfig};
use crate::nsm::NsmSource;

/// Where the image keeps what it runs.
pub const PROCESS_PATH: &str = "/etc/keyferry/process.json";
/// Where the image keeps the app's files, which become the root.
const ROOT: &str = "/rootfs";
/// The NSM driver of an image whose kernel has none.
const NSM_MODULE: &str = "/nsm.ko";

/// Whether the kernel started this process, and with it the enclave.
pub fn is_first_process() -> bool {
    std::process::id() == 1
}

/// Everything that an enclave does, and its restart at the end, which is how an enclave ends. Returns only if the
/// kernel refuses to restart.
pub fn first_process() -> ExitCode {
    std::panic::set_hook(Box::new(|panic| {
        // The place only: a panic's message may quote what it was about.
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        report(Exit::Internal, &format!("panicked at {place}"));
        let _refused = restart();
    }));
    match live() {
        Ok(()) => report(Exit::Done, "the app ended"),
        Err(error) => report(error.exit(), &error.reason()),
    }
    let refused = restart();
    report(Exit::Internal, &format!("cannot restart: {refused}"));
    Exit::Internal.into()
}

fn live() -> Result<(), InitError> {
    let system = |what| move |source| InitError::System { what, source };
    crate::forbid_core_dumps().map_err(system("cannot forbid core dumps"))?;
    let enclave = Enclave::prepare()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(system("cannot make a runtime"))?;
    let result = runtime.block_on(run(enclave, Role::First));
    // A module that hangs holds a thread that cannot be ended; the machine ends all the same.
    runtime.shutdown_timeout(Duration::ZERO);
    result
}

/// What an enclave's init goes by.
#[derive(Debug)]
pub struct Enclave {
    /// The measured configuration.
    pub config: AgentConfig,
    /// What it runs.
    pub process: ProcessFile,
    /// The security module.
    pub nsm: NsmSource,
    /// How to reach the parent.
    pub parent: Parent,
}

impl Enclave {
    /// Reads the measured files of an image.
    ///
    /// # Errors
    /// [`InitError::File`] and those of the two formats.
    pub fn read(config: &Path, process: &Path, nsm: NsmSource, parent: Parent) -> Result<Self, InitError> {
        let config = AgentConfig::from_toml(&read(config)?)
            .map_err(|source| InitError::Config { path: config.to_owned(), source: Box::new(source) })?;
        let process = ProcessFile::from_json(&read(process)?)
            .map_err(|source| InitError::Process { path: process.to_owned(), source })?;
        Ok(Self { config, process, nsm, parent })
    }

    /// Makes a booted kernel into a place where programs can run, as its first process. Blocks.
    ///
    /// # Errors
    /// [`InitError`]; the enclave cannot go on then.
    pub fn prepare() -> Result<Self, InitError> {
        // Both are outside of the new root.
        let mut enclave = Self::read(
            Path::new(config::PATH),
            Path::new(PROCESS_PATH),
            NsmSource::Device,
            Parent::default(),
        )?;
        let module = match File::open(NSM_MODULE) {
            Ok(file) => Some(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(InitError::File { path: NSM_MODULE.into(), source }),
        };
        mounts::enter(Path::new(ROOT))?;
        enclave.parent = Parent::from_kernel()?;
        if let Some(module) = module {
            rustix::system::finit_module(&module, c"", 0)
                .map_err(|errno| InitError::Module { path: NSM_MODULE, source: errno.into() })?;
        }
        loopback::up().map_err(InitError::Loopback)?;
        Ok(enclave)
    }
}

fn read(path: &Path) -> Result<String, InitError> {
    let failed = |source| InitError::File { path: path.to_owned(), source };
    let mut text = String::new();
    File::open(path).map_err(failed)?.take(config::MAX_LEN + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > config::MAX_LEN {
        return Err(failed(io::Error::other(format!("larger than {} bytes", config::MAX_LEN))));
    }
    Ok(text)
}

fn restart() -> io::Error {
    rustix::fs::sync();
    match rustix::system::reboot(rustix::system::RebootCommand::Restart) {
        Err(errno) => errno.into(),
        Ok(()) => io::Error::other("the kernel returned from a restart"),
    }
}
