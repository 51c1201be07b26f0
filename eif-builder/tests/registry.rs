//! Pulling from registries: over TLS, with each kind of credentials, and from registries that lie.
#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]

mod support;

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use support::images::{TestImage, kernel, test_image};
use support::registry::{Access, Fault, PASSWORD, Registry, Tls};
use support::{Inputs, program, sha256};

/// Of 127.0.0.0/8, only 127.0.0.1 counts as this machine: to this address, TLS has to be right.
const ELSEWHERE: &str = "127.0.0.2";

fn image() -> TestImage {
    test_image(&json!({ "Entrypoint": ["/app/run"] }))
}

/// What a container engine left in the user's home, and a kernel.
struct User {
    inputs: Inputs,
}

impl User {
    fn new() -> Self {
        let inputs = Inputs::new();
        inputs.file("bzImage", &kernel());
        inputs.file("init", &support::images::static_elf(b"init"));
        Self { inputs }
    }

    fn with_config(config: &Value) -> Self {
        let user = Self::new();
        user.inputs.file("config.json", config.to_string().as_bytes());
        user
    }

    /// Installs a credential helper that answers with this script.
    fn with_helper(&self, script: &str) {
        let path = self.inputs.file("docker-credential-test", format!("#!/bin/sh\n{script}\n").as_bytes());
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Builds from a reference; returns the exit code and what was said.
    fn build(&self, reference: &str, trusted: Option<&Tls>) -> (Option<i32>, String, String) {
        self.run(&["build", "--image", reference, "--output", "image.eif", "--init", "aws"], trusted)
    }

    fn run(&self, arguments: &[&str], trusted: Option<&Tls>) -> (Option<i32>, String, String) {
        let folder = self.inputs.folder.path();
        let inherited = std::env::var_os("PATH").unwrap();
        let path = [folder.as_os_str(), OsStr::new(":"), inherited.as_os_str()];
        let mut command = Command::new(program());
        command.args(arguments).current_dir(folder).stdin(Stdio::null());
        command.env("DOCKER_CONFIG", folder).env("NITRO_CLI_BLOBS", folder);
        command.env("PATH", path.into_iter().collect::<OsString>());
        if let Some(tls) = trusted {
            command.env("SSL_CERT_FILE", self.inputs.file("roots.pem", tls.pem.as_bytes()));
        }
        let output = command.output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    }

    fn expect_image(&self, registry: &Registry, trusted: Option<&Tls>) -> String {
        let (code, answer, said) = self.build(&registry.reference(), trusted);
        assert_eq!(code, Some(0), "{said}");
        answer
    }

    fn expect_refusal(&self, registry: &Registry, trusted: Option<&Tls>, code: i32, reason: &str) {
        let (found, _, said) = self.build(&registry.reference(), trusted);
        assert_eq!(found, Some(code), "{said}");
        assert!(said.contains(reason), "{said}");
        assert!(!said.contains("secret") && !said.contains(PASSWORD), "{said}");
        assert!(!self.inputs.path("image.eif").exists(), "an image was left behind");
    }
}

fn config_with(registry: &Registry, entry: Value) -> Value {
    json!({ "auths": { registry.address.as_str(): entry } })
}

#[test]
fn tls_must_be_trusted() {
    let tls = Tls::for_address(ELSEWHERE);
    let registry = Registry::start(ELSEWHERE, Some(&tls), image(), Access::Open, Fault::None);
    let user = User::new();
    user.expect_refusal(&registry, None, 1, "certificate");
    user.expect_refusal(&registry, Some(&Tls::for_address("127.0.0.3")), 1, "certificate");
    user.expect_image(&registry, Some(&tls));
}

#[test]
fn plain_http_is_for_this_machine_only() {
    let user = User::new();
    let here = Registry::start("127.0.0.1", None, image(), Access::Open, Fault::None);
    user.expect_image(&here, None);
    std::fs::remove_file(user.inputs.path("image.eif")).unwrap();
    let elsewhere = Registry::start(ELSEWHERE, None, image(), Access::Open, Fault::None);
    user.expect_refusal(&elsewhere, None, 1, "127.0.0.2");
    assert!(elsewhere.seen().iter().all(|request| !request.line.contains("HTTP/1")), "asked in plain");
}

#[test]
fn a_registry_on_this_machine_may_have_tls() {
    let tls = Tls::for_address("127.0.0.1");
    let registry = Registry::start("127.0.0.1", Some(&tls), image(), Access::Open, Fault::None);
    User::new().expect_image(&registry, Some(&tls));
}

#[test]
fn passwords_come_from_the_docker_configuration() {
    let tls = Tls::for_address(ELSEWHERE);
    let registry = Registry::start(ELSEWHERE, Some(&tls), image(), Access::Password, Fault::None);
    User::new().expect_refusal(&registry, Some(&tls), 3, "hint: `docker login REGISTRY`");
    let wrong = config_with(&registry, json!({ "auth": "dGVzdDp3cm9uZw==" }));
    User::with_config(&wrong).expect_refusal(&registry, Some(&tls), 3, "401");
    let right = User::with_config(&config_with(&registry, json!({ "auth": PASSWORD })));
    right.expect_image(&registry, Some(&tls));
}

#[test]
fn tokens_are_got_with_a_password_an_identity_or_nothing() {
    let tls = Tls::for_address(ELSEWHERE);
    let registry = Registry::start(ELSEWHERE, Some(&tls), image(), Access::Token, Fault::None);
    User::new().expect_refusal(&registry, Some(&tls), 3, "no token: 401");
    let user = User::with_config(&config_with(&registry, json!({ "auth": PASSWORD })));
    user.expect_image(&registry, Some(&tls));
    let user = User::with_config(&config_with(&registry, json!({ "identitytoken": "the-identity" })));
    user.expect_image(&registry, Some(&tls));
    let open = Registry::start(ELSEWHERE, Some(&tls), image(), Access::AnonymousToken, Fault::None);
    User::new().expect_image(&open, Some(&tls));
}

#[test]
fn credential_helpers_are_asked() {
    let tls = Tls::for_address(ELSEWHERE);
    let registry = Registry::start(ELSEWHERE, Some(&tls), image(), Access::Password, Fault::None);
    let config = json!({ "credHelpers": { registry.address.as_str(): "test" } });
    let user = User::with_config(&config);
    user.with_helper(
        "read server; test \"$1\" = get && echo \"{\\\"ServerURL\\\":\\\"$server\\\",\\\"Username\\\":\\\"test\\\",\\\"Secret\\\":\\\"secret\\\"}\"",
    );
    user.expect_image(&registry, Some(&tls));
    std::fs::remove_file(user.inputs.path("image.eif")).unwrap();
    // Not to know a registry is no failure; to fail is.
    user.with_helper("read server; echo 'credentials not found in native keychain'; exit 1");
    user.expect_refusal(&registry, Some(&tls), 3, "wants a user name and a password");
    user.with_helper("read server; echo 'the key ring is locked'; exit 1");
    user.expect_refusal(&registry, Some(&tls), 2, "the key ring is locked");
}

#[test]
fn a_broken_docker_configuration_is_not_passed_over() {
    let registry = Registry::start("127.0.0.1", None, image(), Access::Open, Fault::None);
    let user = User::new();
    user.inputs.file("config.json", b"{ \"auths\": ");
    user.expect_refusal(&registry, None, 2, "no credentials for");
}

#[test]
fn credentials_stay_with_the_registry_that_they_are_for() {
    let tls = Tls::for_address(ELSEWHERE);
    let store = Registry::start(ELSEWHERE, Some(&tls), image(), Access::Open, Fault::None);
    let registry = Registry::start_with_blobs_at(
        ELSEWHERE,
        Some(&tls),
        image(),
        Access::Token,
        Fault::None,
        Some(format!("https://{}", store.address)),
    );
    let user = User::with_config(&config_with(&registry, json!({ "auth": PASSWORD })));
    user.expect_image(&registry, Some(&tls));
    assert!(!store.seen().is_empty());
    assert!(store.seen().iter().all(|request| request.authorization.is_none()), "{:?}", store.seen());
}

#[test]
fn a_digest_pins_the_image_and_a_lock_file_the_tag() {
    let registry = Registry::start("127.0.0.1", None, image(), Access::Open, Fault::None);
    let user = User::new();
    let (index, manifest) = (sha256(&image().index), sha256(&image().manifest));
    let answer = user.expect_image(&registry, None);
    for digest in [&index, &manifest] {
        let pinned = format!("{}/app@sha256:{digest}", registry.address);
        let (code, same, said) = user.build(&pinned, None);
        assert_eq!((code, &same), (Some(0), &answer), "{said}");
    }
    std::fs::remove_file(user.inputs.path("image.eif")).unwrap();
    let (code, _, said) = user.build(&format!("{}/app@sha256:{}", registry.address, "0".repeat(64)), None);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("404"), "{said}");

