//! What an operator sees and does: policies that change, health, figures, the log of decisions, the commands about them.

#![expect(clippy::unwrap_used, reason = "a test stops where something is wrong")]

mod common;

use std::path::Path;
use std::process::{Command, Output};

use common::{APP, Ask, DEADLINE, World};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpListener;
use tokio::time::timeout;

async fn health(world: &World) -> String {
    let told = world.get("/health").await;
    assert_eq!(told.status, 200);
    String::from_utf8(told.body).unwrap()
}

/// Asks until the answer is as wanted.
async fn until_healthy(world: &World, wanted: bool) -> String {
    let asking = async {
        loop {
            let text = health(world).await;
            if (text == "OK") == wanted {
                return text;
            }
            tokio::task::yield_now().await;
        }
    };
    timeout(DEADLINE, asking).await.unwrap()
}

#[tokio::test]
async fn a_policy_is_followed_and_a_broken_one_is_reported() {
    let world = World::with_policy("core.auth_api.policy.reload = \"10ms\"\n").await;
    let file = world.directory.path().join("policy.toml");
    let usable = std::fs::read_to_string(&file).unwrap();
    let certificate = world.certificate().await;
    assert_eq!(world.app_key(&certificate).await.status, 200);

    std::fs::write(&file, "apps = 1").unwrap();
    let text = until_healthy(&world, false).await;
    assert_eq!(
        text,
        "OK\nauthoriser: the new policy cannot be used; the last one stays in force (the log says more)"
    );
    assert_eq!(world.app_key(&certificate).await.status, 200);
    let metrics = String::from_utf8(world.get("/metrics").await.body).unwrap();
    assert!(metrics.contains("keyferry_kms_dependency_up{name=\"authoriser\"} 0\n"), "{metrics}");

    std::fs::write(&file, usable.replace(&APP.to_string(), &"22".repeat(20))).unwrap();
    until_healthy(&world, true).await;
    let refused = world.app_key(&certificate).await;
    assert_eq!(
        (refused.status, refused.error().as_str()),
        (400, "App not allowed: Boot denied: app not registered")
    );
}

#[tokio::test]
async fn every_decision_is_recorded_and_no_key() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("audit.jsonl");
    let more = common::policy(&directory) + &format!("core.audit.file = \"{}\"\n", log.display());
    let world = World::with(directory, &more).await;
    let certificate = world.certificate().await;
    let keys = world.app_key(&certificate).await.json();
    let refused = world.post("/prpc/GetAppKey?json", b"{}").await;
    assert_eq!(refused.status, 400);
    world.kms.shutdown().await;

    let text = std::fs::read_to_string(&log).unwrap();
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let events: Vec<_> = lines.iter().map(|line| line["event"].as_str().unwrap()).collect();
    assert_eq!(events, ["start", "decision", "refused", "stop"]);
    assert_eq!(lines[1]["decision"], "allowed");
    assert_eq!(lines[1]["app_id"], APP.to_string());
    assert_eq!(lines[1]["os_image_hash"], hex::encode(common::image()));
    assert_eq!(lines[1]["evidence"].as_str().unwrap().len(), 64);
    assert!(lines[1]["peer"].as_str().unwrap().contains("127.0.0.1:"));
    assert_eq!(lines[2]["reason"], "no-attestation");
    for key in ["disk_crypt_key", "env_crypt_key", "k256_key"] {
        assert!(!text.contains(keys[key].as_str().unwrap()), "{key}");
    }

    let verify =
        |arguments: &[&str]| run(&[&["audit", "verify", log.to_str().unwrap()][..], arguments].concat());
    let head = lines[3]["hash"].as_str().unwrap();
    let told = verify(&["--head", head]);
    assert_eq!(told.status.code(), Some(0), "{told:?}");
    assert_eq!(String::from_utf8_lossy(&told.stdout), format!("4 lines hold together; head {head}\n"));
    assert_eq!(verify(&["--head", &"0".repeat(64)]).status.code(), Some(3));
    std::fs::write(&log, text.replace("\"decision\":\"allowed\"", "\"decision\":\"denied\"")).unwrap();
    let told = verify(&["--json"]);
    assert_eq!(told.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&told.stderr).contains("line 2 was changed"), "{told:?}");
    std::fs::remove_file(&log).unwrap();
    assert_eq!(verify(&[]).status.code(), Some(2));
}

