//! From a project folder to a served KMS and a second node, on stand-ins of Google and of the machines' KMSs, as an
//! operator types it.

#![expect(clippy::unwrap_used, reason = "a test may stop at once")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use e2e::google::{Fault, Google};
use e2e::{Finished, KmsMachine, answer, finish, program};
use kms_protocol::kms_file::KmsFile;
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(120);
/// What a guest prints on its way.
const CONSOLE: &str = "[    0.000000] Linux version 6.9.0-dstack\n[  OK  ] Preparing dstack system...\n\
    Using persistent data disk /dev/nvme0n2p1\nMounting host-shared\nRunning pre-launch script\n\
    Starting containers\n Container dstack-kms-1  Started\n";

/// A home directory with settings, a stand-in of Google, and an image like the one the machines' evidence shows.
struct Operator {
    home: TempDir,
    google: Google,
}

impl Operator {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let google = Google::start();
        google.set_external_address("127.0.0.1");
        google.print_at_boot(CONSOLE);
        let settings = home.path().join(".config/dstack-cloud");
        std::fs::create_dir_all(&settings).unwrap();
        let text = r#"{"image_search_paths": ["~/.dstack/images"], "gcp": {"project": "demo-proj"}}"#;
        std::fs::write(settings.join("config.json"), text).unwrap();
        Self { home, google }
    }

    /// A project, and the KMS that will run on its machine.
    fn project(&self, name: &str, like: Option<&KmsMachine>) -> (PathBuf, KmsMachine) {
        let image = self.home.path().join(".dstack/images/dstack-cloud-0.6.0");
        if !image.exists() {
            std::fs::create_dir_all(&image).unwrap();
            std::fs::write(image.join("disk.raw"), vec![5; 600 << 10]).unwrap();
            std::fs::write(image.join("auth_hash.txt"), "00".repeat(32)).unwrap();
        }
        self.done(self.home.path(), &["new", name, "--key-provider", "tpm"]);
        let project = self.home.path().join(name);
        let prepared: serde_json::Value =
            serde_json::from_str(&self.done(&project, &["prepare", "--json"])).unwrap();
        let machine = KmsMachine::start(prepared["appId"].as_str().unwrap(), like);
        std::fs::write(image.join("auth_hash.txt"), machine.image_hash()).unwrap();
        (project, machine)
    }

    fn command(&self, directory: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(program("keyferry"));
        command.arg("kms").args(arguments).current_dir(directory);
        command.env_clear().env("HOME", self.home.path()).env("PATH", "/usr/bin:/bin").env("NO_COLOR", "1");
        command.envs(self.google.environment());
        command
    }

    fn run(&self, directory: &Path, arguments: &[&str]) -> Finished {
        finish(self.command(directory, arguments), DEADLINE)
    }

    fn done(&self, directory: &Path, arguments: &[&str]) -> String {
        answer(self.command(directory, arguments), DEADLINE)
    }
}

/// What brings the KMS on `machine` up, after the command's name and its own arguments.
fn arguments<'a>(first: &[&'a str], texts: &'a [String; 2], more: &[&'a str]) -> Vec<&'a str> {
    let [port, trust] = texts;
    let common = [
        "--domain",
        "localhost",
        "--operator",
        "127.0.0.1/32",
        "--platform",
        "dstack-nitro-enclave",
        "--port",
        port,
        "--trust",
        trust,
        "--yes",
    ];
    [first, &common, more].concat()
}

fn texts(machine: &KmsMachine) -> [String; 2] {
    [machine.port.to_string(), machine.trust().display().to_string()]
}

fn kms_file(project: &Path) -> KmsFile {
    KmsFile::decode(&std::fs::read(project.join("kms.json")).unwrap()).unwrap()
}

/// Sources of the rule that opens the KMS's port, if there is one.
fn let_in(google: &Google, instance: &str, port: u16) -> Option<serde_json::Value> {
    let rule = google.resource(&format!("firewall {instance}-allow-tcp-{port}"))?;
    Some(rule["sourceRanges"].clone())
}

