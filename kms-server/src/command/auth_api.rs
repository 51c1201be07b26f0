//! `auth-api`: the authorisation service alone, for a KMS that asks one.

use std::path::PathBuf;

use clap::Args;
use command_line::{Exit, Failure, print_line};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use transport::Endpoint;

use crate::authorise::api;
use crate::config::{Config, Loaded};
use crate::notify::Notify;

/// Arguments of `auth-api`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  kms-server auth-api --config auth.toml                                    # its [core.auth_api] decides
  kms-server auth-api --policy policy.toml --listen tcp:127.0.0.1:18000
  ETH_RPC_URL=https://sepolia.base.org ETH_CHAIN_ID=84532 KMS_CONTRACT_ADDR=0x… kms-server auth-api

An upstream KMS asks it with [core.auth_api.webhook] url = \"http://127.0.0.1:8000\".")]
pub struct AuthApi {
    /// Settings that win over /etc/kms/kms.toml and ./kms.toml
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Decide by the rules in this file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["config", "rpc_urls"])]
    pub policy: Option<PathBuf>,
    /// Decide by the contract: endpoints that must agree, separated by commas
    #[arg(
        long = "rpc-url",
        env = "ETH_RPC_URL",
        hide_env_values = true,
        value_delimiter = ',',
        value_name = "URL",
        conflicts_with = "config"
    )]
    pub rpc_urls: Vec<String>,
    /// Chain of the contract
    #[arg(long, env = "ETH_CHAIN_ID", value_name = "NUMBER")]
    pub chain_id: Option<u64>,
    /// Address of the KMS contract
    #[arg(long, env = "KMS_CONTRACT_ADDR", value_name = "ADDRESS")]
    pub kms_contract: Option<String>,
    /// Where to listen; whoever reaches it can ask
    #[arg(long, value_name = "ENDPOINT", default_value = "tcp:127.0.0.1:8000")]
    pub listen: Endpoint,
}

/// Serves until `shutdown` is cancelled.
///
/// # Errors
///
/// 2 for unusable settings, 1 otherwise.
pub(super) async fn run(arguments: AuthApi, shutdown: CancellationToken) -> Result<(), Failure> {
    let listen = arguments.listen.clone();
    let Loaded { config, warnings, files } = load(arguments)?;
    for file in files {
        info!(file = %file.display(), "read settings");
    }
    for warning in warnings.iter().filter(|warning| warning.contains("auth_api")) {
        warn!("{warning}");
    }
    let notify = Notify::from_environment(|name| std::env::var(name).ok());
    let service = api::start(config, &listen, &shutdown).await.map_err(super::start_failure)?;
    print_line(&format!("listening on {}", service.endpoint));
    notify.ready();
    tokio::select! {
        () = service.stopped.wait() => {}
        () = notify.feed_watchdog() => {}
    }
    info!("stopped");
    Ok(())
}

fn load(arguments: AuthApi) -> Result<Loaded, Failure> {
    let AuthApi { config, policy, rpc_urls, chain_id, kms_contract, listen: _ } = arguments;
    let usage = |error| Failure::new(Exit::Usage, error);
    let mut auth_api = toml::Table::new();
    if let Some(file) = policy {
        let file = file.display().to_string();
        auth_api.insert("type".into(), "policy".into());
        auth_api.insert("policy".into(), toml::Table::from_iter([("file".to_owned(), file.into())]).into());
    } else if !rpc_urls.is_empty() {
        let mut chain = toml::Table::new();
        chain.insert("rpc_urls".into(), rpc_urls.into());
        if let Some(id) = chain_id.and_then(|id| i64::try_from(id).ok()) {
            chain.insert("chain_id".into(), id.into());
        }
        if let Some(address) = kms_contract {
            chain.insert("kms_contract".into(), address.into());
        }
        auth_api.insert("type".into(), "chain".into());
        auth_api.insert("chain".into(), chain.into());
    } else {
        return Config::load(config.as_deref()).map_err(usage);
    }
    let core = toml::Table::from_iter([("auth_api".to_owned(), auth_api.into())]);
    let text = toml::Table::from_iter([("core".to_owned(), core.into())]).to_string();
    let (config, warnings) = Config::from_toml(&text).map_err(usage)?;
    Ok(Loaded { config, warnings, files: Vec::new() })
}
