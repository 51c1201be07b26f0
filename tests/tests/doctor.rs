//! `keyferry doctor tdx-host` on trees of files that look like a host, as an operator types it: a host that is well, and each
//! failure that users met.

#![expect(clippy::unwrap_used, reason = "a test may stop at once")]

use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use cloud_provisioners::project::Project;
use e2e::serve::{Answer, Question, Server};
use e2e::vmm::Vmm;
use e2e::{Finished, KmsMachine, Setup, finish, free_port, program, readme_blocks};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(120);
const CONTRACT: &str = "0x2f83172A49584C017F2B256F0FB2Dca14126Ba9C";
const DIGEST_OF_NOTHING: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// A host on which everything is as it must be, with the services it needs.
struct Host {
    root: TempDir,
    vmm: Vmm,
    /// PCCS, authoriser, chain and registry in one.
    services: Server,
    key_provider: TcpListener,
    _docker: std::thread::JoinHandle<()>,
}

fn services(question: &Question) -> Option<Answer> {
    let known = format!("HEAD /v2/kms/manifests/{DIGEST_OF_NOTHING}");
    Some(match question.line.as_str() {
        "GET /sgx/certification/v4/rootcacrl" => Answer::bytes(200, b"308201".to_vec()),
        "GET /auth" => Answer::json(200, &json!({"status": "ok"})),
        "GET /auth-without-chain" => Answer::json(200, &json!({"kmsContractAddr": ""})),
        "GET /auth-error" => Answer::json(500, &json!({"status": "error"})),
        "POST /rpc" => {
            let call: Value = serde_json::from_slice(&question.body).unwrap();
            let result = match (call["method"].as_str().unwrap(), call["params"][0].as_str()) {
                ("eth_chainId", _) => json!("0x14a34"),
                ("eth_getCode", Some(CONTRACT)) => json!("0x6080"),
                ("eth_getCode", _) => json!("0x"),
                (other, _) => panic!("{other}"),
            };
            Answer::json(200, &json!({"jsonrpc": "2.0", "id": 1, "result": result}))
        }
        "HEAD /v2/kms/manifests/0.5.4" => Answer::bytes(200, Vec::new()),
        line if line == known => Answer::bytes(200, Vec::new()),
        "GET /v2/kms/tags/list" => Answer::json(200, &json!({"name": "kms", "tags": ["0.5.3", "0.5.4"]})),
        "HEAD /v2/private/manifests/1" => {
            Answer::bytes(401, Vec::new()).with("www-authenticate", "Basic realm=\"private\"")
        }
        "GET /Dstack-TEE/dstack/releases/download/guest-os-v0.6.0/dstack-0.6.0.tar.gz" => {
            Answer::bytes(200, release()).with("etag", "\"1\"")
        }
        _ => Answer::bytes(404, Vec::new()),
    })
}

/// The archive of a guest image.
fn release() -> Vec<u8> {
    let list = format!("{}  bzImage\n", hex::encode(Sha256::digest("kernel")));
    let digest = hex::encode(Sha256::digest(&list));
    let gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let mut builder = tar::Builder::new(gzip);
    for (name, content) in [
        ("bzImage", "kernel"),
        ("metadata.json", r#"{"kernel": "bzImage"}"#),
        ("sha256sum.txt", &list),
        ("digest.txt", &digest),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, format!("dstack-0.6.0/{name}"), content.as_bytes()).unwrap();
    }
    builder.into_inner().unwrap().finish().unwrap()
}

