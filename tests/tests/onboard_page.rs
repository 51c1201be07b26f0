//! The commands that the setup page offers for pasting are commands of this project.

#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]

use std::process::Command;
use std::time::Duration;

use e2e::{finish, program};

const SCRIPT: &str = include_str!("../../kms-server/src/onboard/page/onboard.js");
const DEADLINE: Duration = Duration::from_secs(120);

#[test]
fn the_commands_of_the_setup_page_are_real() {
    let names: Vec<&str> =
        SCRIPT.split("command(\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    assert_eq!(names, ["add-image", "add-kms", "add-device"]);
    // The form that the page writes, with a contract and an endpoint, as the authoriser names them or as variables.
    assert!(SCRIPT.contains("`keyferry chain ${name} 0x${value} ${kms} ${rpc}`"));
    for (kms, rpc) in [
        ("--kms 0x5FbDB2315678afecb367f032d93F642f64180aa3", "--rpc-url https://rpc.example.com"),
        ("--kms \"$KMS_CONTRACT_ADDR\"", "--rpc-url \"$RPC_URL\""),
    ] {
        for name in &names {
            let pasted = format!("keyferry chain {name} 0x{} {kms} {rpc}", "ab".repeat(32));
            let mut shell = Command::new("sh");
            // What would be signed is printed instead of sent, so no chain is needed.
            shell.args(["-c", &format!("\"$0\" {} --calldata", pasted.strip_prefix("keyferry ").unwrap())]);
            shell.arg(program("keyferry"));
            shell.env("KMS_CONTRACT_ADDR", "0x5FbDB2315678afecb367f032d93F642f64180aa3");
            shell.env("RPC_URL", "https://rpc.example.com");
            let finished = finish(shell, DEADLINE);
            assert_eq!(finished.code, Some(0), "{pasted}: {finished:?}");
            assert!(finished.stdout.contains(&"ab".repeat(32)), "{pasted}: {finished:?}");
        }
    }
}
