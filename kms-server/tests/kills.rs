//! A KMS that is killed at any moment of its bootstrap, its onboarding or a start has all of its keys or none, and the
//! same ones for ever. `KEYFERRY_KILLS` sets how often each is killed.
//!
//! A kill comes after so many changes to the directory, counted while the program runs; the count goes through every
//! value that a run can reach, so that each write is hit. That a stop between two system calls does no harm either is
//! tested where every change can be refused, in the store's own tests.

#![expect(clippy::unwrap_used, reason = "a test stops where something is wrong")]

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use attestation::UnixMillis;
use common::agent::Agent;
use common::settings_text;
use kms_server::store::inspect::{State, inspect};
use kms_server::{Config, Opened, ServerHandle};
use nsm_emulator::{Config as EmulatorConfig, Emulator};

/// Kills of each kind when nobody says otherwise.
const DEFAULT: usize = 40;
/// No run takes this long; it only keeps a hang from holding everything up.
const LONGEST: Duration = Duration::from_secs(60);

fn kills() -> usize {
    std::env::var("KEYFERRY_KILLS").ok().map_or(DEFAULT, |text| text.parse().unwrap())
}

fn clock() -> UnixMillis {
    UnixMillis(nsm_emulator::system_clock(0)())
}

/// The names below a directory and the sizes of the files: what a change changes.
fn listing(directory: &Path) -> BTreeMap<PathBuf, u64> {
    let mut all = BTreeMap::new();
    let mut open = vec![directory.to_owned()];
    while let Some(next) = open.pop() {
        // It may be gone by now.
        let Ok(entries) = std::fs::read_dir(&next) else { continue };
        for entry in entries.flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.is_dir() {
                open.push(entry.path());
            }
            all.insert(entry.path(), if metadata.is_dir() { 0 } else { metadata.len() });
        }
    }
    all
}

/// Waits for `changes` changes to the directory, then kills. Whether the process was killed, or had ended before.
fn kill_after(child: &mut Child, directory: &Path, changes: usize) -> bool {
    let started = Instant::now();
    let mut last = listing(directory);
    let mut seen = 0;
    while seen < changes {
        assert!(started.elapsed() < LONGEST, "the program hangs");
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        let now = listing(directory);
        seen += usize::from(now != last);
        last = now;
    }
    child.kill().unwrap();
    child.wait().unwrap();
    true
}

/// The root keys on the disk, wherever they are, if both are there.
fn roots(certs: &Path) -> Option<[Vec<u8>; 2]> {
    let read = |name: &str| {
        [certs.to_owned(), certs.join(".bootstrap.ready")]
            .iter()
            .find_map(|place| std::fs::read(place.join(name)).ok())
    };
    Some([read("root-ca.key")?, read("root-k256.key")?])
}

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kms-server"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Runs to the end; whether it succeeded.
fn run(command: &mut Command) -> bool {
    command.status().unwrap().success()
}

fn bootstrap(certs: &Path) -> Command {
    let mut command = program();
    command.arg("bootstrap").arg("--dir").arg(certs).args(["--domain", "localhost"]);
    command
}

#[test]
fn a_bootstrap_is_all_or_nothing() {
    let (mut killed, mut kept) = (0, 0);
    let mut changes = 0;
    while killed < kills() {
        let directory = tempfile::tempdir().unwrap();
        let certs = directory.path().join("certs");
        std::fs::create_dir(&certs).unwrap();
        let mut child = bootstrap(&certs).spawn().unwrap();
        if !kill_after(&mut child, &certs, changes) {
            // The counter has gone past the end of a run: from the start again.
            changes = 0;
            continue;
        }
        killed += 1;
        changes += 1;
        let made = roots(&certs);
        let state = inspect(&certs, clock()).unwrap().state;
        assert_ne!(state, State::Broken, "after {changes} changes");
        // The next attempt makes keys where there are none, and finishes what was begun.
        let succeeded = run(&mut bootstrap(&certs));
        assert_eq!(inspect(&certs, clock()).unwrap().state, State::Ready);
        let now = roots(&certs).unwrap();
        if let Some(made) = made.filter(|_| matches!(state, State::Ready | State::AlmostReady)) {
            assert!(!succeeded, "a second bootstrap was not refused");
            assert_eq!(made, now, "the root keys have changed");
            kept += 1;
        }
    }
    println!("{killed} kills, {kept} of them after the keys were made");
    assert!(kept > 0 && kept < killed);
}

