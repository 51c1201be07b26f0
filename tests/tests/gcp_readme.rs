//! The walk through a KMS on GCP as the README prints it: only the values that are the reader's own are replaced.

#![expect(clippy::unwrap_used, reason = "a test may stop at once")]

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use e2e::google::Google;
use e2e::{Finished, KmsMachine, finish, program, readme_blocks};

const DEADLINE: Duration = Duration::from_secs(180);

/// A reader's shell.
struct Reader {
    home: tempfile::TempDir,
    google: Google,
}

impl Reader {
    fn run(&self, script: &str, more: &[(&str, String)]) -> Finished {
        let mut shell = Command::new("sh");
        shell.args(["-euc", script]).current_dir(self.home.path()).env_clear();
        shell.env("HOME", self.home.path()).env("EDITOR", "true").env("NO_COLOR", "1");
        shell.env("PATH", format!("{}:/usr/bin:/bin", self.home.path().join("bin").display()));
        shell.envs(self.google.environment()).envs(more.iter().map(|(name, value)| (name, value)));
        finish(shell, DEADLINE)
    }

    fn done(&self, script: &str, more: &[(&str, String)]) -> String {
        let finished = self.run(script, more);
        assert_eq!(finished.code, Some(0), "{script}\n{}", finished.stderr);
        finished.stdout
    }

    /// The KMS of a project's machine, once its measurement is known.
    fn machine(&self, project: &str, like: Option<&KmsMachine>) -> KmsMachine {
        let prepared = self.done(&format!("keyferry kms prepare -C {project} --json"), &[]);
        let prepared: serde_json::Value = serde_json::from_str(&prepared).unwrap();
        KmsMachine::start(prepared["appId"].as_str().unwrap(), like)
    }
}

/// An archive of an OS image whose hash is the one of the machines' evidence, and its digest.
fn image(directory: &Path, hash: &str) -> String {
    std::fs::write(directory.join("disk.raw"), vec![5; 600 << 10]).unwrap();
    std::fs::write(directory.join("auth_hash.txt"), hash).unwrap();
    let mut tar = Command::new("tar");
    tar.args(["-czf", "image.tar.gz", "disk.raw", "auth_hash.txt"]).current_dir(directory);
    assert!(tar.status().unwrap().success());
    let archive = std::fs::read(directory.join("image.tar.gz")).unwrap();
    hex::encode(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &archive))
}

/// Cuts a block before the line that begins with `command`.
fn cut<'a>(block: &'a str, command: &str) -> (&'a str, &'a str) {
    block.split_at(block.find(command).unwrap())
}

#[test]
fn the_walk_to_a_kms_and_a_second_node_works_as_printed() {
    let home = tempfile::tempdir().unwrap();
    std::fs::create_dir(home.path().join("bin")).unwrap();
    std::os::unix::fs::symlink(program("keyferry"), home.path().join("bin/keyferry")).unwrap();
    let google = Google::start();
    google.set_external_address("127.0.0.1");
    let reader = Reader { home, google };

    let first = readme_blocks("## A KMS on GCP from zero");
    let second = readme_blocks("### A second node");
    let [values, walk] = &first[..] else { panic!("{first:#?}") };
    let [join, down] = &second[..] else { panic!("{second:#?}") };
    // Every value that the walk needs is one that the reader is told to choose.
    let chosen: Vec<&str> =
        values.lines().filter_map(|line| line.strip_prefix("export ")?.split('=').next()).collect();
    let named = [
        "PROJECT",
        "DOMAIN",
        "OPERATOR",
        "CLIENTS",
        "KMS_IMAGE",
        "KMS_CONTRACT_ADDR",
        "IMAGE_URL",
        "IMAGE_SHA256",
    ];
    assert_eq!(chosen, named);

    // The evidence of every emulated machine shows this image.
    let probe = KmsMachine::start(&"11".repeat(20), None);
    let files = tempfile::tempdir().unwrap();
    let digest = image(files.path(), &probe.image_hash());
    let archive = e2e::serve_file(std::fs::read(files.path().join("image.tar.gz")).unwrap());
    let mut chosen: Vec<(&str, String)> = vec![
        ("PROJECT", "demo-proj".into()),
        ("DOMAIN", "localhost".into()),
        ("OPERATOR", "127.0.0.1/32".into()),
        ("CLIENTS", "203.0.113.0/24".into()),
        ("KMS_IMAGE", format!("registry.example.com/keyferry-kms@sha256:{}", "ab".repeat(32))),
        ("KMS_CONTRACT_ADDR", format!("0x{}", "11".repeat(20))),
        ("IMAGE_URL", format!("{archive}/dstack-cloud-0.6.0-uki.tar.gz")),
        ("IMAGE_SHA256", digest),
        ("KMS_PLATFORM", "dstack-nitro-enclave".into()),
    ];

    let (prepare, up) = cut(walk, "keyferry kms up ");
    let prepared = reader.done(prepare, &chosen);
    assert!(prepared.contains("COMPOSE_HASH: 0x"), "{prepared}");
    let machine = reader.machine("kms-a", Some(&probe));
    chosen.push(("KMS_TRUST", machine.trust().display().to_string()));
    chosen.push(("KMS_PORT", machine.port.to_string()));
    let told = reader.done(up, &chosen);
    for expected in ["written to ", "RUNNING", "from 203.0.113.0/24", "dstack-kms-a  us-central1-a"] {
        assert!(told.contains(expected), "{expected}: {told}");
    }

    let (make, join) = cut(join, "keyferry kms join ");
    let make = make.replace("kms-b.example.com", "localhost");
    // The port is part of the script, so it is chosen before the machine is there.
    let domain = ("DOMAIN_B", "localhost".to_owned());
    chosen.pop();
    reader.done(&make, &chosen);
    let other = reader.machine("kms-b", Some(&probe));
    chosen.extend([("KMS_PORT", other.port.to_string()), domain]);
    let joined = reader.done(join, &chosen);
    let root = |told: &str| told.lines().find(|line| line.contains("K256 root")).unwrap().to_owned();
    assert_eq!(root(&told), root(&joined));

    reader.done(down, &chosen);
    let left = ["bucket demo-proj-dstack", "image dstack-cloud-0-6-0", "image dstack-data-disk"];
    assert_eq!(reader.google.inventory(), left);
}
