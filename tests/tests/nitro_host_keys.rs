//! `keyferry get-keys --host` and `keyferry host` as people call them: a real image on a host behind OpenSSH, with keys of a
//! real KMS, through the scripts and the command lines of dstack's deployment guide.
//!
//! They need root, OpenSSH's server, QEMU, vhost-device-vsock and a kernel, and say so where one is missing.

#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]
#![expect(clippy::print_stdout, reason = "a test that is skipped says why")]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use e2e::aws::Aws;
use e2e::{
    APP_ID, Contracts, Daemon, Finished, NitroHost, finish, kernel, kms_settings, program, readme_blocks,
    run, static_agent,
};
use enclave_vm::{MachineKind, Search};
use serde_json::Value;

/// For one command. A machine without KVM boots in seconds, if nobody else wants the processor.
const DEADLINE: Duration = Duration::from_secs(400);

/// The clock of an emulated machine stands still while others have the processor.
const SLOW_CLOCK: [&str; 3] = ["--", "--max-clock-skew", "250s"];

/// A host, and a KMS that it can reach.
struct Lab {
    host: NitroHost,
    kms: Option<Daemon>,
    port: u16,
}

impl Lab {
    /// A host that is there, whoever made it.
    fn new() -> Option<Self> {
        let lab = Self::with(NitroHost::start)?;
        let deployment = "{\n  \"instance_id\": \"i-0\",\n  \"public_ip\": \"127.0.0.1\"\n}\n";
        lab.host.set("deployment.json", deployment);
        Some(lab)
    }