/// A running KMS to take keys from, and what others need to be let in by it.
struct Source {
    server: ServerHandle,
    emulator: Arc<Emulator>,
    agent: Agent,
    directory: tempfile::TempDir,
}

impl Source {
    async fn start() -> Self {
        let emulator = Arc::new(Emulator::new(EmulatorConfig::default()).unwrap());
        let agent = Agent::start(Arc::clone(&emulator)).await;
        let directory = tempfile::tempdir().unwrap();
        let more = "core.onboard.auto_bootstrap_domain = \"localhost\"\n";
        let text = Self::text(&emulator, &agent, directory.path(), more);
        let config = Config::from_toml(&text).unwrap().0;
        let server = Opened::open(config, Arc::new(clock)).await.unwrap().serve().await.unwrap();
        Self { server, emulator, agent, directory }
    }

    fn text(emulator: &Emulator, agent: &Agent, directory: &Path, more: &str) -> String {
        let image = hex::encode(common::image());
        let policy = directory.join("policy.toml");
        let rules = format!(
            "[apps.{}]\nimages = [\"{image}\"]\n\
             [kms]\nimages = [\"{image}\"]\nmr_aggregated = [\"{image}\"]\nallow_any_device = true\n",
            common::APP
        );
        std::fs::write(&policy, rules).unwrap();
        let more = format!(
            "core.auth_api.type = \"policy\"\ncore.auth_api.policy.file = \"{}\"\n{}{more}",
            policy.display(),
            agent.settings()
        );
        settings_text(directory, emulator, &more)
    }

    /// Settings of another KMS on this machine, as a file; and its directory of keys.
    fn node(&self, directory: &Path, more: &str) -> (PathBuf, PathBuf) {
        let settings = directory.join("kms.toml");
        std::fs::write(&settings, Self::text(&self.emulator, &self.agent, directory, more)).unwrap();
        let certs = directory.join("certs");
        std::fs::create_dir_all(&certs).unwrap();
        (settings, certs)
    }
}

