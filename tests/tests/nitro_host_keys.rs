//! `keyferry get-keys --host` and `keyferry host` as people call them: a real image on a host behind OpenSSH, with keys of a
//! real KMS, through the scripts and the command lines of dstack's deployment guide.
//!
//! They need root, OpenSSH's server, QEMU, vhost-device-vsock and a kernel, and say so where one is missing.

#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]
#![expect(clippy::print_stdout, reason = "a test that is skipped says why")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use e2e::{APP_ID, Daemon, Finished, NitroHost, finish, kernel, kms_settings, program, run, static_agent};
use enclave_vm::{MachineKind, Search};
use serde_json::Value;

/// For one command. A machine without KVM boots in seconds, if nobody else wants the processor.
const DEADLINE: Duration = Duration::from_secs(400);

/// A host, and a KMS that it can reach.
struct Lab {
    host: NitroHost,
    kms: Option<Daemon>,
    port: u16,
}

impl Lab {
    /// Nothing where something is missing; the test says so.
    fn new() -> Option<Self> {
        let [cache, home, path] = ["XDG_CACHE_HOME", "HOME", "PATH"].map(std::env::var_os);
        let search = Search::in_environment(cache.as_deref(), home.as_deref(), path.as_deref());
        let ready = kernel().map(drop);
        let ready = ready
            .and_then(|()| search.find(MachineKind::Microvm).map(drop).map_err(|error| error.to_string()))
            .and_then(|()| NitroHost::start());
        match ready {
            Ok(host) => {
                let made = run("keyferry", &["enclave", "root", &host.text("nsm")], DEADLINE);
                assert_eq!(made.code, Some(0), "{made:?}");
                fs::copy(host.path("nsm/root.pem"), host.path("nsm-root.pem")).unwrap();
                host.set(
                    "deployment.json",
                    "{\n  \"instance_id\": \"i-0\",\n  \"public_ip\": \"127.0.0.1\"\n}\n",
                );
                Some(Self { host, kms: None, port: 0 })
            }
            Err(reason) => {
                println!("skipped: {reason}");
                None
            }
        }
    }

    /// A KMS that knows one image, at the port of the one before it.
    fn start_kms(&mut self, image: &str) {
        self.kms = None;
        let policy = self.host.path("policy.toml");
        fs::write(&policy, format!("[apps.{APP_ID}]\nimages = [\"{image}\"]\n")).unwrap();
        let authoriser = format!("type = \"policy\"\n[core.auth_api.policy]\nfile = {policy:?}\n");
        let settings = kms_settings(self.host.directory(), "", &authoriser);
        self.host.set("kms.toml", &settings.replace("port = 0", &format!("port = {}", self.port)));
        let kms = Daemon::start("kms-server", &["serve", "-c", &self.host.text("kms.toml")]);
        self.port = kms.port();
        self.kms = Some(kms);
    }

    /// A script in the host's folder, with the guide's variables and what stands for things that are not there.
    fn script(&self, name: &str, variables: &[(&str, &str)], arguments: &[&str]) -> Command {
        let script = format!("{}/../scripts/{name}", env!("CARGO_MANIFEST_DIR"));
        let mut command = Command::new(script);
        command
            .args(arguments)
            .current_dir(self.host.directory())
            .env("XDG_RUNTIME_DIR", self.host.directory());
        command.env("KEYFERRY", program("keyferry")).env("KEYFERRY_HOST_PROXY", program("host-proxy"));
        command.env("KEYFERRY_AGENT", static_agent()).env("KEYFERRY_KERNEL", kernel().unwrap());
        command.env("NSM_ROOT", self.host.path("nsm")).env("PROXY_OPENS", format!("127.0.0.1:{}", self.port));
        command.envs(variables.iter().copied());
        command
    }

    /// The command lines of the guide. The clock of an emulated machine stands still while others have the processor.
    fn get_keys(&self, variables: &[(&str, &str)], arguments: &[&str]) -> Command {
        let url = format!("https://localhost:{}", self.port);
        let mut command = self.script("get_keys.sh", variables, arguments);
        command.args(["--", "--max-clock-skew", "250s"]);
        command.env("HOST", "127.0.0.1").env("KMS_URL", url).env("APP_ID", APP_ID);
        command.env("KEY_PATH", "./id_ed25519");
        command
    }
}

/// Ends the program as nothing else does: without a word to anybody.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _gone = self.0.wait();
    }
}

fn keys(json: &[u8]) -> [String; 3] {
    let value: Value = serde_json::from_slice(json).unwrap();
    ["disk_crypt_key", "env_crypt_key", "k256_key"].map(|name| value[name].as_str().unwrap().to_owned())
}

