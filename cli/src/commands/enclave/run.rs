//! `keyferry enclave run`.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::{Args, ValueEnum};
use command_line::{Exit, Failure};
use enclave_vm::{
    Accelerator, BootImage, Ending, Error, GuestCid, GuestEnd, Home, Launch, Log, MachineConfig, MachineKind,
    Memory, Name, Phase, Plain, Registers, Search, Sink, Stopper, Vm,
};
use nsm_emulator::{Config, Emulator, LocalRoot, system_clock};
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};

use super::background;
use super::image::Opened;
use super::manage::json;

/// Longest wait for an enclave's end at a time; it is only a matter of waking up once in a while.
const TURN: Duration = Duration::from_secs(3600);

/// Arguments of `keyferry enclave run`.
#[derive(Args, Debug)]
pub(crate) struct Run {
    /// The enclave image.
    pub(super) image: PathBuf,
    /// Name of the enclave; from the image's file name unless given.
    #[arg(long)]
    pub(super) name: Option<Name>,
    /// Memory in MiB, at least four times the size of the image; 256 or what the image needs unless given.
    #[arg(long, value_name = "MIB")]
    memory: Option<u64>,
    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = 2)]
    cpus: u8,
    /// Start as AWS's debug mode: the document shows zeros instead of PCR0, PCR1 and PCR2.
    #[arg(long)]
    debug: bool,
    /// microvm signs documents under a local root; nitro-enclave has QEMU measure the image and signs nothing.
    #[arg(long, value_enum, default_value_t)]
    machine: Machine,
    /// Use KVM, or emulate.
    #[arg(long, value_enum, default_value_t)]
    accelerator: Acceleration,
    /// Write the console to this file instead of standard output.
    #[arg(long, value_name = "FILE")]
    console: Option<PathBuf>,
    /// Write the root certificate of the NSM to this file (PEM): the trust anchor for verifying its documents.
    #[arg(long, value_name = "FILE")]
    root_out: Option<PathBuf>,
    /// Sign documents under the root in this directory (see `keyferry enclave root`); under a new one unless given.
    #[arg(long, value_name = "DIRECTORY")]
    root_dir: Option<PathBuf>,
    /// Path that the Unix sockets of the guest's vsock start with; in the enclave's own directory unless given.
    #[arg(long, value_name = "PATH")]
    vsock: Option<PathBuf>,
    /// CID of the guest.
    #[arg(long, default_value_t = GuestCid::default().get())]
    cid: u32,
    /// IAM role of the parent, for PCR3.
    #[arg(long, value_name = "ARN")]
    parent_role: Option<String>,
    /// Instance id of the parent, for PCR4.
    #[arg(long, value_name = "ID")]
    parent_id: Option<String>,
    /// Move the clock of the NSM, for tests of what a wrong clock leads to.
    #[arg(long, value_name = "SECONDS", default_value_t = 0, allow_hyphen_values = true, hide = true)]
    nsm_clock_offset: i64,
    /// Append to the kernel command line.
    #[arg(long, value_name = "TEXT")]
    append: Option<String>,
    /// The enclave is ready when its console shows a line with this text; without it, when its init starts.
    #[arg(long, value_name = "TEXT")]
    ready_line: Option<String>,
    /// How long the guest has to start its init.
    #[arg(long, value_name = "SECONDS", default_value = "120", value_parser = super::seconds)]
    pub(super) boot_timeout: Duration,
    /// End the enclave, with exit code 4, if it still runs after this time.
    #[arg(long, value_name = "SECONDS", value_parser = super::seconds)]
    timeout: Option<Duration>,
    /// Return when the enclave is ready and let it run on.
    #[arg(long)]
    pub(super) detach: bool,
    /// Print JSON instead of the console: with --detach what was started, else how it ended.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    tools: ToolArguments,
    /// The runner of a detached enclave: print one JSON document when it is ready.
    #[arg(long, hide = true)]
    background: bool,
}

