//! A build that is interrupted leaves nothing behind.
#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]

mod support;

use std::io::Write as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use support::images::{gzip, kernel, test_image};
use support::{Inputs, program};

/// Names in a folder.
fn names(folder: &std::path::Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Builds from a ramdisk that never comes to its end (a pipe that stays open) and interrupts once the temporary image
/// is there.
fn interrupt(signal: &str) {
    let inputs = Inputs::new();
    inputs.file("bzImage", &kernel());
    let folder = inputs.folder.path();
    let mut child = Command::new(program())
        .args([
            "pack",
            "--kernel",
            "bzImage",
            "--cmdline",
            "x",
            "--ramdisk",
            "/dev/stdin",
            "--output",
            "image.eif",
        ])
        .current_dir(folder)
        .env("TMPDIR", folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut ramdisk = child.stdin.take().unwrap();
    let before = vec!["bzImage".to_owned()];
    let deadline = Instant::now() + Duration::from_secs(60);
    // Writing blocks until the program reads: more than a pipe holds has gone in only when it is at work.
    ramdisk.write_all(&vec![7; 4 << 20]).unwrap();
    assert_ne!(names(folder), before, "there is no temporary file to leave behind");
    let kill = Command::new("kill").args([format!("-{signal}"), child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < deadline, "SIG{signal} does not end it");
        // Once the program has ended, the pipe breaks.
        let _broken = ramdisk.write(&[7; 4096]);
    };
    assert_eq!((status.code(), status.signal()), (Some(130), None));
    assert_eq!(names(folder), before);
}

#[test]
fn sigint_leaves_nothing_behind() {
    interrupt("INT");
}

#[test]
fn sigterm_leaves_nothing_behind() {
    interrupt("TERM");
}

/// What ends by itself cleans up, too: here a packed archive whose copy is made and then found to be wrong.
#[test]
fn a_failed_build_leaves_nothing_behind() {
    let inputs = Inputs::new();
    inputs.file("bzImage", &kernel());
    let folder = inputs.folder.path();
    test_image(&serde_json::json!({})).write_archive(&inputs.path("image.tar"));
    let mut packed = std::fs::read(inputs.path("image.tar")).unwrap();
    let at = packed.len() / 2;
    packed[at] ^= 1;
    inputs.file("image.tar", &gzip(&packed));
    let before = names(folder);
    let status = Command::new(program())
        .args(["build", "--docker-archive", "image.tar", "--kernel", "bzImage", "--output", "image.eif"])
        .current_dir(folder)
        .env("TMPDIR", folder)
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(!status.success());
    assert_eq!(names(folder), before);
}