#[test]
fn the_guides_commands_fetch_the_keys_of_the_direct_trip_also_after_kill_9() {
    let Some(mut lab) = Lab::new() else { return };
    lab.start_kms(&"11".repeat(32));

    // Measured without a host: none is spoken to.
    let measured = finish(lab.get_keys(&[], &["--show-mrs"]), DEADLINE);
    assert_eq!(lab.host.steps(), 0);
    assert_eq!(measured.code, Some(0), "{measured:?}");
    assert!(measured.stderr.contains("compare it with the KMS's own root CA"), "{measured:?}");
    let names: Vec<&str> = measured.stdout.lines().filter_map(|line| line.split(": ").next()).collect();
    assert_eq!(names, ["PCR0", "PCR1", "PCR2", "OS_IMAGE_HASH"]);
    let hash = measured.stdout.lines().last().unwrap().trim_start_matches("OS_IMAGE_HASH: 0x").to_owned();
    lab.start_kms(&hash);

    // Killed while the host starts the enclave: it starts all the same, and the next run ends it and goes on.
    let fifo = lab.host.path("held");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).unwrap();
    lab.host.faults("held run-enclave");
    let mut command = lab.get_keys(&[], &[]);
    let killed = Killed(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    assert_eq!(fs::read_to_string(&fifo).unwrap(), "held\n");
    drop(killed);
    assert_eq!(fs::read_to_string(&fifo).unwrap(), "ended\n");
    lab.host.clear("fault");
    assert!(!lab.host.path("app_keys.json").exists());

    let fetched = finish(lab.get_keys(&[], &[]), DEADLINE);
    assert_eq!(fetched.code, Some(0), "{fetched:?}\n{}", lab.host.read("console"));
    assert!(fetched.stderr.contains("booted"), "{fetched:?}");
    let path = lab.host.path("app_keys.json");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    let on_host = keys(&fs::read(&path).unwrap());
    assert!(lab.host.read("ncat_keys.log").contains("finished"), "{}", lab.host.read("ncat_keys.log"));
    assert_eq!(lab.host.enclaves(), [""; 0]);
    for key in &on_host {
        for text in [&fetched.stdout, &fetched.stderr, &lab.host.read("ncat_keys.log")] {
            assert!(!text.contains(key), "a key is shown");
        }
    }

    // The same image in a virtual machine here.
    let folder = lab.host.text(&format!(".keyferry/get-keys/{APP_ID}"));
    let (identity, open) = (format!("{folder}/operator.txt"), format!("127.0.0.1:{}", lab.port));
    let (nsm, output) = (lab.host.text("nsm"), lab.host.text("direct.json"));
    let direct =
        ["get-keys", "--project", &folder, "--identity", &identity, "--nsm-root", &nsm, "--open", &open];
    let mut command = Command::new(program("keyferry"));
    command.args(direct).args(["--output", &output]).env("XDG_RUNTIME_DIR", lab.host.directory());
    let direct = finish(command, DEADLINE);
    assert_eq!(direct.code, Some(0), "{direct:?}");
    assert_eq!(keys(&fs::read(output).unwrap()), on_host);
}

#[test]
fn an_attestation_comes_with_the_keys_and_debug_mode_gives_a_console_instead() {
    let Some(mut lab) = Lab::new() else { return };
    lab.start_kms(&"11".repeat(32));
    let measured = finish(lab.get_keys(&[], &["--show-mrs"]), DEADLINE);
    let hash = measured.stdout.lines().last().unwrap().trim_start_matches("OS_IMAGE_HASH: 0x").to_owned();
    lab.start_kms(&hash);

    let host = [("HOST", "127.0.0.1"), ("KEY_PATH", "id_ed25519")];
    let fetched = finish(lab.script("fetch_attestation.sh", &host, &[]), DEADLINE);
    assert_eq!(fetched.code, Some(0), "{fetched:?}\n{}", lab.host.read("console"));
    assert!(fetched.stdout.contains("Saved attestation to "), "{fetched:?}");
    let (document, root) = (lab.host.text("nitro_attestation.bin"), lab.host.text("nsm-root.pem"));
    let verified =
        run("keyferry", &["attestation", "verify", "--root", &root, "--json", &document], DEADLINE);
    assert_eq!(verified.code, Some(0), "{verified:?}");
    assert!(verified.stdout.contains(&hash), "{verified:?}");
    assert!(!lab.host.path("app_keys.json").exists());

    let debug = finish(lab.get_keys(&[("DEBUG_ENCLAVE", "1")], &[]), DEADLINE);
    assert_eq!(debug.code, Some(3), "{debug:?}");
    assert!(debug.stderr.contains("warning: in debug mode PCR0, PCR1 and PCR2 are zero"), "{debug:?}");
    let console = lab.host.read("enclave_console.log");
    assert!(console.contains("keyferry: "), "{console}");
    assert!(!lab.host.path("app_keys.json").exists());
    assert_eq!(lab.host.enclaves(), [""; 0]);
}

