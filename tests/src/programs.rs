//! Where the project's programs are.

use std::env;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

/// The path of a program of this workspace, built from the sources as they are now.
///
/// Cargo tells a test only about the programs of its own package, so this asks cargo to build them all, once a
/// process; when nothing changed that takes a fraction of a second.
///
/// # Panics
/// When the build fails: no test can go on without the programs.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let directory = BUILT.get_or_init(|| {
        // This test runs as target/PROFILE/deps/NAME-HASH.
        let test = env::current_exe().expect("a running program has a path");
        let profile = test.ancestors().nth(2).expect("tests run two levels below their profile's directory");
        let mut build = Command::new(env!("CARGO"));
        // As the test run itself is built: another selection would unite other features and build everything anew.
        build.args(["test", "--no-run", "--quiet", "--workspace", "--locked"]);
        build.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        build
            .arg("--target-dir")
            .arg(profile.parent().expect("a profile's directory is in the target directory"));
        if profile.ends_with("release") {
            build.arg("--release");
        }
        let status = build.status().expect("cargo runs");
        assert!(status.success(), "cargo build: {status}");
        profile.to_owned()
    });
    directory.join(name)
}
