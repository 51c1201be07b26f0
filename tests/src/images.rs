//! Enclave images with the agent as init, and the programs that boot them.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The kernel for test images, or why there is none.
///
/// # Errors
/// The reason, for a test to say why it is skipped.
pub fn kernel() -> Result<PathBuf, String> {
    let path = env::var_os("KEYFERRY_KERNEL").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/tools/enclave-vm/bzImage")),
        PathBuf::from,
    );
    if path.is_file() { Ok(path) } else { Err(format!("no kernel at {}", path.display())) }
}

/// A static agent, built from the sources as they are now, once a process.
///
/// # Panics
/// When the build fails.
#[must_use]
pub fn static_agent() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        if let Some(path) = env::var_os("KEYFERRY_AGENT") {
            return path.into();
        }
        let test = env::current_exe().expect("a running program has a path");
        let target = test.ancestors().nth(3).expect("tests run three levels below the target directory");
        let triple = "x86_64-unknown-linux-gnu";
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--locked", "--package", "enclave-agent", "--bin", "enclave-agent"]);
        build.args(["--target", triple]).arg("--target-dir").arg(target);
        build.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        // With --target these are for the program alone, not for what runs while it is built.
        build.env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols");
        build.env_remove("CARGO_ENCODED_RUSTFLAGS");
        let status = build.status().expect("cargo runs");
        assert!(status.success(), "cargo build of the static agent: {status}");
        target.join(triple).join("debug/enclave-agent")
    })
}