impl Host {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let vmm = Vmm::start(None);
        let services = Server::start(services);
        let key_provider = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let docker = root.path().join("var/run/docker.sock");
        std::fs::create_dir_all(docker.parent().unwrap()).unwrap();
        let docker = answer_pings(UnixListener::bind(docker).unwrap());
        let host = Self { root, vmm, services, key_provider, _docker: docker };
        host.write("proc/cpuinfo", "processor : 0\nflags\t\t: fpu sgx sgx_lc tdx_host_platform\n");
        host.write("proc/sys/kernel/osrelease", "6.8.0-1028-intel\n");
        host.write(
            "dev/kmsg",
            "6,1,0,-;x86/tme: enabled by BIOS\n6,2,0,-;x86/mktme: enabled by BIOS\n6,3,1,-;virt/tdx: BIOS enabled: private \
             KeyID range [64, 128)\n6,4,2,-;virt/tdx: module initialized\n",
        );
        host.write("sys/module/kvm_intel/parameters/tdx", "Y\n");
        for device in ["kvm", "sgx_enclave", "sgx_provision", "vhost-vsock"] {
            host.write(&format!("dev/{device}"), "");
        }
        host.write(
            "usr/bin/qemu-system-x86_64",
            "#!/bin/sh\necho 'QEMU emulator version 8.2.2 (Debian 1:8.2.2+ds-0ubuntu1.4+tdx1.1)'\n",
        );
        let qemu = host.root.path().join("usr/bin/qemu-system-x86_64");
        std::fs::set_permissions(qemu, std::fs::Permissions::from_mode(0o755)).unwrap();
        host.write("proc/meminfo", "MemTotal: 131072000 kB\nMemAvailable: 65536000 kB\n");
        host.process(100, "qgs", &["/usr/bin/qgs"]);
        host.process(101, "aesm_service", &["/opt/intel/aesm_service"]);
        host.write("etc/qgs.conf", "port = 4050\nnumber_threads = 4\n");
        host.write(
            "var/log/mpa_registration.log",
            "INFO: Registration Flow - PLATFORM_ESTABLISHMENT passed successfully.\n",
        );
        let pccs = format!("{}/sgx/certification/v4/", host.services.url());
        host.write("etc/sgx_default_qcnl.conf", &format!("{{\n  // where\n  \"pccs_url\": \"{pccs}\"\n}}\n"));
        host.write("proc/net/tcp", "  sl  local_address rem_address   st\n");
        host.configure(|_| ());
        host.image("bzImage", "kernel");
        host.write("kms/app.json", r#"{"name": "kms", "os_image": "dstack-0.6.0", "key_provider": "local"}"#);
        host.write(
            "kms/docker-compose.yaml",
            &format!(
                "services:\n  kms:\n    image: {}/kms@{DIGEST_OF_NOTHING}\n    volumes:\n      - \
                 /var/run/dstack.sock:/var/run/dstack.sock\n",
                host.services.address()
            ),
        );
        host
    }

