//! One enclave image on this machine from start to end, with a parent in this process: the way out, the answer to the
//! heartbeat, and whoever takes what it exports.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use command_line::{Exit, Failure};
use enclave_vm::{
    BootImage, BootTime, Ending, Home, Launch, MachineConfig, MachineKind, Name, Plain, Sink, Tools, Vm,
    vsock_path,
};
use host_proxy::config::{Format, Kind, Receive, Service};
use host_proxy::limits::TunnelLimits;
use host_proxy::policy::{Entry, RuleSet};
use nsm_emulator::{Config, Emulator, LocalRoot, system_clock};
use tokio::task::spawn_blocking;
use transport::Endpoint;

use super::enclave;
use super::enclave::image::Opened;
use super::enclave::run::ToolArguments;

/// Ports of a parent: its proxy (by default), its heartbeat, its receiver.
const PROXY: u32 = 3128;
const HEARTBEAT: u32 = 9000;
const RECEIVER: u32 = 9999;
/// Keys, certificates and evidence are a few kilobytes.
const MAX_EXPORT: u64 = 1 << 20;

/// Between two looks at what the enclave exported.
const LOOK: Duration = Duration::from_millis(100);
/// What is shown of a line.
const MAX_LINE: usize = 4096;

/// What is needed to boot an image on this machine, found or refused with everything that is missing.
pub(super) fn tools(arguments: &ToolArguments) -> Result<Tools, Failure> {
    arguments.search().find(MachineKind::Microvm).map_err(enclave::failure)
}

/// Which root the NSM's documents are signed under.
pub(super) enum NsmRoot<'a> {
    /// That of this module.
    Of(&'a Emulator),
    /// One that is kept.
    Kept(&'a LocalRoot),
}

/// An image and its parent, before they are started.
pub(super) struct LocalEnclave<'a> {
    /// What runs.
    pub(super) image: &'a Path,
    /// The programs that run it.
    pub(super) tools: Tools,
    /// Its module's root.
    pub(super) root: NsmRoot<'a>,
    /// What its proxy opens: `HOST:PORT`.
    pub(super) opens: Vec<String>,
    /// Where an export is kept.
    pub(super) export: PathBuf,
    /// Shown while it runs.
    pub(super) console: Console,
    /// Memory in MiB, if not what the image needs.
    pub(super) memory_mib: Option<u64>,
    /// Processors.
    pub(super) cpus: u8,
    /// It is ended after this time.
    pub(super) lifetime: Duration,
    /// It is ended as soon as its export is here; else it ends with its app.
    pub(super) until_exported: bool,
}

/// How it went.
pub(super) struct Ended {
    pub(super) ending: Ending,
    pub(super) boot_time: Option<BootTime>,
}

impl Ended {
    /// The end, if it is not that of an enclave that did what it was to do.
    pub(super) fn into_result(self) -> Result<Self, Failure> {
        match enclave::run::exit_of(&self.ending) {
            Exit::Done => Ok(self),
            _ => Err(enclave::failure(enclave_vm::Error::Ended { ending: self.ending })),
        }
    }
}

impl LocalEnclave<'_> {
    /// Boots the image and waits for its end. Nothing is left running or on disk after it but the export.
    pub(super) async fn run(self) -> Result<Ended, Failure> {
        let Self { image, tools, root, opens, export, console, memory_mib, cpus, lifetime, until_exported } =
            self;
        let image_path = image.to_owned();
        let opened = spawn_blocking(move || Opened::open(&image_path)).await.map_err(internal)??;
        let config =
            Config { pcrs: opened.registers.for_emulator(), module_id: None, clock: system_clock(0) };
        let nsm = match root {
            NsmRoot::Of(module) => module.another(config),
            NsmRoot::Kept(root) => Emulator::with_root(root, config),
        };
        let nsm = Arc::new(nsm.map_err(internal)?);
        let home = home(image)?;
        let vsock = home.vsock();
        let parent = start_parent(&vsock, &opens, export.clone()).await?;
        let launch = Launch {
            image: BootImage::Parts { parts: opened.into_parts()?, nsm },
            image_path: image.to_owned(),
            debug: false,
            config: MachineConfig {
                memory: memory_mib.map(enclave_vm::Memory::from_mib),
                cpus,
                lifetime: Some(lifetime),
                ..MachineConfig::default()
            },
            tools,
            vsock,
            consoles: vec![Sink::Plain(Plain::new(console))],
            home,
        };
        let watched = spawn_blocking(move || {
            let vm = Vm::start(launch)?;
            // The machine has its lifetime, so this ends.
            let ending = loop {
                match vm.wait(LOOK) {
                    Some(ending) => break Some(ending),
                    None if until_exported && export.exists() => break None,
                    None => {}
                }
            };
            let boot_time = vm.boot_time();
            Ok::<_, enclave_vm::Error>((ending.unwrap_or_else(|| vm.stop()), boot_time))
        });
        let watched = watched.await.map_err(internal)?;
        parent.shutdown().await;
        let (ending, boot_time) = watched.map_err(enclave::failure)?;
        Ok(Ended { ending, boot_time })
    }
}

/// A directory of its own under a name that is free: the process's number makes it so.
fn home(image: &Path) -> Result<Home, Failure> {
    let name = format!("{}-{}", Name::of_file(image), std::process::id());
    let name: Name = name.parse().map_err(enclave::failure)?;
    enclave::registry().create(name).map_err(enclave::failure)
}

async fn start_parent(vsock: &Path, opens: &[String], export: PathBuf) -> Result<host_proxy::Proxy, Failure> {
    let port = |port| Endpoint::unix(vsock_path(vsock, port)).map_err(internal);
    let rules = opens.iter().map(|rule| rule.parse().map(Entry::new)).collect::<Result<_, _>>();
    let service = |name: &str, listen, kind| Service {
        name: name.into(),
        listen,
        cids: None,
        tunnel: TunnelLimits::default(),
        kind,
    };
    let receive = Receive { path: export, max_bytes: MAX_EXPORT, format: Format::Framed };
    let services = vec![
        Service::egress("egress", port(PROXY)?, RuleSet::new(rules.map_err(internal)?)),
        service("heartbeat", port(HEARTBEAT)?, Kind::Heartbeat),
        service("receiver", port(RECEIVER)?, Kind::Receive(receive)),
    ];
    let config = host_proxy::Config::new(services).map_err(internal)?;
    host_proxy::Proxy::start(config).await.map_err(internal)
}

/// Shows the lines of a console to whoever wants them.
pub(super) struct Console {
    line: String,
    show: Box<dyn FnMut(&str) + Send>,
}

impl Console {
    /// `show` gets each line.
    pub(super) fn new(show: impl FnMut(&str) + Send + 'static) -> Self {
        Self { line: String::new(), show: Box::new(show) }
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // The console's sink gives whole characters.
        for character in String::from_utf8_lossy(bytes).chars() {
            match character {
                '\n' => (self.show)(&std::mem::take(&mut self.line)),
                _ if self.line.len() < MAX_LINE => self.line.push(character),
                _ => {}
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn internal(error: impl std::error::Error + Send + Sync + 'static) -> Failure {
    Failure::new(Exit::Internal, error)
}
