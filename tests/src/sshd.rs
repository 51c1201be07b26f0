//! A Nitro host: a real OpenSSH server in process and mount namespaces of its own, with the kernel, processors and
//! hugepages of an EC2 instance, and stand-ins (`tests/sshd`) for the programs that change them. They act as the real ones
//! do and say what those say; an enclave that they start is a virtual machine that really boots its image.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

use crate::program;

/// For a server to listen, on a busy machine too.
const START: Duration = Duration::from_secs(60);
const SCRIPTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/sshd");
const SERVER: &str = "/usr/sbin/sshd";
/// The kernel that the machine runs, and for which it has the module.
const KERNEL: &str = "6.1.150-174.273.amzn2023.x86_64";

/// A running machine; it ends when dropped, with all that runs on it.
#[derive(Debug)]
pub struct NitroHost {
    server: Child,
    directory: TempDir,
    address: SocketAddr,
}

impl NitroHost {
    /// Starts one, as AWS launches it: nothing is installed. Its key and its record are in its directory.
    ///
    /// # Errors
    /// What is missing, for a test that says why it is skipped.
    ///
    /// # Panics
    /// When the server does not start although everything is there.
    pub fn start() -> Result<Self, String> {
        ready()?;
        let host = Self::boot((Ipv4Addr::LOCALHOST, free_port()).into());
        host.admit(&host.read("id_ed25519.pub"));
        host.record();
        Ok(host)
    }

    /// Starts one with an address of its own, at which SSH has its usual port, and that nobody may log in to yet.
    ///
    /// # Errors
    /// As [`Self::start`].
    ///
    /// # Panics
    /// As [`Self::start`].
    pub fn launch() -> Result<Self, String> {
        ready()?;
        // All of 127.0.0.0/8 is this machine, and no two processes have the same id.
        let [_, high, middle, low] = std::process::id().to_be_bytes();
        let address = SocketAddr::from(([127, 64 + high, middle, low], 22));
        drop(TcpListener::bind(address).map_err(|error| format!("{address} cannot be had: {error}"))?);
        Ok(Self::boot(address))
    }

    fn boot(address: SocketAddr) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = |name: &str| directory.path().join(name);
        for folder in ["home", "enclaves", "units", "run"] {
            fs::create_dir(path(folder)).expect("a directory of ours");
        }
        for key in ["host_key", "id_ed25519", "other_key"] {
            generate(&path(key));
        }
        for (name, content) in [
            ("kernel", KERNEL),
            ("modules", KERNEL),
            ("arch", "x86_64"),
            ("fragmented", "0"),
            ("boot_id", "3bfe9b0a-6c3e-4a39-9a3c-1d2b8d9e7a51"),
        ] {
            write(&path(name), &format!("{content}\n"));
        }
        write(&path("environment"), &environment(directory.path()));
        fs::copy(format!("{SCRIPTS}/gate.sh"), path("gate.sh")).expect("a file of ours");
        let mut host = Self { server: idle(), directory, address };
        host.configure("host_key");
        host.serve();
        host
    }

    /// Lets the owner of this public key log in, and nobody else from now on.
    pub fn admit(&self, public_key: &str) {
        write(&self.path("authorized_keys"), &format!("{}\n", public_key.trim_end()));
    }

    /// Where its SSH server listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The key it proves itself with: `ssh-ed25519 AAAA…`.
    #[must_use]
    pub fn host_key(&self) -> String {
        self.read("host_key.pub").split(' ').take(2).collect::<Vec<_>>().join(" ")
    }

    fn configure(&self, host_key: &str) {
        let settings = format!(
            "ListenAddress {}\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nUsePAM no\n\
             StrictModes no\nPermitRootLogin yes\nPasswordAuthentication no\nForceCommand {}\n\
             SetEnv MACHINE_ENVIRONMENT={}\nMaxStartups 100\n",
            self.address,
            self.text(host_key),
            self.text("authorized_keys"),
            self.text("gate.sh"),
            self.text("environment"),
        );
        write(&self.path("sshd_config"), &settings);
    }

    fn serve(&mut self) {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]);
        command.arg(format!("{SCRIPTS}/start.sh")).arg(self.directory.path()).arg(format!("{SCRIPTS}/bin"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        self.server = command.spawn().expect("unshare starts");
        let stderr = self.server.stderr.take().expect("stderr is piped");
        let log = self.path("sshd.log");
        let (listening, listens) = mpsc::channel();
        thread::spawn(move || {
            let mut kept = String::new();
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                kept.push_str(&line);
                kept.push('\n');
                // The directory may be gone when the last lines come.
                let _for_people = fs::write(&log, &kept);
                if line.starts_with("Server listening on") {
                    let _nobody_waits = listening.send(());
                }
            }
        });
        let told = listens.recv_timeout(START);
        assert!(told.is_ok(), "sshd does not listen:\n{}", self.read("sshd.log"));
    }

    /// How `keyferry` reaches it, as `keyferry host up` records it.
    fn record(&self) {
        let record = serde_json::json!({
            "version": 1, "address": self.address.ip(), "port": self.address.port(), "user": "ec2-user",
            "private_key": "id_ed25519", "host_key": self.host_key(),
        });
        write(&self.path("keyferry-host.json"), &format!("{record:#}\n"));
    }

    /// The machine as if another had taken its address: the same but for its host key.
    ///
    /// # Panics
    /// When it does not start again.
    pub fn replace(&mut self) {
        self.end();
        self.configure("other_key");
        self.serve();
    }

    /// The folder with the machine's record, keys and state.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A path in that folder.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The same as text.
    #[must_use]
    pub fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// A file of the machine's state; empty when it is not there.
    #[must_use]
    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// Sets a file of the machine's state.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn set(&self, name: &str, content: &str) {
        write(&self.path(name), content);
    }

    /// Removes a file of the machine's state.
    pub fn clear(&self, name: &str) {
        // One that is not there is cleared.
        let _gone = fs::remove_file(self.path(name));
    }

    /// From now on each command that is new meets a fault once: `cut`, `late`, `hangs` or `held` (see `gate.sh`); with
    /// words behind it, as in `held run-enclave`, only commands with these words.
    pub fn faults(&self, kind: &str) {
        self.clear("faulted");
        self.set("fault", &format!("{kind}\n"));
    }

    /// How many commands met the fault.
    #[must_use]
    pub fn faulted(&self) -> usize {
        self.read("faulted").lines().count()
    }

    /// How many commands came so far.
    #[must_use]
    pub fn steps(&self) -> usize {
        self.read("steps").trim().parse().unwrap_or(0)
    }

    /// The command with this number, from 1.
    #[must_use]
    pub fn step(&self, number: usize) -> String {
        self.read(&format!("step.{number}"))
    }

    /// Enclaves that the machine lists.
    ///
    /// # Panics
    /// When its state cannot be read.
    #[must_use]
    pub fn enclaves(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("enclaves")).expect("a directory of ours");
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }

    fn end(&mut self) {
        // Both fail only where it has ended already. Its child is killed with it, and with that all in its namespace.
        let _gone = self.server.kill();
        let _gone = self.server.wait();
    }
}

