//! What an image's init does, as a process beside a KMS, a module and a parent: keys for its app, and parents that
//! misbehave. The app must not run without its keys, whatever the parent does.

#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;

use attestation::{OsImageHash, Pcr, os_image_hash};
use e2e::{APP_ID, Finished, IMAGE, Trip, Variation, finish, program};
use serde_json::{Value, json};

/// No run of these tests takes this long; it only keeps a hang from holding everything up.
const DEADLINE: Duration = Duration::from_secs(120);

/// The app: leaves its environment and its keys where the test finds them.
const APP: &str = "env > \"$MARK\" && cp \"$KEYS\" \"$MARK.keys\"";

fn image() -> OsImageHash {
    let [zero, one, two] = IMAGE.map(Pcr::new);
    os_image_hash(&zero, &one, &two)
}

/// An enclave's init and its parent, before either is started.
struct Scene {
    trip: Trip,
    /// More lines of the agent's configuration.
    config: &'static str,
    /// What the app does.
    app: &'static str,
}

impl Scene {
    fn new(variation: Variation<'_>) -> Self {
        Self { trip: Trip::start(&image().to_string(), variation), config: "", app: APP }
    }

    /// A port of the parent.
    fn port(&self, port: u32) -> PathBuf {
        self.trip.path(&format!("parent_{port}"))
    }

    /// More lines of the agent's configuration.
    fn with_config(self, config: &'static str) -> Self {
        let mut scene = self;
        scene.config = config;
        scene
    }

    /// Another app.
    fn with_app(self, app: &'static str) -> Self {
        let mut scene = self;
        scene.app = app;
        scene
    }

    /// The trip's proxy as the parent's.
    fn with_proxy(self) -> Self {
        symlink(self.trip.path("proxy.sock"), self.port(3128)).unwrap();
        self
    }

    /// A port of the parent on which every connection gets `treatment`.
    fn with_port(self, port: u32, treatment: fn(UnixStream)) -> Self {
        let listener = UnixListener::bind(self.port(port)).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                thread::spawn(move || treatment(stream));
            }
        });
        self
    }

    fn run(&self) -> Finished {
        let root_ca = fs::read_to_string(self.trip.kms_keys().join("root-ca.crt")).unwrap();
        let config = format!(
            "kms_url = \"https://localhost:{}\"\napp_id = \"{APP_ID}\"\nkms_ca = '''\n{root_ca}'''\n\
             delivery = [\"files\"]\nlocal_proxy_port = 0\n{}\n",
            self.trip.kms.port(),
            self.config
        );
        fs::write(self.trip.path("agent.toml"), config).unwrap();
        let keys = self.keys();
        let process = json!({
            "args": ["/bin/sh", "-c", self.app],
            "env": [
                "PATH=/usr/bin:/bin",
                format!("MARK={}", self.mark().display()),
                format!("KEYS={}", keys.display()),
            ],
            "cwd": "/",
            "uid": fs::metadata(self.trip.path("agent.toml")).map(|it| owner(&it)).unwrap().0,
            "gid": fs::metadata(self.trip.path("agent.toml")).map(|it| owner(&it)).unwrap().1,
        });
        fs::write(self.trip.path("process.json"), process.to_string()).unwrap();
        let mut command = Command::new(program("enclave-agent"));
        command.arg("init").arg("--config").arg(self.trip.path("agent.toml"));
        command.arg("--process").arg(self.trip.path("process.json"));
        command.args(["--nsm", self.trip.module.endpoint()]);
        command.arg("--parent").arg(format!("unix:{}", self.trip.path("parent").display()));
        command.arg("--run-dir").arg(self.run_dir());
        finish(command, DEADLINE)
    }

    /// Memory, as an enclave's /run.
    fn run_dir(&self) -> PathBuf {
        let name = self.trip.path("").file_name().unwrap().to_owned();
        PathBuf::from("/dev/shm").join(name)
    }

    fn keys(&self) -> PathBuf {
        self.run_dir().join("keyferry/app_keys.json")
    }

    fn mark(&self) -> PathBuf {
        self.trip.path("mark")
    }

    /// The run ended like this, with these words, and the app never ran.
    fn expect(&self, code: i32, words: &str) -> Finished {
        let finished = self.run();
        assert_eq!(finished.code, Some(code), "{finished:?}");
        assert!(finished.stderr.contains(words), "{words}: {finished:?}");
        assert!(!self.mark().exists(), "the app ran: {finished:?}");
        assert!(!self.keys().exists(), "there are keys");
        finished
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // Not there when no keys came.
        let _absent = fs::remove_dir_all(self.run_dir());
    }
}

fn owner(metadata: &fs::Metadata) -> (u32, u32) {
    use std::os::unix::fs::MetadataExt;
    (metadata.uid(), metadata.gid())
}

#[test]
fn the_app_starts_with_its_keys_and_what_the_image_says() {
    let beat = |mut stream: UnixStream| {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [0xb7]);
        stream.write_all(&byte).unwrap();
    };
    let scene = Scene::new(Variation::default()).with_proxy().with_port(9000, beat);
    let finished = scene.run();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    for words in ["the parent answered the heartbeat", "the KMS released the keys", "starting /bin/sh"] {
        assert!(finished.stderr.contains(words), "{words}: {finished:?}");
    }
    let keys: Value =
        serde_json::from_slice(&fs::read(scene.mark().with_extension("keys")).unwrap()).unwrap();
    assert_eq!(keys["disk_crypt_key"].as_str().unwrap().len(), 64);
    assert_eq!(fs::metadata(scene.keys()).unwrap().permissions().mode() & 0o777, 0o600);
    // Nothing of the agent's own environment, and no keys in it.
    let environment = fs::read_to_string(scene.mark()).unwrap();
    let names: Vec<_> =
        environment.lines().filter_map(|line| line.split_once('=')).map(|(name, _)| name).collect();
    let known = ["PATH", "MARK", "KEYS", "PWD", "OLDPWD", "SHLVL", "_"];
    assert!(names.iter().all(|name| known.contains(name)), "{names:?}");
    let secret = keys["disk_crypt_key"].as_str().unwrap();
    assert!(!environment.contains(secret) && !finished.stderr.contains(secret));
}

