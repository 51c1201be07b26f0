//! `keyferry enclave` as people call it: images that really boot, and what is left when the runner is killed.
//!
//! Boots need QEMU, vhost-device-vsock and a kernel (`scripts/enclave-vm-tools.sh`), and say so where one is missing.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise, in its helpers too")]
#![expect(clippy::print_stdout, reason = "a test that is skipped says why")]

#[path = "../../enclave-vm/tests/support/mod.rs"]
mod support;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use eif_builder::{Arch, Assembled, Assembler, SectionKind};
use enclave_vm::MachineKind;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};
use serde_json::Value;

const COMMAND_LINE: &str = "reboot=k panic=30 pci=off nomodules console=ttyS0 random.trust_cpu=on";

/// A place with an image, and state directories of its own.
struct Bench {
    directory: tempfile::TempDir,
    image: PathBuf,
    measured: Assembled,
}

impl Bench {
    /// Nothing where something is missing; the test says so.
    fn new(kind: MachineKind) -> Option<Self> {
        match (support::kernel(), support::tools(kind)) {
            (Ok(kernel), Ok(_)) => Some(Self::with_kernel(&kernel)),
            (Err(reason), _) | (_, Err(reason)) => {
                println!("skipped: {reason}");
                None
            }
        }
    }

    fn with_kernel(kernel: &Path) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let ramdisk = support::ramdisk(directory.path());
        let image = directory.path().join("guest.eif");
        let mut assembler = Assembler::writing(Arch::X86_64, File::create(&image).unwrap()).unwrap();
        assembler.bytes(SectionKind::Kernel, &std::fs::read(kernel).unwrap()).unwrap();
        assembler.bytes(SectionKind::Cmdline, COMMAND_LINE.as_bytes()).unwrap();
        // Metadata in front of the ramdisks, as nitro-cli puts it.
        assembler.bytes(SectionKind::Metadata, b"{}").unwrap();
        // In two halves, so that PCR1 and PCR2 differ: the first holds everything but the end of the archive.
        let (first, second) = ramdisk.split_at(ramdisk.len() - 124);
        assembler.bytes(SectionKind::Ramdisk, first).unwrap();
        assembler.bytes(SectionKind::Ramdisk, second).unwrap();
        let (measured, _) = assembler.finish(None).unwrap();
        Self { directory, image, measured }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_keyferry"));
        command.arg("enclave").args(arguments).env("XDG_RUNTIME_DIR", self.directory.path());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let image = self.image.to_str().unwrap();
        self.command(&[&["run", image], arguments].concat()).output().unwrap()
    }

    fn ask(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// What is in the state directory beside its lock.
    fn left(&self) -> Vec<String> {
        let enclaves = self.directory.path().join("keyferry/enclaves").read_dir().unwrap();
        let names = enclaves.map(|it| it.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name != "lock").collect()
    }

    /// The processes that run for the enclave called `name`.
    fn processes(&self, name: &str) -> Vec<i32> {
        let (name, directory) = (format!("enclave-{name}"), self.directory.path().join("keyferry"));
        let processes = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
        processes
            .filter_map(|it| {
                Some((it.file_name().to_str()?.parse().ok()?, std::fs::read(it.path().join("cmdline")).ok()?))
            })
            .filter(|(_, words): &(i32, Vec<u8>)| {
                let words = String::from_utf8_lossy(words);
                words.split('\0').any(|word| word == name) || words.contains(directory.to_str().unwrap())
            })
            .map(|(pid, _)| pid)
            .collect()
    }

    fn pcrs(&self) -> [String; 3] {
        let registers = &self.measured.registers;
        [registers.pcr0, registers.pcr1, registers.pcr2].map(|pcr| pcr.to_string())
    }
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// What the guest said about `what`.
fn answer<'a>(console: &'a str, what: &str) -> &'a str {
    let prefix = format!("guest: {what} ");
    let found = console.lines().find_map(|line| line.split_once(&prefix).map(|(_, answer)| answer));
    found.unwrap_or_else(|| panic!("nothing about {what} in:\n{console}"))
}

