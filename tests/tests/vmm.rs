//! A project on a bare-metal host, against the stand-in of its VMM: made once, found again whatever was cut, and removed only
//! when no key is lost.

#![expect(clippy::unwrap_used, reason = "a test may stop at once")]

use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use cloud_provisioners::bring_up::{Machine as _, Visitors};
use cloud_provisioners::project::{Project, Settings};
use cloud_provisioners::vmm::{Client, Deployment, Outcome, VmmMachine};
use cloud_provisioners::{Error, vmm};
use e2e::serve::{Answer, Server};
use e2e::vmm::{Fault, Vmm};
use e2e::{Finished, finish, program};
use ratls::issue::KeyPair;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;

const NOW: &str = "2026-11-21T08:00:00";
const DEADLINE: Duration = Duration::from_secs(120);

/// A project, and a registry that has its image.
struct Site {
    directory: TempDir,
    _registry: Server,
}

impl Site {
    fn new(change: impl FnOnce(&mut Value)) -> Self {
        let registry = Server::start(|question| {
            let known = question.line == "HEAD /v2/kms/manifests/0.5.4";
            Some(Answer::bytes(if known { 200 } else { 404 }, Vec::new()))
        });
        let mut app = json!({
            "name": "kms", "os_image": "dstack-0.6.0", "key_provider": "local", "gateway_enabled": false,
            "app_id": "11".repeat(20), "instance_id_seed": "22".repeat(20),
            "vmm_config": {"ports": ["tcp:0.0.0.0:12001:8000"]},
        });
        change(&mut app);
        let site = Self { directory: tempfile::tempdir().unwrap(), _registry: registry };
        std::fs::create_dir(site.project()).unwrap();
        std::fs::write(site.project().join("app.json"), app.to_string()).unwrap();
        let image = format!("services:\n  kms:\n    image: {}/kms:0.5.4\n", site._registry.address());
        std::fs::write(site.project().join("docker-compose.yaml"), image).unwrap();
        std::fs::write(site.project().join(".user-config"), r#"{"EXECUTION_RPC":"https://rpc.example/key"}"#)
            .unwrap();
        site
    }

    fn project(&self) -> PathBuf {
        self.directory.path().join("kms")
    }

    fn open(&self) -> Deployment {
        Deployment::open(Project::open(&self.project()).unwrap()).unwrap()
    }

    async fn deploy(&self, client: &Client) -> Result<Outcome, Error> {
        let mut deployment = Deployment::open(Project::open(&self.project())?)?;
        let prepared = deployment.prepare(&Settings::default())?;
        let found = deployment.check(client, &prepared).await?;
        deployment.apply(client, &prepared, found, NOW).await.map(|(_, outcome)| outcome)
    }
}

fn client(vmm: &Vmm) -> Client {
    Client::new(&vmm.url(), None).unwrap()
}

#[tokio::test]
async fn a_machine_is_made_once_with_the_compose_as_it_is_measured() {
    let vmm = Vmm::start(None);
    let (site, client) = (Site::new(|_| ()), client(&vmm));
    assert_eq!(site.deploy(&client).await.unwrap(), Outcome::Made);
    let made = vmm.configuration("dstack-kms").unwrap();
    let compose: Value = serde_json::from_str(made["compose_file"].as_str().unwrap()).unwrap();
    assert_eq!((&compose["secure_time"], &compose["key_provider"]), (&json!(false), &json!("local")));
    let hash = site.open().prepare(&Settings::default()).unwrap().compose.hash();
    use sha2::Digest as _;
    let sent = made["compose_file"].as_str().unwrap().as_bytes();
    assert_eq!(<[u8; 32]>::from(sha2::Sha256::digest(sent)), hash);
    assert_eq!(made["user_config"], r#"{"EXECUTION_RPC":"https://rpc.example/key"}"#);
    assert!(
        !made["compose_file"].as_str().unwrap().contains("rpc.example/key"),
        "a secret in the measured, public part"
    );
    let port = json!([{"protocol": "tcp", "host_port": 12001, "vm_port": 8000, "host_address": "0.0.0.0"}]);
    assert_eq!(made["ports"], port);
    assert_eq!((&made["vcpu"], &made["memory"], &made["disk_size"]), (&json!(2), &json!(4096), &json!(20)));

    assert_eq!(site.deploy(&client).await.unwrap(), Outcome::Unchanged);
    site.open().stop(&client).await.unwrap();
    assert_eq!(vmm.machines(), ["dstack-kms stopped"]);
    assert_eq!(site.deploy(&client).await.unwrap(), Outcome::Unchanged);
    assert_eq!(vmm.machines(), ["dstack-kms running"]);

    let refused = site.open().remove(&client, None).await.unwrap_err();
    assert!(matches!(refused, Error::VmmRefused(vmm::Refusal::HoldsKeys { .. })), "{refused}");
    assert!(site.open().remove(&client, Some("dstack-kms")).await.unwrap());
    assert_eq!(vmm.machines(), Vec::<String>::new());
    assert!(!site.open().remove(&client, Some("dstack-kms")).await.unwrap());
    assert_eq!(site.open().project().state().unwrap().unwrap().status, "REMOVED");
}

#[tokio::test]
async fn a_second_run_mends_a_fault_at_any_call() {
    let calls = {
        let vmm = Vmm::start(None);
        Site::new(|_| ()).deploy(&client(&vmm)).await.unwrap();
        vmm.calls().len()
    };
    assert!(calls >= 5, "a deployment makes {calls} calls");
    for fault in [Fault::Refused("something is wrong"), Fault::Unanswered, Fault::AnswerLost] {
        for at in 0..calls {
            let vmm = Vmm::start(None);
            let (site, client) = (Site::new(|_| ()), client(&vmm));
            vmm.fail(at, fault.clone());
            let first = site.deploy(&client).await;
            assert!(first.is_err(), "call {at}, {fault:?}: overlooked");
            let second = site.deploy(&client).await;
            assert!(second.is_ok(), "call {at}, {fault:?}: first {first:?}, then {second:?}");
            assert_eq!(vmm.machines(), ["dstack-kms running"], "call {at}, {fault:?}");
        }
    }
}

/// What a bring-up does to the machine, from nothing to clients let in.
async fn open_to_clients(site: &Site, client: &Client) -> Result<(), Error> {
    let mut deployment = Deployment::open(Project::open(&site.project())?)?;
    let mut prepared = deployment.prepare(&Settings::default())?;
    let mut machine = VmmMachine::new(&mut deployment, client, &mut prepared, 12001, || NOW.to_owned())?;
    machine.deploy().await?;
    machine.admit(&Visitors::Operators(Vec::new())).await?;
    let said = machine.console(0).await?;
    assert_eq!((said.text.as_str(), said.next), ("Linux version 6.9\n", 18));
    let loopback = "127.0.0.1:12001".parse().unwrap();
    assert_eq!(machine.address().await?, Some(loopback));
    machine.admit(&Visitors::Clients(vec!["0.0.0.0/0".parse().unwrap()])).await?;
    assert_eq!(machine.address().await?, Some(loopback));
    Ok(())
}

#[tokio::test]
async fn a_machine_is_opened_to_clients_whatever_was_cut_at_any_call() {
    const OPEN: [&str; 1] = ["tcp:0.0.0.0:12001:8000"];
    let new = || {
        let vmm = Vmm::start(None);
        vmm.print_at_boot("Linux version 6.9\n");
        let (site, client) = (Site::new(|_| ()), client(&vmm));
        (vmm, site, client)
    };
    let calls = {
        let (vmm, site, client) = new();
        open_to_clients(&site, &client).await.unwrap();
        assert_eq!(vmm.open_ports("dstack-kms"), OPEN);
        vmm.calls()
    };
    let methods: Vec<&str> = calls.iter().map(|it| it.method.as_str()).collect();
    let made = calls.iter().find(|it| it.method == "CreateVm").unwrap();
    assert_eq!(made.body["ports"][0]["host_address"], "127.0.0.1", "nobody else reaches a KMS without keys");
    for changes in ["CreateVm", "ShutdownVm", "StopVm", "UpdateVm", "StartVm"] {
        assert!(methods.contains(&changes), "{changes}: {methods:?}");
    }
    for fault in [Fault::Refused("something is wrong"), Fault::Unanswered, Fault::AnswerLost] {
        for (at, method) in methods.iter().enumerate() {
            let (vmm, site, client) = new();
            vmm.fail(at, fault.clone());
            let first = open_to_clients(&site, &client).await;
            // A guest that cannot be asked is stopped.
            let overlooked =
                first.is_ok() && !(*method == "ShutdownVm" && matches!(fault, Fault::Refused(_)));
            assert!(!overlooked, "call {at}, {method}, {fault:?}: overlooked");
            let second = open_to_clients(&site, &client).await;
            assert!(second.is_ok(), "call {at}, {method}, {fault:?}: first {first:?}, then {second:?}");
            assert_eq!(vmm.machines(), ["dstack-kms running"], "call {at}, {method}, {fault:?}");
            assert_eq!(vmm.open_ports("dstack-kms"), OPEN, "call {at}, {method}, {fault:?}");
        }
    }
}

#[tokio::test]
async fn a_console_is_read_on_from_where_it_was_read_to() {
    let vmm = Vmm::start(None);
    let (site, client) = (Site::new(|_| ()), client(&vmm));
    let mut deployment = site.open();
    let mut prepared = deployment.prepare(&Settings::default()).unwrap();
    let mut machine =
        VmmMachine::new(&mut deployment, &client, &mut prepared, 12001, || NOW.to_owned()).unwrap();
    machine.deploy().await.unwrap();
    let (mut position, mut all) = (0, String::new());
    for number in 0..400 {
        let said = format!("line {number}\n");
        vmm.print_on_console("dstack-kms", &said);
        if number % 7 == 0 {
            let read = machine.console(position).await.unwrap();
            (position, all) = (read.next, all + &read.text);
        }
    }
    all.push_str(&machine.console(position).await.unwrap().text);
    let expected: String = (0..400).map(|number| format!("line {number}\n")).collect();
    assert_eq!(all, expected);
}

#[tokio::test]
async fn what_cannot_work_is_refused_before_anything_is_made() {
    let other = |ports: &str| {
        json!({"name": "dstack-kms", "image": "dstack-0.6.0", "compose_file": "{}", "ports": [
            {"protocol": "tcp", "host_port": ports.parse::<u32>().unwrap(), "vm_port": 1, "host_address": ""},
        ]})
    };
    type Case = (fn(&mut Value), Option<Value>, &'static str, &'static str);
    let mut elsewhere = other("12001");
    elsewhere["name"] = json!("another");
    let cases: [Case; 12] = [
        (|app| app["secure_time"] = json!(true), None, "secure_time: is true", ""),
        (|app| app["key_provider"] = json!("tpm"), None, "key_provider: is tpm", ""),
        (|app| app["vmm_config"] = json!({}), None, "vmm_config.ports: is empty", ""),
        (|app| app["vmm_config"]["port"] = json!(1), None, "vmm_config: unknown field `port`", ""),
        (
            |app| app["vmm_config"]["ports"] = json!(["8000"]),
            None,
            "vmm_config.ports: \"8000\" is no port mapping",
            "",
        ),
        (|app| app["vmm_config"]["name"] = json!("a;b"), None, "vmm_config.name: \"a;b\"", ""),
        (
            |app| app["os_image"] = json!("dstack-9.9.9"),
            None,
            "guest image dstack-9.9.9: the VMM does not have it",
            "keyferry kms pull",
        ),
        (|app| app["os_image"] = json!("dstack-dev-0.6.0"), None, "is a development image", "os_image"),
        (
            |app| app["vmm_config"]["memory"] = json!(999_999),
            None,
            "memory in MiB: 999999 wanted",
            "vmm_config",
        ),
        (
            |_| (),
            Some(elsewhere),
            "port 12001 of the host is published by the machine another",
            "another port",
        ),
        (
            |_| (),
            Some(other("1")),
            "machine dstack-kms: is there already, and this project did not make it",
            "vmm_config.name",
        ),
        (
            |app| app["docker_compose_file"] = json!("other.yaml"),
            None,
            "kms:0.5.5: not in the registry",
            "push the image",
        ),
    ];
    for (change, before, problem, hint) in cases {
        let vmm = Vmm::start(None);
        let site = Site::new(change);
        let image = format!("services:\n  kms:\n    image: {}/kms:0.5.5\n", site._registry.address());
        std::fs::write(site.project().join("other.yaml"), image).unwrap();
        if let Some(machine) = &before {
            vmm.add_machine(machine);
        }
        let there = vmm.machines();
        let refused = site.deploy(&client(&vmm)).await.expect_err(problem);
        assert!(refused.to_string().contains(problem), "{problem}: {refused}");
        assert!(refused.hint().unwrap_or_default().contains(hint), "{problem}: {:?}", refused.hint());
        assert_eq!(vmm.machines(), there, "{problem}");
        assert!(vmm.calls().iter().all(|call| call.method != "CreateVm"), "{problem}");
    }
}

/// What a VMM says no to a machine with, and what the operator is told.
#[tokio::test]
async fn every_refusal_of_a_machine_has_a_next_step() {
    for (words, hint) in [
        ("Port mapping is disabled", "[cvm.port_mapping] enabled"),
        ("Port mapping is not allowed for tcp:12001", "[cvm.port_mapping] range"),
        ("duplicate host port mapping: tcp 0.0.0.0:12001", "publish each port"),
        ("host port mapping conflicts with VM 1: tcp 0.0.0.0:12001", "keyferry kms vmm list"),
        ("Failed to load VM: Failed to load image: dstack-0.6.0", "keyferry kms pull"),
        ("vhost-vsock: unable to set guest cid: Address already in use", "cid_start"),
        ("failed to create disk: No space left on device (os error 28)", "make room on the host"),
    ] {
        let vmm = Vmm::start(None);
        let (site, client) = (Site::new(|_| ()), client(&vmm));
        vmm.fail_method("CreateVm", Fault::Refused(words));
        let error = site.deploy(&client).await.unwrap_err();
        assert!(error.hint().unwrap_or_default().contains(hint), "{words}: {error}, {:?}", error.hint());
        assert_eq!(site.deploy(&client).await.unwrap(), Outcome::Made, "{words}");
    }
}

/// A registry that shows a certificate of its own making, which no guest would accept.
async fn registry_with_a_bad_certificate() -> SocketAddr {
    let key = KeyPair::generate().unwrap();
    let now = ratls::UnixTime::since_unix_epoch(Duration::from_secs(1_700_000_000));
    let certificate = ratls::issue::root_ca(&key, now).unwrap();
    let config = ServerConfig::builder().with_no_client_auth();
    let config = config.with_single_cert(vec![certificate.der().clone()], key.private_key_der()).unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            // The client ends the handshake.
            let _refused = acceptor.accept(stream).await;
        }
    });
    address
}

