//! From a project folder to a served KMS and a second node on a bare-metal host, on stand-ins of its VMM and of the machines'
//! KMSs, as an operator types it.

#![expect(clippy::unwrap_used, reason = "a test may stop at once")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use cloud_provisioners::project::Project;
use e2e::serve::{Answer, Server};
use e2e::vmm::{Fault, Vmm};
use e2e::{Contracts, Finished, KmsMachine, Setup, TdxHost, answer, finish, free_port, program};
use kms_protocol::kms_file::KmsFile;
use serde_json::Value;
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(120);
/// What a guest prints on its way.
const CONSOLE: &str = "Linux version 6.9.0-dstack\n[  OK  ] Preparing dstack system...\nRunning pre-launch script\n\
    Starting containers\n Container dstack-kms-1  Started\n";

/// A home directory, a stand-in of the host's VMM, and a registry that has the KMS's image.
struct Operator {
    home: TempDir,
    vmm: Vmm,
    registry: Server,
}

impl Operator {
    fn new() -> Self {
        let vmm = Vmm::start(None);
        vmm.print_at_boot(CONSOLE);
        let registry = Server::start(|question| {
            let known = question.line == "HEAD /v2/kms/manifests/0.6.0";
            Some(Answer::bytes(if known { 200 } else { 404 }, Vec::new()))
        });
        Self { home: tempfile::tempdir().unwrap(), vmm, registry }
    }

    /// A project, and the KMS that will run on its machine.
    fn project(&self, name: &str, like: Option<&KmsMachine>) -> (PathBuf, KmsMachine) {
        self.project_with(name, Setup { like, ..Setup::default() })
    }

    fn project_with(&self, name: &str, mut setup: Setup<'_>) -> (PathBuf, KmsMachine) {
        let compose = format!("services:\n  kms:\n    image: {}/kms:0.6.0\n", self.registry.address());
        std::fs::write(self.home.path().join("docker-compose.yaml"), compose).unwrap();
        let port = free_port();
        let publish = format!("tcp:0.0.0.0:{port}:8000");
        let new =
            ["new", name, "--key-provider", "local", "--os-image", "dstack-0.6.0", "--publish", &publish];
        self.done(self.home.path(), &[&new[..], &["--compose", "docker-compose.yaml"]].concat());
        let directory = self.home.path().join(name);
        let project = Project::open(&directory).unwrap();
        let compose = project.compose(&project.app().unwrap(), None).unwrap();
        let app_id = compose.app_id();
        setup.port = Some(port);
        if let Some((_, hash)) = &mut setup.tdx {
            *hash = compose.hash();
        }
        (directory, KmsMachine::start_with(&hex::encode(app_id), &setup))
    }

    fn command(&self, directory: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(program("keyferry"));
        command.arg("kms").args(arguments).current_dir(directory);
        command.env_clear().env("HOME", self.home.path()).env("PATH", "/usr/bin:/bin").env("NO_COLOR", "1");
        command.env("DSTACK_VMM_URL", self.vmm.url());
        command
    }

    fn run(&self, directory: &Path, arguments: &[&str]) -> Finished {
        finish(self.command(directory, arguments), DEADLINE)
    }

    fn done(&self, directory: &Path, arguments: &[&str]) -> String {
        answer(self.command(directory, arguments), DEADLINE)
    }

    /// Methods that change something, as far as they were called.
    fn changes(&self) -> Vec<String> {
        let calls = self.vmm.calls().into_iter().map(|call| call.method);
        calls.filter(|method| method.ends_with("Vm")).collect()
    }
}

/// What brings the KMS on `machine` up, after the command's name and its own arguments.
fn arguments<'a>(first: &[&'a str], texts: &'a [String; 4], more: &[&'a str]) -> Vec<&'a str> {
    let [port, trust, image, platform] = texts;
    let common = ["--target", "vmm", "--domain", "localhost", "--platform", platform, "--yes"];
    let own = ["--port", port, "--trust", trust, "--os-image-hash", image];
    [first, &common, &own, more].concat()
}

fn texts(machine: &KmsMachine) -> [String; 4] {
    let trust = machine.trust().display().to_string();
    [machine.port.to_string(), trust, machine.image_hash(), machine.platform().to_owned()]
}

fn kms_file(project: &Path) -> KmsFile {
    KmsFile::decode(&std::fs::read(project.join("kms.json")).unwrap()).unwrap()
}

const CLIENTS: [&str; 2] = ["--clients", "0.0.0.0/0"];

