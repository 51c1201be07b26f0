//! `keyferry kms` against the stand-in of Google's APIs, as an operator types it.

#![expect(clippy::unwrap_used, reason = "a test may stop at once")]

use std::io::{BufRead as _, Read as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use e2e::google::{Fault, Google};
use e2e::{Finished, Variation, answer, finish, program, start_kms};
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(120);

/// A home directory with settings and an OS image, and a stand-in.
struct Operator {
    home: TempDir,
    google: Google,
}

impl Operator {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let image = home.path().join(".dstack/images/dstack-cloud-0.6.0");
        std::fs::create_dir_all(&image).unwrap();
        std::fs::write(image.join("disk.raw"), vec![5; 600 << 10]).unwrap();
        std::fs::write(image.join("auth_hash.txt"), "ab".repeat(32)).unwrap();
        let operator = Self { home, google: Google::start() };
        // An editor that changes nothing: the settings begin as the template.
        let edited = operator.run(operator.home.path(), &["config-edit"]);
        assert_eq!(edited.code, Some(0), "{edited:?}");
        operator
    }

    fn command(&self, directory: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(program("keyferry"));
        command.arg("kms").args(arguments).current_dir(directory);
        command.env_clear().env("HOME", self.home.path()).env("EDITOR", "true").env("PATH", "/usr/bin:/bin");
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

#[test]
fn from_a_new_project_to_nothing_left() {
    let operator = Operator::new();
    let home = operator.home.path().to_owned();
    operator.done(&home, &["new", "node", "--key-provider", "tpm", "--project", "demo-proj"]);
    let node = home.join("node");
    let prepared = operator.done(&node, &["prepare"]);
    assert!(prepared.starts_with("COMPOSE_HASH: 0x"), "{prepared}");
    assert_eq!(prepared, operator.done(&node, &["prepare"]), "the hash is the same at every run");

    let asked = operator.run(&node, &["deploy"]);
    assert_eq!(asked.code, Some(2), "without a terminal nothing that costs is done: {}", asked.stderr);
    assert!(asked.stderr.contains("(costs money)") && asked.stderr.contains("--yes"), "{}", asked.stderr);
    assert_eq!(operator.google.inventory(), Vec::<String>::new());

    let deployed = operator.done(&node, &["deploy", "--yes"]);
    assert!(deployed.contains("external ip: 203.0.113.10"), "{deployed}");
    operator.done(&node, &["deploy"]);
    let opened = operator.done(&node, &["fw", "allow", "12001", "--source", "198.51.100.7/32"]);
    assert_eq!(opened, "12001/tcp from 198.51.100.7/32 is let in\n");
    let everyone = operator.run(&node, &["fw", "allow", "18000"]);
    assert_eq!(everyone.code, Some(2), "{}", everyone.stderr);
    assert!(everyone.stderr.contains("answers anyone without authentication"), "{}", everyone.stderr);
    let listed = operator.done(&node, &["fw", "list"]);
    assert_eq!(listed, "dstack-node-allow-tcp-12001  allow tcp 12001  from 198.51.100.7/32\n");

    operator.google.print_on_console("dstack-node", "one\ntwo\nthree\n");
    assert_eq!(operator.done(&node, &["logs", "-n", "2"]), "two\nthree\n");
    assert!(operator.done(&node, &["stop"]).contains("TERMINATED"));
    assert!(operator.done(&node, &["start"]).contains("RUNNING"));
    let listed = operator.done(&home, &["list", "--project", "demo-proj", "--json"]);
    assert!(listed.contains(r#""instance":"dstack-node""#), "{listed}");

    let refused = operator.run(&node, &["remove", "--yes"]);
    assert_eq!(refused.code, Some(3), "{}", refused.stderr);
    assert!(refused.stderr.contains("hint: onboard a second KMS first"), "{}", refused.stderr);
    operator.done(&node, &["remove", "--yes", "--lose-keys-of", "dstack-node"]);
    let left = ["bucket demo-proj-dstack", "image dstack-cloud-0-6-0", "image dstack-data-disk"];
    assert_eq!(operator.google.inventory(), left);
    let status = operator.run(&node, &["status"]);
    assert_eq!((status.code, status.stdout.as_str()), (Some(3), ""));
}

/// What a child prints, line by line, with a deadline for each.
struct Lines(std::sync::mpsc::Receiver<String>);

impl Lines {
    fn of(child: &mut std::process::Child) -> Self {
        let (sender, lines) = std::sync::mpsc::channel();
        let output = child.stdout.take().unwrap();
        std::thread::spawn(move || {
            for line in std::io::BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self(lines)
    }

    fn next(&self) -> String {
        self.0.recv_timeout(DEADLINE).unwrap()
    }
}

#[test]
fn a_log_is_followed_and_says_what_was_lost() {
    let operator = Operator::new();
    let home = operator.home.path().to_owned();
    operator.done(&home, &["new", "node", "--key-provider", "none", "--project", "demo-proj"]);
    let node = home.join("node");
    operator.done(&node, &["deploy", "--yes"]);
    operator.google.print_on_console("dstack-node", "one\ntwo\n");
    let mut command = operator.command(&node, &["logs", "--follow", "-n", "1"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let lines = Lines::of(&mut child);
    assert_eq!(lines.next(), "two");
    operator.google.print_on_console("dstack-node", "three\n");
    assert_eq!(lines.next(), "three");
    // More than the server keeps: the beginning is gone, and that is said.
    operator.google.print_on_console("dstack-node", &format!("{}\n", "x".repeat(1 << 20)));
    operator.google.print_on_console("dstack-node", "last\n");
    while lines.next() != "last" {}
    child.kill().unwrap();
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    child.wait().unwrap();
    assert!(said.contains("the server has dropped output before it could be read"), "{said}");
}

#[test]
fn a_kms_project_keeps_secrets_out_of_the_measurement() {
    let operator = Operator::new();
    let home = operator.home.path().to_owned();
    let image = |name: &str| format!("registry.example.com/{name}@sha256:{}", "ab".repeat(32));
    let (kms, helios) = (image("keyferry-kms"), image("helios"));
    let (contract, root) = (format!("0x{}", "11".repeat(20)), format!("0x{}", "22".repeat(32)));
    let common = ["--project", "demo-proj", "--kms-image", &kms, "--kms-contract", &contract];
    let direct = [
        &["new", "a", "--kms", "direct"][..],
        &common,
        &["--rpc-url", "https://one.example.com", "--rpc-url", "https://two.example.com"],
    ];
    operator.done(&home, &direct.concat());
    let prepared = operator.run(&home.join("a"), &["prepare"]);
    assert_eq!((prepared.code, prepared.stderr.as_str()), (Some(0), ""), "no doubts");
    let app: serde_json::Value =
        serde_json::from_slice(&std::fs::read(home.join("a/app.json")).unwrap()).unwrap();
    assert_eq!((&app["key_provider"], &app["gateway_enabled"]), (&"tpm".into(), &false.into()));

    let light =
        [&["new", "b", "--kms", "light"][..], &common, &["--helios-image", &helios, "--checkpoint", &root]];
    let made = operator.run(&home, &light.concat());
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    assert!(made.stderr.contains("fill in b/.user-config"), "{}", made.stderr);
    let project = home.join("b");
    let unfilled = operator.run(&project, &["prepare"]);
    assert_eq!(unfilled.code, Some(2));
    assert!(
        unfilled.stderr.contains("error: .user-config: EXECUTION_RPC is missing or empty"),
        "{}",
        unfilled.stderr
    );
    let fill = |key: &str| {
        let text = format!("{{\"EXECUTION_RPC\": \"https://rpc.example.com/{key}\"}}");
        std::fs::write(project.join(".user-config"), text).unwrap();
        operator.done(&project, &["prepare"])
    };
    assert_eq!(fill("first-secret"), fill("second-secret"), "a rotated secret is the same measurement");
    for file in ["shared/app-compose.json", "prelaunch.sh", "docker-compose.yaml"] {
        assert!(!std::fs::read_to_string(project.join(file)).unwrap().contains("second-secret"), "{file}");
    }

    for (arguments, error) in [
        (&["--kms", "direct", "--rpc-url", "https://one.example.com"][..], "needs --rpc-url twice"),
        (&["--kms", "light", "--helios-image", &helios], "needs --checkpoint"),
        (
            &["--kms", "direct", "--rpc-url", "https://u:secret@a.example", "--rpc-url", "https://b.example"],
            "seems to hold a key",
        ),
    ] {
        let refused = operator.run(&home, &[&["new", "c"][..], &common, arguments].concat());
        assert_eq!(refused.code, Some(2), "{arguments:?}");
        assert!(refused.stderr.contains(error) && !refused.stderr.contains("secret@"), "{}", refused.stderr);
        assert!(!home.join("c").exists());
    }
}

#[test]
fn variables_are_encrypted_only_to_a_key_that_a_pinned_root_signed() {
    let operator = Operator::new();
    let home = operator.home.path().to_owned();
    let directory = tempfile::tempdir().unwrap();
    let module = nsm_emulator::Emulator::new(nsm_emulator::Config::default()).unwrap();
    let kms = start_kms(directory.path(), &module.root_pem(), &"00".repeat(32), Variation::default());
    let settings = home.join(".config/dstack-cloud");
    let text = format!(
        r#"{{"services": {{"kms_urls": ["https://localhost:{}"]}}, "image_search_paths": ["~/.dstack/images"]}}"#,
        kms.port()
    );
    std::fs::write(settings.join("config.json"), text).unwrap();
    operator.done(&home, &["new", "app", "--no-gw", "--project", "demo-proj"]);
    let project = home.join("app");
    std::fs::write(project.join(".env"), "PASSWORD=a-secret\nUSER=u\n").unwrap();

    let refused = operator.run(&project, &["deploy", "--yes"]);
    assert_eq!(refused.code, Some(3), "{}", refused.stderr);
    assert!(refused.stderr.contains("kms-whitelist.json names no trusted_signers"), "{}", refused.stderr);
    assert!(refused.stderr.contains("hint: variables are encrypted only to"), "{}", refused.stderr);
    let list = |root: &str| {
        let text = format!(r#"{{"trusted_signers": ["0x{root}"]}}"#);
        std::fs::write(settings.join("kms-whitelist.json"), text).unwrap();
    };
    list("0324653eac434488002cc06bbfb7f10fe18991e35f9fe4302dbea6d2353dc0ab1c");
    let refused = operator.run(&project, &["deploy", "--yes"]);
    assert_eq!(refused.code, Some(3), "{}", refused.stderr);
    assert!(refused.stderr.contains("not signed by one of the 1 trusted_signers"), "{}", refused.stderr);
    assert_eq!(operator.google.inventory(), Vec::<String>::new());

    let certs = directory.path().join("certs").display().to_string();
    let inspected: serde_json::Value =
        serde_json::from_str(&operator.done(&home, &["inspect", &certs, "--json"])).unwrap();
    list(inspected["k256_pubkey"].as_str().unwrap());
    operator.done(&project, &["deploy", "--yes"]);
    let sealed = std::fs::read(project.join("shared/.encrypted-env")).unwrap();
    assert!(!sealed.windows(8).any(|it| it == b"a-secret"));
    let compose = std::fs::read_to_string(project.join("shared/app-compose.json")).unwrap();
    assert!(compose.contains("\"PASSWORD\"") && !compose.contains("a-secret"), "{compose}");
    // The same variables and the same key: the same configuration, so the machine stays.
    operator.google.forget_calls();
    operator.done(&project, &["deploy"]);
    assert!(operator.google.calls().iter().all(|call| call.line.starts_with("GET ")), "nothing was changed");
    std::fs::write(project.join(".env"), "PASSWORD=another\n").unwrap();
    let changed = operator.run(&project, &["deploy", "--yes"]);
    assert_eq!(changed.code, Some(3), "another configuration is another machine: {}", changed.stderr);
}

#[test]
fn what_cannot_work_is_said_in_one_line_with_a_next_step() {
    let operator = Operator::new();
    let home = operator.home.path().to_owned();
    let new = |name: &str, more: &[&str]| {
        let arguments = [&["new", name, "--key-provider", "tpm"], more].concat();
        operator.done(&home, &arguments);
        home.join(name)
    };
    let project = ["--project", "demo-proj"];
    let no_project = new("a", &[]);
    let no_image = new("b", &[&project[..], &["--os-image", "dstack-cloud-9.9.9"]].concat());
    let no_tdx = new("c", &[&project[..], &["--zone", "us-west2-a"]].concat());
    let no_zone = new("d", &[&project[..], &["--zone", "mars-north1-a"]].concat());
    let env = new("e", &project);
    std::fs::write(env.join(".env"), "A=1\n").unwrap();
    let forbidden = new("f", &project);

    for (directory, code, error, hint) in [
        (&home, 2, "no project here, app.json is missing", "keyferry kms new NAME"),
        (&no_project, 2, "gcp_config.project: is required and empty", ""),
        (&no_image, 2, "os image dstack-cloud-9.9.9: not in ", "keyferry kms pull dstack-cloud-9.9.9"),
        (&no_tdx, 3, "zone us-west2-a: has no Sapphire Rapids CPUs, so no TDX", "us-central1-a"),
        (&no_zone, 3, "zone mars-north1-a: there is no such zone", "us-central1-a"),
        (&env, 2, "encrypted variables need the key provider kms, this project has tpm", "remove "),
    ] {
        let finished = operator.run(directory, &["deploy", "--yes"]);
        assert_eq!(finished.code, Some(code), "{error}: {}", finished.stderr);
        let line = finished.stderr.lines().find(|line| line.starts_with("error: ")).unwrap();
        assert!(line.contains(error), "{line}");
        assert!(finished.stderr.contains(hint), "{error}: {}", finished.stderr);
    }
    operator.google.forget_calls();
    let message = "Required 'compute.zones.get' permission for 'projects/demo-proj'";
    operator.google.fail(0, Fault::Refused(403, "forbidden", message));
    let finished = operator.run(&forbidden, &["deploy", "--yes"]);
    assert_eq!(finished.code, Some(3), "{}", finished.stderr);
    assert!(
        finished.stderr.contains("hint: the account needs the permission compute.zones.get"),
        "{}",
        finished.stderr
    );
    assert_eq!(operator.google.inventory(), Vec::<String>::new());
}