#[test]
fn how_the_app_ends_is_how_the_enclave_ends() {
    let scene = Scene::new(Variation::default()).with_proxy().with_app("exit 7");
    let finished = scene.run();
    assert_eq!(finished.code, Some(1), "{finished:?}");
    assert!(finished.stderr.contains("/bin/sh: exited with 7"), "{finished:?}");
}

#[test]
fn an_app_that_fails_is_started_again_as_the_configuration_says() {
    let scene = Scene::new(Variation::default())
        .with_proxy()
        .with_config("restart = \"on-failure\"\nmax_restarts = 3\n")
        .with_app("echo run >> \"$MARK\"; [ \"$(wc -l < \"$MARK\")\" -ge 2 ]");
    let finished = scene.run();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    assert!(finished.stderr.contains("the app exited with 1; restart 1 of 3"), "{finished:?}");
    assert_eq!(fs::read_to_string(scene.mark()).unwrap(), "run\nrun\n");
}

#[test]
fn a_parent_without_a_heartbeat_does_not_keep_the_app_from_its_keys() {
    for treatment in [
        (|stream| drop(stream)) as fn(UnixStream),
        |mut stream| stream.write_all(b"garbage").unwrap_or_default(),
        |stream| drop(stream.try_clone().map(|mut stream| stream.read(&mut [0; 64]))),
    ] {
        let scene = Scene::new(Variation::default()).with_proxy().with_port(9000, treatment);
        let finished = scene.run();
        assert_eq!(finished.code, Some(0), "{finished:?}");
        assert!(scene.mark().exists(), "the app did not run");
    }
}

#[test]
fn an_enclave_that_fails_at_once_gives_its_heartbeat_all_the_same() {
    let late = |mut stream: UnixStream| {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        // Whoever does not wait for the answer is gone by the end of this.
        stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        if stream.read(&mut [0]).is_err() {
            stream.write_all(&byte).unwrap();
        }
    };
    let variation = Variation { module: &["--clock-offset", "60"], ..Variation::default() };
    let scene = Scene::new(variation).with_proxy().with_port(9000, late);
    let finished = scene.expect(3, "the NSM's, expected at most 5s");
    assert!(finished.stderr.contains("the parent answered the heartbeat"), "{finished:?}");
}

#[test]
fn without_a_proxy_there_are_no_keys_and_no_app() {
    let scene = Scene::new(Variation::default()).with_config("attempts = 2\n");
    scene.expect(4, "gave up after 2 attempts");
}

#[test]
fn a_proxy_that_says_nothing_is_given_up() {
    let silent = |mut stream: UnixStream| while stream.read(&mut [0; 64]).is_ok_and(|len| len > 0) {};
    let scene = Scene::new(Variation::default()).with_config("timeout = \"3s\"\n");
    scene.with_port(3128, silent).expect(4, "no keys within 3s");
}

#[test]
fn a_proxy_that_hangs_up_is_given_up() {
    let scene = Scene::new(Variation::default()).with_config("attempts = 3\n");
    scene.with_port(3128, drop).expect(4, "gave up after 3 attempts");
}

#[test]
fn a_proxy_that_talks_garbage_is_given_up() {
    let garbage = |mut stream: UnixStream| while stream.write_all(&[0x5a; 4096]).is_ok() {};
    Scene::new(Variation::default()).with_port(3128, garbage).expect(1, "no tunnel to the KMS");
    let talkative = |mut stream: UnixStream| {
        // A tunnel as promised, and then anything but the KMS.
        let mut head = [0; 1024];
        let _short = stream.read(&mut head);
        let _gone = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
        while stream.write_all(&[0x5a; 4096]).is_ok() {}
    };
    Scene::new(Variation::default()).with_port(3128, talkative).expect(1, "");
}

#[test]
fn a_proxy_that_leads_elsewhere_is_refused() {
    let other = Trip::start(&image().to_string(), Variation::default());
    let scene = Scene::new(Variation::default());
    // The other KMS has a root of its own; the tunnel ends there whatever was asked for.
    let port = other.kms.port();
    let listener = UnixListener::bind(scene.port(3128)).unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut head = [0; 1024];
            let _short = stream.read(&mut head);
            let mut kms = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
            let _gone = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
            let (mut back, mut there) = (stream.try_clone().unwrap(), kms.try_clone().unwrap());
            thread::spawn(move || std::io::copy(&mut kms, &mut back));
            thread::spawn(move || std::io::copy(&mut stream, &mut there));
        }
    });
    scene.expect(3, "not the trusted KMS");
}

#[test]
fn a_clock_that_is_not_the_modules_ends_the_enclave_before_anything_is_asked() {
    for offset in ["-60", "60"] {
        let variation = Variation { module: &["--clock-offset", offset], ..Variation::default() };
        let scene = Scene::new(variation).with_proxy();
        let finished = scene.expect(3, "the NSM's, expected at most 5s");
        assert!(!finished.stderr.contains("released"), "{finished:?}");
    }
}