#[test]
fn a_kms_comes_up_a_second_node_joins_and_nothing_is_left() {
    let operator = Operator::new();
    let (first, machine) = operator.project("kms-a", None);
    let (own, clients) = (texts(&machine), ["--clients", "203.0.113.0/24"]);
    let watched = [&clients[..], &["--watch", "1s"]].concat();
    let up = operator.run(&first, &arguments(&["up"], &own, &watched));
    assert_eq!(up.code, Some(0), "{}", up.stderr);
    let file = kms_file(&first);
    assert_eq!(file.url, format!("https://localhost:{}", machine.port));
    assert!(up.stdout.contains(&file.k256_pubkey) && up.stdout.contains("written to "), "{}", up.stdout);
    assert_eq!(file.node.os_image_hash, machine.image_hash());
    for told in
        ["(costs money)", "keyferry chain add-kms 0x", "the evidence binds the keys", "answered for 1 s"]
    {
        assert!(up.stderr.contains(told), "{told}: {}", up.stderr);
    }
    assert_eq!(
        let_in(&operator.google, "dstack-kms-a", machine.port).unwrap(),
        serde_json::json!(["203.0.113.0/24"]),
        "who set the KMS up is not let in any more"
    );

    // Once more, without anything to do.
    operator.google.forget_calls();
    let again = operator.done(&first, &arguments(&["up"], &own, &[&clients[..], &["--json"]].concat()));
    let again: serde_json::Value = serde_json::from_str(&again).unwrap();
    assert_eq!(
        (&again["asBefore"], &again["kms"]["k256_pubkey"]),
        (&true.into(), &file.k256_pubkey.clone().into())
    );
    assert!(operator.google.calls().iter().all(|call| call.line.starts_with("GET ")), "nothing was changed");

    // `kms verify` of the file's identity holds too.
    let trust = machine.trust().display().to_string();
    operator.done(&first, &["verify", &file.url, "--k256", &file.k256_pubkey, "--config", &trust]);

    let (second, other) = operator.project("kms-b", Some(&machine));
    let join = texts(&other);
    let joined = operator.run(&second, &arguments(&["join", "../kms-a"], &join, &[]));
    assert_eq!(joined.code, Some(0), "{}", joined.stderr);
    let replica = kms_file(&second);
    assert_eq!((&replica.ca_pubkey, &replica.k256_pubkey), (&file.ca_pubkey, &file.k256_pubkey));
    assert_eq!(replica.replicas, std::slice::from_ref(&file.url));
    assert_eq!(replica.url, format!("https://localhost:{}", other.port));
    assert_eq!(
        let_in(&operator.google, "dstack-kms-b", other.port),
        None,
        "without --clients the port is closed"
    );
    assert!(joined.stderr.contains("keyferry kms fw allow"), "{}", joined.stderr);

    for (project, name) in [(&second, "dstack-kms-b"), (&first, "dstack-kms-a")] {
        operator.done(project, &["remove", "--yes", "--lose-keys-of", name]);
    }
    let left = ["bucket demo-proj-dstack", "image dstack-cloud-0-6-0", "image dstack-data-disk"];
    assert_eq!(operator.google.inventory(), left);
}

/// Kills the program without a word, as the kernel does when memory runs out.
fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