#[test]
fn the_scripts_say_what_is_missing() {
    let directory = tempfile::tempdir().unwrap();
    let ask = |name: &str, variables: &[(&str, &str)], arguments: &[&str]| -> Finished {
        let mut command = Command::new(format!("{}/../scripts/{name}", env!("CARGO_MANIFEST_DIR")));
        command.args(arguments).current_dir(directory.path()).envs(variables.iter().copied());
        for variable in ["HOST", "KMS_URL", "APP_ID", "KEY_PATH"] {
            if !variables.iter().any(|(name, _)| *name == variable) {
                command.env_remove(variable);
            }
        }
        finish(command, DEADLINE)
    };
    let url = ("KMS_URL", "https://kms.example.com:12001");
    for (name, variables, arguments, words) in [
        ("get_keys.sh", &[("HOST", "127.0.0.1")][..], &[][..], "KMS_URL is required"),
        ("get_keys.sh", &[url], &[], "neither HOST nor deployment.json"),
        ("get_keys.sh", &[url], &["--show-mrz"], "usage: HOST="),
        ("fetch_attestation.sh", &[], &[], "usage: HOST="),
        ("fetch_attestation.sh", &[("HOST", "127.0.0.1")], &[], "no project, or several"),
    ] {
        let finished = ask(name, variables, arguments);
        assert_eq!(finished.code, Some(2), "{finished:?}");
        assert!(finished.stderr.contains(words), "expected {words:?} in {finished:?}");
    }
}

#[test]
fn a_host_is_set_up_examined_and_asked_on_the_command_line() {
    let host = match NitroHost::start() {
        Ok(host) => host,
        Err(reason) => return println!("skipped: {reason}"),
    };
    let ask = |arguments: &[&str]| {
        let mut command = Command::new(program("keyferry"));
        command.arg("host").args(arguments).current_dir(host.directory());
        finish(command, DEADLINE)
    };
    let doctor = ask(&["doctor"]);
    assert_eq!(doctor.code, Some(3), "{doctor:?}");
    assert!(doctor.stdout.contains("problem: nitro-cli: command not found\n  fix: "), "{doctor:?}");

    let proxy = program("host-proxy").display().to_string();
    let setup = ask(&["setup", "--memory", "600", "--host-proxy", &proxy, "--json"]);
    assert_eq!(setup.code, Some(0), "{setup:?}");
    let report: Value = serde_json::from_str(&setup.stdout).unwrap();
    assert_eq!((&report["processors"], &report["memory_mib"]), (&Value::from(2), &Value::from(600)));
    assert!(setup.stderr.contains("install nitro-cli\n"), "{setup:?}");
    let again = ask(&["setup", "--memory", "600", "--host-proxy", &proxy]);
    assert_eq!((again.code, again.stderr.as_str()), (Some(0), ""), "{again:?}");
    assert_eq!(again.stdout, "ready: Nitro CLI 1.4.2, 2 processors and 600.00 MiB set aside for enclaves\n");

    let doctor = ask(&["doctor", "--kms", "localhost:1", "--json"]);
    assert_eq!(doctor.code, Some(3), "{doctor:?}");
    assert!(doctor.stdout.contains("the host cannot connect to localhost port 1"), "{doctor:?}");
    let doctor = ask(&["doctor"]);
    assert_eq!((doctor.code, doctor.stdout.as_str()), (Some(0), "nothing is wrong with this host\n"));

    let said = ask(&["ssh", "--", "printf", "%s\\n", "it's", "two  words"]);
    assert_eq!((said.code, said.stdout.as_str()), (Some(0), "it's\ntwo  words\n"), "{said:?}");
    let failed = ask(&["ssh", "--", "sh", "-c", "echo no >&2; exit 3"]);
    assert_eq!(failed.code, Some(3), "{failed:?}");
    assert!(failed.stderr.starts_with("no\nerror: the command ended with exit code 3"), "{failed:?}");
    let log = ask(&["logs", "--allocator"]);
    assert!(log.stdout.contains("Successfully allocated Nitro Enclaves resources"), "{log:?}");

    // An address alone is not enough: its key is not taken from the host itself.
    fs::remove_file(host.path("keyferry-host.json")).unwrap();
    let mut command = Command::new(program("keyferry"));
    command.args(["host", "doctor", "--host", "127.0.0.1", "--ssh-key", "id_ed25519", "--ssh-port", "1"]);
    let unknown = finish(
        {
            command.current_dir(host.directory());
            command
        },
        DEADLINE,
    );
    assert_eq!(unknown.code, Some(2), "{unknown:?}");
    assert!(unknown.stderr.contains("its host key is not known"), "{unknown:?}");
}