    fn write(&self, path: &str, content: &str) {
        let path = self.root.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    fn remove(&self, path: &str) {
        std::fs::remove_file(self.root.path().join(path)).unwrap();
    }

    fn process(&self, id: u32, name: &str, arguments: &[&str]) {
        self.write(&format!("proc/{id}/comm"), &format!("{name}\n"));
        self.write(&format!("proc/{id}/cmdline"), &(arguments.join("\0") + "\0"));
    }

    fn image(&self, file: &str, content: &str) {
        let directory = "var/lib/dstack/images/dstack-0.6.0";
        let list = format!("{}  {file}\n", hex::encode(Sha256::digest("kernel")));
        self.write(&format!("{directory}/{file}"), content);
        self.write(&format!("{directory}/metadata.json"), r#"{"kernel": "bzImage"}"#);
        self.write(&format!("{directory}/sha256sum.txt"), &list);
        self.write(&format!("{directory}/digest.txt"), &hex::encode(Sha256::digest(&list)));
    }

    /// The VMM's configuration, after a change.
    fn configure(&self, change: impl FnOnce(&mut String)) {
        let mut text = format!(
            "address = \"tcp:127.0.0.1:9080\"\nrun_path = \"/var/lib/dstack/vm\"\n[image]\npath = \"/var/lib/dstack/images\"\n\
             [auth]\nenabled = false\n[cvm]\npccs_url = \"{}\"\ncid_start = 30000\ncid_pool_size = 1000\nqgs_port = 4050\n\
             [cvm.networking]\nmode = \"user\"\n[cvm.port_mapping]\nenabled = true\n[key_provider]\nenabled = true\naddress = \
             \"127.0.0.1\"\nport = {}\n",
            self.services.url(),
            self.key_provider.local_addr().unwrap().port(),
        );
        change(&mut text);
        self.write("etc/dstack/vmm.toml", &text);
    }

    fn examine(&self, arguments: &[&str]) -> Finished {
        let mut command = Command::new(program("keyferry"));
        let root = self.root.path().to_str().unwrap();
        command.args(["doctor", "tdx-host", "--root", root, "--disk", "1"]).args(arguments);
        command
            .env_remove("ETH_RPC_URL")
            .env_remove("DSTACK_VMM_TOKEN")
            .env("DSTACK_VMM_URL", self.vmm.url());
        finish(command, DEADLINE)
    }

    fn url(&self, path: &str) -> String {
        format!("{}/{path}", self.services.url())
    }

    /// The one check that fails, with its cause and remedy, in JSON and for people.
    fn fails(&self, check: &str, finding: &str, arguments: &[&str]) {
        let finished = self.examine(&[&["--json"], arguments].concat());
        assert_eq!(finished.code, Some(3), "{check}: {}{}", finished.stdout, finished.stderr);
        let answer: Value = serde_json::from_str(&finished.stdout).unwrap();
        assert_eq!((&answer["version"], &answer["passed"]), (&json!(1), &json!(false)));
        let failed: Vec<&Value> =
            answer["findings"].as_array().unwrap().iter().filter(|it| it["status"] == "fail").collect();
        let told = failed.iter().map(|it| it.to_string()).collect::<Vec<_>>().join("\n");
        assert_eq!(failed.len(), 1, "{check}: {told}");
        assert_eq!(failed[0]["check"], check, "{told}");
        assert!(failed[0]["finding"].as_str().unwrap().contains(finding), "{told}");
        for part in ["cause", "remedy"] {
            assert!(
                failed[0][part].as_str().is_some_and(|it| it.len() > 10),
                "{check} has no {part}: {told}"
            );
        }
    }

    /// The one check that is worth a look.
    fn warns(&self, check: &str, finding: &str) {
        let finished = self.examine(&["--json"]);
        assert_eq!(finished.code, Some(0), "{check}: {}", finished.stdout);
        let answer: Value = serde_json::from_str(&finished.stdout).unwrap();
        let warned: Vec<&Value> =
            answer["findings"].as_array().unwrap().iter().filter(|it| it["status"] == "warn").collect();
        assert_eq!(warned.len(), 1, "{warned:?}");
        assert_eq!(warned[0]["check"], check, "{warned:?}");
        assert!(warned[0]["finding"].as_str().unwrap().contains(finding), "{warned:?}");
    }
}

/// A Docker that only says that it is there.
fn answer_pings(listener: UnixListener) -> std::thread::JoinHandle<()> {
    use std::io::{Read as _, Write as _};
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let mut request = [0; 1024];
            // One small request, which comes in one piece on a socket of this machine.
            let _read = stream.read(&mut request);
            let _written =
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nOK");
        }
    })
}

fn text(change: &'static str, to: &'static str) -> impl FnOnce(&mut String) {
    move |text: &mut String| {
        assert!(text.contains(change), "{change} is not in {text}");
        *text = text.replace(change, to);
    }
}

