//! Real enclave images in virtual machines: keys for the image that the KMS knows, refusals for every other, and parents
//! that are not there.
//!
//! They need QEMU, vhost-device-vsock and a kernel (`scripts/enclave-vm-tools.sh`), and say so where one is missing.

#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]
#![expect(clippy::print_stdout, reason = "a test that is skipped says why")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use age::secrecy::ExposeSecret;
use age::x25519::Identity;
use e2e::{APP_ID, Daemon, Finished, finish, kernel, kms_settings, program, static_agent};
use enclave_vm::{MachineKind, Search};
use serde_json::Value;

/// For one command. A machine without KVM boots in seconds, if nobody else wants the processor.
const DEADLINE: Duration = Duration::from_secs(300);

/// A KMS, images for it, and the root of the modules that run them.
struct Lab {
    directory: tempfile::TempDir,
    kms: Option<Daemon>,
    port: u16,
}

impl Lab {
    /// Nothing where something is missing; the test says so.
    fn new() -> Option<Self> {
        if let Err(reason) = ready() {
            println!("skipped: {reason}");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let mut lab = Self { directory, kms: None, port: 0 };
        let made = lab.keyferry(&["enclave", "root", &lab.text("nsm")]);
        assert_eq!(made.code, Some(0), "{made:?}");
        fs::copy(lab.path("nsm/root.pem"), lab.path("nsm-root.pem")).unwrap();
        // The images hold the KMS's root, and its policy the image: so it makes its keys first.
        lab.start_kms(&format!("\"{}\"", "11".repeat(32)));
        lab.port = lab.kms.take().unwrap().port();
        Some(lab)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn keyferry(&self, arguments: &[&str]) -> Finished {
        let mut command = Command::new(program("keyferry"));
        command.args(arguments).env("XDG_RUNTIME_DIR", self.directory.path());
        finish(command, DEADLINE)
    }

    /// A KMS that knows one image, as a policy writes it.
    fn start_kms(&mut self, image: &str) {
        let policy = format!("[apps.{APP_ID}]\nimages = [{image}]\n");
        fs::write(self.path("policy.toml"), policy).unwrap();
        let authoriser =
            format!("type = \"policy\"\n[core.auth_api.policy]\nfile = {:?}\n", self.path("policy.toml"));
        let settings = kms_settings(self.directory.path(), "", &authoriser);
        let settings = settings.replace("port = 0", &format!("port = {}", self.port));
        fs::write(self.path("kms.toml"), settings).unwrap();
        self.kms = Some(Daemon::start("kms-server", &["serve", "-c", &self.text("kms.toml")]));
    }

    /// A project whose app writes `words` on the console, with more lines for `[kms]`.
    fn project(&self, name: &str, words: &str, kms: &str) -> PathBuf {
        let folder = self.path(name);
        fs::create_dir(&folder).unwrap();
        fs::copy(self.path("certs/root-ca.crt"), folder.join("ca.pem")).unwrap();
        let agent = static_agent();
        let text = format!(
            "[image]\nbinary = {agent:?}\ncmd = [\"attest\", \"--report-data\", \"{}\"]\n\
             [boot]\nkernel = {:?}\ninit = \"agent\"\nagent = {agent:?}\n\
             [kms]\nurl = \"https://localhost:{}\"\napp_id = \"{APP_ID}\"\nkms_ca = \"ca.pem\"\n{kms}",
            hex::encode(words),
            kernel().unwrap(),
            self.port
        );
        fs::write(folder.join("keyferry.toml"), text).unwrap();
        folder
    }

    /// Builds a project's image, and gives it, its registers as a policy writes them, and its hash.
    fn build(&self, project: &Path) -> (PathBuf, String, String) {
        let image = project.with_extension("eif");
        let built = self.keyferry(&[
            "eif",
            "build",
            project.to_str().unwrap(),
            "--output",
            image.to_str().unwrap(),
            "--json",
        ]);
        assert_eq!(built.code, Some(0), "{built:?}");
        let measured = self.keyferry(&["eif", "measure", image.to_str().unwrap(), "--json"]);
        let measured: Value = serde_json::from_str(&measured.stdout).unwrap();
        let text = measured.to_string();
        let register = |name: &str| find(&measured, name).unwrap_or_else(|| panic!("no {name}: {text}"));
        let pairs = ["PCR0", "PCR1", "PCR2"].map(|name| {
            let (key, value) = (name.to_lowercase(), register(name));
            format!("{key} = \"{value}\"")
        });
        let registers = format!("{{ {} }}", pairs.join(", "));
        (image, registers, register("OsImageHash").trim_start_matches("0x").to_owned())
    }

    /// Runs an image with a parent that has the KMS behind its proxy.
    fn run(&self, name: &str, image: &Path, arguments: &[&str]) -> Finished {
        let vsock = self.text(&format!("{name}.vsock"));
        let listen = format!("unix:{vsock}_3128");
        let heartbeat = format!("unix:{vsock}_9000");
        let rules = [format!("localhost:{}", self.port), format!("127.0.0.1:{}", self.port)];
        let proxy =
            ["--listen", &listen, "--heartbeat", &heartbeat, "--allow", &rules[0], "--allow", &rules[1]];
        let _proxy = Daemon::start("host-proxy", &proxy);
        self.run_alone(name, image, arguments)
    }

    /// Runs an image without a parent.
    fn run_alone(&self, name: &str, image: &Path, arguments: &[&str]) -> Finished {
        let (vsock, root) = (self.text(&format!("{name}.vsock")), self.text("nsm"));
        let fixed = ["enclave", "run", image.to_str().unwrap(), "--name", name, "--vsock", &vsock];
        let more = ["--root-dir", &root, "--timeout", "240"];
        self.keyferry(&[&fixed[..], &more, arguments].concat())
    }
}

fn ready() -> Result<(), String> {
    kernel()?;
    let [cache, home, path] = ["XDG_CACHE_HOME", "HOME", "PATH"].map(std::env::var_os);
    let search = Search::in_environment(cache.as_deref(), home.as_deref(), path.as_deref());
    search.find(MachineKind::Microvm).map(drop).map_err(|error| error.to_string())
}

/// The text under a key, however deep.
fn find(value: &Value, key: &str) -> Option<String> {
    match value {
        Value::Object(map) => match map.get(key) {
            Some(Value::String(text)) => Some(text.clone()),
            _ => map.values().find_map(|value| find(value, key)),
        },
        _ => None,
    }
}

#[test]
fn the_demo_boots_an_image_and_opens_the_keys_that_it_exports() {
    if let Err(reason) = ready() {
        return println!("skipped: {reason}");
    }
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(program("keyferry"));
    command.args(["demo", "--vm", "--json"]).env("XDG_RUNTIME_DIR", directory.path());
    command.arg("--kernel").arg(kernel().unwrap()).arg("--agent").arg(static_agent());
    let finished = finish(command, DEADLINE);
    assert_eq!(finished.code, Some(0), "{finished:?}");
    let report: Value = serde_json::from_str(&finished.stdout).unwrap();
    assert_eq!(report["os_image_hash"].as_str().unwrap().len(), 64);
    assert_eq!(report["k256_public_key"].as_str().unwrap().len(), 66);
    assert!(finished.stderr.contains("the parent answered the heartbeat"), "{finished:?}");
    let left: Vec<_> = fs::read_dir(directory.path().join("keyferry/enclaves")).unwrap().flatten().collect();
    assert!(left.iter().all(|entry| entry.file_name() == "lock"), "{left:?}");
}

#[test]
fn a_project_becomes_keys_in_one_command() {
    let Some(mut lab) = Lab::new() else { return };
    let identity = Identity::generate();
    fs::write(lab.path("operator.txt"), identity.to_string().expose_secret()).unwrap();
    let recipients = format!("recipients = [\"{}\"]\n", identity.to_public());
    let project = lab.project("project", "here", &recipients);
    let (_, registers, hash) = lab.build(&project);
    lab.start_kms(&registers);
    let finished = lab.keyferry(&[
        "get-keys",
        "--project",
        project.to_str().unwrap(),
        "--identity",
        &lab.text("operator.txt"),
        "--nsm-root",
        &lab.text("nsm"),
        "--open",
        &format!("127.0.0.1:{}", lab.port),
        "--output",
        &lab.text("app_keys.json"),
        "--json",
    ]);
    assert_eq!(finished.code, Some(0), "{finished:?}");
    let keys: Value = serde_json::from_slice(&fs::read(lab.path("app_keys.json")).unwrap()).unwrap();
    assert_eq!(keys["disk_crypt_key"].as_str().unwrap().len(), 64);
    assert!(finished.stdout.contains(&hash), "{finished:?}");
    let secret = keys["disk_crypt_key"].as_str().unwrap();
    assert!(!finished.stderr.contains(secret) && !finished.stdout.contains(secret));
}

#[test]
fn another_app_another_configuration_and_debug_mode_are_refused_with_the_registers_that_differ() {
    let Some(mut lab) = Lab::new() else { return };
    let known = lab.project("known", "the app", "danger_allow_debug = true\n");
    let (image, registers, _) = lab.build(&known);
    lab.start_kms(&registers);
    let app = lab.project("app", "another app", "danger_allow_debug = true\n");
    let config = lab.project("config", "the app", "danger_allow_debug = true\nallowed_ports = [8080]\n");
    for (name, image, arguments, words) in [
        ("app", lab.build(&app).0, &[][..], "; PCR2 is "),
        ("config", lab.build(&config).0, &[], "; PCR2 is "),
        ("debug", image, &["--debug"], "PCR0/1/2 are zeroed"),
    ] {
        let finished = lab.run(name, &image, arguments);
        assert_eq!(finished.code, Some(3), "{name}: {finished:?}");
        assert!(finished.stdout.contains(words), "{name}: {finished:?}");
        assert!(!finished.stdout.contains("keyferry: starting"), "{name}: {finished:?}");
    }
}

#[test]
fn a_parent_that_is_not_there_and_a_clock_that_is_wrong_end_the_enclave_without_its_app() {
    let Some(lab) = Lab::new() else { return };
    let project = lab.project("project", "the app", "");
    let text = fs::read_to_string(project.join("keyferry.toml")).unwrap();
    fs::write(project.join("keyferry.toml"), format!("{text}[agent]\nattempts = 2\n")).unwrap();
    let (image, ..) = lab.build(&project);
    for (name, arguments, code, words) in [
        ("absent", &[][..], 4, "keyferry: exit 4: gave up after 2 attempts"),
        ("clock", &["--nsm-clock-offset", "60"], 3, "the NSM's, expected at most 5s"),
    ] {
        let finished = lab.run_alone(name, &image, arguments);
        assert_eq!(finished.code, Some(code), "{name}: {finished:?}");
        assert!(finished.stdout.contains(words), "{name}: {finished:?}");
        assert!(!finished.stdout.contains("keyferry: starting"), "{name}: {finished:?}");
    }
}
