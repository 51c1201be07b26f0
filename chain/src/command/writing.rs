use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use alloy::primitives::utils::format_ether;
use alloy::primitives::{Address, Bytes, U256};
use command_line::{Exit, Failure};
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::args::{Command, CreateApp, Deploy, OnEither, Settle, Writing};
use super::{args, endpoints, print_json, printed, variable};
use crate::abi::KmsInfo;
use crate::write::operations::{self, Danger, NewApp};
use crate::write::{
    Artifacts, Deployment, FeeCaps, Operation, Outcome, Plan, Sender, SenderConfig, default_folder, deploy,
};
use crate::{Error, LOCAL_CHAIN_ID, Result};

/// Largest description of a KMS that is read, in bytes: a quote and an event log are some 100 kB.
const MAX_INFO: u64 = 4 << 20;

pub(super) async fn run(command: Command, out: &mut dyn Write) -> Result<Exit, Failure> {
    let danger = |writing: &Writing| match writing.danger {
        true => Danger::Accepted,
        false => Danger::Refused,
    };
    let (operation, writing) = match command {
        Command::Deploy(it) => return deploy_all(it, out).await,
        Command::CreateApp(it) => return create_app(it, out).await,
        Command::Settle(it) => return settle(it, out).await,
        Command::AcceptOwner(it) => return accept_owner(it, out).await,
        Command::RegisterApp(it) => (operations::register_app(it.kms.kms, it.value.address), it.writing),
        Command::AddImage(it) => {
            (operations::add_image(it.kms.kms, it.value.hash, danger(&it.writing))?, it.writing)
        }
        Command::RemoveImage(it) => (operations::remove_image(it.kms.kms, it.value.hash), it.writing),
        Command::AddHash(it) => {
            (operations::add_hash(it.app.app_id, it.value.hash, danger(&it.writing))?, it.writing)
        }
        Command::RemoveHash(it) => (operations::remove_hash(it.app.app_id, it.value.hash), it.writing),
        Command::AddKms(it) => {
            (operations::add_kms(it.kms.kms, it.value.hash, danger(&it.writing))?, it.writing)
        }
        Command::RemoveKms(it) => (operations::remove_kms(it.kms.kms, it.value.hash), it.writing),
        Command::AddDevice(it) => {
            let add =
                if it.app_id.is_some() { operations::add_app_device } else { operations::add_kms_device };
            (add(contract(&it), it.value.hash, danger(&it.writing))?, it.writing)
        }
        Command::RemoveDevice(it) => {
            let remove = if it.app_id.is_some() {
                operations::remove_app_device
            } else {
                operations::remove_kms_device
            };
            (remove(contract(&it), it.value.hash), it.writing)
        }
        Command::SetGateway(it) => (operations::set_gateway(it.kms.kms, &it.value.gateway), it.writing),
        Command::SetKmsInfo(it) => {
            (operations::set_kms_info(it.kms.kms, kms_info(&it.value.file)?), it.writing)
        }
        Command::SetAppImplementation(it) => {
            (operations::set_app_implementation(it.kms.kms, it.value.address), it.writing)
        }
        Command::AllowAnyDevice(it) => {
            (operations::allow_any_device(it.app.app_id, !it.value.off, danger(&it.writing))?, it.writing)
        }
        Command::RequireTcb(it) => (operations::require_tcb(it.app.app_id, !it.value.off), it.writing),
        Command::TransferOwner(it) => (operations::transfer_owner(contract(&it), it.value.to), it.writing),
        Command::Status(_)
        | Command::Explain(_)
        | Command::Watch(_)
        | Command::Doctor(_)
        | Command::Local(_) => {
            return Err(Error::Usage("not a write".to_owned()).into());
        }
    };
    one(&operation, &writing, out).await
}

fn contract<A: clap::Args>(it: &OnEither<A>) -> Address {
    it.app_id.or(it.kms).unwrap_or_default()
}

/// Does one operation and tells what came of it.
async fn one(operation: &Operation, writing: &Writing, out: &mut dyn Write) -> Result<Exit, Failure> {
    if writing.calldata {
        return printed(print_calldata(operation, writing, out));
    }
    let mut sender = open(writing).await?;
    sender.settle().await?;
    let outcome = run_asked(&mut sender, operation, writing.yes).await?;
    printed(print_outcome(operation.name, &outcome, json!({}), writing.json, out))
}

