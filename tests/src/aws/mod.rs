//! EC2 on this machine: moto, an implementation of AWS's interfaces by others, behind a front that does what moto leaves
//! out, keeps what was asked, and fails on demand.
//!
//! What the front adds to moto: a launch repeated under its client token gives the same instance; enclave options are
//! kept and shown, and change only on a stopped instance; parameters of Systems Manager are looked up in a launch;
//! instance types and images that do not exist are refused; a security group in use is not deleted; a console shows the
//! host's SSH key; instances take a moment to appear, to run and to end; regions that do not exist are refused.
//!
//! Systems Manager starts sessions with instances that have a role, a while after they began to run; keys of EC2 Instance
//! Connect arrive at the instance.
//!
//! Left out: permissions, quotas, prices, and everything inside an instance.

mod front;
mod gaps;
mod moto;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use base64::Engine as _;
use tokio::sync::oneshot;

use gaps::Gaps;
use moto::Moto;

/// The SSH key of a host that is nowhere.
const HOST_KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE0LPFeB9S10wKXfhVjxDmEqVvCSrBEZrwAUpbB7ixSu";
/// A test waits this long for a call that is held.
const HELD: Duration = Duration::from_secs(60);

/// What a host prints on its console at its first boot.
fn console(key: &str) -> String {
    let line = "<14>Nov 21 10:00:01 ec2:";
    format!(
        "[    2.1] cloud-init: done\r\n{line} -----BEGIN SSH HOST KEY KEYS-----\r\n{line} {key} root@host\r\n\
         {line} -----END SSH HOST KEY KEYS-----\r\n"
    )
}

/// A call that was received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// `RunInstances`.
    pub action: String,
    /// Its parameters, without `Action` and `Version`, in the order they were sent.
    pub parameters: Vec<(String, String)>,
    /// The region it was signed for.
    pub region: String,
    /// Same for the repetitions of one call.
    invocation: String,
    /// Target and body, for the services that take JSON.
    json: Option<(String, hyper::body::Bytes)>,
}

impl Call {
    /// A parameter's value.
    #[must_use]
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// Whether it only looks.
    #[must_use]
    pub fn reads(&self) -> bool {
        self.action.starts_with("Describe")
            || self.action.starts_with("Get")
            || self.parameter("DryRun") == Some("true")
    }
}

/// How a call fails, with all its repetitions unless it says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is refused with this status, code and message; nothing happens.
    Refused(u16, &'static str, &'static str),
    /// The connection is closed without an answer; nothing happens.
    Unanswered,
    /// It happens, and the connection is closed without an answer.
    AnswerLost,
    /// It happens, and only its repetition is answered.
    FirstAnswerLost,
    /// Nothing happens, and nothing is ever answered.
    HeldBefore,
    /// It happens, and nothing is ever answered.
    HeldAfter,
}

/// EC2 for a test. It ends when dropped.
pub struct Aws {
    address: SocketAddr,
    shared: Arc<Shared>,
    held: Mutex<Receiver<()>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    moto: Moto,
}

struct Shared {
    moto: String,
    client: reqwest::Client,
    inner: Mutex<Inner>,
    hold: Sender<()>,
}

struct Inner {
    gaps: Gaps,
    calls: Vec<Call>,
    /// Faults by the number of the call they hit, counted from 0.
    faults: Vec<(usize, Fault)>,
    console: String,
    public_ip: IpAddr,
    /// The instance's list of keys that log in.
    admits: Option<PathBuf>,
}

impl Shared {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no holder of this lock panics")
    }
}

impl Aws {
    /// Starts it with an empty account. `None` where moto is not installed, and says so: `scripts/aws-tools.sh` installs
    /// it.
    ///
    /// # Panics
    /// When moto does not start, or nothing can listen.
    #[must_use]
    pub fn start() -> Option<Self> {
        let moto = Moto::start()?;
        let (hold, held) = std::sync::mpsc::channel();
        let inner = Inner {
            gaps: Gaps::default(),
            calls: Vec::new(),
            faults: Vec::new(),
            console: console(HOST_KEY),
            public_ip: Ipv4Addr::new(203, 0, 113, 10).into(),
            admits: None,
        };
        let client = reqwest::Client::builder().no_proxy().timeout(HELD).build();
        let client = client.expect("a client without TLS needs nothing");
        let shared = Arc::new(Shared { moto: moto.url(), client, inner: Mutex::new(inner), hold });
        let (stop, stopped) = oneshot::channel();
        let (address, thread) = front::start(Arc::clone(&shared), stopped);
        Some(Self { address, shared, held: Mutex::new(held), stop: Some(stop), thread: Some(thread), moto })
    }

