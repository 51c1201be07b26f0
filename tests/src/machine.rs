//! A machine with real vsock: a Linux guest that runs programs of this workspace, booted as an enclave would be.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use attestation::Pcr;
use eif_builder::cpio::{Entry, FileType, Writer};
use enclave_vm::{
    BootImage, Ending, GuestEnd, ImageParts, Launch, MachineConfig, MachineKind, Name, Plain, Registers,
    Registry, Search, Sink, Spool, Tools, Vm,
};
use nsm_emulator::{Config, Emulator, system_clock};

use crate::{IMAGE, program};

/// The kernel beside the checkout.
const KERNEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/tools/enclave-vm/bzImage");
/// What the kernel needs to show something; the rest is appended.
const COMMAND_LINE: &str = "reboot=k panic=30 pci=off nomodules console=ttyS0 random.trust_cpu=on";
/// More than enough for an emulated guest on a busy machine.
const PATIENCE: Duration = Duration::from_secs(300);

/// What is needed to boot a guest.
pub struct Machine {
    tools: Tools,
    directory: tempfile::TempDir,
    nsm: Arc<Emulator>,
    files: Vec<(String, u32, Vec<u8>)>,
}

impl Machine {
    /// Finds the programs that boot a guest.
    ///
    /// # Errors
    /// What is missing, for a test that says why it is skipped.
    ///
    /// # Panics
    /// When there is no temporary directory.
    pub fn find() -> Result<Self, String> {
        if !Path::new(KERNEL).is_file() {
            return Err(format!("no kernel for a guest: {KERNEL} is not there"));
        }
        let [cache, home, path] = ["XDG_CACHE_HOME", "HOME", "PATH"].map(std::env::var_os);
        let search = Search::in_environment(cache.as_deref(), home.as_deref(), path.as_deref());
        let tools = search.find(MachineKind::Microvm).map_err(|error| error.to_string())?;
        let pcrs = Registers::of_image(IMAGE.map(Pcr::new), None).for_emulator();
        let nsm = Emulator::new(Config { pcrs, module_id: None, clock: system_clock(0) });
        Ok(Self {
            tools,
            directory: tempfile::tempdir().expect("a temporary directory"),
            nsm: Arc::new(nsm.expect("the emulator makes its keys")),
            files: Vec::new(),
        })
    }

    /// A directory for the test's own files; it goes with the machine.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The certificate that the guest's module is trusted by.
    #[must_use]
    pub fn module_root(&self) -> String {
        self.nsm.root_pem()
    }

    /// Where a connection of the guest to CID 2 and `port` arrives.
    #[must_use]
    pub fn socket(&self, port: u32) -> PathBuf {
        enclave_vm::vsock_path(&self.vsock(), port)
    }

    /// The socket that leads to listeners in the guest: after `CONNECT PORT` and a line feed.
    #[must_use]
    pub fn vsock(&self) -> PathBuf {
        self.directory().join("vsock")
    }

    /// Puts a file into the guest.
    pub fn file(&mut self, path: &str, content: impl Into<Vec<u8>>) {
        self.files.push((path.to_owned(), 0o644, content.into()));
    }

    /// Puts a program of this workspace into the guest, without its symbols but with the shared libraries it needs.
    ///
    /// # Panics
    /// When `strip` or `ldd` fails.
    pub fn program(&mut self, path: &str, name: &str) {
        let stripped = self.directory().join(name);
        let status = Command::new("strip").arg("-o").arg(&stripped).arg(program(name)).status();
        assert!(status.expect("strip runs").success(), "strip {name}");
        let listed = Command::new("ldd").arg(&stripped).output().expect("ldd runs");
        // NAME => PATH (ADDRESS), or PATH (ADDRESS) for the loader.
        for word in
            String::from_utf8_lossy(&listed.stdout).split_whitespace().filter(|it| it.starts_with('/'))
        {
            if !self.files.iter().any(|(path, ..)| path == word) {
                self.files.push((word.to_owned(), 0o755, fs::read(word).expect("a library of the program")));
            }
        }
        self.files.push((path.to_owned(), 0o755, fs::read(&stripped).expect("what strip wrote")));
    }

