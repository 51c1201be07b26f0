use std::path::{Path, PathBuf};
use std::sync::Arc;

use attestation::{Pcr, PcrIndex, UnixMillis};
use kms_protocol::wire::webhook::BootInfo;

use super::*;
use crate::authorise::{Grant, Purpose, Question, Refusal};

fn clock() -> crate::Clock {
    Arc::new(|| UnixMillis(1_767_323_045_678))
}

fn log() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.jsonl");
    (directory, path)
}

fn decision(answer: &Result<Grant, Refusal>) -> Event {
    let boot_info = BootInfo {
        app_id: vec![0x11; 20],
        os_image_hash: vec![0x22; 32],
        tee_variant: "dstack-nitro-enclave".into(),
        ..BootInfo::default()
    };
    let registers = vec![(PcrIndex::IMAGE, Pcr::new([1; 48]))];
    let question = Question { purpose: Purpose::App, boot_info, registers, evidence: Some([0x33; 32]) };
    Event::decision(&question, "policy", Outcome::from(answer), Some("192.0.2.1:5".into()))
}

fn allowed() -> Event {
    decision(&Ok(Grant { gateway_app_id: "0x1".into() }))
}

/// A log with a start, an allowance and a refusal.
async fn written(path: &Path) -> String {
    let audit = Audit::open(path, clock()).unwrap();
    audit.write(allowed()).await.unwrap();
    audit.write(decision(&Err(Refusal::denied("no\nline \"forged\"")))).await.unwrap();
    drop(audit);
    // Its thread ends a moment later; until then the file is locked.
    std::fs::File::open(path).unwrap().lock().unwrap();
    std::fs::read_to_string(path).unwrap()
}

#[tokio::test]
async fn lines_say_who_asked_and_what_was_decided() {
    let (_directory, path) = log();
    let text = written(&path).await;
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 3);
    assert_eq!(lines[0]["event"], "start");
    assert_eq!(lines[0]["prev"], "0".repeat(64));
    for (key, value) in [
        ("event", "decision"),
        ("time", "2026-01-02T03:04:05.678Z"),
        ("purpose", "app"),
        ("authoriser", "policy"),
        ("decision", "allowed"),
        ("peer", "192.0.2.1:5"),
        ("app_id", &"11".repeat(20)),
        ("os_image_hash", &"22".repeat(32)),
        ("evidence", &"33".repeat(32)),
    ] {
        assert_eq!(lines[1][key], value, "{key}");
    }
    assert_eq!(lines[2]["decision"], "denied");
    assert_eq!(lines[2]["reason"], "no line \"forged\"");
    assert_eq!(lines[2]["prev"], lines[1]["hash"]);
    let summary = verify(&path).unwrap();
    assert_eq!((summary.lines, summary.unfinished), (3, 0));
    assert_eq!(hex::encode(summary.head), lines[2]["hash"].as_str().unwrap());
}

#[tokio::test]
async fn nothing_can_be_changed_taken_out_or_put_in() {
    let (_directory, path) = log();
    let text = written(&path).await;
    let lines: Vec<&str> = text.lines().collect();
    let broken = |lines: &[&str]| {
        std::fs::write(&path, lines.join("\n") + "\n").unwrap();
        verify(&path).unwrap_err()
    };
    let other = lines[1].replace("allowed", "denied");
    assert!(matches!(broken(&[lines[0], &other, lines[2]]), AuditError::Changed { line: 2, .. }));
    assert!(matches!(broken(&[lines[0], lines[2]]), AuditError::Order { line: 2, what: "prev", .. }));
    assert!(matches!(broken(&[lines[1], lines[2]]), AuditError::Order { line: 1, what: "prev", .. }));
    assert!(matches!(broken(&[lines[0], lines[2], lines[1]]), AuditError::Order { line: 2, .. }));
    assert!(matches!(broken(&[lines[0], lines[0], lines[1]]), AuditError::Order { line: 2, .. }));
    assert!(matches!(broken(&[lines[0], "", lines[1]]), AuditError::Form { line: 2, .. }));
    // Bytes after the hash are hashed by nobody.
    let longer = lines[1].to_owned() + " ";
    assert!(matches!(broken(&[lines[0], &longer]), AuditError::Form { line: 2, .. }));
    let long = format!("{{\"a\":\"{}\"}}", "x".repeat(MAX_LINE));
    assert!(matches!(broken(&[lines[0], &long]), AuditError::TooLong { line: 2 }));
    // What only the head shows: its end is missing.
    std::fs::write(&path, lines[..2].join("\n") + "\n").unwrap();
    assert_eq!(verify(&path).unwrap().lines, 2);
}

#[tokio::test]
async fn every_truncation_is_whole_lines_and_a_rest() {
    let (_directory, path) = log();
    let text = written(&path).await;
    for length in 0..text.len() {
        let part = &text[..length];
        std::fs::write(&path, part).unwrap();
        let summary = verify(&path).unwrap();
        assert_eq!(summary.lines, part.matches('\n').count() as u64, "{length} bytes");
        let rest = length - part.rfind('\n').map_or(0, |at| at + 1);
        assert_eq!(summary.unfinished, rest as u64);
    }
}

#[tokio::test]
async fn a_log_goes_on_after_a_crash() {
    let (_directory, path) = log();
    let text = written(&path).await;
    std::fs::write(&path, &text[..text.len() - 10]).unwrap();
    let audit = Audit::open(&path, clock()).unwrap();
    audit.write(allowed()).await.unwrap();
    let after = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = after.lines().collect();
    assert_eq!(verify(&path).unwrap().lines, 4);
    let start: serde_json::Value = serde_json::from_str(lines[2]).unwrap();
    let unfinished = text.lines().last().unwrap().len() - 9;
    assert_eq!((start["event"].as_str(), start["cut"].as_u64()), (Some("start"), Some(unfinished as u64)));
}

#[tokio::test]
async fn a_log_that_was_changed_is_not_continued() {
    let (_directory, path) = log();
    let text = written(&path).await;
    std::fs::write(&path, text.replace("allowed", "Allowed")).unwrap();
    assert!(matches!(Audit::open(&path, clock()), Err(OpenError::Broken { .. })));
}

#[tokio::test]
async fn two_servers_do_not_write_one_log() {
    let (_directory, path) = log();
    let first = Audit::open(&path, clock()).unwrap();
    assert!(matches!(Audit::open(&path, clock()), Err(OpenError::Locked { .. })));
    first.write(Event::Stop).await.unwrap();
}

#[tokio::test]
async fn a_log_that_cannot_be_written_says_so() {
    let (_directory, path) = log();
    let audit = Audit::unwritable(&path, clock());
    for _ in 0..2 {
        assert!(audit.write(allowed()).await.is_err());
    }
    assert_eq!(std::fs::read(&path).unwrap(), b"");
}

#[tokio::test]
async fn strangers_do_not_fill_the_disk() {
    let (_directory, path) = log();
    let audit = Audit::open(&path, clock()).unwrap();
    for _ in 0..1000 {
        audit.refused("no-attestation", "App not allowed", None);
    }
    // In line behind them.
    audit.write(Event::Stop).await.unwrap();
    let lines = verify(&path).unwrap().lines;
    assert!(lines < 200, "{lines} lines");
}
