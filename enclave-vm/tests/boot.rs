//! Real boots: a kernel with the stock nsm driver, our NSM behind it, and vsock.
//!
//! They need QEMU, vhost-device-vsock and a kernel (`scripts/enclave-vm-tools.sh`), and say so where one is missing.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise, in its helpers too")]
#![expect(clippy::print_stdout, reason = "a test that is skipped says why")]

mod support;

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use attestation::{
    AttestationDocument, Error as AttestationError, Pcr, PcrIndex, TrustAnchor, UnixMillis, Verifier,
};
use enclave_vm::{
    BootImage, Ending, GuestEnd, ImageParts, Launch, MachineConfig, MachineKind, Memory, Name, Phase, Plain,
    Registers, Registry, Sink, Spool, Tools, Vm,
};
use nsm_emulator::{Config, Emulator, system_clock};

/// What the kernel of the tests needs to show something; the rest is appended.
const COMMAND_LINE: &str = "reboot=k panic=30 pci=off nomodules console=ttyS0 random.trust_cpu=on";
/// More than enough for an emulated boot on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);

/// A place for a test's enclave, and what boots in it.
struct Bench {
    directory: tempfile::TempDir,
    tools: Tools,
    ramdisk: Vec<u8>,
}

/// What the guest wrote.
#[derive(Clone, Default)]
struct Transcript(Arc<Mutex<Vec<u8>>>);

impl Write for Transcript {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Transcript {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    /// What the guest said about `what`.
    fn answer(&self, what: &str) -> String {
        let prefix = format!("guest: {what} ");
        let text = self.text();
        let found =
            text.lines().find_map(|line| line.split_once(&prefix).map(|(_, answer)| answer.to_owned()));
        found.unwrap_or_else(|| panic!("nothing about {what} in:\n{text}"))
    }
}

impl Bench {
    /// Nothing where something is missing; the test says so.
    fn new() -> Option<Self> {
        match (support::kernel(), support::tools(MachineKind::Microvm)) {
            (Ok(_), Ok(tools)) => {
                let directory = tempfile::tempdir().unwrap();
                Some(Self { ramdisk: support::ramdisk(directory.path()), directory, tools })
            }
            (Err(reason), _) | (_, Err(reason)) => {
                println!("skipped: {reason}");
                None
            }
        }
    }

    fn registry(&self) -> Registry {
        Registry::at(self.directory.path().join("run/enclaves"))
    }

    /// One that no other test has, here or in another checkout.
    fn name(&self) -> Name {
        let directory = self.directory.path().file_name().unwrap().to_str().unwrap().to_lowercase();
        format!("test{}", directory.replace('.', "-")).parse().unwrap()
    }

    /// The command lines of the programs that run for this enclave: they name it, or a file in its directory.
    fn processes(&self) -> Vec<String> {
        let (name, directory) = (format!("enclave-{}", self.name()), self.directory.path().to_str().unwrap());
        let processes = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok).map(|it| it.path());
        processes
            .filter_map(|it| std::fs::read(it.join("cmdline")).ok())
            .map(|words| String::from_utf8_lossy(&words).replace('\0', " "))
            .filter(|words| words.contains(&name) || words.contains(directory))
            .collect()
    }

    fn vsock(&self) -> std::path::PathBuf {
        self.directory.path().join("vsock")
    }

    fn start(
        &self,
        registers: &Registers,
        append: &str,
        config: MachineConfig,
    ) -> (Vm, Transcript, Arc<Emulator>) {
        let pcrs = registers.for_emulator();
        let nsm = Config { pcrs, module_id: None, clock: system_clock(0) };
        let nsm = Arc::new(Emulator::new(nsm).unwrap());
        let mut kernel = Spool::new("kernel").unwrap();
        let mut len = kernel.append(&mut std::fs::File::open(support::kernel().unwrap()).unwrap()).unwrap();
        let mut ramdisks = Spool::new("ramdisks").unwrap();
        len += ramdisks.append(&mut self.ramdisk.as_slice()).unwrap();
        let parts = ImageParts { kernel, ramdisks, command_line: COMMAND_LINE.to_owned(), image_len: len };
        let transcript = Transcript::default();
        let vm = Vm::start(Launch {
            home: self.registry().create(self.name()).unwrap(),
            image: BootImage::Parts { parts, nsm: Arc::clone(&nsm) },
            image_path: "guest.eif".into(),
            debug: false,
            config: MachineConfig { append: Some(append.to_owned()), boot_timeout: PATIENCE, ..config },
            tools: self.tools.clone(),
            vsock: self.vsock(),
            consoles: vec![Sink::Plain(Plain::new(transcript.clone()))],
        });
        (vm.unwrap(), transcript, nsm)
    }

