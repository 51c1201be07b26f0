use std::io::Write;

use command_line::{Exit, Failure};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use super::args::Local;
use super::{now, print_json, printed, variable};
use crate::local::{DEVELOPMENT_KEY, LocalChain, find_anvil, not_found, owner, seed};
use crate::{Error, LOCAL_CHAIN_ID, Result};

/// Runs until it is told to end.
pub(super) async fn run(it: Local, out: &mut dyn Write) -> Result<Exit, Failure> {
    let anvil = it.anvil.clone().or_else(|| find_anvil(variable)).ok_or_else(not_found)?;
    let failed = |error: std::io::Error| Error::LocalChain { problem: error.to_string() };
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut chain = LocalChain::start(&anvil, it.port, &[]).await?;
    // The chain begins anew each time, so its journal need not outlive it.
    let journal = std::env::temp_dir().join(format!("keyferry-local-chain-{}", std::process::id()));
    let seeded = async { seed(&mut owner(chain.url(), &journal, now).await?, it.image).await }.await;
    std::fs::remove_dir_all(&journal).map_err(failed)?;
    let seeded = seeded?;
    let document = json!({
        "command": "local",
        "version": 1,
        "rpcUrl": chain.url(),
        "chainId": LOCAL_CHAIN_ID,
        "kmsContract": seeded.contracts.kms,
        "appImplementation": seeded.contracts.app_implementation,
        "appId": hex::encode(seeded.app),
        "owner": seeded.owner,
        "ownerKey": DEVELOPMENT_KEY,
    });
    if let Some(path) = &it.out {
        std::fs::write(path, format!("{document}\n")).map_err(failed)?;
    }
    match it.json {
        true => printed(print_json(out, document))?,
        false => {
            let (url, kms, app) = (chain.url(), seeded.contracts.kms, hex::encode(seeded.app));
            let facts = format!(
                "RPC_URL={url}\nKMS_CONTRACT_ADDR={kms}\nAPP_ID={app}\nPRIVATE_KEY={DEVELOPMENT_KEY}"
            );
            let ready = format!("listening on tcp:{}", url.trim_start_matches("http://"));
            printed(writeln!(out, "{facts}\n{ready}").and_then(|()| out.flush()))?
        }
    };
    tracing::info!(
        "the local chain runs until this command is ended; the key is public and worth nothing elsewhere"
    );
    tokio::select! {
        ended = chain.wait() => Err(ended.map_or_else(Failure::from, |()| not_found().into())),
        _ = terminate.recv() => Ok(Exit::Done),
    }
}