impl Drop for NitroHost {
    fn drop(&mut self) {
        self.end();
    }
}

/// What the scripts know.
fn environment(directory: &Path) -> String {
    let variable = |name: &str| std::env::var(name).ok();
    let home = variable("HOME").unwrap_or_else(|| "/root".into());
    let cache = variable("XDG_CACHE_HOME").unwrap_or_else(|| format!("{home}/.cache"));
    let directory = directory.display();
    format!(
        "MACHINE={directory}\nSTAND_INS={SCRIPTS}/bin\nVSOCK={directory}/vsock\nKEYFERRY={}\nKEYFERRY_PROXY={}\n\
         export XDG_RUNTIME_DIR={directory}/run XDG_CACHE_HOME={cache}\n",
        program("keyferry").display(),
        program("host-proxy").display(),
    )
}

fn ready() -> Result<(), String> {
    if !Path::new(SERVER).is_file() {
        return Err(format!("no OpenSSH server at {SERVER}"));
    }
    if !rustix::process::geteuid().is_root() {
        return Err("a machine of its own needs root, for its namespaces".into());
    }
    let mut namespaces = Command::new("unshare");
    // Writable layers over system directories are what not every container allows.
    namespaces.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c"]);
    namespaces.arg(
        "mount -t tmpfs layers /run && mkdir /run/a /run/b && \
         mount -t overlay -o lowerdir=/etc,upperdir=/run/a,workdir=/run/b overlay /etc",
    );
    let output = namespaces.output().map_err(|error| format!("unshare: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "no namespaces with layers of their own here: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    ))
}

fn generate(path: &Path) {
    let mut command = Command::new("ssh-keygen");
    command.args(["-q", "-t", "ed25519", "-N", "", "-C", "test", "-f"]).arg(path);
    let status = command.status().expect("ssh-keygen comes with the server");
    assert!(status.success(), "ssh-keygen: {status}");
}

/// A port that nobody listens on at the moment.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("a bound socket has an address").port()
}

/// A process that is there until the server is.
fn idle() -> Child {
    Command::new("true").spawn().expect("true starts")
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).expect("a file in a directory of ours");
}