#[test]
fn a_kms_comes_up_a_second_node_joins_and_nothing_is_left() {
    let operator = Operator::new();
    let (first, machine) = operator.project("kms-a", None);
    let (own, port) = (texts(&machine), machine.port);
    let up = operator.run(&first, &arguments(&["up"], &own, &CLIENTS));
    assert_eq!(up.code, Some(0), "{}", up.stderr);
    let file = kms_file(&first);
    assert_eq!(file.url, format!("https://localhost:{port}"));
    assert!(up.stdout.contains(&file.k256_pubkey) && up.stdout.contains("written to "), "{}", up.stdout);
    for told in ["make the machine dstack-kms-a", "keyferry chain add-kms 0x", "the evidence binds the keys"]
    {
        assert!(up.stderr.contains(told), "{told}: {}", up.stderr);
    }
    assert_eq!(operator.changes(), ["CreateVm", "ShutdownVm", "StopVm", "UpdateVm", "StartVm"]);
    let made = &operator.vmm.calls().into_iter().find(|call| call.method == "CreateVm").unwrap().body;
    assert_eq!(made["ports"][0]["host_address"], "127.0.0.1", "only the host reaches a KMS without keys");
    let compose: Value = serde_json::from_str(made["compose_file"].as_str().unwrap()).unwrap();
    assert_eq!((&compose["secure_time"], &compose["key_provider"]), (&false.into(), &"local".into()));
    assert_eq!(operator.vmm.open_ports("dstack-kms-a"), [format!("tcp:0.0.0.0:{port}:8000")]);

    // Once more, without anything to do.
    operator.vmm.forget_calls();
    let again = operator.done(&first, &arguments(&["up"], &own, &[&CLIENTS[..], &["--json"]].concat()));
    let again: Value = serde_json::from_str(&again).unwrap();
    assert_eq!(again["asBefore"], true);
    assert_eq!(operator.changes(), Vec::<String>::new());

    let (second, other) = operator.project("kms-b", Some(&machine));
    let joined = operator.run(&second, &arguments(&["join", "../kms-a"], &texts(&other), &[]));
    assert_eq!(joined.code, Some(0), "{}", joined.stderr);
    let replica = kms_file(&second);
    assert_eq!((&replica.ca_pubkey, &replica.k256_pubkey), (&file.ca_pubkey, &file.k256_pubkey));
    assert_eq!(replica.replicas, std::slice::from_ref(&file.url));
    let closed = [format!("tcp:127.0.0.1:{}:8000", other.port)];
    assert_eq!(operator.vmm.open_ports("dstack-kms-b"), closed, "without --clients the port stays closed");
    assert!(joined.stderr.contains("--clients 0.0.0.0/0"), "{}", joined.stderr);

    for (project, name) in [(&second, "dstack-kms-b"), (&first, "dstack-kms-a")] {
        operator.done(project, &["vmm", "remove", "--yes", "--lose-keys-of", name]);
    }
    assert_eq!(operator.vmm.machines(), Vec::<String>::new());
}

/// Killed without a word at each call that changes something, before and after it took effect, and while the KMS makes keys.
#[test]
fn a_bring_up_that_was_killed_is_gone_on_with() {
    let operator = Operator::new();
    let (project, machine) = operator.project("kms", None);
    let own = texts(&machine);
    let up = || operator.command(&project, &arguments(&["up"], &own, &CLIENTS));
    let kill_when = |ready: &dyn Fn()| {
        let mut command = up();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        ready();
        child.kill().unwrap();
        child.wait().unwrap();
    };
    let hangs = || {
        assert!(operator.vmm.wait_for_hang(DEADLINE));
        operator.vmm.forget_hangs();
    };
    operator.vmm.fail_method("CreateVm", Fault::Hangs);
    kill_when(&hangs);
    assert_eq!(operator.vmm.machines(), Vec::<String>::new());
    operator.vmm.fail_method("CreateVm", Fault::HangsAfter);
    kill_when(&hangs);
    assert_eq!(operator.vmm.machines(), ["dstack-kms running"]);
    // The KMS makes keys, and nobody hears of it. What its machine prints can be looked at meanwhile.
    machine.hold().on();
    kill_when(&|| {
        machine.hold().wait(DEADLINE);
        let logs = operator.done(&project, &["vmm", "logs"]);
        assert_eq!(logs.trim_end(), CONSOLE.trim_end());
    });
    machine.hold().release();
    for method in ["ShutdownVm", "StopVm", "UpdateVm", "StartVm"] {
        for fault in [Fault::Hangs, Fault::HangsAfter] {
            operator.vmm.fail_method(method, fault);
            kill_when(&hangs);
        }
    }
    let finished = finish(up(), DEADLINE);
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    assert_eq!(kms_file(&project).node.os_image_hash, machine.image_hash());
    assert_eq!(operator.vmm.machines(), ["dstack-kms running"]);
    assert_eq!(operator.vmm.open_ports("dstack-kms"), [format!("tcp:0.0.0.0:{}:8000", machine.port)]);
}