    /// Nothing where something is missing; the test says so.
    fn with(host: fn() -> Result<NitroHost, String>) -> Option<Self> {
        let [cache, home, path] = ["XDG_CACHE_HOME", "HOME", "PATH"].map(std::env::var_os);
        let search = Search::in_environment(cache.as_deref(), home.as_deref(), path.as_deref());
        let jq = path.iter().flat_map(std::env::split_paths).any(|folder| folder.join("jq").is_file());
        let ready = if jq { kernel().map(drop) } else { Err("no jq".to_owned()) };
        let ready = ready
            .and_then(|()| search.find(MachineKind::Microvm).map(drop).map_err(|error| error.to_string()))
            .and_then(|()| host());
        match ready {
            Ok(host) => {
                let made = run("keyferry", &["enclave", "root", &host.text("nsm")], DEADLINE);
                assert_eq!(made.code, Some(0), "{made:?}");
                fs::copy(host.path("nsm/root.pem"), host.path("nsm-root.pem")).unwrap();
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
        let policy = self.host.path("policy.toml");
        fs::write(&policy, format!("[apps.{APP_ID}]\nimages = [\"{image}\"]\n")).unwrap();
        self.start_kms_that_asks(&format!("type = \"policy\"\n[core.auth_api.policy]\nfile = {policy:?}\n"));
    }

    fn start_kms_that_asks(&mut self, authoriser: &str) {
        self.kms = None;
        let settings = kms_settings(self.host.directory(), "", authoriser);
        self.host.set("kms.toml", &settings.replace("port = 0", &format!("port = {}", self.port)));
        let kms = Daemon::start("kms-server", &["serve", "-c", &self.host.text("kms.toml")]);
        self.port = kms.port();
        self.kms = Some(kms);
    }

    fn url(&self) -> String {
        format!("https://localhost:{}", self.port)
    }

    /// The keys that the image of a generated project gets in a virtual machine here.
    fn direct(&self, project: &Path) -> [String; 3] {
        let mut command = Command::new(program("keyferry"));
        command.args(["get-keys", "--open", &format!("127.0.0.1:{}", self.port), "--output"]);
        command.arg(self.host.path("direct.json")).arg("--project").arg(project);
        command.arg("--identity").arg(project.join("operator.txt"));
        command.arg("--nsm-root").arg(self.host.path("nsm"));
        command.env("XDG_RUNTIME_DIR", self.host.directory());
        let direct = finish(command, DEADLINE);
        assert_eq!(direct.code, Some(0), "{direct:?}");
        keys(&fs::read(self.host.path("direct.json")).unwrap())
    }

    /// The host's folder, and what stands for things that are not there.
    fn surround(&self, command: &mut Command) {
        command.current_dir(self.host.directory()).env("XDG_RUNTIME_DIR", self.host.directory());
        command.env("KEYFERRY", program("keyferry")).env("KEYFERRY_HOST_PROXY", program("host-proxy"));
        command.env("KEYFERRY_AGENT", static_agent()).env("KEYFERRY_KERNEL", kernel().unwrap());
        command.env("NSM_ROOT", self.host.path("nsm")).env("PROXY_OPENS", format!("127.0.0.1:{}", self.port));
    }

    /// The README's line for this script of dstack's guide, as it is printed up to the script, then these arguments.
    fn printed(&self, script: &str, arguments: &str) -> Finished {
        let printed = readme_blocks("## Fetch keys through a Nitro host")[1].replace("\\\n", "");
        let line = printed.lines().find_map(|line| Some(line.split_once(script)?.0)).unwrap();
        let line = line.replace("https://<KMS_DOMAIN>:12001", &self.url()).replace("<APP_ID>", APP_ID);
        fs::copy(self.host.path("id_ed25519"), self.host.path("dstack-nitro-enclave-key.pem")).unwrap();
        let mut shell = Command::new("sh");
        shell.args(["-euc", &format!("{line}{}/../{script} {arguments}", env!("CARGO_MANIFEST_DIR"))]);
        self.surround(&mut shell);
        finish(shell, DEADLINE)
    }

    /// The script of the guide, with its variables.
    fn get_keys(&self, variables: &[(&str, &str)], arguments: &[&str]) -> Command {
        let mut command = Command::new(format!("{}/../scripts/get_keys.sh", env!("CARGO_MANIFEST_DIR")));
        command.args(arguments).args(SLOW_CLOCK);
        self.surround(&mut command);
        command.env("HOST", "127.0.0.1").env("KMS_URL", self.url()).env("APP_ID", APP_ID);
        command.env("KEY_PATH", "./id_ed25519").envs(variables.iter().copied());
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
    let measured = lab.printed("scripts/get_keys.sh", &format!("--show-mrs {}", SLOW_CLOCK.join(" ")));
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
    let second = finish(lab.get_keys(&[], &[]), DEADLINE);
    assert_eq!(second.code, Some(3), "{second:?}");
    assert!(second.stderr.contains(&format!("{APP_ID}: another process is working on this")), "{second:?}");
    drop(killed);
    assert_eq!(fs::read_to_string(&fifo).unwrap(), "ended\n");
    lab.host.clear("fault");
    assert!(!lab.host.path("app_keys.json").exists());

    let fetched = lab.printed("scripts/get_keys.sh", &SLOW_CLOCK.join(" "));
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
    assert_eq!(lab.direct(&lab.host.path(&format!(".keyferry/get-keys/{APP_ID}"))), on_host);
}

/// An operator's shell.
struct Operator {
    home: tempfile::TempDir,
    directory: PathBuf,
    variables: Vec<(&'static str, String)>,
}

impl Operator {
    /// `keyferry`, and what is out there for an operator and is not here: AWS's root, and a KMS with a public address.
    fn new(lab: &Lab, directory: &Path, variables: &[(&'static str, String)]) -> Self {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("keyferry");
        let script = format!(
            "#!/bin/sh\n[ \"$1\" != get-keys ] || \\\n  \
             set -- \"$@\" --nsm-root {} --open 127.0.0.1:{} --max-clock-skew 250s\nexec {} \"$@\"\n",
            lab.host.text("nsm"),
            lab.port,
            program("keyferry").display(),
        );
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        Self { home, directory: directory.to_owned(), variables: variables.to_vec() }
    }

    fn done(&self, script: &str) -> Finished {
        let mut shell = Command::new("sh");
        shell.args(["-euc", script]).current_dir(&self.directory).env_clear().stdin(Stdio::null());
        shell.env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", self.home.path().display()));
        shell.env("HOME", self.home.path()).envs(self.variables.iter().map(|(name, value)| (name, value)));
        let finished = finish(shell, DEADLINE);
        assert_eq!(finished.code, Some(0), "{script}\n{finished:?}");
        finished
    }

    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.directory).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// From an account with nothing in it to keys, and back to an account with nothing in it: the README's walk as it is
/// printed. Only what the reader is told to choose is chosen here.
#[test]
fn the_walk_from_zero_to_keys_and_to_nothing_left_works_as_printed() {
    let Some(aws) = Aws::start() else { return };
    let Some(mut lab) = Lab::with(NitroHost::launch) else { return };
    lab.start_kms(&"11".repeat(32));
    aws.set_host_key(&lab.host.host_key());
    aws.set_public_ip(lab.host.address().ip());
    let blocks = readme_blocks("## A Nitro host from zero");
    let [values, walk] = &blocks[..] else { panic!("{blocks:#?}") };
    let chosen: Vec<(&str, String)> = vec![
        ("REGION", "us-east-1".into()),
        ("KMS_URL", lab.url()),
        ("KMS_ROOT_CA", lab.host.text("certs/root-ca.crt")),
        ("APP_ID", APP_ID.into()),
        ("KEYFERRY_AGENT", static_agent().display().to_string()),
        ("KEYFERRY_HOST_PROXY", program("host-proxy").display().to_string()),
        ("KEYFERRY_KERNEL", kernel().unwrap().display().to_string()),
    ];
    let (directory, variables) = (tempfile::tempdir().unwrap(), aws.environment());
    let address_service = [("KEYFERRY_ADDRESS_SERVICE", aws.endpoint())];
    let operator =
        Operator::new(&lab, directory.path(), &[&chosen[..], &variables, &address_service].concat());
    let named = values.lines().filter_map(|line| line.strip_prefix("export ")?.split('=').next());
    assert!(named.eq(chosen.iter().map(|(name, _)| *name)), "{values}");

    // The KMS is told of the image, as the reader is told to.
    let (measure, rest) = walk.split_at(walk.find("keyferry host up ").unwrap());
    let measured = operator.done(measure).stdout;
    let hash = measured.lines().last().unwrap().strip_prefix("OS_IMAGE_HASH: 0x").unwrap();
    lab.start_kms(hash);

    // The host comes up with the key that EC2 was given.
    let (up, rest) = rest.split_at(rest.find("keyferry get-keys ").unwrap());
    let told = operator.done(up).stdout;
    assert!(told.contains(&format!("public ip:   {}\n", lab.host.address().ip())), "{told}");
    lab.host.admit(&aws.login_key());

    let (fetch, down) = rest.split_at(rest.find("keyferry host down ").unwrap());
    let fetched = operator.done(fetch);
    assert!(fetched.stderr.contains("install nitro-cli\n"), "{fetched:?}");
    let path = operator.directory.join("app_keys.json");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    let on_host = keys(&fs::read(&path).unwrap());
    assert_eq!(lab.host.enclaves(), [""; 0]);
    let project = operator.directory.join(format!(".keyferry/get-keys/{APP_ID}"));
    assert_eq!(lab.direct(&project), on_host);

    let there = aws.inventory("us-east-1").len();
    assert_eq!(there, 4, "an instance, its volume, its key pair and its security group");
    let files = [".keyferry", "app_keys.json", "deployment.json", "host_proxy.log", "keyferry-host.json"];
    assert_eq!(operator.files(), files);
    let removed = operator.done(down).stdout;
    assert!(removed.starts_with("TERMINATE the instance i-"), "{removed}");
    assert!(removed.ends_with("removed; nothing of this host is left\n"), "{removed}");
    assert_eq!(aws.inventory("us-east-1"), Vec::<String>::new());
    // What is kept is the reader's: the keys, the log, and the project whose image is registered.
    assert_eq!(operator.files(), [".keyferry", "app_keys.json", "host_proxy.log"]);
    let kept: Vec<_> = fs::read_dir(operator.directory.join(".keyferry")).unwrap().flatten().collect();
    assert!(kept.iter().all(|entry| entry.file_name() == "get-keys"), "{kept:?}");
}

#[test]
fn an_attestation_comes_with_the_keys_and_debug_mode_gives_a_console_instead() {
    let Some(mut lab) = Lab::new() else { return };
    lab.start_kms(&"11".repeat(32));
    let measured = finish(lab.get_keys(&[], &["--show-mrs"]), DEADLINE);
    let hash = measured.stdout.lines().last().unwrap().trim_start_matches("OS_IMAGE_HASH: 0x").to_owned();
    lab.start_kms(&hash);

    let fetched = lab.printed("scripts/fetch_attestation.sh", "");
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
    let machine = lab.host.read("vm.log") + &lab.host.read("console");
    assert!(console.contains("keyferry: "), "{console}\n{debug:?}\n{machine}");
    assert!(!lab.host.path("app_keys.json").exists());
    assert_eq!(lab.host.enclaves(), [""; 0]);
}

/// The contracts are asked before the host is; the KMS asks the same ones.
#[test]
fn an_image_goes_to_a_host_once_the_contracts_know_it() {
    let Some(contracts) = Contracts::start() else { return };
    let Some(mut lab) = Lab::new() else { return };
    lab.start_kms_that_asks(&format!(
        "type = \"chain\"\n[core.auth_api.chain]\nrpc_urls = [{:?}]\nchain_id = {}\nkms_contract = {:?}\n",
        contracts.fact("rpcUrl"),
        contracts.chain_id(),
        contracts.fact("kmsContract"),
    ));
    let app_id = contracts.fact("appId");
    let ask = |variables: &[(&str, &str)]| {
        let mut command = lab.get_keys(&[&[("APP_ID", app_id)], variables].concat(), &[]);
        command.arg("--check-registration").env_remove("PRIVATE_KEY");
        finish(command, DEADLINE)
    };
    let chain = [("RPC_URL", contracts.fact("rpcUrl")), ("KMS_CONTRACT_ADDR", contracts.fact("kmsContract"))];
    let refused = |words: &str| {
        let told = ask(&chain);
        assert_eq!(told.code, Some(3), "{told:?}");
        assert!(told.stderr.contains("error: the contracts do not allow this image: "), "{told:?}");
        assert!(told.stderr.contains(words), "expected {words:?}: {told:?}");
        assert!(told.stderr.contains("hint: register it: `keyferry chain add-image 0x"), "{told:?}");
    };

    let measured = finish(lab.get_keys(&[("APP_ID", app_id)], &["--show-mrs"]), DEADLINE);
    let image = measured.stdout.lines().last().unwrap().trim_start_matches("OS_IMAGE_HASH: ").to_owned();
    refused("OS image is not allowed");
    contracts.run(&["add-image", &image, "--yes"]);
    refused("Compose hash not allowed");
    contracts.run(&["add-hash", "--app-id", app_id, &image, "--yes"]);
    let nowhere = ask(&[("RPC_URL", "http://127.0.0.1:1"), chain[1]]);
    assert_eq!(nowhere.code, Some(4), "{nowhere:?}");
    assert_eq!(lab.host.steps(), 0);

    // From now on as the README has it, in the folder of the project and with the record of the host beside it.
    let project = lab.host.path(&format!(".keyferry/get-keys/{}", app_id.trim_start_matches("0x")));
    for file in ["keyferry-host.json", "id_ed25519"] {
        fs::copy(lab.host.path(file), project.join(file)).unwrap();
    }
    let printed = readme_blocks("## Fetch keys through a Nitro host")[0];
    let (chosen, commands) = printed.split_at(printed.find("keyferry get-keys").unwrap());
    assert!(chosen.starts_with("export KEYFERRY_HOST_PROXY=…"), "{chosen}");
    let commands = commands
        .replace("-o app_keys.json", "-o app_keys.json --check-registration")
        .replace("kms.example.com:12001", &format!("localhost:{}", lab.port));
    let proxy = [("KEYFERRY_HOST_PROXY", program("host-proxy").display().to_string())];
    let chain_of = chain.map(|(name, value)| (name, value.to_owned()));
    let told = Operator::new(&lab, &project, &[&proxy[..], &chain_of].concat()).done(&commands).stdout;
    assert!(told.contains("ready: Nitro CLI 1.4.2"), "{told}");
    assert!(told.contains("nothing is wrong with this host\n"), "{told}");
    let fetched = keys(&fs::read(project.join("app_keys.json")).unwrap());
    assert!(fetched.iter().all(|key| key.len() == 64), "three keys");
    let steps = lab.host.steps();
    contracts.run(&["remove-image", &image, "--yes"]);
    refused("OS image is not allowed");
    assert_eq!(lab.host.steps(), steps);
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
