//! `keyferry demo`: the whole trip on this machine, and trips that must fail.

mod on_chain;
mod stage;
mod story;
mod vm;

use std::time::Duration;

use clap::Args;
use command_line::{Exit, Failure};
use enclave_agent::{KeySummary, Keys};
use kms_server::ServerHandle;
use serde::Serialize;
use tokio::time::timeout;

use self::on_chain::Registry;
use self::stage::{Enclave, Stage, registered_image};
use self::story::Story;

/// Everything together; each step has a shorter deadline of its own.
const WHOLE_DEMO: Duration = Duration::from_secs(120);

/// Arguments of `keyferry demo`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  keyferry demo
  keyferry demo --chain
  keyferry demo --vm --kernel bzImage --agent \"$(scripts/static-agent.sh)\"")]
pub(crate) struct Arguments {
    /// Let contracts on a local chain decide: an image is registered, gets keys, is taken back, and gets none
    #[arg(long)]
    chain: bool,
    /// Show the keys themselves, not only their fingerprints
    #[arg(long)]
    reveal: bool,
    /// Print the summary as one JSON document; the steps go to standard error
    #[arg(long, conflicts_with = "reveal")]
    json: bool,
    /// Build an enclave image and boot it in a virtual machine, instead of playing its agent here
    #[arg(long, conflicts_with = "chain")]
    vm: bool,
    #[command(flatten)]
    machine: vm::VmArguments,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    version: u32,
    keys: KeySummary,
    refusals: Vec<Refusal>,
}

/// A trip that had to fail, and did.
#[derive(Debug, Serialize)]
struct Refusal {
    attempt: &'static str,
    exit_code: u8,
    reason: String,
}

pub(crate) async fn run(arguments: Arguments) -> Result<Exit, Failure> {
    let Arguments { chain, reveal, json, vm, machine } = arguments;
    let (limit, told) = if vm {
        (vm::WHOLE_DEMO, timeout(vm::WHOLE_DEMO, vm::tell(machine, reveal, json)).await)
    } else {
        (WHOLE_DEMO, timeout(WHOLE_DEMO, tell(chain, reveal, json)).await)
    };
    match told {
        Ok(told) => told.map(|()| Exit::Done),
        Err(_) => Err(Failure::new(Exit::NoAnswer, format!("the demo did not end within {limit:?}"))),
    }
}

async fn tell(chain: bool, reveal: bool, json: bool) -> Result<(), Failure> {
    let mut story = Story::new(json);
    story.chapter("The stage: everything runs on this machine, over real sockets");
    let (stage, keys, refusals) =
        if chain { by_contracts(&mut story).await? } else { by_rules(&mut story).await? };
    if json {
        let report = Report { version: 1, keys: keys.summary(), refusals };
        let text = serde_json::to_string(&report).map_err(|error| Failure::new(Exit::Internal, error))?;
        command_line::print_line(&text);
    } else {
        story.summary(&keys, refusals.len(), reveal)?;
    }
    stage.strike().await;
    Ok(())
}

/// Keys by a file of rules, and three attempts that must fail.
async fn by_rules(story: &mut Story) -> Result<(Stage, Keys, Vec<Refusal>), Failure> {
    let stage = Stage::set(None, story).await?;

    story.chapter("The trip");
    let keys = stage.fetch_keys(&Enclave::registered(&stage, "first")?, stage.kms(), story).await?;

    story.chapter("Three trips that must fail");
    let mut refusals = Vec::new();
    for (attempt, enclave, kms) in [
        ("an enclave with a changed image", Enclave::with_changed_image(&stage)?, stage.kms()),
        ("a document two hours old", Enclave::with_old_clock(&stage)?, stage.kms()),
        ("a KMS under another root", Enclave::registered(&stage, "again")?, stage.impostor()),
    ] {
        refusals.push(refused(attempt, &stage, &enclave, kms, story).await?);
    }
    Ok((stage, keys, refusals))
}

/// Keys by the contracts on a chain: only between the image's registration and its removal.
async fn by_contracts(story: &mut Story) -> Result<(Stage, Keys, Vec<Refusal>), Failure> {
    let mut registry = Registry::start(story).await?;
    let stage = Stage::set(Some(&registry), story).await?;
    let image = *registered_image().as_bytes();

    story.chapter("Before the image is registered");
    let early = Enclave::registered(&stage, "early")?;
    let early = refused("an image that nobody registered", &stage, &early, stage.kms(), story).await?;

    story.chapter("Once it is registered");
    registry.add(image, story).await?;
    let keys = stage.fetch_keys(&Enclave::registered(&stage, "registered")?, stage.kms(), story).await?;

    story.chapter("Once it is taken back");
    registry.remove(image, story).await?;
    let late = Enclave::registered(&stage, "late")?;
    let late = refused("an image that was taken back", &stage, &late, stage.kms(), story).await?;
    Ok((stage, keys, vec![early, late]))
}

/// A trip that has to be refused.
async fn refused(
    attempt: &'static str,
    stage: &Stage,
    enclave: &Enclave,
    kms: &ServerHandle,
    story: &mut Story,
) -> Result<Refusal, Failure> {
    story.attempt(attempt);
    let failure = match stage.fetch_keys(enclave, kms, story).await {
        Err(failure) if failure.exit() == Exit::Refused => failure,
        Err(failure) => return Err(failure),
        Ok(_) => return Err(Failure::new(Exit::Internal, format!("{attempt} was given keys"))),
    };
    let reason = failure.message();
    story.refused(&reason);
    Ok(Refusal { attempt, exit_code: failure.exit().code(), reason })
}
