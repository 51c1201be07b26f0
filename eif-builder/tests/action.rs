//! The GitHub Action's steps, run as a runner runs them.
#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]

mod support;

use std::process::Command;

use support::images::{kernel, static_elf};
use support::{Inputs, in_path, program};

/// The script of a step: one line behind `run:`, or the indented lines behind `run: |`.
fn script(step: &str) -> String {
    let action = include_str!("../action.yml");
    let (_, rest) = action.split_once(&format!("    - name: {step}\n")).expect("a step of this name");
    let (_, run) = rest.split_once("      run: ").expect("a script");
    match run.strip_prefix("|\n") {
        Some(block) => block
            .lines()
            .map_while(|line| line.strip_prefix("        ").or(line.is_empty().then_some("")))
            .map(|line| format!("{line}\n"))
            .collect(),
        None => run.lines().next().unwrap().trim_matches('\'').to_owned(),
    }
}

struct Runner {
    inputs: Inputs,
}

impl Runner {
    fn step(&self, step: &str, environment: &[(&str, &str)]) -> (Option<i32>, String) {
        let mut command = Command::new("bash");
        // `shell: bash` is `bash --noprofile --norc -eo pipefail {0}` on a runner.
        command.args(["--noprofile", "--norc", "-eo", "pipefail", "-c", &script(step)]);
        command.current_dir(self.inputs.folder.path()).env("TOOL", program());
        for (name, file) in [("GITHUB_OUTPUT", "outputs"), ("GITHUB_STEP_SUMMARY", "summary")] {
            command.env(name, self.inputs.path(file));
        }
        let output = command.envs(environment.iter().copied()).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    }
}

#[test]
fn the_action_builds_measures_and_refuses() {
    for tool in ["bash", "jq"] {
        if in_path(tool).is_none() {
            println!("skipped: no {tool}");
            return;
        }
    }
    let inputs = Inputs::new();
    inputs.file("bzImage", &kernel());
    inputs.file("app", &static_elf(b"app"));
    let toml = "[image]\nbinary = \"app\"\n[boot]\nkernel = \"bzImage\"\ninit = \"application\"\n";
    inputs.file("keyferry.toml", toml.as_bytes());
    let runner = Runner { inputs };

    let (code, said) = runner.step("Build the image", &[("INPUT", "."), ("OUTPUT", "with space.eif")]);
    assert_eq!(code, Some(0), "{said}");
    let measure = |expect: &str, reference: &str| {
        let inputs = [("INPUT", "with space.eif"), ("EXPECT", expect), ("REFERENCE", reference)];
        runner.step("Measure", &inputs)
    };
    let (code, said) = measure("", "");
    assert_eq!(code, Some(0), "{said}");
    let outputs = std::fs::read_to_string(runner.inputs.path("outputs")).unwrap();
    let hash = outputs.lines().find_map(|line| line.strip_prefix("os-image-hash=")).unwrap().to_owned();
    let json = outputs.lines().find_map(|line| line.strip_prefix("measurements=")).unwrap();
    let value: serde_json::Value = serde_json::from_str(json).unwrap();
    assert_eq!(value["OsImageHash"], hash.as_str());
    let summary = std::fs::read_to_string(runner.inputs.path("summary")).unwrap();
    assert_eq!(summary, format!("OS_IMAGE_HASH `{hash}`\n"));

    assert_eq!(measure(&hash, "").0, Some(0));
    runner.inputs.file("registered measurements.json", json.as_bytes());
    assert_eq!(measure(&hash, "registered measurements.json").0, Some(0));
    let other = format!("0x{}", "11".repeat(32));
    let (code, said) = measure(&other, "");
    assert!(code == Some(3) && said.contains("OS_IMAGE_HASH is 0x"), "{said}");
}