fn spawn(mut command: Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn a_bring_up_that_was_killed_is_gone_on_with() {
    let operator = Operator::new();
    let (project, machine) = operator.project("kms", None);
    let own = texts(&machine);
    let up = || operator.command(&project, &arguments(&["up"], &own, &[]));

    // While the machine is being made, and after it was, unheard.
    for fault in [Fault::Hangs, Fault::HangsAfter] {
        let calls = operator.google.calls().len();
        // The plan is made twice; after it come the calls that change something.
        operator.google.fail(calls + 21, fault);
        let child = spawn(up());
        assert!(operator.google.hangs().wait(DEADLINE));
        kill(child);
        operator.google.forget_hangs();
    }
    // While the KMS makes keys: it makes them, and nobody hears of it.
    machine.hold().on();
    let child = spawn(up());
    machine.hold().wait(DEADLINE);
    // What its machine prints can be looked at meanwhile.
    assert!(operator.done(&project, &["logs"]).contains("Starting containers"));
    kill(child);
    machine.hold().release();

    let finished = finish(up(), DEADLINE);
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    assert_eq!(kms_file(&project).node.os_image_hash, machine.image_hash());
    operator.done(&project, &["remove", "--yes", "--lose-keys-of", "dstack-kms"]);
    let left = ["bucket demo-proj-dstack", "image dstack-cloud-0-6-0", "image dstack-data-disk"];
    assert_eq!(operator.google.inventory(), left);
}

#[test]
fn what_is_not_as_expected_is_refused_with_a_next_step() {
    let operator = Operator::new();
    let (project, machine) = operator.project("kms", None);
    let own = texts(&machine);
    let up = |more: &[&str]| operator.run(&project, &arguments(&["up"], &own, more));
    let zeros = "00".repeat(32);
    for (more, code, error, hint) in [
        (&["--os-image-hash", &zeros][..], 3, "os_image_hash is ", "--os-image-hash"),
        (&["--mr-aggregated", &zeros], 3, "mr_aggregated is ", "do not use these keys"),
        (&["--device-id", &zeros], 3, "device_id is ", "do not use these keys"),
        (&["--operator", "0.0.0.0/0"], 2, "everybody could set up the KMS", ""),
        (&["--wait", "moon=1s"], 2, "expected NAME=TIME", ""),
    ] {
        let finished = up(more);
        assert_eq!(finished.code, Some(code), "{more:?}: {}", finished.stderr);
        assert!(finished.stderr.contains(error), "{more:?}: {}", finished.stderr);
        assert!(finished.stderr.contains(hint), "{more:?}: {}", finished.stderr);
        assert!(!project.join("kms.json").exists());
    }
    // Another way in is not tolerated while anybody could set the KMS up.
    let range = operator.run(&project, &["fw", "allow", &own[0]]);
    assert_eq!(range.code, Some(0), "{}", range.stderr);
    let finished = up(&[]);
    assert_eq!(finished.code, Some(0), "our own rule is narrowed: {}", finished.stderr);

    // A KMS that was set up by others has no record of its own.
    let (other, stranger) = operator.project("other", Some(&machine));
    let own = texts(&stranger);
    let onboard =
        format!("{{\"source_url\":\"https://localhost:{}\",\"domain\":\"localhost\"}}", machine.port);
    let mut curl = Command::new("curl");
    let url = format!("http://127.0.0.1:{}/prpc/Onboard.Onboard?json", stranger.port);
    curl.args(["-fsS", "-H", "content-type: application/json", "-d", &onboard, &url]);
    assert_eq!(finish(curl, DEADLINE).code, Some(0));
    let finished = operator.run(&other, &arguments(&["up"], &own, &[]));
    assert_eq!(finished.code, Some(3), "{}", finished.stderr);
    assert!(finished.stderr.contains("no record that they were made on this machine"), "{}", finished.stderr);
    assert!(finished.stderr.contains("hint: somebody else set this KMS up"), "{}", finished.stderr);
}

#[test]
fn a_guest_that_does_not_start_is_told_from_its_console() {
    let operator = Operator::new();
    operator.google.print_at_boot("Linux version 6.9\n.user-config is too large, max size 1048576\n");
    let (project, machine) = operator.project("kms", None);
    // Nothing listens at this port: it is below those of machines and of the kernel's choice.
    let own = ["2".to_owned(), machine.trust().display().to_string()];
    let finished = operator.run(&project, &arguments(&["up"], &own, &[]));
    assert_eq!(finished.code, Some(3), "{}", finished.stderr);
    assert!(finished.stderr.contains(".user-config is too large"), "{}", finished.stderr);
    assert!(finished.stderr.contains("hint: a file of the configuration is larger"), "{}", finished.stderr);
}