#[test]
fn a_host_that_is_well_passes_every_check() {
    let host = Host::new();
    let project = host.root.path().join("kms");
    let digest =
        std::fs::read_to_string(host.root.path().join("var/lib/dstack/images/dstack-0.6.0/digest.txt"))
            .unwrap();
    let (auth, rpc) = (host.url("auth"), host.url("rpc"));
    let finished = host.examine(&[
        "-C",
        project.to_str().unwrap(),
        "--image",
        "dstack-0.6.0",
        "--image-digest",
        &digest,
        "--port",
        "12001",
        "--auth-url",
        &auth,
        "--rpc-url",
        &rpc,
        "--chain-id",
        "84532",
        "--contract",
        CONTRACT,
    ]);
    assert_eq!(finished.code, Some(0), "{}{}", finished.stdout, finished.stderr);
    let mut checks: Vec<&str> = finished.stdout.lines().filter(|line| line.starts_with("ok ")).collect();
    let last = finished.stdout.lines().last().unwrap();
    assert_eq!(last, format!("0 failed, 0 to look at, {} passed", checks.len()), "{}", finished.stdout);
    checks.iter_mut().for_each(|line| *line = line.split_whitespace().nth(1).unwrap());
    let expected = [
        "cpu",
        "kernel",
        "tme",
        "tdx-module",
        "kvm",
        "sgx",
        "vsock",
        "qemu",
        "memory",
        "disk",
        "pccs-host",
        "qgsd",
        "aesm",
        "registration",
        "docker",
        "pccs-guest",
        "key-provider",
        "vmm-auth",
        "network",
        "port-mapping",
        "cid",
        "guest-image",
        "vmm",
        "port",
        "registry",
        "compose",
        "auth",
        "chain",
    ];
    assert_eq!(checks, expected);
}

#[test]
fn firmware_and_kernel() {
    let host = Host::new();
    host.write("proc/cpuinfo", "flags : fpu sgx sgx_lc\n");
    host.fails("cpu", "does not show tdx_host_platform", &[]);

    let host = Host::new();
    host.write("dev/kmsg", "6,1,0,-;x86/tme: not enabled by BIOS\n6,1,0,-;virt/tdx: module initialized\n");
    host.fails("tme", "not enabled by BIOS", &[]);
    host.write("dev/kmsg", "6,1,0,-;x86/tme: enabled by BIOS\n6,1,0,-;x86/mktme: enabled by BIOS\n");
    host.fails("tdx-module", "no word of virt/tdx", &[]);
    host.write(
        "dev/kmsg",
        "6,1,0,-;x86/tme: enabled by BIOS\n6,1,0,-;x86/mktme: enabled by BIOS\n6,1,0,-;virt/tdx: BIOS enabled: x\n",
    );
    host.fails("tdx-module", "the module did not start", &[]);

    let host = Host::new();
    host.write("sys/module/kvm_intel/parameters/tdx", "N\n");
    host.fails("kvm", "parameters/tdx is N", &[]);
    host.remove("sys/module/kvm_intel/parameters/tdx");
    host.fails("kvm", "No such file", &[]);

    let host = Host::new();
    host.remove("dev/sgx_provision");
    host.fails("sgx", "/dev/sgx_provision missing", &[]);

    let host = Host::new();
    host.remove("dev/vhost-vsock");
    host.fails("vsock", "/dev/vhost-vsock is missing", &[]);

    let host = Host::new();
    host.write("usr/bin/qemu-system-x86_64", "#!/bin/sh\necho 'QEMU emulator version 7.2.0'\n");
    host.fails("qemu", "7.2.0", &[]);
    host.remove("usr/bin/qemu-system-x86_64");
    host.fails("qemu", "No such file", &[]);

    let host = Host::new();
    host.write("proc/sys/kernel/osrelease", "6.8.0-45-generic\n");
    host.warns("kernel", "6.8.0-45-generic: not known to host TDX");
    host.write("proc/sys/kernel/osrelease", "6.8.0-1001-intel\n");
    host.warns("kernel", "6.8.0-1001-intel");

    let host = Host::new();
    host.fails("memory", "64000 MiB are available, 99999999 are wanted", &["--memory", "99999999"]);
    host.write("proc/meminfo", "MemAvailable: 1048576 kB\n");
    host.fails("memory", "1024 MiB are available, 4096 are wanted", &[]);
}

