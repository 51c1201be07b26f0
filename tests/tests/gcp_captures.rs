//! What we ask Google for beside what dstack-cloud asks for through gcloud: the same, or a difference with its reason.
//!
//! The requests of dstack-cloud were recorded and are not part of this project; without them the comparison is skipped.

#![expect(clippy::unwrap_used, reason = "a test may stop at once")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use e2e::google::{Call, Google};
use e2e::{finish, program};
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(120);
const CAPTURES: &str = "../../shared/reference/captures/gcp-dstack-cloud-gcloud528.jsonl";
const PROJECT: &str = "/compute/v1/projects/demo-proj/";

/// dstack-cloud's command, and ours for the same.
const COMMANDS: [(&str, &[&str]); 8] = [
    ("dstack-cloud deploy", &["deploy", "--yes"]),
    ("dstack-cloud fw allow 12001", &["fw", "allow", "12001"]),
    ("dstack-cloud fw deny 22", &["fw", "deny", "22"]),
    ("dstack-cloud stop", &["stop"]),
    ("dstack-cloud start", &["start"]),
    ("dstack-cloud deploy --delete", &["deploy", "--delete", "--yes", "--lose-keys-of", "dstack-kms"]),
    ("dstack-cloud fw remove 12001", &["fw", "remove", "12001"]),
    ("dstack-cloud remove", &["remove", "--yes", "--lose-keys-of", "dstack-kms"]),
];

/// Where we differ: the call, the place in its body or an empty one for the whole call, who has it, and why.
const DIFFERENCES: [(&str, &str, &str); 12] = [
    ("POST global/images", "/labels", "so that machines and images of this program can be found"),
    (
        "POST global/images",
        "/description",
        "holds the boot disk's hash: an image is compared by content, not by age",
    ),
    (
        "POST zones/us-central1-a/instances",
        "/labels",
        "so that only what belongs to this deployment is touched",
    ),
    ("POST zones/us-central1-a/instances", "/serviceAccounts", "a KMS needs no identity in the cloud"),
    ("POST zones/us-central1-a/instances", "/metadata", "empty"),
    (
        "POST zones/us-central1-a/instances",
        "/deletionProtection",
        "its disk holds the only copy of the root keys",
    ),
    (
        "POST zones/us-central1-a/instances",
        "/shieldedInstanceConfig",
        "says what the guest's attestation needs instead of relying on a default",
    ),
    (
        "DELETE global/images/dstack-cloud-0-6-0",
        "",
        "an image that a cut run left half made would be in the way",
    ),
    ("POST zones/us-central1-a/instances/dstack-kms/setDeletionProtection", "", "see deletionProtection"),
    (
        "DELETE global/firewalls/dstack-kms-deny-tcp-22",
        "",
        "a rule that is left holds for the next machine of that name",
    ),
    (
        "DELETE bucket demo-bucket/dstack-cloud-0-6-0.tar.gz",
        "",
        "an archive costs money once its image is made",
    ),
    (
        "DELETE bucket demo-bucket/dstack-kms-shared.tar.gz",
        "",
        "it holds the configuration, which may be secret",
    ),
];

/// A call that changes something: its line without what all have in common, and its body.
type Change = (String, Value);

fn line(method: &str, path: &str) -> String {
    match (path.strip_prefix(PROJECT), path.strip_prefix("/storage/v1/b/")) {
        (Some(rest), _) => format!("{method} {rest}"),
        (_, Some(object)) => format!("{method} bucket {}", object.replace("/o/", "/")),
        _ => format!("{method} {path}"),
    }
}

/// Uploads are bytes, waiting changes nothing, and buckets are made by hand for dstack-cloud.
fn is_change(line: &str) -> bool {
    let (method, rest) = line.split_once(' ').unwrap();
    !["GET", "PUT"].contains(&method)
        && !rest.ends_with("/wait")
        && !rest.contains("upload")
        && rest != "/storage/v1/b"
}

/// Addresses of resources in their short form, whoever was asked.
fn normalise(value: &Value) -> Value {
    match value {
        Value::String(text) => match text.split_once(PROJECT) {
            Some((_, rest)) => json!(rest),
            None => match text.strip_prefix("https://storage.googleapis.com/") {
                Some(object) => json!(object.trim_start_matches("storage/v1/b/").replace("/o/", "/")),
                None => json!(text),
            },
        },
        Value::Array(items) => items.iter().map(normalise).collect(),
        Value::Object(members) => {
            members.iter().map(|(name, value)| (name.clone(), normalise(value))).collect()
        }
        other => other.clone(),
    }
}

