//! A chain on this machine, for demonstrations and tests: anvil with the stand-in contracts and a registered app.

use std::env::split_paths;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use alloy::primitives::{Address, B256};
use alloy::signers::local::PrivateKeySigner;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::rpc::{Clock, Endpoints, Limits};
use crate::write::operations::{Danger, NewApp};
use crate::write::{Artifacts, Deployed, Deployment, Sender, SenderConfig, deploy, operations, run_unasked};
use crate::{Error, LOCAL_CHAIN_ID, Result};

/// The first account of every anvil and Hardhat chain. Its key is public by design and worth nothing elsewhere.
pub const DEVELOPMENT_KEY: &str = "ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80";
/// The npm package of anvil, as `scripts` and the hint name it.
pub const ANVIL_PACKAGE: &str = "@foundry-rs/anvil@1.7.1";
/// Time for anvil to listen.
const START: Duration = Duration::from_secs(30);

/// A running anvil. It ends when this is dropped.
pub struct LocalChain {
    child: Child,
    url: String,
}

/// What was put on a local chain.
#[derive(Clone, Copy, Debug)]
pub struct Seeded {
    /// The contracts.
    pub contracts: Deployed,
    /// An application that may run the image, on any device.
    pub app: Address,
    /// Owner of everything.
    pub owner: Address,
}

/// Looks for anvil: the variable `KEYFERRY_ANVIL`, `PATH`, `node_modules` of the working directory, and the cache
/// folder `keyferry/npm` that the hint of [`not_found`] fills. The program behind npm's wrapper is preferred, since a
/// signal ends it at once.
pub fn find_anvil(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    if let Some(path) = variable("KEYFERRY_ANVIL") {
        return Some(path.into());
    }
    let cache = variable("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| variable("HOME").map(|home| PathBuf::from(home).join(".cache")));
    let folders =
        ["node_modules".into()].into_iter().chain(cache.map(|it| it.join("keyferry/npm/node_modules")));
    let packaged = folders.flat_map(|it| in_node_modules(&it));
    let on_path =
        variable("PATH").map(|it| split_paths(&it).map(|folder| folder.join("anvil")).collect::<Vec<_>>());
    on_path.unwrap_or_default().into_iter().chain(packaged).find(|it| it.is_file())
}

/// Where an npm installation of anvil keeps it.
pub fn in_node_modules(folder: &Path) -> [PathBuf; 3] {
    let native = |platform: &str| folder.join(format!("@foundry-rs/anvil-{platform}/bin/anvil"));
    [native("linux-amd64"), native("linux-arm64"), folder.join(".bin/anvil")]
}

/// The error when [`find_anvil`] finds none.
pub fn not_found() -> Error {
    Error::LocalChain {
        problem: format!(
            "no anvil here; install it with `npm install --ignore-scripts --prefix ~/.cache/keyferry/npm {ANVIL_PACKAGE}`"
        ),
    }
}

impl LocalChain {
    /// Starts anvil on 127.0.0.1; on a free port when `port` is 0.
    ///
    /// # Errors
    /// [`Error::LocalChain`] when it does not start or does not listen within 30 s.
    pub async fn start(anvil: &Path, port: u16, arguments: &[&str]) -> Result<Self> {
        let wrong = |problem: String| Error::LocalChain { problem };
        let mut child = Command::new(anvil)
            .args(["--host", "127.0.0.1", "--port", &port.to_string()])
            .args(["--chain-id", &LOCAL_CHAIN_ID.to_string()])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| wrong(format!("{}: {error}", anvil.display())))?;
        let mut lines = child.stdout.take().map(|it| BufReader::new(it).lines());
        let listening = async {
            while let Some(lines) = &mut lines {
                match lines.next_line().await.map_err(|error| wrong(error.to_string()))? {
                    Some(line) => match line.strip_prefix("Listening on ") {
                        Some(address) => return Ok(format!("http://{}", address.trim())),
                        None => continue,
                    },
                    None => break,
                }
            }
            Err(wrong("anvil ended before it listened; the port may be in use".to_owned()))
        };
        let url = timeout(START, listening)
            .await
            .map_err(|_| wrong(format!("anvil did not listen within {START:?}")))??;
        // Its log is read and dropped, or it would stop at a full pipe.
        tokio::spawn(async move {
            while let Some(lines) = &mut lines
                && let Ok(Some(_)) = lines.next_line().await
            {}
        });
        Ok(Self { child, url })
    }

    /// Its JSON-RPC address.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// [`Error::LocalChain`].
    pub async fn wait(&mut self) -> Result<()> {
        let status = self.child.wait().await;
        let problem =
            status.map_or_else(|error| error.to_string(), |status| format!("anvil ended: {status}"));
        Err(Error::LocalChain { problem })
    }
}

/// The account that owns everything on a local chain.
///
/// # Errors
/// See [`Sender::open`].
pub async fn owner(url: &str, journal: &Path, clock: Clock) -> Result<Sender> {
    let endpoints = Endpoints::new(&[url.to_owned()], 1, Limits::default(), clock)?.on_chain(LOCAL_CHAIN_ID);
    let signer: PrivateKeySigner = DEVELOPMENT_KEY
        .parse()
        .map_err(|_| Error::Key { from: "development key".to_owned(), problem: "not a key".to_owned() })?;
    let config =
        SenderConfig { confirmations: 1, poll: Duration::from_millis(50), ..SenderConfig::default() };
    Sender::open(endpoints, Box::new(signer), journal, config).await
}

/// Deploys the stand-in contracts and an application for the [owner] of a local chain, and allows `image` on both when
/// given.
///
/// # Errors
/// See [`deploy`].
pub async fn seed(sender: &mut Sender, image: Option<B256>) -> Result<Seeded> {
    let owner = sender.address();
    let deployment = Deployment {
        artifacts: Artifacts::built_in(),
        owner,
        app_implementation: None,
        label: String::new(),
    };
    let contracts = deploy(sender, &deployment, &mut run_unasked).await?;
    let app = NewApp {
        owner,
        disable_upgrades: false,
        require_tcb: false,
        allow_any_device: true,
        device: B256::ZERO,
        compose_hash: image.unwrap_or_default(),
        first_generation: false,
    };
    let app = operations::create_app(contracts.kms, app, String::new(), Danger::Accepted)?;
    let app = run_unasked(sender, &app)
        .await?
        .created()
        .ok_or_else(|| Error::LocalChain { problem: "no application was created".to_owned() })?;
    if let Some(image) = image {
        run_unasked(sender, &operations::add_image(contracts.kms, image, Danger::Refused)?).await?;
    }
    Ok(Seeded { contracts, app, owner })
}