    let toml = format!(
        "[image]\nregistry = \"{}\"\n[boot]\nkernel = \"bzImage\"\ninit = \"aws\"\nblobs = \".\"\n",
        registry.reference()
    );
    user.inputs.file("keyferry.toml", toml.as_bytes());
    let (code, _, said) = user.run(&["measure", "."], None);
    assert!(code == Some(2) && said.contains("not pinned: a tag can move"), "{said}");
    assert_eq!(user.run(&["lock", "."], None).0, Some(0));
    let lock = std::fs::read_to_string(user.inputs.path("keyferry.lock")).unwrap();
    assert!(lock.contains(&format!("/app@sha256:{index}")), "{lock}");
    let (code, measured, said) = user.run(&["measure", "."], None);
    assert_eq!((code, measured), (Some(0), answer), "{said}");
}

#[test]
fn what_a_registry_sends_is_checked_and_bounded() {
    for (fault, codes, reason) in [
        (Fault::OtherManifest, &[3][..], "has digest sha256:"),
        (Fault::EndlessManifest, &[3], "at most 4194304 are allowed"),
        (Fault::LongLayer, &[3], "bytes, at most"),
        // What unpacks it may notice before the digest does.
        (Fault::ChangedLayer, &[1, 3], "sha256:"),
    ] {
        let registry = Registry::start("127.0.0.1", None, image(), Access::Open, fault);
        let (code, _, said) = User::new().build(&registry.reference(), None);
        assert!(code.is_some_and(|code| codes.contains(&code)), "{fault:?}: {said}");
        assert!(said.contains(reason), "{fault:?}: {said}");
    }
    let registry = Registry::start("127.0.0.1", None, image(), Access::AnonymousToken, Fault::EndlessToken);
    User::new().expect_refusal(&registry, None, 3, "at most 262144 are allowed");
}