#[tokio::test]
async fn a_registry_with_a_bad_certificate_is_said_before_anything_is_made() {
    let vmm = Vmm::start(None);
    let site = Site::new(|_| ());
    let registry = registry_with_a_bad_certificate().await;
    let image = format!("services:\n  kms:\n    image: {registry}/kms:0.5.4\n");
    std::fs::write(site.project().join("docker-compose.yaml"), image).unwrap();
    let refused = site.deploy(&client(&vmm)).await.unwrap_err();
    let expected = format!("image {registry}/kms:0.5.4: the certificate of {registry} is not valid: ");
    assert!(refused.to_string().starts_with(&expected), "{refused}");
    assert!(refused.hint().unwrap().contains("the guest's own roots know"), "{:?}", refused.hint());
    assert_eq!(vmm.machines(), Vec::<String>::new());
}

#[tokio::test]
async fn a_changed_compose_is_another_machine() {
    let vmm = Vmm::start(None);
    let (site, client) = (Site::new(|_| ()), client(&vmm));
    site.deploy(&client).await.unwrap();
    std::fs::write(site.project().join("prelaunch.sh"), "echo changed\n").unwrap();
    let refused = site.deploy(&client).await.unwrap_err();
    assert_eq!(refused.to_string(), "machine dstack-kms: is there already, with another compose");
    assert!(refused.hint().unwrap().contains("onboard a second KMS first"));
}