/// The programs that boot an enclave, where they are not where programs usually are.
#[derive(Args, Clone, Debug)]
pub(in crate::commands) struct ToolArguments {
    /// QEMU to use.
    #[arg(long, value_name = "PROGRAM", env = "KEYFERRY_QEMU")]
    qemu: Option<PathBuf>,
    /// vhost-device-vsock to use.
    #[arg(long, value_name = "PROGRAM", env = "KEYFERRY_VHOST_DEVICE_VSOCK")]
    vhost_device_vsock: Option<PathBuf>,
    /// Directory with QEMU's firmware (qboot.rom).
    #[arg(long, value_name = "DIRECTORY", env = "KEYFERRY_FIRMWARE")]
    firmware: Option<PathBuf>,
}

impl ToolArguments {
    /// Where to look for the programs.
    pub(in crate::commands) fn search(&self) -> Search {
        let [cache, home, path] = ["XDG_CACHE_HOME", "HOME", "PATH"].map(std::env::var_os);
        Search {
            qemu: self.qemu.clone(),
            vhost_device_vsock: self.vhost_device_vsock.clone(),
            firmware: self.firmware.clone(),
            ..Search::in_environment(cache.as_deref(), home.as_deref(), path.as_deref())
        }
    }
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Machine {
    #[default]
    Microvm,
    NitroEnclave,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Acceleration {
    #[default]
    Auto,
    Kvm,
    Tcg,
}

/// An enclave that was started, as `--detach --json` prints it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Started {
    version: u8,
    pub(super) name: Name,
    pid: u32,
    debug: bool,
    pub(super) vsock: PathBuf,
    pub(super) nsm_root: Option<PathBuf>,
    pub(super) os_image_hash: String,
    /// What the NSM shows.
    pcrs: BTreeMap<String, String>,
    /// Milliseconds from the start of QEMU to the start of init.
    boot_millis: Option<u128>,
    /// The same by the guest's clock, from the entry of the kernel.
    boot_guest_millis: Option<u128>,
}

/// An enclave that has ended, as `--json` prints it.
#[derive(Serialize)]
struct Ended<'a> {
    #[serde(flatten)]
    started: &'a Started,
    ending: String,
}

pub(super) fn run(arguments: Run, stdout: &mut impl Write, stderr: &mut impl Write) -> Result<Exit, Failure> {
    if arguments.detach && !arguments.background {
        return background::run(&arguments, stdout, stderr);
    }
    let tools = arguments.tools.search().find(arguments.machine.into()).map_err(super::failure)?;
    let opened = Opened::open(&arguments.image)?;
    let registers = arguments.registers(&opened.registers);
    let config = arguments.config()?;
    let registry = super::registry();
    let name = arguments.name.clone().unwrap_or_else(|| Name::of_file(&arguments.image));
    let home = registry.create(name.clone()).map_err(super::failure)?;
    let mut started = Started {
        version: 1,
        name,
        pid: std::process::id(),
        debug: arguments.debug,
        vsock: arguments.vsock.clone().unwrap_or_else(|| home.vsock()),
        nsm_root: None,
        os_image_hash: opened.os_image_hash.to_string(),
        pcrs: registers
            .to_map()
            .iter()
            .map(|(index, pcr)| (index.get().to_string(), pcr.to_string()))
            .collect(),
        boot_millis: None,
        boot_guest_millis: None,
    };
    let consoles = arguments.consoles(&home)?;
    let image = match arguments.machine {
        Machine::Microvm => {
            let nsm = emulator(&registers, arguments.root_dir.as_deref(), arguments.nsm_clock_offset)?;
            started.nsm_root = Some(home.nsm_root());
            if let Some(path) = &arguments.root_out {
                fs::write(path, nsm.root_pem()).map_err(file_failure("write", path))?;
                started.nsm_root = Some(path.clone());
            }
            BootImage::Parts { parts: opened.into_parts()?, nsm }
        }
        Machine::NitroEnclave => BootImage::File {
            path: arguments.image.clone(),
            len: opened.len,
            command_line: opened.command_line,
            parent_role: arguments.parent_role.clone(),
            parent_instance: arguments.parent_id.clone(),
        },
    };
    let signals = Signals::watch()?;
    let vsock = started.vsock.clone();
    let image_path = fs::canonicalize(&arguments.image).unwrap_or_else(|_| arguments.image.clone());
    let debug = arguments.debug;
    let launch = Launch { home, image, image_path, debug, config, tools, vsock, consoles };
    let vm = Vm::start(launch).map_err(super::failure)?;
    signals.stop(vm.stopper());
    tell(&started, stderr).map_err(|error| Failure::new(Exit::Internal, error))?;
    watch(&arguments, vm, started, &signals, stdout)
}

