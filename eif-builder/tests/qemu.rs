//! Boots an image of ours in QEMU's nitro-enclave machine and compares what its NSM reports.
//!
//! Needs the QEMU and the kernel of ../shared/tools/enclave-vm (or KEYFERRY_QEMU and KEYFERRY_KERNEL), and
//! `vhost-device-vsock` in the path (or KEYFERRY_VHOST_VSOCK).
#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]

mod support;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use eif_builder::{Assembled, Compression};

/// Boot takes about a second of guest time; emulated and on a busy machine it can take a minute.
const BOOT_LIMIT: Duration = Duration::from_secs(180);

struct Tools {
    qemu: PathBuf,
    kernel: PathBuf,
    vsock: PathBuf,
}

/// Ends a program when the test ends.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Looks for what the test needs; the error says what is missing.
fn tools(folder: &Path) -> Result<Tools, String> {
    let from_env = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let kernel = from_env("KEYFERRY_KERNEL")
        .or_else(|| support::shared("tools/enclave-vm/bzImage"))
        .ok_or("no enclave kernel")?;
    let vsock = from_env("KEYFERRY_VHOST_VSOCK").unwrap_or_else(|| "vhost-device-vsock".into());
    runs(&vsock)?;
    let qemu = match from_env("KEYFERRY_QEMU") {
        Some(qemu) => qemu,
        None => {
            let packed = support::shared("tools/enclave-vm/qemu-system-x86_64.xz").ok_or("no QEMU")?;
            let qemu = folder.join("qemu-system-x86_64");
            let output = std::fs::File::create(&qemu).map_err(|error| error.to_string())?;
            let unpacked = Command::new("xz").arg("-dc").arg(packed).stdout(output).status();
            if !unpacked.is_ok_and(|status| status.success()) {
                return Err("xz cannot unpack QEMU".into());
            }
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            std::fs::set_permissions(&qemu, mode).map_err(|error| error.to_string())?;
            qemu
        }
    };
    runs(&qemu)?;
    Ok(Tools { qemu, kernel, vsock })
}

fn runs(program: &Path) -> Result<(), String> {
    match Command::new(program).arg("--version").output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            Err(format!("{} does not run: {}", program.display(), String::from_utf8_lossy(&output.stderr)))
        }
        Err(error) => Err(format!("{} does not run: {error}", program.display())),
    }
}

/// The init that prints registers, linked statically.
fn init(folder: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/assets/nsm_init.rs");
    let output = folder.join("init");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let status = Command::new(rustc)
        .args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-o"])
        .args([&output, &source])
        .status()
        .unwrap();
    assert!(status.success());
    output
}

/// Two ramdisks, the second packed, so that PCR1 and PCR2 differ from PCR0 and from nothing.
fn image(folder: &Path, kernel: &Path, compression: Compression, signer: bool) -> (PathBuf, Assembled) {
    let inputs = support::Inputs::new();
    let mut recipe = inputs.v1();
    recipe.kernel = kernel.to_owned();
    recipe.cmdline = b"reboot=k panic=1 console=ttyS0 random.trust_cpu=on".to_vec();
    let stack = eif_builder::ramdisk::Init::Aws { init: init(folder), nsm_ko: None };
    let boot = stack.boot_ramdisk().unwrap();
    let app =
        eif_builder::source::from_binary(&folder.join("init"), "app", eif_builder::Arch::X86_64).unwrap();
    let process = eif_builder::ramdisk::Process { args: vec!["/app".into()], ..Default::default() };
    let app = stack.app_ramdisk(app, &process).unwrap();
    recipe.ramdisks = vec![
        eif_builder::Ramdisk::Archive { label: "boot".into(), compression: Compression::None, fill: boot },
        eif_builder::Ramdisk::Archive { label: "app".into(), compression, fill: app },
    ];
    recipe.signer = signer.then(|| inputs.p384());
    let path = folder.join("image.eif");
    let assembled = recipe.write(&path).unwrap();
    (path, assembled)
}

/// Lines of a program's output, read on a thread of their own so that waiting for them has a limit.
fn lines(child: &mut Child) -> Receiver<String> {
    let (sender, receiver) = channel();
    let output = child.stdout.take().unwrap();
    std::thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                break;
            }
        }
    });
    receiver
}

/// Boots the image and returns the lines that its init printed.
fn boot(tools: &Tools, folder: &Path, image: &Path) -> Vec<String> {
    let socket = folder.join("v.sock");
    let vm =
        format!("guest-cid=4,socket={},uds-path={}", socket.display(), folder.join("vm.vsock").display());
    let mut vsock = Command::new(&tools.vsock);
    vsock.args(["--vm", &vm]).stdout(Stdio::null()).stderr(Stdio::null());
    let _vsock = Running(vsock.spawn().unwrap());
    let deadline = Instant::now() + BOOT_LIMIT;
    while !socket.exists() {
        assert!(Instant::now() < deadline, "vhost-device-vsock makes no socket");
        std::thread::yield_now();
    }
    let mut qemu = Command::new(&tools.qemu);
    qemu.args([
        "-M",
        "nitro-enclave,vsock=c,id=test",
        "-nographic",
        "-m",
        "512M",
        "-cpu",
        "max",
        "-no-reboot",
    ])
    .args(["-L", "/usr/share/seabios", "-L", "/usr/share/qemu", "-kernel"])
    .arg(image)
    // Not part of the registers. Without it the kernel panics where its emulated processor had to wait.
    .args(["-append", "no_timer_check"])
    .arg("-chardev")
    .arg(format!("socket,id=c,path={}", socket.display()))
    .stdin(Stdio::null())
    .stdout(Stdio::piped())
    .stderr(Stdio::inherit());
    let mut qemu = Running(qemu.spawn().unwrap());
    let console = lines(&mut qemu.0);
    let mut printed = Vec::new();
    let mut log = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(line) = console.recv_timeout(left) else {
            panic!("the image does not boot; its console:\n{}", log.join("\n"));
        };
        if line == "NSM DONE" {
            return printed;
        }
        if let Some(fact) = line.strip_prefix("NSM ") {
            printed.push(fact.to_owned());
        }
        log.push(line);
    }
}

#[test]
fn qemu_boots_our_image_and_reports_our_registers() {
    let folder = tempfile::tempdir().unwrap();
    let tools = match tools(folder.path()) {
        Ok(tools) => tools,
        Err(why) => {
            println!("skipped: {why}");
            return;
        }
    };
    for (compression, signed) in [(Compression::None, true), (Compression::Gzip, false)] {
        let folder = tempfile::tempdir().unwrap();
        let (image, assembled) = image(folder.path(), &tools.kernel, compression, signed);
        let printed = boot(&tools, folder.path(), &image);
        let registers = assembled.registers;
        let zero = attestation::Pcr::ZERO;
        for (index, pcr) in [
            (0, registers.pcr0),
            (1, registers.pcr1),
            (2, registers.pcr2),
            (8, registers.pcr8.unwrap_or(zero)),
        ] {
            let line = format!("PCR{index} {pcr}");
            assert!(printed.contains(&line), "expected {line}, the NSM reports\n{}", printed.join("\n"));
        }
    }
}