#[test]
fn an_image_boots_and_its_document_verifies_under_the_root_that_was_written() {
    let Some(bench) = Bench::new(MachineKind::Microvm) else { return };
    let root = bench.directory.path().join("root.pem");
    let output = bench.run(&["--root-out", root.to_str().unwrap(), "--timeout", "300"]);
    let console = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{console}{}", text(&output.stderr));

    let response = answer(console, "document").to_owned();
    let evidence = bench.directory.path().join("document");
    // Behind {"Attestation": {"document": and the length of the byte string.
    std::fs::write(&evidence, hex::decode(response).unwrap().split_off(26)).unwrap();
    let [pcr0, pcr1, pcr2] = bench.pcrs();
    let mut verify = Command::new(env!("CARGO_BIN_EXE_keyferry"));
    verify.args(["attestation", "verify", "--root", root.to_str().unwrap(), evidence.to_str().unwrap()]);
    verify.args([
        "--pcr",
        &format!("0={pcr0}"),
        "--pcr",
        &format!("1={pcr1}"),
        "--pcr",
        &format!("2={pcr2}"),
    ]);
    let verified = verify.output().unwrap();
    assert_eq!(verified.status.code(), Some(0), "{}", text(&verified.stderr));
    assert_eq!(bench.left(), Vec::<String>::new());
}

#[test]
fn qemus_own_nsm_measures_what_eif_builder_measured() {
    let Some(bench) = Bench::new(MachineKind::NitroEnclave) else { return };
    // The driver asks for randomness while it probes. With a second processor it may ask before the device is started;
    // QEMU's NSM loses such a request, and answers nothing after it.
    let output = bench.run(&["--machine", "nitro-enclave", "--cpus", "1", "--timeout", "300"]);
    let console = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{console}{}", text(&output.stderr));
    for (index, pcr) in bench.pcrs().iter().enumerate() {
        let said = answer(console, &format!("pcr{index}"));
        assert!(said.contains(pcr), "PCR{index} is {said}, expected {pcr}");
    }
}