#[test]
fn what_cannot_work_is_refused_with_a_next_step() {
    let operator = Operator::new();
    let (project, machine) = operator.project("kms", None);
    let own = texts(&machine);
    let zeros = "00".repeat(32);
    let refused = |arguments: &[&str], code: i32, error: &str, hint: &str| {
        let finished = operator.run(&project, arguments);
        assert_eq!(finished.code, Some(code), "{arguments:?}: {}", finished.stderr);
        assert!(finished.stderr.contains(error), "{arguments:?}: {}", finished.stderr);
        assert!(finished.stderr.contains(&format!("hint: {hint}")), "{arguments:?}: {}", finished.stderr);
        assert!(!project.join("kms.json").exists());
    };
    let up = |more: &[&'static str]| arguments(&["up"], &own, more);
    refused(&up(&["--operator", "127.0.0.1/32"]), 2, "cannot tell one visitor from another", "leave it out");
    refused(&up(&["--clients", "203.0.113.0/24"]), 2, "everybody or nobody", "keep others out");
    refused(&up(&["--vmm", "https://tdx.example.com"]), 2, "from its host alone", "run this on the host");
    let plain = ["up", "--target", "vmm", "--domain", "localhost", "--yes", "--trust", &own[1]];
    refused(&plain, 2, "guest image dstack-0.6.0: its hash is not known", "give --os-image-hash");
    refused(&["up", "--domain", "localhost"], 2, "--operator is missing", "name your own address");
    let app = std::fs::read_to_string(project.join("app.json")).unwrap();
    std::fs::write(project.join("app.json"), app.replace("tcp:0.0.0.0", "tcp:127.0.0.1")).unwrap();
    refused(&up(&CLIENTS), 2, "on loopback alone, where no client is", "write the KMS's port");
    std::fs::write(project.join("app.json"), app).unwrap();
    let nowhere = [&plain[..], &["--os-image-hash", &zeros, "--port", "1"]].concat();
    refused(&nowhere, 2, "vmm_config.ports: publishes no tcp port 1", "write the KMS's port");
    assert_eq!(operator.vmm.machines(), Vec::<String>::new(), "all this is found before a machine is made");

    let other = [&plain[..], &["--os-image-hash", &zeros, "--port", &own[0]]].concat();
    refused(
        &other,
        3,
        "tee_variant is dstack-nitro-enclave, expected dstack-tdx",
        "the machine is not the kind",
    );
    let other = [&other[..], &["--platform", "dstack-nitro-enclave"]].concat();
    refused(&other, 3, "os_image_hash is ", "the machine runs another image");
}

/// A KMS that asks for its token is set up by whoever has it.
#[test]
fn a_kms_that_asks_for_a_token_is_given_it() {
    let operator = Operator::new();
    let setup = Setup { more: "core.onboard.token = true\n", ..Setup::default() };
    let (project, machine) = operator.project_with("kms", setup);
    let own = texts(&machine);
    let refused = operator.run(&project, &arguments(&["up"], &own, &[]));
    assert_eq!(refused.code, Some(3), "{}", refused.stderr);
    assert!(refused.stderr.contains("the setup token is missing or wrong"), "{}", refused.stderr);
    assert!(refused.stderr.contains("give it with --onboard-token-file"), "{}", refused.stderr);
    let token = operator.home.path().join("token");
    std::fs::write(&token, "0".repeat(32)).unwrap();
    let with_token = arguments(&["up"], &own, &["--onboard-token-file", token.to_str().unwrap()]);
    assert_eq!(operator.run(&project, &with_token).code, Some(3), "another token");
    std::fs::write(&token, machine.setup_token() + "\n").unwrap();
    let finished = operator.run(&project, &with_token);
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    assert!(!finished.stderr.contains(&machine.setup_token()));
    kms_file(&project);
}

/// KMSs with TDX evidence, whose authoriser reads the contract that `up` and `join` write to.
#[test]
fn kmss_on_tdx_are_registered_on_the_chain_that_their_authorisers_read() {
    let Some(contracts) = Contracts::start() else { return };
    let operator = Operator::new();
    let host = Arc::new(TdxHost::start());
    let (rpc, contract) = (contracts.fact("rpcUrl"), contracts.fact("kmsContract"));
    let settings = format!(
        "core.auth_api.type = \"chain\"\ncore.auth_api.chain.rpc_urls = [{rpc:?}]\n\
         core.auth_api.chain.chain_id = {}\ncore.auth_api.chain.kms_contract = {contract:?}\n",
        contracts.chain_id()
    );
    let new = |name| {
        let tdx = Some((Arc::clone(&host), [0; 32]));
        operator.project_with(name, Setup { authoriser: Some(&settings), tdx, ..Setup::default() })
    };
    let run = |project: &Path, arguments: &[&str], environment: &[(&str, String)]| {
        let mut command = operator.command(project, arguments);
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        finish(command, DEADLINE)
    };
    let (first, machine) = new("kms-a");
    let own = texts(&machine);
    let up = |more: &[&'static str]| arguments(&["up"], &own, more);

    // Nothing says where the contract is: the exact commands are told.
    let finished = run(&first, &up(&["--register"]), &[]);
    assert_eq!(finished.code, Some(3), "{}", finished.stderr);
    let image = machine.image_hash();
    for command in
        [format!("\n  keyferry chain add-image 0x{image}\n"), "\n  keyferry chain add-kms 0x".to_owned()]
    {
        assert!(finished.stderr.contains(&command), "{command}: {}", finished.stderr);
    }
    // Not registered, so not allowed, and waited for no longer than is asked.
    let finished = run(&first, &up(&["--wait", "registration=1s"]), &[]);
    assert_eq!(finished.code, Some(4), "{}", finished.stderr);
    assert!(finished.stderr.contains("OS image is not allowed"), "{}", finished.stderr);
    assert!(finished.stderr.contains("hint: look at: register the measurements"), "{}", finished.stderr);

    // Evidence under a root that is not trusted proves nothing, whatever was registered.
    let other = operator.home.path().join("other.pem");
    std::fs::write(&other, TdxHost::start().root_pem()).unwrap();
    let trust = std::fs::read_to_string(machine.trust()).unwrap();
    let root = machine.trust().with_file_name("root.pem");
    let distrust = operator.home.path().join("distrust.toml");
    std::fs::write(&distrust, trust.replace(root.to_str().unwrap(), other.to_str().unwrap())).unwrap();
    let mut misled = own.clone();
    misled[1] = distrust.display().to_string();
    let finished = run(&first, &arguments(&["up"], &misled, &["--register"]), &contracts.environment());
    assert_eq!(finished.code, Some(3), "{}", finished.stderr);
    for told in
        ["the measurements are registered", "evidence of the bootstrap does not verify", "--trust names"]
    {
        assert!(finished.stderr.contains(told), "{told}: {}", finished.stderr);
    }
    assert!(!first.join("kms.json").exists());

    let finished = run(&first, &up(&[]), &[]);
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    assert!(finished.stderr.contains("the evidence binds the keys"), "{}", finished.stderr);
    let file = kms_file(&first);
    assert_eq!((file.node.tee_variant.as_str(), &file.node.os_image_hash), ("dstack-tdx", &image));
    assert_ne!(file.node.mr_aggregated, image);

    // A second node is another app, so it measures something else, and needs a registration of its own.
    let (second, machine) = new("kms-b");
    let own = texts(&machine);
    let join = arguments(&["join", "../kms-a"], &own, &["--register"]);
    let joined = run(&second, &join, &contracts.environment());
    assert_eq!(joined.code, Some(0), "{}", joined.stderr);
    let replica = kms_file(&second);
    assert_eq!((&replica.k256_pubkey, &replica.ca_pubkey), (&file.k256_pubkey, &file.ca_pubkey));
    assert_ne!(replica.node.mr_aggregated, file.node.mr_aggregated);
    assert_ne!(replica.node.compose_hash, file.node.compose_hash);
}

#[test]
fn a_guest_that_does_not_start_is_told_from_its_console() {
    for (console, code, error, hint) in [
        (
            ".user-config is too large, max size 1048576\n",
            3,
            ".user-config is too large",
            "a file of the config",
        ),
        (
            "QGS error code: 0x12001\nFailed to get sealing key\n",
            4,
            "Failed to get sealing key",
            "see the checks key-p",
        ),
    ] {
        let operator = Operator::new();
        operator.vmm.print_at_boot(&format!("Linux version 6.9\n{console}"));
        let (project, mut machine) = operator.project("kms", None);
        machine.stop();
        let own = texts(&machine);
        let finished = operator.run(&project, &arguments(&["up"], &own, &["--wait", "boot=1s"]));
        assert_eq!(finished.code, Some(code), "{}", finished.stderr);
        assert!(finished.stderr.contains(error), "{}", finished.stderr);
        assert!(finished.stderr.contains(hint), "{hint}: {}", finished.stderr);
    }
}
