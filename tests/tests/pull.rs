//! `keyferry kms pull` against a server that has an image, breaks off, changes its mind, or has something else.

#![expect(clippy::unwrap_used, reason = "a test may stop at once")]

use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use e2e::serve::{Answer, Question, Server};
use e2e::{Finished, finish, program};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

const DEADLINE: Duration = Duration::from_secs(120);
const UKI: &str = "/Phala-Network/meta-dstack-cloud/releases/download/v0.6.0/dstack-cloud-0.6.0-uki.tar.gz";
const BARE_METAL: &str = "/Dstack-TEE/dstack/releases/download/guest-os-v0.6.0/dstack-0.6.0.tar.gz";

fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::none()));
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, format!("image/{name}"), *bytes).unwrap();
    }
    builder.into_inner().unwrap().finish().unwrap()
}

fn uki() -> Vec<u8> {
    // Random enough that no part of it looks like another.
    let disk: Vec<u8> =
        (0..400_000_u32).flat_map(|it| it.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    archive(&[("disk.raw", &disk), ("auth_hash.txt", "ab".repeat(32).as_bytes())])
}

fn bare_metal() -> Vec<u8> {
    let list = format!("{}  bzImage\n", hex::encode(Sha256::digest("kernel")));
    let digest = hex::encode(Sha256::digest(&list));
    archive(&[
        ("bzImage", b"kernel"),
        ("metadata.json", br#"{"kernel": "bzImage"}"#),
        ("sha256sum.txt", list.as_bytes()),
        ("digest.txt", digest.as_bytes()),
    ])
}

/// What the server does with the next requests, first to last.
#[derive(Clone, Copy, Debug)]
enum Whim {
    /// Breaks off after so many bytes.
    Cut(usize),
    /// Closes without an answer.
    Unanswered,
    /// Answers with this status.
    Status(u16),
    /// Has another content from now on, under another tag.
    Change,
}

struct Releases {
    server: Server,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Releases {
    fn start(path: &'static str, content: Vec<u8>, whims: &[Whim]) -> Self {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (seen, whims) = (Arc::clone(&asked), Mutex::new((whims.to_vec(), content, 1)));
        let server = Server::start(move |question: &Question| {
            seen.lock().unwrap().push(question.header("range").to_owned());
            let mut state = whims.lock().unwrap();
            let whim = if state.0.is_empty() { None } else { Some(state.0.remove(0)) };
            if let Some(Whim::Change) = whim {
                state.1 = bare_metal();
                state.2 += 1;
            }
            let (content, tag) = (&state.1, format!("\"tag-{}\"", state.2));
            if question.line != format!("GET {path}") {
                return Some(Answer::bytes(404, b"Not Found".to_vec()));
            }
            let from = question.header("range").strip_prefix("bytes=").and_then(|it| it.strip_suffix('-'));
            let from: Option<usize> =
                from.and_then(|it| it.parse().ok()).filter(|_| question.header("if-range") == tag);
            let answer = match from {
                Some(from) if from >= content.len() => {
                    Answer::bytes(416, Vec::new()).with("content-range", format!("bytes */{}", content.len()))
                }
                Some(from) => Answer::bytes(206, content[from..].to_vec())
                    .with("content-range", format!("bytes {from}-{}/{}", content.len() - 1, content.len())),
                None => Answer::bytes(200, content.clone()),
            };
            match whim {
                Some(Whim::Unanswered) => None,
                Some(Whim::Status(status)) => Some(Answer::bytes(status, Vec::new())),
                Some(Whim::Cut(bytes)) => Some(answer.with("etag", tag).cut_after(bytes)),
                _ => Some(answer.with("etag", tag)),
            }
        });
        Self { server, asked }
    }

    fn pull(&self, into: &Path, arguments: &[&str]) -> Finished {
        let mut command = Command::new(program("keyferry"));
        command.args(["kms", "pull", "--mirror", &self.server.url(), "--into", into.to_str().unwrap()]);
        command.args(arguments).env("HOME", into);
        finish(command, DEADLINE)
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

/// What is in a directory, hidden files too.
fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn an_image_is_fetched_once_and_its_hashes_are_shown() {
    let content = uki();
    let releases = Releases::start(UKI, content.clone(), &[]);
    let images = tempfile::tempdir().unwrap();
    let done = releases.pull(images.path(), &["dstack-cloud-0.6.0"]);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let directory = images.path().join("dstack-cloud-0.6.0");
    let expected = format!(
        "image: {}\nSHA-256 of the archive: {}\nOS_IMAGE_HASH (by the image's own files): 0x{}\n",
        directory.display(),
        hex::encode(Sha256::digest(&content)),
        "ab".repeat(32)
    );
    assert_eq!(done.stdout, expected);
    assert_eq!(names(images.path()), ["dstack-cloud-0.6.0"], "nothing else is left");
    assert_eq!(std::fs::metadata(directory.join("disk.raw")).unwrap().len(), 1_600_000);

    let again = releases.pull(images.path(), &["dstack-cloud-0.6.0", "--json"]);
    let again: Value = serde_json::from_str(&again.stdout).unwrap();
    assert_eq!(again["archiveSha256"], Value::Null);
    assert_eq!(releases.asked().len(), 1, "what is there is not fetched again");
}

#[test]
fn a_download_goes_on_where_it_was_cut() {
    let content = uki();
    let whims = [Whim::Cut(50_000), Whim::Unanswered, Whim::Status(503), Whim::Cut(30_000)];
    let releases = Releases::start(UKI, content.clone(), &whims);
    let images = tempfile::tempdir().unwrap();
    let hash = hex::encode(Sha256::digest(&content));
    let done = releases.pull(images.path(), &["dstack-cloud-0.6.0", "--sha256", &hash]);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let asked = releases.asked();
    assert_eq!(asked.len(), 5, "{asked:?}");
    assert_eq!(asked[0], "");
    let from = |at: usize| -> usize {
        asked[at].trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap()
    };
    assert_eq!([from(1), from(2), from(3), from(4)], [50_000, 50_000, 50_000, 80_000]);
}

#[test]
fn a_later_run_goes_on_and_a_changed_archive_is_begun_anew() {
    let releases = Releases::start(UKI, uki(), &[Whim::Cut(50_000), Whim::Status(403)]);
    let images = tempfile::tempdir().unwrap();
    let cut = releases.pull(images.path(), &["dstack-cloud-0.6.0"]);
    assert_eq!(cut.code, Some(3), "{}", cut.stderr);
    assert!(cut.stderr.contains("status 403\nhint: run the same command again"), "{}", cut.stderr);
    let done = releases.pull(images.path(), &["dstack-cloud-0.6.0"]);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert!(releases.asked()[2].starts_with("bytes="), "{:?}", releases.asked());

    let releases = Releases::start(BARE_METAL, uki(), &[Whim::Cut(50_000), Whim::Change]);
    let images = tempfile::tempdir().unwrap();
    let done = releases.pull(images.path(), &["dstack-0.6.0", "--bare-metal"]);
    assert_eq!(done.code, Some(0), "a mix of two archives: {}", done.stderr);
}

#[test]
fn the_other_variant_another_hash_and_no_archive_are_said() {
    for (path, content, arguments, code, error, hint) in [
        (
            UKI,
            bare_metal(),
            &["dstack-cloud-0.6.0"][..],
            3,
            "expected the one with one bootable disk",
            "NAME-uki.tar.gz",
        ),
        (
            BARE_METAL,
            uki(),
            &["dstack-0.6.0", "--bare-metal"],
            3,
            "this is the variant with one bootable disk",
            "--bare-metal",
        ),
        (UKI, uki(), &["dstack-cloud-0.6.1"], 3, "status 404", "--bare-metal fetches the other"),
        (
            UKI,
            b"<html>Not Found</html>".to_vec(),
            &["dstack-cloud-0.6.0"],
            3,
            "the archive cannot be read",
            "",
        ),
        (
            UKI,
            archive(&[("disk.raw", b"x")]),
            &["dstack-cloud-0.6.0"],
            2,
            "neither digest.txt nor auth_hash.txt",
            "",
        ),
        (UKI, uki(), &["dstack"], 2, "has no version", "dstack-cloud-0.6.0"),
        (UKI, uki(), &["https://x.example/y-1.0-uki.tar.gz"], 2, "needs its SHA-256", "--sha256"),
    ] {
        let releases = Releases::start(path, content, &[]);
        let images = tempfile::tempdir().unwrap();
        let finished = releases.pull(images.path(), arguments);
        assert_eq!(finished.code, Some(code), "{error}: {}", finished.stderr);
        assert!(finished.stderr.contains(error), "{error}: {}", finished.stderr);
        assert!(finished.stderr.contains(hint), "{error}: {}", finished.stderr);
        let left = names(images.path());
        assert!(
            left.iter().all(|name| name.ends_with(".part") || name.ends_with(".origin")),
            "{error}: {left:?}"
        );
    }
    let releases = Releases::start(UKI, uki(), &[]);
    let images = tempfile::tempdir().unwrap();
    let finished = releases.pull(images.path(), &["dstack-cloud-0.6.0", "--sha256", &"00".repeat(32)]);
    assert_eq!(finished.code, Some(3), "{}", finished.stderr);
    assert!(
        finished.stderr.contains("expected 0000") && finished.stderr.contains("the download was removed")
    );
    assert_eq!(names(images.path()), Vec::<String>::new());
}
