//! Google's own gcloud against the stand-in that our tests rely on, and against machines we made: what it accepts and shows is
//! what Google's programs expect.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use e2e::google::Google;
use e2e::{Finished, finish, program};
use serde_json::Value;

/// gcloud itself takes a second or two a command, and more on a busy machine.
const DEADLINE: Duration = Duration::from_secs(300);

struct Site {
    home: tempfile::TempDir,
    google: Google,
}

impl Site {
    fn run(&self, program: &Path, directory: &Path, arguments: &[&str]) -> Finished {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(directory).envs(self.google.environment());
        command.env("HOME", self.home.path()).env("EDITOR", "true");
        command.env("CLOUDSDK_CONFIG", self.home.path().join("gcloud"));
        command.env("CLOUDSDK_CORE_PROJECT", "demo-proj");
        for name in
            ["CORE_DISABLE_PROMPTS", "CORE_DISABLE_USAGE_REPORTING", "COMPONENT_MANAGER_DISABLE_UPDATE_CHECK"]
        {
            command.env(format!("CLOUDSDK_{name}"), "1");
        }
        finish(command, DEADLINE)
    }

    fn gcloud(&self, arguments: &[&str]) -> String {
        let finished = self.run(Path::new("gcloud"), self.home.path(), arguments);
        assert_eq!(finished.code, Some(0), "gcloud {arguments:?}: {}", finished.stderr);
        finished.stdout
    }

    fn ours(&self, directory: &Path, arguments: &[&str]) {
        let finished = self.run(&program("keyferry"), directory, &[&["kms"], arguments].concat());
        assert_eq!(finished.code, Some(0), "{arguments:?}: {}", finished.stderr);
    }
}

#[test]
fn gcloud_sees_and_changes_what_we_made_and_we_what_it_made() {
    if Command::new("gcloud").arg("--version").output().is_err() {
        eprintln!("skipped: gcloud is not installed");
        return;
    }
    let site = Site { home: tempfile::tempdir().unwrap(), google: Google::start() };
    let home = site.home.path().to_owned();
    let image = home.join(".dstack/images/dstack-cloud-0.6.0");
    std::fs::create_dir_all(&image).unwrap();
    std::fs::write(image.join("disk.raw"), vec![5; 64 << 10]).unwrap();
    std::fs::write(image.join("auth_hash.txt"), "ab".repeat(32)).unwrap();
    site.ours(&home, &["config-edit"]);
    site.ours(&home, &["new", "kms", "--key-provider", "none", "--project", "demo-proj"]);
    let project = home.join("kms");
    site.ours(&project, &["deploy", "--yes"]);

    let zone = "--zone=us-central1-a";
    let shown = site.gcloud(&["compute", "instances", "describe", "dstack-kms", zone, "--format=json"]);
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown["confidentialInstanceConfig"]["confidentialInstanceType"], "TDX");
    assert_eq!(shown["serviceAccounts"], Value::Null);
    // A rule of gcloud's is one of ours: it is listed, and removed.
    site.gcloud(&[
        "compute",
        "firewall-rules",
        "create",
        "dstack-kms-allow-tcp-12001",
        "--direction=INGRESS",
        "--allow=tcp:12001",
        "--source-ranges=198.51.100.7/32",
        "--target-tags=fw-dstack-kms",
    ]);
    site.ours(&project, &["fw", "remove", "12001"]);
    assert!(site.google.inventory().iter().all(|line| !line.starts_with("firewall ")));

    // Small files go in one request, large ones in a session.
    for (name, size) in [("small", 1 << 10), ("large", 9 << 20)] {
        let file = home.join(name);
        std::fs::write(&file, vec![7; size]).unwrap();
        let to = format!("gs://demo-proj-dstack/{name}");
        site.gcloud(&["storage", "cp", file.to_str().unwrap(), &to]);
        assert_eq!(site.google.object("demo-proj-dstack", name).map(|it| it.len()), Some(size), "{name}");
    }
    site.gcloud(&["compute", "instances", "delete", "dstack-kms", zone, "--quiet"]);
    let status = site.run(&program("keyferry"), &project, &["kms", "status"]);
    assert_eq!((status.code, status.stdout.as_str()), (Some(3), ""), "{}", status.stderr);
}