fn theirs() -> Option<BTreeMap<String, Vec<Change>>> {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(CAPTURES)).ok()?;
    let mut commands: BTreeMap<String, Vec<Change>> = BTreeMap::new();
    for request in text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()) {
        let line = line(request["method"].as_str().unwrap(), request["path"].as_str().unwrap());
        let changes = commands.entry(request["command"].as_str().unwrap().to_owned()).or_default();
        if is_change(&line) {
            changes.push((line, normalise(&request["body"])));
        }
    }
    Some(commands)
}

fn ours(calls: &[Call]) -> Vec<Change> {
    let changes = calls.iter().map(|call| {
        let (method, path) = call.line.split_once(' ').unwrap();
        (line(method, path), normalise(call.body.as_ref().unwrap_or(&Value::Null)))
    });
    changes.filter(|(line, _)| is_change(line)).collect()
}

/// Places at which two bodies differ, one level deep in what both have.
fn places(left: &Value, right: &Value) -> BTreeSet<String> {
    let (Some(left), Some(right)) = (left.as_object(), right.as_object()) else {
        return if left == right { BTreeSet::new() } else { BTreeSet::from([String::new()]) };
    };
    let names: BTreeSet<&String> = left.keys().chain(right.keys()).collect();
    let differ = names.into_iter().filter(|name| left.get(*name) != right.get(*name));
    differ.map(|name| format!("/{name}")).collect()
}

/// The calls of one command by what they are about; two of one line differ by the name in the body.
fn by_line(changes: &[Change]) -> BTreeMap<(String, String), Value> {
    let key = |(line, body): &Change| (line.clone(), body["name"].as_str().unwrap_or_default().to_owned());
    changes.iter().map(|change| (key(change), change.1.clone())).collect()
}

#[test]
fn the_requests_are_those_of_dstack_cloud_or_differ_for_a_reason() {
    let Some(theirs) = theirs() else {
        eprintln!("skipped: {CAPTURES} is not here");
        return;
    };
    let google = Google::start();
    let home = tempfile::tempdir().unwrap();
    let image = home.path().join(".dstack/images/dstack-cloud-0.6.0");
    std::fs::create_dir_all(&image).unwrap();
    std::fs::write(image.join("disk.raw"), vec![5; 64 << 10]).unwrap();
    std::fs::write(image.join("auth_hash.txt"), "ab".repeat(32)).unwrap();
    let run = |directory: &Path, arguments: &[&str]| {
        let mut command = Command::new(program("keyferry"));
        command.arg("kms").args(arguments).current_dir(directory).env_clear();
        command.env("HOME", home.path()).env("EDITOR", "true").env("PATH", "/usr/bin:/bin");
        command.envs(google.environment());
        let finished = finish(command, DEADLINE);
        assert_eq!(finished.code, Some(0), "{arguments:?}: {}", finished.stderr);
    };
    run(home.path(), &["config-edit"]);
    run(home.path(), &["new", "kms", "--key-provider", "tpm", "--project", "demo-proj"]);
    let project = home.path().join("kms");
    let app = std::fs::read_to_string(project.join("app.json")).unwrap();
    let app = app.replace(r#""bucket": """#, r#""bucket": "gs://demo-bucket""#);
    std::fs::write(project.join("app.json"), app).unwrap();

    let (mut used, mut unknown) = (BTreeSet::new(), Vec::new());
    for (command, arguments) in COMMANDS {
        google.forget_calls();
        run(&project, arguments);
        let (left, right) = (by_line(&theirs[command]), by_line(&ours(&google.calls())));
        assert!(!left.is_empty(), "{command} changed nothing when it was recorded");
        for key in left.keys().chain(right.keys()).collect::<BTreeSet<_>>() {
            let (left, right) = (left.get(key), right.get(key));
            let differ = match (left, right) {
                (Some(left), Some(right)) => places(left, right),
                _ => BTreeSet::from([String::new()]),
            };
            for place in differ {
                match DIFFERENCES.iter().position(|(line, at, _)| *line == key.0 && *at == place) {
                    Some(known) => drop(used.insert(known)),
                    None => unknown.push(format!("{command}: {key:?} {place}: {left:?}, ours {right:?}")),
                }
            }
        }
    }
    assert!(unknown.is_empty(), "{}", unknown.join("\n"));
    let stale: Vec<_> =
        (0..DIFFERENCES.len()).filter(|it| !used.contains(it)).map(|it| DIFFERENCES[it]).collect();
    assert_eq!(stale, [], "differences that are none any more");
}