#[test]
fn quotes_and_keys() {
    let host = Host::new();
    host.remove("proc/100/comm");
    host.fails("qgsd", "does not run", &[]);

    let host = Host::new();
    host.write("etc/qgs.conf", "port = 4051\n");
    host.fails("qgsd", "has port 4051, the VMM tells guests 4050", &[]);

    let host = Host::new();
    host.remove("proc/101/comm");
    host.fails("aesm", "no process aesm_service", &[]);

    let host = Host::new();
    let nowhere = unused_port();
    host.write(
        "etc/sgx_default_qcnl.conf",
        &format!(r#"{{"pccs_url": "http://127.0.0.1:{nowhere}/sgx/certification/v4/"}}"#),
    );
    host.fails("pccs-host", "Connection refused", &[]);
    host.write(
        "etc/sgx_default_qcnl.conf",
        &format!(r#"{{"pccs_url": "{}/sgx/certification/v3/"}}"#, host.services.url()),
    );
    host.fails("pccs-host", "status 404", &[]);
    host.write("etc/sgx_default_qcnl.conf", "{}");
    host.fails("pccs-host", "has no pccs_url", &[]);

    let host = Host::new();
    host.configure(|text| *text = text.replace(&host.services.url(), &format!("http://127.0.0.1:{nowhere}")));
    host.fails("pccs-guest", "Connection refused", &[]);

    let host = Host::new();
    host.write("var/log/mpa_registration.log", "ERROR: Registration Flow - request failed: 401\n");
    host.fails("registration", "request failed: 401", &[]);
    host.remove("var/log/mpa_registration.log");
    host.warns("registration", "No such file");

    let host = Host::new();
    let port = host.key_provider.local_addr().unwrap().port();
    host.write("proc/net/tcp", &format!("sl local rem st\n 0: 00000000:{port:04X} 00000000:0000 0A\n"));
    host.fails("key-provider", &format!("listens at 0.0.0.0:{port}, not only on loopback"), &[]);
    host.write("proc/net/tcp", "sl local rem st\n");
    host.configure(|text| *text = text.replace(&format!("port = {port}"), &format!("port = {nowhere}")));
    host.fails("key-provider", "Connection refused", &[]);
    host.configure(text("[key_provider]\nenabled = true", "[key_provider]\nenabled = false"));
    host.fails("key-provider", "enabled is false", &[]);

    let host = Host::new();
    host.remove("var/run/docker.sock");
    host.fails("docker", "docker.sock", &[]);
}

#[test]
fn the_vmm_and_its_configuration() {
    let host = Host::new();
    let nowhere = format!("http://127.0.0.1:{}", unused_port());
    host.fails("vmm", "Connection refused", &["--vmm", &nowhere]);
    let with_token = Vmm::start(Some("secret"));
    host.fails("vmm", "not authorised", &["--vmm", &with_token.url()]);
    host.fails("vmm", "status 404", &["--vmm", &host.services.url()]);

    host.configure(text("tcp:127.0.0.1:9080", "tcp:0.0.0.0:9080"));
    host.fails("vmm-auth", "listens at 0.0.0.0 without authentication", &[]);
    host.configure(text("mode = \"user\"", "mode = \"bridge\""));
    host.warns("network", "mode bridge");
    host.configure(text("[cvm.port_mapping]\nenabled = true", "[cvm.port_mapping]\nenabled = false"));
    host.fails("port-mapping", "enabled is false", &[]);
    host.configure(text("pccs_url = \"http", "pccs_url = \"\"\nignored = \"http"));
    host.warns("pccs-guest", "[cvm] pccs_url is empty");
    host.configure(text("[auth]", "[auth"));
    host.fails("vmm-config", "/etc/dstack/vmm.toml: ", &[]);
    host.remove("etc/dstack/vmm.toml");
    host.fails("vmm-config", "No such file", &[]);
}

#[test]
fn ids_and_ports_that_others_have() {
    let host = Host::new();
    let ours = [
        "/usr/bin/qemu-system-x86_64",
        "-device",
        "vhost-vsock-pci,guest-cid=30001",
        "file=/var/lib/dstack/vm/1/hda.img",
    ];
    host.process(200, "qemu-system-x86", &ours);
    assert_eq!(host.examine(&[]).code, Some(0), "our own guest clashed");
    host.process(
        201,
        "qemu-system-x86",
        &["/usr/bin/qemu-system-x86_64", "-device", "vhost-vsock-pci,guest-cid=30002"],
    );
    host.fails("cid", "a guest of somebody else has 30002, within 30000 to 30999", &[]);
    host.remove("proc/201/comm");
    host.process(202, "dstack-vmm", &["/usr/bin/dstack-vmm", "-c", "/opt/other/vmm.toml"]);
    host.write(
        "opt/other/vmm.toml",
        "run_path = \"/opt/other/vm\"\n[cvm]\ncid_start = 30500\ncid_pool_size = 1000\n",
    );
    host.fails("cid", "the VMM of /opt/other/vmm.toml hands out 30500 to 31499 too", &[]);
    host.remove("proc/202/comm");

    host.write("proc/net/tcp6", "sl local rem st\n 0: 00000000000000000000000000000000:2EE1 0:0 0A\n");
    host.fails("port", "12001 is taken at [::]:12001", &["--port", "12001"]);
    assert_eq!(host.examine(&["--port", "12002"]).code, Some(0));
}

#[test]
fn the_guest_image_is_the_one_that_was_released() {
    let host = Host::new();
    let image = ["--image", "dstack-0.6.0"];
    host.fails("guest-image", "metadata.json: No such file", &["--image", "dstack-9.9.9"]);
    host.fails("guest-image", "expected 00", &[&image[..], &["--image-digest", "0x00"]].concat());
    host.image("bzImage", "another kernel");
    host.fails("guest-image", "bzImage is not the file sha256sum.txt lists", &image);
    host.remove("var/lib/dstack/images/dstack-0.6.0/bzImage");
    host.fails("guest-image", "bzImage is missing, which metadata.json names as kernel", &image);
}

#[test]
fn registry_authoriser_and_chain() {
    let host = Host::new();
    let at = host.services.address();
    let image = |name: &str| format!("{at}/{name}");
    host.fails(
        "registry",
        "kms:0.5.5: not in the registry, which has 0.5.3, 0.5.4",
        &["--container-image", &image("kms:0.5.5")],
    );
    host.fails(
        "registry",
        "refuses an anonymous reader, status 401",
        &["--container-image", &image("private:1")],
    );
    let nowhere = format!("127.0.0.1:{}/kms:1", unused_port());
    host.fails("registry", "Connection refused", &["--container-image", &nowhere]);
    let by_tag = host.examine(&["--container-image", &image("kms:0.5.4")]);
    assert!(
        by_tag.code == Some(0) && by_tag.stdout.contains("kms:0.5.4 is there, by a tag"),
        "{}",
        by_tag.stdout
    );

    host.fails("auth", "without the field status", &["--auth-url", &host.url("auth-without-chain")]);
    host.fails("auth", "status 500, error", &["--auth-url", &host.url("auth-error")]);
    let nobody = format!("http://127.0.0.1:{}/", unused_port());
    host.fails("auth", "Connection refused", &["--auth-url", &nobody]);

    let rpc = host.url("rpc");
    host.fails("chain", "is chain 84532, expected 8453", &["--rpc-url", &rpc, "--chain-id", "8453"]);
    let other = "0x000000000000000000000000000000000000dEaD";
    host.fails("chain", "has no code at 0x0000", &["--rpc-url", &rpc, "--contract", other]);
    let secret = format!("http://127.0.0.1:{}/a-key-of-the-endpoint", unused_port());
    host.fails("chain", "eth_chainId", &["--rpc-url", &secret]);
    let told = host.examine(&["--rpc-url", &secret]);
    assert!(!told.stdout.contains("a-key-of-the-endpoint"), "{}", told.stdout);
}

#[test]
fn a_compose_that_cannot_work_on_bare_metal() {
    let host = Host::new();
    let project = host.root.path().join("kms");
    let project = ["-C", project.to_str().unwrap()];
    host.write("kms/app.json", r#"{"name": "kms", "key_provider": "local", "secure_time": true}"#);
    host.fails("compose", "secure_time is true", &project);
    host.write("kms/app.json", r#"{"name": "kms", "key_provider": "tpm"}"#);
    host.fails("compose", "key_provider is tpm", &project);
    let ports =
        |port| format!(r#"{{"name":"kms","key_provider":"local","vmm_config":{{"ports":["{port}"]}}}}"#);
    host.write("kms/app.json", &ports("tcp:127.0.0.1:9100:8000"));
    host.fails("compose", "every port is published on loopback alone", &project);
    host.write("kms/app.json", &ports("9100"));
    host.fails("compose", "vmm_config.ports: \"9100\" is no port mapping", &project);
    host.write("kms/app.json", r#"{"name": "kms", "key_provider": "local"}"#);
    host.write("kms/docker-compose.yaml", "services: {}\n");
    host.fails("compose", "no service mounts /var/run/dstack.sock", &project);
}

#[test]
fn what_a_log_shows_is_told_with_cause_and_remedy() {
    let host = Host::new();
    for (line, remedy) in [
        ("guest: QGS error code: 0x12001", "pccs-host and registration"),
        ("key provider: DCAP error", "update the firmware"),
        ("boot: Waiting for the system time to be synchronized", "secure_time false"),
        ("qemu: vhost-vsock: unable to set guest cid: Address already in use", "cid_start"),
        ("docker: manifest for cr.example/dstack-kms:0.5.5 not found", "tag or digest"),
    ] {
        host.write("serial.log", &format!("starting\n{line}\n"));
        let log = host.root.path().join("serial.log");
        let finished = host.examine(&["--log", log.to_str().unwrap()]);
        assert_eq!(finished.code, Some(3), "{line}: {}", finished.stdout);
        assert!(
            finished.stdout.contains(&format!("FAIL  log                    {line}")),
            "{}",
            finished.stdout
        );
        assert!(finished.stdout.contains(remedy), "{line}: {}", finished.stdout);
        assert!(finished.stderr.contains("hint: mend the first that failed"), "{}", finished.stderr);
    }
    let missing = host.examine(&["--log", "/nonexistent/log"]);
    assert_eq!(missing.code, Some(2), "{}", missing.stderr);
}

/// A shell on the host, in which a walkthrough is typed.
fn shell(host: &Host, script: &str, more: &[(&str, String)]) -> Finished {
    let home = host.root.path().join("home/op");
    let keyferry = program("keyferry");
    let path = format!("{}:/usr/bin:/bin", keyferry.parent().unwrap().display());
    let mut command = Command::new("bash");
    command.args(["-euo", "pipefail", "-c", script]).current_dir(&home).env_clear();
    command.env("HOME", &home).env("PATH", path).env("KEYFERRY_HOST_ROOT", host.root.path());
    command.env("KEYFERRY_MIRROR", host.services.url()).env("DSTACK_VMM_URL", host.vmm.url());
    command.envs(more.iter().map(|(name, value)| (*name, value)));
    finish(command, Duration::from_secs(300))
}

/// The KMS of the walkthrough's machine.
fn kms(host: &Host, port: u16, like: Option<&KmsMachine>) -> KmsMachine {
    let project = Project::open(&host.root.path().join("home/op/kms-metal")).unwrap();
    let app_id = project.compose(&project.app().unwrap(), None).unwrap().app_id();
    KmsMachine::start_with(&hex::encode(app_id), &Setup { port: Some(port), like, ..Setup::default() })
}

#[test]
fn the_walkthrough_on_bare_metal_runs_as_it_is_printed() {
    let host = Host::new();
    host.configure(text("/var/lib/dstack/images", "/home/op/.dstack-vmm/image"));
    std::fs::create_dir_all(host.root.path().join("home/op")).unwrap();
    let blocks = readme_blocks("## KMS on bare metal");
    let [values, walk, down, playbook] = blocks.as_slice() else { panic!("{blocks:#?}") };
    let chosen: Vec<&str> =
        values.lines().filter_map(|line| line.strip_prefix("export ")?.split('=').next()).collect();
    assert_eq!(chosen, ["DOMAIN", "KMS_PORT", "KMS_IMAGE", "KMS_CONTRACT_ADDR", "OS_IMAGE_HASH"]);
    let port = free_port();
    let mut chosen = vec![
        ("DOMAIN", "localhost".to_owned()),
        ("KMS_PORT", port.to_string()),
        ("KMS_IMAGE", format!("{}/kms@{DIGEST_OF_NOTHING}", host.services.address())),
        ("KMS_CONTRACT_ADDR", CONTRACT.to_owned()),
        ("KMS_PLATFORM", "dstack-nitro-enclave".to_owned()),
    ];
    let (prepare, up) = walk.split_at(walk.find("keyferry kms up ").unwrap());
    let done = shell(&host, prepare, &chosen);
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
    for shown in ["SHA-256 of the archive: ", "ok    guest-image", "ok    registry", "ok    port "] {
        assert!(done.stdout.contains(shown), "{shown}: {}", done.stdout);
    }
    let machine = kms(&host, port, None);
    chosen.push(("OS_IMAGE_HASH", machine.image_hash()));
    chosen.push(("KMS_TRUST", machine.trust().display().to_string()));
    let done = shell(&host, up, &chosen);
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
    for shown in
        ["written to kms-metal/kms.json", "status: running", &format!("port: tcp:0.0.0.0:{port}:{port}")]
    {
        assert!(done.stdout.contains(shown), "{shown}: {}", done.stdout);
    }
    let done = shell(&host, down, &chosen);
    assert_eq!((done.code, done.stdout.as_str()), (Some(0), "removed dstack-kms-metal\n"), "{}", done.stderr);
    assert_eq!(host.vmm.machines(), Vec::<String>::new());

    let Some(tools) = ansible() else {
        println!("skipped: the playbook, because scripts/ansible-tools.sh has not installed Ansible");
        return;
    };
    host.write(
        "home/op/hosts.yml",
        "tdx_hosts:\n  hosts:\n    localhost:\n      ansible_connection: local\n",
    );
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    std::os::unix::fs::symlink(repository.join("deploy"), host.root.path().join("home/op/deploy")).unwrap();
    let directory = host.root.path().join("opt/keyferry");
    std::fs::create_dir_all(directory.parent().unwrap()).unwrap();
    // As printed, but for where the program goes: a test does not write to this machine's /opt.
    let command = format!("{} -e kms_directory={}", playbook.trim_end(), directory.display());
    // The machine that was removed is gone with its keys.
    drop(machine);
    let machine = kms(&host, port, None);
    let tools = tools.to_str().unwrap();
    chosen.retain(|(name, _)| !["KMS_PORT", "KMS_TRUST", "OS_IMAGE_HASH"].contains(name));
    chosen.extend([
        ("PYTHONPATH", tools.to_owned()),
        ("ANSIBLE_NOCOLOR", "1".to_owned()),
        ("KMS_PORT", port.to_string()),
        ("OS_IMAGE_HASH", machine.image_hash()),
        ("KMS_TRUST", machine.trust().display().to_string()),
    ]);
    let command = format!("PATH={tools}/bin:$PATH\n{command}");
    let first = shell(&host, &command, &chosen);
    assert_eq!(first.code, Some(0), "{}{}", first.stdout, first.stderr);
    assert_eq!(host.vmm.machines(), ["dstack-kms-metal running"]);
    let second = shell(&host, &command, &chosen);
    assert!(second.stdout.contains("changed=0"), "{}", second.stdout);
    host.remove("dev/sgx_enclave");
    let stopped = shell(&host, &command, &chosen);
    assert_ne!(stopped.code, Some(0), "{}", stopped.stdout);
    assert!(stopped.stdout.contains("/dev/sgx_enclave missing"), "{}", stopped.stdout);
}

/// Where `scripts/ansible-tools.sh` has put Ansible.
fn ansible() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
    let mut found =
        std::fs::read_dir(cache.join("keyferry/ansible")).ok()?.flatten().map(|entry| entry.path());
    found.find(|path| path.join("bin/ansible-playbook").is_file())
}

fn unused_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}