#[test]
fn a_detached_enclave_is_listed_followed_and_stopped() {
    let Some(bench) = Bench::new(MachineKind::Microvm) else { return };
    let arguments =
        ["--detach", "--json", "--name", "app", "--debug", "--append", "test=wait", "--ready-line"];
    let output = bench.run(&[arguments.as_slice(), &["guest: ready"]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let started: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(started["pcrs"]["0"], "00".repeat(48));
    assert_eq!(started["os_image_hash"], bench.measured.registers.os_image_hash().to_string());
    println!("boot to init: {} ms, {} ms in the guest", started["boot_millis"], started["boot_guest_millis"]);

    let list = bench.ask(&["list", "--json"]);
    let list: Value = serde_json::from_slice(&list.stdout).unwrap();
    assert_eq!(list["enclaves"][0]["name"], "app");
    assert_eq!(list["enclaves"][0]["phase"], "ready");
    assert_eq!(list["enclaves"][0]["pid"], started["pid"]);
    let again = bench.run(&["--name", "app"]);
    assert_eq!(again.status.code(), Some(2));
    assert!(
        text(&again.stderr).contains("error: an enclave named app is running\nhint: choose another name")
    );

    let mut follow = bench.command(&["console", "app", "--follow"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(follow.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("guest: ready")));
    assert_eq!(bench.ask(&["stop", "app"]).status.code(), Some(0));
    assert_eq!(follow.wait().unwrap().code(), Some(0));
    assert_eq!(bench.processes("app"), Vec::<i32>::new());
    assert_eq!(bench.left(), Vec::<String>::new());
    let stop = bench.ask(&["stop", "app"]);
    assert_eq!(
        (stop.status.code(), text(&stop.stderr)),
        (Some(2), "error: no enclave named app is running\nhint: see `keyferry enclave list`\n")
    );
}

#[test]
fn nothing_outlives_a_runner_that_is_killed() {
    let Some(bench) = Bench::new(MachineKind::Microvm) else { return };
    let output = bench.run(&["--detach", "--json", "--name", "killed", "--append", "test=wait"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let started: Value = serde_json::from_slice(&output.stdout).unwrap();
    let running = bench.processes("killed").into_iter().map(watch).collect::<Vec<_>>();
    // The runner itself has the name in its arguments, but not as QEMU has it.
    assert_eq!(running.len(), 2);
    let runner = watch(i32::try_from(started["pid"].as_i64().unwrap()).unwrap());
    rustix::process::pidfd_send_signal(&runner, Signal::KILL).unwrap();
    for process in running.iter().chain([&runner]) {
        let ten_seconds = Timespec::try_from(Duration::from_secs(10)).unwrap();
        let ended =
            rustix::event::poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&ten_seconds)).unwrap();
        assert_eq!(ended, 1, "a process outlives its runner");
    }
    assert_eq!(bench.left(), ["killed"], "the directory is there until somebody looks");
    assert_eq!(text(&bench.ask(&["list"]).stdout), "no enclave is running\n");
    assert_eq!(bench.left(), Vec::<String>::new());
}

#[test]
fn an_interrupt_ends_the_enclave() {
    let Some(bench) = Bench::new(MachineKind::Microvm) else { return };
    let image = bench.image.to_str().unwrap();
    let mut runner: Child = bench
        .command(&["run", image, "--name", "stopped", "--append", "test=wait"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(runner.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("guest: ready")));
    let pidfd = watch(i32::try_from(runner.id()).unwrap());
    rustix::process::pidfd_send_signal(&pidfd, Signal::INT).unwrap();
    assert_eq!(runner.wait().unwrap().code(), Some(130));
    assert_eq!(bench.processes("stopped"), Vec::<i32>::new());
    assert_eq!(bench.left(), Vec::<String>::new());
}

#[test]
fn an_image_that_needs_more_memory_is_refused_before_anything_starts() {
    let Some(bench) = Bench::new(MachineKind::Microvm) else { return };
    let output = bench.run(&["--memory", "63"]);
    assert_eq!(output.status.code(), Some(2));
    let expected = format!(
        "error: memory of 63 MiB: an image of {} bytes needs at least 64 MiB\nhint: use `--memory 64`\n",
        bench.measured.len
    );
    assert_eq!(text(&output.stderr), expected);
    assert_eq!(bench.left(), Vec::<String>::new());
}

#[test]
fn a_file_that_is_no_image_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("no.eif");
    std::fs::write(&file, vec![0; 4096]).unwrap();
    if let Err(reason) = support::tools(MachineKind::Microvm) {
        println!("skipped: {reason}");
        return;
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_keyferry"));
    let output = command
        .args(["enclave", "run"])
        .arg(&file)
        .env("XDG_RUNTIME_DIR", directory.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
}

#[test]
fn what_is_missing_is_told_with_the_next_step() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_keyferry"));
    command
        .args(["enclave", "run", "image.eif", "--qemu", "/nowhere/qemu", "--firmware"])
        .arg(directory.path());
    let output = command.args(["--vhost-device-vsock", "/nowhere/vsock"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let stderr = text(&output.stderr);
    for part in
        ["/nowhere/qemu cannot be asked", "qboot.rom is in none of", "/nowhere/vsock is not a program"]
    {
        assert!(stderr.contains(part), "{stderr}");
    }
    assert!(stderr.contains("\nhint: run `scripts/enclave-vm-tools.sh`"), "{stderr}");
}

fn watch(pid: i32) -> std::os::fd::OwnedFd {
    rustix::process::pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap()
}