#[tokio::test]
async fn who_finds_no_place_is_told_so_and_meta_is_answered() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let more = format!(
        "core.server.max_requests = 1\ncore.auth_api.webhook.url = \"http://{}\"\n",
        listener.local_addr().unwrap()
    );
    let world = World::with(tempfile::tempdir().unwrap(), &more).await;
    let certificate = world.certificate().await;
    let waiting = async { world.app_key(&certificate).await };
    tokio::pin!(waiting);
    let asked = async {
        let mut open = Vec::new();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = [0; 4];
            stream.read_exact(&mut head).await.unwrap();
            open.push(stream);
            // The other question is the one for a description.
            if head == *b"POST" {
                return open;
            }
        }
    };
    let _open = tokio::select! {
        told = &mut waiting => panic!("nobody answers, yet {told:?}"),
        open = asked => open,
    };
    let ask =
        Ask { verb: "POST", path: "/prpc/GetAppKey?json", headers: &[], body: b"{}", certificate: None };
    tokio::select! {
        told = &mut waiting => panic!("nobody answers, yet {told:?}"),
        told = world.ask(ask) => {
            let told = told.unwrap();
            assert_eq!((told.status, told.error().as_str()), (503, "too many requests; try again"));
            assert_eq!(told.headers["retry-after"], "1");
        }
    }
    tokio::select! {
        told = &mut waiting => panic!("nobody answers, yet {told:?}"),
        told = world.get("/prpc/GetMeta") => assert_eq!(told.status, 200),
    }
    let metrics = String::from_utf8(world.get("/metrics").await.body).unwrap();
    assert!(!metrics.contains("keyferry_kms_requests_shed_total 0\n"), "{metrics}");
}

#[tokio::test]
async fn one_peer_cannot_take_all_connections() {
    let world = World::with_policy("core.server.max_connections_per_peer = 2\n").await;
    let first = common::connect(&world.kms, None, &["http/1.1"]).await.unwrap();
    let second = common::connect(&world.kms, None, &["http/1.1"]).await.unwrap();
    assert!(common::connect(&world.kms, None, &["http/1.1"]).await.is_err());
    drop((first, second));
    // Once the server has seen that they are gone.
    let again = async {
        while common::connect(&world.kms, None, &["http/1.1"]).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    timeout(DEADLINE, again).await.unwrap();
}

#[test]
fn explain_says_which_rule_decides() {
    let directory = tempfile::tempdir().unwrap();
    let policy = directory.path().join("policy.toml");
    let image = "ab".repeat(32);
    std::fs::write(&policy, format!("[apps.{APP}]\nimages = [\"{image}\"]\n")).unwrap();
    let explain = |arguments: &[&str]| {
        run(&[&["explain", "--policy", policy.to_str().unwrap()][..], arguments].concat())
    };
    let app = APP.to_string();
    let allowed = explain(&["--app-id", &app, "--image", &image]);
    assert_eq!(allowed.status.code(), Some(0), "{allowed:?}");
    assert_eq!(
        String::from_utf8_lossy(&allowed.stdout),
        format!("yes apps.{app}: the app is there\nyes apps.{app}.images: {image} is entry 0\nallowed\n")
    );
    let other = "cd".repeat(32);
    let refused = explain(&["--app-id", &app, "--image", &other, "--json"]);
    assert_eq!(refused.status.code(), Some(3));
    let told: serde_json::Value = serde_json::from_slice(&refused.stdout).unwrap();
    assert_eq!(told["allowed"], false);
    assert_eq!(told["steps"][1]["rule"], format!("apps.{app}.images"));
    assert_eq!(told["reason"], "compose hash not allowed");
    assert_eq!(explain(&["--app-id", &app]).status.code(), Some(2), "no image");
    assert_eq!(
        run(&["explain", "--policy", "/nowhere", "--app-id", &app, "--image", &image]).status.code(),
        Some(2)
    );
}

fn run(arguments: &[&str]) -> Output {
    Command::new(Path::new(env!("CARGO_BIN_EXE_kms-server"))).args(arguments).output().unwrap()
}