/// Waits for the enclave's end, and tells what was asked for on the way.
fn watch(
    arguments: &Run,
    vm: Vm,
    mut started: Started,
    signals: &Signals,
    stdout: &mut impl Write,
) -> Result<Exit, Failure> {
    let note_boot = |started: &mut Started| {
        started.boot_millis = vm.boot_time().map(|it| it.wall.as_millis());
        started.boot_guest_millis = vm.boot_time().map(|it| it.guest.as_millis());
    };
    if arguments.background {
        // A boot has a deadline of its own, and an enclave that has to become ready has its lifetime.
        let ready = loop {
            match vm.wait_for(Phase::Ready, TURN) {
                Err(Error::NotYet { .. }) => {}
                ready => break ready,
            }
        };
        ready.map_err(super::failure)?;
        note_boot(&mut started);
        let told = json(stdout, &started).and_then(|()| stdout.flush());
        told.map_err(|error| Failure::new(Exit::Internal, error))?;
    }
    let ending = loop {
        if let Some(ending) = vm.wait(TURN) {
            break ending;
        }
    };
    if arguments.json && !arguments.background {
        note_boot(&mut started);
        let ended = Ended { started: &started, ending: ending.to_string() };
        if let Err(error) = json(stdout, &ended).and_then(|()| stdout.flush()) {
            super::write_failure(error)?;
        }
    }
    match exit_of(&ending) {
        Exit::Done if signals.interrupted() => Ok(Exit::Interrupted),
        Exit::Done => Ok(Exit::Done),
        _ => Err(super::failure(Error::Ended { ending })),
    }
}

/// What an enclave's end means for a script.
pub(in crate::commands) fn exit_of(ending: &Ending) -> Exit {
    match ending {
        Ending::Guest(GuestEnd::Restarted | GuestEnd::Halted) | Ending::Stopped => Exit::Done,
        Ending::Guest(GuestEnd::Reported(report)) => Exit::from_code(report.code),
        Ending::NotBooted { .. } | Ending::LifetimeOver(_) => Exit::NoAnswer,
        _ => Exit::Internal,
    }
}

/// Tells a person where everything is.
fn tell(started: &Started, stderr: &mut impl Write) -> io::Result<()> {
    writeln!(stderr, "enclave {}, image {}", started.name, started.os_image_hash)?;
    for (index, pcr) in &started.pcrs {
        writeln!(stderr, "PCR{index} {pcr}")?;
    }
    writeln!(stderr, "vsock: CID 2, port P is {}_P", started.vsock.display())?;
    match &started.nsm_root {
        Some(root) => writeln!(stderr, "root of its documents: {}", root.display()),
        None => writeln!(stderr, "its documents carry no signature"),
    }
}

impl Run {
    fn registers(&self, image: &Registers) -> Registers {
        let mut registers = image.clone();
        if let Some(role) = &self.parent_role {
            registers = registers.with_parent_role(role);
        }
        if let Some(id) = &self.parent_id {
            registers = registers.with_parent_instance(id);
        }
        if self.debug { registers.in_debug_mode() } else { registers }
    }