async fn create_app(it: CreateApp, out: &mut dyn Write) -> Result<Exit, Failure> {
    let danger = if it.writing.danger { Danger::Accepted } else { Danger::Refused };
    let build = |owner: Address| {
        let app = NewApp {
            owner,
            disable_upgrades: it.disable_upgrades,
            require_tcb: it.require_tcb_up_to_date,
            allow_any_device: it.allow_any_device,
            device: it.device.unwrap_or_default(),
            compose_hash: it.hash.unwrap_or_default(),
            first_generation: it.first_generation,
        };
        operations::create_app(it.kms.kms, app, it.label.clone(), danger)
    };
    if it.writing.calldata {
        let owner = it.owner.ok_or_else(|| Error::Usage("--calldata needs --owner".to_owned()))?;
        return printed(print_calldata(&build(owner)?, &it.writing, out));
    }
    build(Address::ZERO)?; // refuses what needs --danger before a password is asked for
    let mut sender = open(&it.writing).await?;
    sender.settle().await?;
    let operation = build(it.owner.unwrap_or(sender.address()))?;
    let outcome = run_asked(&mut sender, &operation, it.writing.yes).await?;
    let facts = json!({ "appId": outcome.created() });
    printed(print_outcome(operation.name, &outcome, facts, it.writing.json, out))
}

async fn deploy_all(it: Deploy, out: &mut dyn Write) -> Result<Exit, Failure> {
    if it.writing.calldata {
        let failure =
            Failure::new(Exit::Usage, "deploy has no --calldata: a multisig cannot create contracts");
        return Err(failure.with_hint("deploy from any account, with --owner MULTISIG"));
    }
    let mut sender = open(&it.writing).await?;
    sender.settle().await?;
    if it.stand_ins && sender.chain_id() != LOCAL_CHAIN_ID && !it.writing.danger {
        let what = "deploying stand-ins to a chain others use".to_owned();
        return Err(Error::Danger { what, why: "they are made for tests and were never audited" }.into());
    }
    let deployment = Deployment {
        artifacts: it.artifacts.map_or_else(Artifacts::built_in, Artifacts::below),
        owner: it.owner.unwrap_or(sender.address()),
        app_implementation: it.app_implementation,
        label: it.label,
    };
    let yes = it.writing.yes;
    let mut run = async |sender: &mut Sender, operation: &Operation| run_asked(sender, operation, yes).await;
    let deployed = deploy(&mut sender, &deployment, &mut run).await?;
    let facts = json!({
        "command": "deploy",
        "chainId": sender.chain_id(),
        "kms": deployed.kms,
        "kmsImplementation": deployed.kms_implementation,
        "appImplementation": deployed.app_implementation,
    });
    if it.writing.json {
        return printed(print_json(out, facts));
    }
    printed(writeln!(
        out,
        "KMS_CONTRACT_ADDR={}\nkms implementation {}\napp implementation {}",
        deployed.kms, deployed.kms_implementation, deployed.app_implementation
    ))
}

async fn accept_owner(it: OnEither<args::Nothing>, out: &mut dyn Write) -> Result<Exit, Failure> {
    if it.writing.calldata {
        return printed(print_calldata(
            &operations::accept_owner(contract(&it), Address::ZERO),
            &it.writing,
            out,
        ));
    }
    let mut sender = open(&it.writing).await?;
    sender.settle().await?;
    let operation = operations::accept_owner(contract(&it), sender.address());
    let outcome = run_asked(&mut sender, &operation, it.writing.yes).await?;
    printed(print_outcome(operation.name, &outcome, json!({}), it.writing.json, out))
}

async fn settle(it: Settle, out: &mut dyn Write) -> Result<Exit, Failure> {
    let mut sender = open(&it.writing).await?;
    if it.raise_fees {
        sender.raise_fees().await?;
    }
    let ended = sender.settle().await?;
    if it.writing.json {
        return printed(print_json(out, json!({ "command": "settle", "ended": ended })));
    }
    printed(match ended.as_slice() {
        [] => writeln!(out, "nothing was open"),
        ended => ended.iter().try_for_each(|hash| writeln!(out, "{hash} has ended")),
    })
}

/// Opens the account: key, endpoints, journal.
async fn open(writing: &Writing) -> Result<Sender> {
    let ask = || rpassword::prompt_password("password of the keystore: ").map(Zeroizing::new);
    let timeout = Duration::from_secs(writing.network.timeout);
    let signer = writing.key.source().load(variable, ask, timeout).await?;
    let endpoints = endpoints(&writing.network)?;
    let chain_id = endpoints.view().await?.chain_id;
    let folder: PathBuf = match &writing.journal {
        Some(folder) => folder.clone(),
        None => default_folder(variable).ok_or_else(|| Error::Usage("no HOME; give --journal".to_owned()))?,
    };
    let local = chain_id == LOCAL_CHAIN_ID;
    let config = SenderConfig {
        caps: FeeCaps {
            total: u128::from(writing.max_fee_gwei) * 1_000_000_000,
            tip: u128::from(writing.max_tip_gwei) * 1_000_000_000,
        },
        confirmations: writing.confirmations.unwrap_or(if local { 1 } else { 3 }),
        deadline: Duration::from_secs(writing.deadline),
        poll: if local { Duration::from_millis(50) } else { Duration::from_secs(1) },
    };
    Sender::open(endpoints, signer, &folder, config).await
}

