//! A chain on this machine with the contracts on it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use chain::local::{find_anvil, in_node_modules};
use serde_json::Value;
use tempfile::TempDir;

use crate::{Daemon, Finished, finish, program};

/// No command takes this long; it only keeps a hang from holding everything up.
const DEADLINE: Duration = Duration::from_secs(120);

/// A chain with contracts and an app that may run nothing yet.
pub struct Contracts {
    chain: Daemon,
    facts: Value,
    folder: TempDir,
}

impl Drop for Contracts {
    /// The chain's own process ends anvil.
    fn drop(&mut self) {
        self.chain.stop();
    }
}

impl Contracts {
    /// Starts one. `None` without anvil, which is said.
    ///
    /// # Panics
    /// When the chain does not start.
    #[must_use]
    pub fn start() -> Option<Self> {
        let anvil = anvil()?;
        let folder = tempfile::tempdir().expect("a temporary directory");
        let out = folder.path().join("chain.json");
        let mut arguments =
            vec!["chain".into(), "local".into(), "--port".into(), "0".into(), "--anvil".into()];
        arguments.extend([anvil.into_os_string(), "--out".into(), out.clone().into_os_string()]);
        let chain = Daemon::start("keyferry", &arguments);
        let facts = std::fs::read(out).expect("the chain writes what it is");
        let facts = serde_json::from_slice(&facts).expect("what it writes is JSON");
        Some(Self { chain, facts, folder })
    }

    /// What the chain said about itself: `rpcUrl`, `kmsContract`, `ownerKey`, `appId`.
    ///
    /// # Panics
    /// When it did not say that.
    #[must_use]
    pub fn fact(&self, name: &str) -> &str {
        self.facts[name].as_str().expect("the chain said that")
    }

    /// Its number.
    #[must_use]
    pub fn chain_id(&self) -> &Value {
        &self.facts["chainId"]
    }

    /// The variables by which `keyferry chain` is sent there with the owner's key.
    #[must_use]
    pub fn environment(&self) -> [(&'static str, String); 4] {
        [
            ("RPC_URL", self.fact("rpcUrl").to_owned()),
            ("KMS_CONTRACT_ADDR", self.fact("kmsContract").to_owned()),
            ("PRIVATE_KEY", self.fact("ownerKey").to_owned()),
            ("XDG_STATE_HOME", self.folder.path().display().to_string()),
        ]
    }

    /// `keyferry chain`, as an operator with the owner's key would call it.
    ///
    /// # Panics
    /// When it fails.
    pub fn run(&self, arguments: &[&str]) -> Finished {
        let mut command = Command::new(program("keyferry"));
        command.arg("chain").args(arguments).env_clear().envs(self.environment());
        let finished = finish(command, DEADLINE);
        assert_eq!(finished.code, Some(0), "{finished:?}");
        finished
    }
}

/// anvil, as `npm install` in `chain/contracts` leaves it, or wherever the commands find it.
///
/// Says so when there is none.
#[must_use]
#[expect(clippy::print_stdout, reason = "a test that is skipped says why")]
pub fn anvil() -> Option<PathBuf> {
    let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../chain/contracts/node_modules");
    let installed = in_node_modules(&installed).into_iter().find(|it| it.is_file());
    let found = installed.or_else(|| find_anvil(|name| std::env::var_os(name)));
    if found.is_none() {
        println!("skipped: no anvil; run `npm install --ignore-scripts` in chain/contracts");
    }
    found
}