    fn config(&self) -> Result<MachineConfig, Failure> {
        let usage = |reason: &str| Err(Failure::new(Exit::Usage, reason.to_owned()));
        if matches!(self.machine, Machine::NitroEnclave) && self.debug {
            return usage("--debug: QEMU's nitro-enclave machine knows no debug mode");
        }
        if matches!(self.machine, Machine::NitroEnclave)
            && (self.root_out.is_some() || self.root_dir.is_some())
        {
            return usage("--root-out and --root-dir: QEMU's nitro-enclave machine signs nothing");
        }
        let Some(cid) = GuestCid::new(self.cid) else {
            return usage("--cid: 0 to 3 and 4294967295 are not a guest's");
        };
        Ok(MachineConfig {
            memory: self.memory.map(Memory::from_mib),
            cpus: self.cpus,
            accelerator: self.accelerator.into(),
            cid,
            append: self.append.clone(),
            boot_timeout: self.boot_timeout,
            lifetime: self.timeout,
            ready_line: self.ready_line.clone(),
        })
    }

    /// The console is always kept for `keyferry enclave console`.
    fn consoles(&self, home: &Home) -> Result<Vec<Sink>, Failure> {
        let log = |path: PathBuf| Log::create(&path).map(Sink::Log).map_err(file_failure("write", &path));
        let mut sinks = vec![log(home.console())?];
        match &self.console {
            Some(path) => sinks.push(log(path.clone())?),
            None if self.json || self.background => {}
            None => sinks.push(Sink::Plain(Plain::new(io::stdout()))),
        }
        Ok(sinks)
    }
}

fn emulator(
    registers: &Registers,
    root: Option<&std::path::Path>,
    clock_offset: i64,
) -> Result<Arc<Emulator>, Failure> {
    let config =
        Config { pcrs: registers.for_emulator(), module_id: None, clock: system_clock(clock_offset) };
    let emulator = match root {
        Some(directory) => LocalRoot::open(directory).and_then(|root| Emulator::with_root(&root, config)),
        None => Emulator::new(config),
    };
    emulator.map(Arc::new).map_err(|error| Failure::new(Exit::Internal, error))
}

fn file_failure(action: &'static str, path: &std::path::Path) -> impl FnOnce(io::Error) -> Failure {
    let path = path.to_owned();
    move |source| super::failure(Error::File { action, path, source })
}

impl From<Machine> for MachineKind {
    fn from(machine: Machine) -> Self {
        match machine {
            Machine::Microvm => Self::Microvm,
            Machine::NitroEnclave => Self::NitroEnclave,
        }
    }
}

impl From<Acceleration> for Accelerator {
    fn from(acceleration: Acceleration) -> Self {
        match acceleration {
            Acceleration::Auto => Self::Auto,
            Acceleration::Kvm => Self::Kvm,
            Acceleration::Tcg => Self::Tcg,
        }
    }
}

/// SIGINT and SIGTERM, taken from before the enclave starts until the process ends.
struct Signals {
    interrupted: Arc<AtomicBool>,
    stopper: std::sync::mpsc::Sender<Stopper>,
}

impl Signals {
    fn watch() -> Result<Self, Failure> {
        let failed = |error: io::Error| Failure::new(Exit::Internal, error);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(failed)?;
        let (mut interrupt, mut terminate) = {
            let _entered = runtime.enter();
            (
                signal(SignalKind::interrupt()).map_err(failed)?,
                signal(SignalKind::terminate()).map_err(failed)?,
            )
        };
        let interrupted = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&interrupted);
        let (stopper, stoppers) = std::sync::mpsc::channel::<Stopper>();
        let wait = move || {
            runtime.block_on(async {
                tokio::select! {
                    _ = interrupt.recv() => seen.store(true, Ordering::Release),
                    _ = terminate.recv() => {}
                }
            });
            // A signal that comes while the enclave starts waits here for it; nothing comes if that failed.
            if let Ok(stopper) = stoppers.recv() {
                stopper.stop();
            }
        };
        std::thread::Builder::new().name("signals".to_owned()).spawn(wait).map_err(failed)?;
        Ok(Self { interrupted, stopper })
    }

    fn stop(&self, stopper: Stopper) {
        // The thread is gone only when it has had its stopper, and it takes one.
        let _thread_gone = self.stopper.send(stopper);
    }

    fn interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Acquire)
    }
}
