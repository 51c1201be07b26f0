//! Images and a KMS that runs: what a project takes from it is pinned before the image is measured.

#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]

use std::fs;
use std::path::Path;
use std::time::Duration;

use e2e::{APP_ID, Finished, Trip, Variation, run};

/// No command of these tests takes this long; it only keeps a hang from holding everything up.
const DEADLINE: Duration = Duration::from_secs(120);

/// A project for an enclave that gets its keys from this KMS.
fn write_project(folder: &Path, url: &str, kms_ca: &str) {
    // The least that passes for a bzImage and for a static executable.
    let mut kernel = vec![7; 2048];
    kernel[0x202..0x206].copy_from_slice(b"HdrS");
    fs::write(folder.join("bzImage"), kernel).unwrap();
    let mut program = vec![0; 64];
    program[..6].copy_from_slice(b"\x7fELF\x02\x01");
    program[18] = 62;
    program[32] = 64;
    fs::write(folder.join("program"), program).unwrap();
    let toml = format!(
        "[image]\nbinary = \"program\"\n[boot]\nkernel = \"bzImage\"\ninit = \"agent\"\nagent = \"program\"\n\
         [kms]\nurl = \"{url}\"\napp_id = \"{APP_ID}\"\nkms_ca = \"{kms_ca}\"\n"
    );
    fs::write(folder.join("keyferry.toml"), toml).unwrap();
}

fn eif(arguments: &[&str]) -> Finished {
    run("keyferry", &[&["eif"], arguments].concat(), DEADLINE)
}

#[test]
fn fetch_pins_the_root_ca_of_a_running_kms() {
    let trip = Trip::start(&"00".repeat(32), Variation::default());
    let folder = tempfile::tempdir().unwrap();
    let project = folder.path().to_str().unwrap();
    let url = format!("https://localhost:{}", trip.kms.port());
    write_project(folder.path(), &url, "fetch");

    let unpinned = eif(&["measure", project]);
    assert_eq!(unpinned.code, Some(2), "{unpinned:?}");
    assert!(unpinned.stderr.contains("has no certificate for"), "{unpinned:?}");

    let locked = eif(&["lock", project]);
    assert_eq!(locked.code, Some(0), "{locked:?}");
    let root_ca = fs::read_to_string(trip.kms_keys().join("root-ca.crt")).unwrap();
    assert!(locked.stderr.contains("SHA-256 of the root CA"), "{locked:?}");

    // From here on the KMS is not needed, and another one at this address would change nothing.
    let certificate = folder.path().join("root-ca.pem");
    fs::write(&certificate, &root_ca).unwrap();
    drop(trip);
    let fetched = eif(&["measure", project]);
    assert_eq!(fetched.code, Some(0), "{fetched:?}");
    write_project(folder.path(), &url, "root-ca.pem");
    let given = eif(&["measure", project]);
    assert_eq!((given.code, &given.stdout), (Some(0), &fetched.stdout), "{given:?}");

    write_project(folder.path(), &url, "fetch");
    let gone = eif(&["lock", project]);
    assert_eq!(gone.code, Some(1), "{gone:?}");
    assert_eq!(eif(&["measure", project]).stdout, fetched.stdout, "a failed lock changed the lock file");
}
