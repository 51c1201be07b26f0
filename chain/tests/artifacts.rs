//! The committed contracts are what their sources compile to.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test stops where something is wrong, and says what it skips"
)]

use std::path::Path;
use std::process::Command;

#[test]
fn the_artifacts_are_what_the_sources_compile_to() {
    let contracts = Path::new(env!("CARGO_MANIFEST_DIR")).join("contracts");
    if !contracts.join("node_modules/solc").is_dir() {
        eprintln!("skipped: no compiler; run `npm install --ignore-scripts` in chain/contracts");
        return;
    }
    let checked = match Command::new("node").args(["compile.mjs", "--check"]).current_dir(&contracts).output()
    {
        Ok(checked) => checked,
        Err(error) => {
            eprintln!("skipped: no node: {error}");
            return;
        }
    };
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
}
