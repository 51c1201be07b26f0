//! `keyferry kms` against the stand-in of Google's APIs, as an operator types it.

#![expect(clippy::unwrap_used, reason = "a test may stop at once")]

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use e2e::google::{Fault, Google};
use e2e::{Finished, finish, program};
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

    fn run(&self, directory: &Path, arguments: &[&str]) -> Finished {
        let mut command = Command::new(program("keyferry"));
        command.arg("kms").args(arguments).current_dir(directory);
        command.env_clear().env("HOME", self.home.path()).env("EDITOR", "true").env("PATH", "/usr/bin:/bin");
        command.envs(self.google.environment());
        finish(command, DEADLINE)
    }

    fn done(&self, directory: &Path, arguments: &[&str]) -> String {
        let finished = self.run(directory, arguments);
        assert_eq!(finished.code, Some(0), "{arguments:?}: {}", finished.stderr);
        finished.stdout
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
