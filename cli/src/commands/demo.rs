//! `keyferry demo`: the whole trip on this machine, and three trips that must fail.

mod stage;
mod story;

use std::time::Duration;

use clap::Args;
use command_line::{Exit, Failure};
use enclave_agent::KeySummary;
use serde::Serialize;
use tokio::time::timeout;

use self::stage::{Enclave, Stage};
use self::story::Story;

/// Everything together; each step has a shorter deadline of its own.
const WHOLE_DEMO: Duration = Duration::from_secs(120);

/// Arguments of `keyferry demo`.
#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Show the keys themselves, not only their fingerprints
    #[arg(long)]
    reveal: bool,
    /// Print the summary as one JSON document; the steps go to standard error
    #[arg(long, conflicts_with = "reveal")]
    json: bool,
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
    match timeout(WHOLE_DEMO, tell(arguments)).await {
        Ok(told) => told.map(|()| Exit::Done),
        Err(_) => Err(Failure::new(Exit::NoAnswer, format!("the demo did not end within {WHOLE_DEMO:?}"))),
    }
}

async fn tell(Arguments { reveal, json }: Arguments) -> Result<(), Failure> {
    let mut story = Story::new(json);
    story.chapter("The stage: everything runs on this machine, over real sockets");
    let stage = Stage::set(&mut story).await?;

    story.chapter("The trip");
    let keys = stage.fetch_keys(&Enclave::registered(&stage, "first")?, stage.kms(), &mut story).await?;

    story.chapter("Three trips that must fail");
    let mut refusals = Vec::new();
    for (attempt, enclave, kms) in [
        ("an enclave with a changed image", Enclave::with_changed_image(&stage)?, stage.kms()),
        ("a document two hours old", Enclave::with_old_clock(&stage)?, stage.kms()),
        ("a KMS under another root", Enclave::registered(&stage, "again")?, stage.impostor()),
    ] {
        story.attempt(attempt);
        let failure = match stage.fetch_keys(&enclave, kms, &mut story).await {
            Err(failure) if failure.exit() == Exit::Refused => failure,
            Err(failure) => return Err(failure),
            Ok(_) => return Err(Failure::new(Exit::Internal, format!("{attempt} was given keys"))),
        };
        let reason = failure.message();
        story.refused(&reason);
        refusals.push(Refusal { attempt, exit_code: failure.exit().code(), reason });
    }

    if json {
        let report = Report { version: 1, keys: keys.summary(), refusals };
        let text = serde_json::to_string(&report).map_err(|error| Failure::new(Exit::Internal, error))?;
        command_line::print_line(&text);
    } else {
        story.summary(&keys, reveal)?;
    }
    stage.strike().await;
    Ok(())
}