fn run(vmm: &Vmm, directory: &Path, arguments: &[&str], token: Option<&str>) -> Finished {
    finish(command(vmm, directory, arguments, token), DEADLINE)
}

fn command(vmm: &Vmm, directory: &Path, arguments: &[&str], token: Option<&str>) -> Command {
    let mut command = Command::new(program("keyferry"));
    command.args(["kms", "vmm"]).args(arguments).current_dir(directory).env_clear();
    command.env("HOME", directory).env("PATH", "/usr/bin:/bin").env("DSTACK_VMM_URL", vmm.url());
    command.envs(token.map(|token| ("DSTACK_VMM_TOKEN", token)));
    command
}

#[test]
fn a_console_is_followed_across_a_restart() {
    let vmm = Vmm::start(None);
    vmm.print_at_boot("Linux version 6.9\n");
    let site = Site::new(|_| ());
    let directory = site.project();
    let done = |arguments: &[&str]| {
        let finished = run(&vmm, &directory, arguments, None);
        assert_eq!(finished.code, Some(0), "{arguments:?}: {}", finished.stderr);
    };
    done(&["deploy", "--yes"]);
    vmm.print_on_console("dstack-kms", "one\ntwo\n");
    let mut command = command(&vmm, &directory, &["logs", "--follow", "-n", "1"], None);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let (sender, lines) = mpsc::channel();
    let output = child.stdout.take().unwrap();
    std::thread::spawn(move || {
        // Ends when the test does.
        BufReader::new(output).lines().map_while(Result::ok).all(|line| sender.send(line).is_ok())
    });
    let next = || lines.recv_timeout(DEADLINE).unwrap();
    assert_eq!(next(), "two");
    vmm.print_on_console("dstack-kms", "three\n");
    assert_eq!(next(), "three");
    done(&["stop"]);
    done(&["start"]);
    assert_eq!(next(), "Linux version 6.9");
    vmm.print_on_console("dstack-kms", "four\n");
    assert_eq!(next(), "four");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn as_an_operator_types_it() {
    let vmm = Vmm::start(Some("a-token"));
    let site = Site::new(|_| ());
    let directory = site.project();
    let done = |arguments: &[&str]| {
        let finished = run(&vmm, &directory, arguments, Some("a-token"));
        assert_eq!(finished.code, Some(0), "{arguments:?}: {}", finished.stderr);
        finished.stdout
    };
    let refused = run(&vmm, &directory, &["images"], None);
    assert_eq!(refused.code, Some(3), "{}", refused.stderr);
    assert!(
        refused.stderr.contains("hint: give --vmm-token-file, or set DSTACK_VMM_TOKEN"),
        "{}",
        refused.stderr
    );
    assert_eq!(done(&["images"]), "dstack-0.6.0  0.6.0\ndstack-dev-0.6.0  0.6.0  development\n");

    let asked = run(&vmm, &directory, &["deploy"], Some("a-token"));
    assert_eq!(asked.code, Some(2), "without a terminal nothing is made: {}", asked.stderr);
    assert!(asked.stderr.contains("make the machine dstack-kms on http://127.0.0.1:"), "{}", asked.stderr);
    assert_eq!(vmm.machines(), Vec::<String>::new());

    let first: Value = serde_json::from_str(&done(&["deploy", "--yes", "--json"])).unwrap();
    assert_eq!((&first["changed"], &first["machine"]["status"]), (&json!(true), &json!("running")));
    let again: Value = serde_json::from_str(&done(&["deploy", "--json"])).unwrap();
    assert_eq!((&again["changed"], &again["composeHash"]), (&json!(false), &first["composeHash"]));
    let status = done(&["status"]);
    assert!(status.contains("status: running\nboot: done\nport: tcp:0.0.0.0:12001:8000\n"), "{status}");

    vmm.print_on_console("dstack-kms", "one\ntwo\nQGS error code: 0x12001\n");
    let logs = run(&vmm, &directory, &["logs", "-n", "2"], Some("a-token"));
    assert_eq!(logs.stdout, "two\nQGS error code: 0x12001\n");
    assert!(logs.stderr.contains("pccs-host and registration"), "{}", logs.stderr);
    assert_eq!(done(&["stop"]), "stopped\n");
    assert!(done(&["start"]).contains("status: running"));
    assert!(done(&["list"]).starts_with("dstack-kms  running  "));

    let refused = run(&vmm, &directory, &["remove", "--yes"], Some("a-token"));
    assert_eq!(refused.code, Some(3), "{}", refused.stderr);
    assert!(refused.stderr.contains("hint: onboard a second KMS first"), "{}", refused.stderr);
    assert_eq!(done(&["remove", "--yes", "--lose-keys-of", "dstack-kms"]), "removed dstack-kms\n");
    assert_eq!(vmm.machines(), Vec::<String>::new());
    let status = run(&vmm, &directory, &["status"], Some("a-token"));
    assert_eq!((status.code, status.stdout.as_str()), (Some(3), ""));
}