#[test]
fn the_platform_is_chosen_by_the_image_that_is_built() {
    let registry = Registry::start("127.0.0.1", None, image(), Access::Open, Fault::None);
    let user = User::new();
    let mut arm_kernel = support::pattern(1, 5000);
    arm_kernel[56..60].copy_from_slice(b"ARM\x64");
    user.inputs.file("Image", &arm_kernel);
    let (reference, kernel) = (registry.reference(), "Image");
    let arguments =
        ["build", "--image", &reference, "--output", "image.eif", "--arch", "aarch64", "--kernel", kernel];
    // The index names one for arm64, which this registry does not have.
    let (code, _, said) = user.run(&arguments, None);
    assert!(code == Some(1) && said.contains("404"), "{said}");
    let asked = registry.seen().iter().any(|seen| seen.line.contains(&sha256(b"another manifest")));
    assert!(asked, "the manifest for arm64 was not asked for");
}

/// A registry of others, ended with the test.
struct DockerRegistry(Child);

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _gone = self.0.kill();
        let _gone = self.0.wait();
    }
}

/// Lays an image out as docker's registry stores it.
fn store(image: &TestImage, root: &Path) {
    let root = root.join("docker/registry/v2");
    let link = |path: String, blob: &[u8]| {
        let folder = root.join("repositories/app").join(path);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("link"), format!("sha256:{}", sha256(blob))).unwrap();
    };
    for blob in image.blobs() {
        let hex = sha256(blob);
        let folder = root.join("blobs/sha256").join(&hex[..2]).join(&hex);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("data"), blob).unwrap();
        let is_manifest = blob == image.manifest || blob == image.index;
        let kind = if is_manifest { "_manifests/revisions" } else { "_layers" };
        link(format!("{kind}/sha256/{hex}"), blob);
    }
    link("_manifests/tags/1/current".into(), &image.index);
    link(format!("_manifests/tags/1/index/sha256/{}", sha256(&image.index)), &image.index);
}

#[test]
fn dockers_own_registry_with_tls_and_a_password() {
    let Some(path) = support::in_path("docker-registry") else {
        println!("skipped: no docker-registry (Debian's package of that name)");
        return;
    };
    let user = User::new();
    let (key, tls) = Tls::with_key(ELSEWHERE);
    let (key, certificate) = (
        user.inputs.file("key.pem", key.as_bytes()),
        user.inputs.file("certificate.pem", tls.pem.as_bytes()),
    );
    // bcrypt of `secret`.
    let passwords = "test:$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";
    let passwords = user.inputs.file("htpasswd", passwords.as_bytes());
    let root = user.inputs.path("storage");
    store(&image(), &root);
    let port = TcpListener::bind((ELSEWHERE, 0)).unwrap().local_addr().unwrap().port();
    let config = json!({
        "version": 0.1,
        "log": { "level": "info" },
        "storage": { "filesystem": { "rootdirectory": root } },
        "http": { "addr": format!("{ELSEWHERE}:{port}"), "tls": { "certificate": certificate, "key": key } },
        "auth": { "htpasswd": { "realm": "test", "path": passwords } },
    });
    let config = user.inputs.file("registry.yml", config.to_string().as_bytes());
    let mut command = Command::new(path);
    command.arg("serve").arg(config).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut registry = DockerRegistry(command.spawn().unwrap());
    let mut log = BufReader::new(registry.0.stderr.take().unwrap()).lines();
    let listens = log.by_ref().map_while(Result::ok).any(|line| line.contains("listening on"));
    assert!(listens, "docker-registry has ended");
    // It would stop when nobody reads its log.
    std::thread::spawn(move || log.for_each(drop));

    let address = format!("{ELSEWHERE}:{port}");
    let (code, _, said) = user.build(&format!("{address}/app:1"), Some(&tls));
    assert_eq!(code, Some(3), "{said}");
    let credentials = json!({ "auths": { address.as_str(): { "auth": PASSWORD } } });
    user.inputs.file("config.json", credentials.to_string().as_bytes());
    let (code, theirs, said) = user.build(&format!("{address}/app:1"), Some(&tls));
    assert_eq!(code, Some(0), "{said}");
    let ours = Registry::start("127.0.0.1", None, image(), Access::Open, Fault::None);
    assert_eq!(User::new().expect_image(&ours, None), theirs);
}