/// Plans, shows, asks, executes.
async fn run_asked(sender: &mut Sender, operation: &Operation, yes: bool) -> Result<Outcome, Failure> {
    let plan = sender.plan(operation).await?;
    if let Plan::Send { .. } = &plan {
        let text = describe(&plan);
        let asked = tokio::task::spawn_blocking(move || command_line::confirm(&text, "send it?", yes)).await;
        asked.map_err(|error| Failure::new(Exit::Internal, error))??;
    }
    Ok(sender.execute(operation, plan).await?)
}

fn describe(plan: &Plan) -> String {
    let Plan::Send { what, chain_id, from, to, data, nonce, gas_limit, max_fee, tip, .. } = plan else {
        return "nothing to do\n".to_owned();
    };
    let to = to.map_or_else(|| "a new contract".to_owned(), |it| it.to_string());
    let cost = format_ether(U256::from(*gas_limit) * U256::from(*max_fee));
    format!(
        "plan: {what}\n  chain {chain_id}, from {from}, to {to}, nonce {nonce}, {} bytes of data\n  \
         gas {gas_limit}, at most {max_fee} wei each ({tip} of it tip): at most {cost} ether\n",
        data.len()
    )
}

fn print_outcome(
    command: &'static str,
    outcome: &Outcome,
    facts: Value,
    as_json: bool,
    out: &mut dyn Write,
) -> std::io::Result<()> {
    if as_json {
        let mut document = facts;
        document["command"] = command.into();
        match outcome {
            Outcome::AlreadyDone { .. } => document["outcome"] = "already-done".into(),
            Outcome::Done { hash, block, .. } => {
                document["outcome"] = "done".into();
                document["transaction"] = json!(hash);
                document["block"] = json!(block);
            }
        }
        return print_json(out, document);
    }
    match outcome {
        Outcome::AlreadyDone { .. } => writeln!(out, "{command}: already done")?,
        Outcome::Done { hash, block, .. } => {
            writeln!(out, "{command}: done in block {block}, transaction {hash}")?
        }
    }
    match facts["appId"].as_str() {
        Some(app) => writeln!(out, "APP_ID={}", app.trim_start_matches("0x")),
        None => Ok(()),
    }
}

fn print_calldata(operation: &Operation, writing: &Writing, out: &mut dyn Write) -> std::io::Result<()> {
    let document = json!({
        "command": operation.name,
        "description": operation.what,
        "chainId": writing.network.chain_id,
        "to": operation.to,
        "value": "0",
        "data": operation.data,
    });
    match writing.json {
        true => print_json(out, document),
        false => {
            let to = operation.to.unwrap_or_default();
            writeln!(out, "to    {to}\nvalue 0\ndata  {}", operation.data)
        }
    }
}

/// What a KMS says about itself, in either spelling; missing parts are empty.
fn kms_info(path: &Path) -> Result<KmsInfo> {
    let wrong = |problem: String| Error::Usage(format!("{}: {problem}", path.display()));
    let mut text = Vec::new();
    File::open(path)
        .and_then(|it| it.take(MAX_INFO).read_to_end(&mut text))
        .map_err(|it| wrong(it.to_string()))?;
    let json: Value = serde_json::from_slice(&text).map_err(|it| wrong(it.to_string()))?;
    let field = |names: [&str; 2]| -> Result<Bytes> {
        let value = names.iter().find_map(|it| json.get(it)).and_then(Value::as_str).unwrap_or_default();
        let digits = value.trim_start_matches("0x");
        hex::decode(digits).map(Bytes::from).map_err(|_| wrong(format!("{} is not hex", names[0])))
    };
    let info = KmsInfo {
        k256Pubkey: field(["k256_pubkey", "k256Pubkey"])?,
        caPubkey: field(["ca_pubkey", "caPubkey"])?,
        quote: field(["quote", "quote"])?,
        eventlog: field(["eventlog", "eventlog"])?,
    };
    match info.k256Pubkey.is_empty() || info.caPubkey.is_empty() {
        true => Err(wrong("k256_pubkey and ca_pubkey are needed".to_owned())),
        false => Ok(info),
    }
}