    /// Boots; the guest's /init is what was put there.
    ///
    /// # Panics
    /// When the machine does not start.
    #[must_use]
    pub fn boot(self, append: &str) -> Guest {
        let mut kernel = Spool::new("kernel").expect("a spool");
        let mut source = File::open(KERNEL).expect("the kernel");
        let mut len = kernel.append(&mut source).expect("the kernel is copied");
        let mut ramdisks = Spool::new("ramdisks").expect("a spool");
        len += ramdisks.append(&mut self.ramdisk().as_slice()).expect("the ramdisk is copied");
        let parts = ImageParts { kernel, ramdisks, command_line: COMMAND_LINE.to_owned(), image_len: len };
        let console = Console::default();
        let launch = Launch {
            home: Registry::at(self.directory().join("run")).create(self.name()).expect("a name of its own"),
            image: BootImage::Parts { parts, nsm: Arc::clone(&self.nsm) },
            image_path: "guest.eif".into(),
            debug: false,
            config: MachineConfig {
                append: Some(append.to_owned()),
                boot_timeout: PATIENCE,
                lifetime: Some(PATIENCE),
                ..MachineConfig::default()
            },
            tools: self.tools.clone(),
            vsock: self.vsock(),
            consoles: vec![Sink::Plain(Plain::new(console.clone()))],
        };
        let vm = Vm::start(launch).expect("the machine starts");
        Guest { vm, console, machine: self }
    }

    /// One that no other test has, here or in another checkout.
    fn name(&self) -> Name {
        let directory = self.directory().file_name().and_then(|it| it.to_str()).unwrap_or_default();
        format!("test{}", directory.to_lowercase().replace('.', "-")).parse().expect("a name")
    }

    fn ramdisk(&self) -> Vec<u8> {
        let mut archive = Writer::new(Vec::new());
        let mut directories = BTreeSet::from(["dev", "proc", "tmp"].map(PathBuf::from));
        for (path, ..) in &self.files {
            let parents = Path::new(path.trim_start_matches('/')).ancestors().skip(1);
            directories.extend(parents.filter(|it| !it.as_os_str().is_empty()).map(Path::to_owned));
        }
        let name = |path: &Path| path.to_str().expect("paths are text").to_owned();
        // Sorted, so that a directory stands before what is in it.
        for directory in &directories {
            let entry = Entry::new(name(directory), FileType::Directory, 0o755);
            archive.entry(&entry, &mut io::empty()).expect("a directory");
        }
        // The kernel opens init's standard streams here before anything is mounted.
        let mut console = Entry::new("dev/console", FileType::CharDevice, 0o600);
        console.rdev = (5, 1);
        archive.entry(&console, &mut io::empty()).expect("the console");
        for (path, mode, content) in &self.files {
            let mut entry = Entry::new(path.trim_start_matches('/'), FileType::Regular, *mode);
            entry.len = content.len() as u64;
            archive.entry(&entry, &mut content.as_slice()).expect("a file");
        }
        archive.finish().expect("the trailer").0
    }
}

/// A booted guest; it ends when dropped.
pub struct Guest {
    vm: Vm,
    console: Console,
    machine: Machine,
}

impl Guest {
    /// The machine it runs on.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// What is on its console so far.
    #[must_use]
    pub fn console(&self) -> String {
        let bytes = self.console.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// What the guest said behind `guest: WHAT `, as soon as it has.
    ///
    /// # Panics
    /// When it ends, or takes too long, without having said it; with its console.
    #[must_use]
    pub fn said(&self, what: &str) -> String {
        let prefix = format!("guest: {what} ");
        let until = Instant::now() + PATIENCE;
        loop {
            // Asked before the console is read, so that the last words are not missed.
            let ended = self.vm.wait(Duration::from_millis(50));
            let console = self.console();
            // A line that is not complete may still grow.
            let whole = console.rsplit_once('\n').map_or("", |(whole, _)| whole);
            if let Some((_, answer)) = whole.lines().find_map(|line| line.split_once(&prefix)) {
                return answer.trim().to_owned();
            }
            assert!(ended.is_none(), "the guest ended without a word about {what}: {ended:?}\n{console}");
            assert!(Instant::now() < until, "nothing about {what} in:\n{console}");
        }
    }

    /// Waits until the guest has come to the end of its program.
    ///
    /// # Panics
    /// When it ended in another way; with its console.
    pub fn finish(self) {
        let ending = self.vm.wait(PATIENCE);
        assert_eq!(ending, Some(Ending::Guest(GuestEnd::Restarted)), "{}", self.console());
    }
}

/// What the guest wrote.
#[derive(Clone, Debug, Default)]
struct Console(Arc<Mutex<Vec<u8>>>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