    /// What is left of the enclave's files.
    fn left(&self) -> Vec<String> {
        let list = |path: &Path| -> Vec<String> {
            path.read_dir().unwrap().map(|it| it.unwrap().file_name().into_string().unwrap()).collect()
        };
        let mut left = list(&self.directory.path().join("run/enclaves"));
        left.extend(list(self.directory.path()));
        left.retain(|name| !matches!(name.as_str(), "lock" | "init" | "run"));
        left
    }
}

fn registers() -> Registers {
    Registers::of_image([1, 2, 3].map(|byte| Pcr::new([byte; 48])), Some(Pcr::new([8; 48])))
        .with_parent_instance("i-0123456789abcdef0")
}

fn verify(transcript: &Transcript, nsm: &Emulator) -> BTreeMap<PcrIndex, Pcr> {
    let response = hex::decode(transcript.answer("document")).unwrap();
    // {"Attestation": {"document": bytes}}, the length of the bytes in two of them.
    let evidence = response.strip_prefix(b"\xa1\x6bAttestation\xa1\x68document\x59").unwrap();
    let evidence = &evidence[2..];
    let now = UnixMillis(system_clock(0)());
    let verifier = Verifier::new(TrustAnchor::from_pem(&nsm.root_pem()).unwrap());
    let document = verifier.verify(evidence, now).unwrap();
    assert_eq!(document.user_data(), Some(b"asked in the guest".as_slice()));
    assert_eq!(document.module_id(), nsm.module_id());

    let aws = Verifier::new(TrustAnchor::aws_nitro_g1());
    assert!(matches!(aws.verify(evidence, now), Err(AttestationError::UntrustedRoot)));
    let decoded = AttestationDocument::decode(evidence).unwrap();
    (0..16)
        .map(|index| PcrIndex::new(index).unwrap())
        .map(|index| (index, *decoded.pcr(index).unwrap()))
        .collect()
}

#[test]
fn a_guest_gets_documents_that_verify_and_reaches_the_host() {
    let Some(bench) = Bench::new() else { return };
    let host = UnixListener::bind(enclave_vm::vsock_path(&bench.vsock(), 9100)).unwrap();
    let answering = std::thread::spawn(move || {
        let (stream, _) = host.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        (&stream).write_all(b"hello from the host\n").unwrap();
        line
    });
    let config = MachineConfig { ready_line: Some("guest: ready".into()), ..MachineConfig::default() };
    let (vm, transcript, nsm) = bench.start(&registers(), "test.vsock=1", config);
    assert_eq!(vm.vsock(9100), enclave_vm::vsock_path(&bench.vsock(), 9100));
    vm.wait_for(Phase::Ready, PATIENCE).unwrap_or_else(|error| panic!("{error}\n{}", transcript.text()));
    let boot = vm.boot_time().unwrap();
    println!("boot to init: {:?} here, {:?} in the guest", boot.wall, boot.guest);
    assert_eq!(vm.wait(PATIENCE), Some(Ending::Guest(GuestEnd::Restarted)));

    assert_eq!(answering.join().unwrap(), "hello from the guest\n");
    assert_eq!(transcript.answer("vsock"), "hello from the host");
    assert!(
        transcript
            .answer("command line")
            .contains("reboot=t no_timer_check keyferry.parent_cid=2 test.vsock=1")
    );
    assert_eq!(transcript.answer("cpus"), "2");
    let pcrs = verify(&transcript, &nsm);
    for (index, pcr) in registers().to_map() {
        assert_eq!(pcrs[&index], pcr, "{index}");
    }
    assert!(pcrs[&PcrIndex::ROLE].is_zero());
    // {"DescribePCR": {"lock": true, "data": 48 bytes}}
    let pcr0 = format!("a16b4465736372696265504352a2646c6f636bf564646174615830{}", "01".repeat(48));
    assert_eq!(transcript.answer("pcr0"), pcr0);
    assert_eq!(transcript.answer("nonsense"), hex::encode(b"\xa1\x65Error\x6fInvalidArgument"));
    assert!(transcript.answer("long").contains("Message too long"));
    std::fs::remove_file(vm.vsock(9100)).unwrap();
    drop(vm);
    assert_eq!(bench.left(), Vec::<String>::new());
}