/// Starts a node, which says where it listens.
fn serve(settings: &Path) -> (Child, std::net::SocketAddr) {
    let mut command = program();
    let mut child = command.arg("serve").arg("-c").arg(settings).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let address =
        line.trim().strip_prefix("listening on tcp:").unwrap_or_else(|| panic!("{line:?}")).parse().unwrap();
    (child, address)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn onboarding_is_all_or_nothing() {
    let source = Source::start().await;
    let original = roots(&source.directory.path().join("certs")).unwrap();
    let url = format!("https://localhost:{}", source.server.address().port());
    let (mut killed, mut kept) = (0, 0);
    let mut changes = 1;
    while killed < kills() {
        let directory = tempfile::tempdir().unwrap();
        let (settings, certs) = source.node(directory.path(), "");
        let (mut child, address) = tokio::task::spawn_blocking(move || serve(&settings)).await.unwrap();
        let body = format!(r#"{{"source_url":"{url}","domain":"localhost"}}"#);
        let onboarding = tokio::spawn(async move {
            let endpoint: transport::Endpoint = format!("tcp:{address}").parse().unwrap();
            let mut stream = endpoint.connect(LONGEST).await.unwrap();
            let request = format!(
                "POST /prpc/Onboard?json HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            );
            use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
            let mut answer = String::new();
            // The process that answers is killed, sooner or later.
            let _broken = stream.write_all(request.as_bytes()).await;
            let _broken = stream.read_to_string(&mut answer).await;
            answer
        });
        let watched = certs.clone();
        let was_killed = tokio::task::spawn_blocking(move || {
            // An onboarding that is through changes nothing any more, and goes on serving: the keys' last change ends
            // the wait.
            let done = watched.clone();
            let started = Instant::now();
            let mut last = listing(&watched);
            let mut seen = 0;
            while seen < changes {
                assert!(started.elapsed() < LONGEST, "the program hangs");
                let complete = done.join("rpc.crt").exists() && !done.join(".bootstrap.ready").exists();
                let now = listing(&watched);
                seen += usize::from(now != last);
                last = now;
                if complete && seen < changes {
                    break;
                }
            }
            child.kill().unwrap();
            child.wait().unwrap();
            seen == changes
        });
        let was_killed = was_killed.await.unwrap();
        let answer = onboarding.await.unwrap();
        assert!(!answer.contains("error"), "{answer}");
        if !was_killed {
            changes = 1;
            continue;
        }
        killed += 1;
        changes += 1;
        let state = inspect(&certs, clock()).unwrap().state;
        match state {
            State::Empty | State::Unfinished => assert!(roots(&certs).is_none()),
            State::AlmostReady | State::Ready => {
                assert_eq!(roots(&certs).as_ref(), Some(&original), "other root keys");
                kept += 1;
            }
            State::Broken => panic!("half a state after {changes} changes"),
        }
        // The next start takes it from there.
        let config = Config::from_toml(&Source::text(&source.emulator, &source.agent, directory.path(), ""))
            .unwrap()
            .0;
        let opened = Opened::open(config, Arc::new(clock)).await.unwrap();
        assert_eq!(opened.has_keys().unwrap(), matches!(state, State::AlmostReady | State::Ready));
    }
    println!("{killed} kills, {kept} of them after the keys were taken over");
    assert!(kept > 0 && kept < killed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_makes_certificates_again_keeps_the_keys() {
    let source = Source::start().await;
    let directory = tempfile::tempdir().unwrap();
    let more = "core.onboard.auto_bootstrap_domain = \"localhost\"\n";
    let (settings, certs) = source.node(directory.path(), more);
    assert!(run(&mut bootstrap(&certs)));
    let original = roots(&certs).unwrap();
    let (mut killed, mut changes) = (0, 1);
    while killed < kills() {
        for name in ["rpc.crt", "root-ca.crt", "tmp-ca.crt", "tmp-ca.key"] {
            std::fs::remove_file(certs.join(name)).unwrap();
        }
        let (settings, watched) = (settings.clone(), certs.clone());
        let was_killed = tokio::task::spawn_blocking(move || {
            let mut child = program().arg("serve").arg("-c").arg(&settings).spawn().unwrap();
            let started = Instant::now();
            let mut last = listing(&watched);
            let mut seen = 0;
            while seen < changes && !watched.join("rpc.crt").exists() {
                assert!(started.elapsed() < LONGEST, "the program hangs");
                let now = listing(&watched);
                seen += usize::from(now != last);
                last = now;
            }
            child.kill().unwrap();
            child.wait().unwrap();
            seen == changes
        });
        if was_killed.await.unwrap() {
            killed += 1;
            changes += 1;
        } else {
            changes = 1;
        }
        assert_eq!(roots(&certs).as_ref(), Some(&original), "the root keys have changed");
        let config =
            Config::from_toml(&Source::text(&source.emulator, &source.agent, directory.path(), more))
                .unwrap()
                .0;
        let server = Opened::open(config, Arc::new(clock)).await.unwrap().serve().await.unwrap();
        assert_eq!(inspect(&certs, clock()).unwrap().state, State::Ready);
        server.shutdown().await;
    }
    println!("{killed} kills");
}