    /// Where it is, for `AWS_ENDPOINT_URL`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The variables by which AWS's tools and our programs are sent here, and nowhere else.
    #[must_use]
    pub fn environment(&self) -> [(&'static str, String); 5] {
        [
            ("AWS_ENDPOINT_URL", self.endpoint()),
            ("AWS_ACCESS_KEY_ID", "test".to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "test".to_owned()),
            ("AWS_EC2_METADATA_DISABLED", "true".to_owned()),
            ("NO_PROXY", "127.0.0.1".to_owned()),
        ]
    }

    /// Every call so far, in order, without repetitions.
    #[must_use]
    pub fn calls(&self) -> Vec<Call> {
        self.shared.inner().calls.clone()
    }

    /// Forgets calls and faults so far; the next call has number 0.
    pub fn forget_calls(&self) {
        let mut inner = self.shared.inner();
        inner.calls.clear();
        inner.faults.clear();
    }

    /// Lets call number `at` fail, counted from 0 since the start or [`Self::forget_calls`].
    pub fn fail(&self, at: usize, fault: Fault) {
        self.shared.inner().faults.push((at, fault));
    }

    /// Waits until a call is held.
    ///
    /// # Panics
    /// When none comes.
    pub fn wait_until_held(&self) {
        let held = self.held.lock().expect("no holder of this lock panics");
        held.recv_timeout(HELD).expect("the call that is to be held comes");
    }

    /// The SSH key that consoles show from now on.
    pub fn set_host_key(&self, key: &str) {
        self.shared.inner().console = console(key);
    }

    /// Has keys of EC2 Instance Connect written to this list of keys that log in.
    pub fn admit_to(&self, authorized_keys: PathBuf) {
        self.shared.inner().admits = Some(authorized_keys);
    }

    /// Makes an instance profile.
    ///
    /// # Panics
    /// When moto does not.
    pub fn make_instance_profile(&self, name: &str) {
        let name = [("InstanceProfileName".to_owned(), name.to_owned())];
        let _made = self.ask_service("us-east-1", "iam", "CreateInstanceProfile", &name);
    }

    /// The AWS CLI that `scripts/aws-tools.sh` installed: variables to find it by, with more in front of its path. `None`
    /// where it is not, and says so.
    #[must_use]
    #[expect(clippy::print_stdout, reason = "a test that is skipped says why")]
    pub fn cli(first: &Path) -> Option<[(&'static str, String); 2]> {
        let Some(library) = moto::installed("awscli-") else {
            println!("skipped: no AWS CLI; scripts/aws-tools.sh installs it from PyPI");
            return None;
        };
        let path = format!("{}:{}:/usr/bin:/bin", first.display(), library.join("bin").display());
        Some([("PATH", path), ("PYTHONPATH", library.display().to_string())])
    }

    /// The public half of the key pair that the last instance was launched with, as it learns it when it boots.
    ///
    /// # Panics
    /// When none was launched with an imported key.
    #[must_use]
    pub fn login_key(&self) -> String {
        let calls = self.calls();
        let launch = calls.iter().rev().find(|call| call.action == "RunInstances" && !call.reads());
        let name = launch.and_then(|call| call.parameter("KeyName")).expect("a launch with a key");
        let imports =
            |call: &&Call| call.action == "ImportKeyPair" && call.parameter("KeyName") == Some(name);
        let import = calls.iter().find(imports).expect("the key was imported");
        let key = import.parameter("PublicKeyMaterial").expect("an import has a key");
        let key = base64::engine::general_purpose::STANDARD.decode(key).expect("the key is in base64");
        String::from_utf8(key).expect("the key is text")
    }

    /// The public address of every instance from now on.
    pub fn set_public_ip(&self, address: IpAddr) {
        self.shared.inner().public_ip = address;
    }

    /// What is there in a region, asked of moto: `instance i-…`, `volume vol-…`, `key-pair NAME`, `security-group NAME`.
    /// Ended instances and what every account has are left out.
    ///
    /// # Panics
    /// When moto does not answer.
    #[must_use]
    pub fn inventory(&self, region: &str) -> Vec<String> {
        let alive: Vec<(String, String)> = ["pending", "running", "stopping", "stopped"]
            .iter()
            .enumerate()
            .map(|(index, state)| (format!("Filter.1.Value.{}", index + 1), (*state).to_owned()))
            .chain([("Filter.1.Name".to_owned(), "instance-state-name".to_owned())])
            .collect();
        let mut lines = Vec::new();
        for (kind, action, element, parameters) in [
            ("instance", "DescribeInstances", "instanceId", alive.as_slice()),
            ("volume", "DescribeVolumes", "volumeId", &[]),
            ("key-pair", "DescribeKeyPairs", "keyName", &[]),
            ("security-group", "DescribeSecurityGroups", "groupName", &[]),
        ] {
            let answer = self.ask(region, action, parameters);
            let found = gaps::elements(&answer, element);
            lines.extend(found.into_iter().filter(|it| it != "default").map(|it| format!("{kind} {it}")));
        }
        lines.sort();
        lines.dedup();
        lines
    }

    /// Asks moto itself, as another user of the account.
    ///
    /// # Panics
    /// When it does not answer, or refuses.
    #[must_use]
    pub fn ask(&self, region: &str, action: &str, parameters: &[(String, String)]) -> String {
        self.ask_service(region, "ec2", action, parameters)
    }

    fn ask_service(
        &self,
        region: &str,
        service: &'static str,
        action: &str,
        parameters: &[(String, String)],
    ) -> String {
        let shared = Arc::clone(&self.shared);
        let (region, action, parameters) = (region.to_owned(), action.to_owned(), parameters.to_vec());
        // A test may be inside a runtime, where nothing can block on another.
        let asked = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.expect("a runtime starts");
            runtime.block_on(front::ask(&shared, &region, service, &action, &parameters))
        });
        let (status, body) = asked.join().expect("asking does not panic");
        assert_eq!(status, 200, "{body}");
        body
    }

    /// The process id of moto, for messages.
    #[must_use]
    pub fn moto(&self) -> u32 {
        self.moto.id()
    }
}

impl Drop for Aws {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // Fails only when the front has ended already.
            let _ended = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}