#[test]
fn a_guest_in_debug_mode_shows_zeros_and_is_known_for_it() {
    let Some(bench) = Bench::new() else { return };
    let (vm, transcript, nsm) =
        bench.start(&registers().in_debug_mode(), "test=halt", MachineConfig::default());
    assert_eq!(vm.wait(PATIENCE), Some(Ending::Guest(GuestEnd::Halted)));
    let pcrs = verify(&transcript, &nsm);
    for index in [PcrIndex::IMAGE, PcrIndex::KERNEL, PcrIndex::APPLICATION] {
        assert!(pcrs[&index].is_zero(), "{index}");
    }
    assert!(!pcrs[&PcrIndex::SIGNER].is_zero());
}

#[test]
fn a_panic_of_the_guests_kernel_is_told() {
    let Some(bench) = Bench::new() else { return };
    let config = MachineConfig { memory: Some(Memory::from_mib(64)), cpus: 1, ..MachineConfig::default() };
    let (vm, transcript, _) = bench.start(&registers(), "test=panic", config);
    let Some(Ending::Guest(GuestEnd::Panicked(message))) = vm.wait(PATIENCE) else {
        panic!("no panic in:\n{}", transcript.text());
    };
    assert!(message.starts_with("Attempted to kill init! exitcode=0x00000700"), "{message}");
    assert_eq!(transcript.answer("cpus"), "1");
}

#[test]
fn a_running_enclave_is_listed_and_nothing_is_left_of_a_stopped_one() {
    let Some(bench) = Bench::new() else { return };
    let config = MachineConfig { ready_line: Some("guest: ready".into()), ..MachineConfig::default() };
    let (vm, transcript, _) = bench.start(&registers(), "test=wait", config);
    vm.wait_for(Phase::Ready, PATIENCE).unwrap_or_else(|error| panic!("{error}\n{}", transcript.text()));
    assert!(bench.registry().create(bench.name()).is_err(), "the name is taken");
    let state = bench.registry().find(&bench.name()).unwrap();
    assert_eq!(
        (state.memory_mib, state.cpus, state.debug, state.machine.as_str()),
        (256, 2, false, "microvm")
    );
    assert_eq!(state.pid, std::process::id());
    assert_eq!(vm.wait(Duration::ZERO), None, "it waits");
    assert_eq!(bench.processes().len(), 2, "{:?}", bench.processes());
    assert_eq!(vm.stop(), Ending::Stopped);
    assert_eq!(bench.processes(), Vec::<String>::new());
    assert_eq!(bench.left(), Vec::<String>::new());
    assert_eq!(bench.registry().list().unwrap(), []);
}

#[test]
fn an_enclave_whose_time_is_over_is_ended() {
    let Some(bench) = Bench::new() else { return };
    let lifetime = Some(Duration::from_millis(300));
    let (vm, _, _) =
        bench.start(&registers(), "test=wait", MachineConfig { lifetime, ..MachineConfig::default() });
    assert_eq!(vm.wait(PATIENCE), Some(Ending::LifetimeOver(Duration::from_millis(300))));
    drop(vm);
    assert_eq!(bench.left(), Vec::<String>::new());
}

#[test]
fn a_guest_that_does_not_come_up_is_told_with_its_last_words() {
    let Some(mut bench) = Bench::new() else { return };
    // Nothing to run: the kernel panics, having said why.
    bench.ramdisk = vec![0; 512];
    let (vm, transcript, _) = bench.start(&registers(), "", MachineConfig::default());
    let error = vm.wait_for(Phase::Running, PATIENCE).unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with("the enclave ended: the guest's kernel panicked: "),
        "{text}\n{}",
        transcript.text()
    );
}
