use std::fs::File;
use std::io::{Read, Write, stdin};
use std::path::Path;
use std::time::Duration;

use alloy::primitives::Address;
use attestation::AttestationDocument;
use command_line::{Exit, Failure};
use kms_protocol::wire::webhook::{BootInfo, TEE_VARIANT_NITRO};
use serde_json::json;
use tokio::time::sleep;

use super::args::{Doctor, Explain, Reading, Status, Watch};
use super::{endpoints, now, print_json, printed};
use crate::boot_info::{app_boot_info, from_json};
use crate::doctor::{Diagnosis, Expected, diagnose};
use crate::explain::{Explanation, explain_app, explain_kms};
use crate::proof::{KnownCode, ProvenReader};
use crate::rpc::{Endpoints, View};
use crate::status::{AppStatus, KmsStatus, app_status, event, kms_status, logs};
use crate::{Error, Result};

/// Largest boot info or attestation document that is read, in bytes.
const MAX_INPUT: u64 = 1 << 20;
/// The device id that a dstack KMS derives for every Nitro enclave: SHA-256 of `i`, the text before the first `-` of
/// the module id (reference, BootInfo for Nitro).
const NITRO_DEVICE_ID: &str = "de7d1b721a1e0632b7cf04edf5032c8ecffa9f9a08492152b926f1a5a7e765d7";

pub(super) async fn status(it: Status, out: &mut dyn Write) -> Result<Exit, Failure> {
    let endpoints = endpoints(&it.network)?.behind_head(it.reading.behind_head);
    let view = view(&endpoints, &it.reading).await?;
    let kms = kms_status(&endpoints, &view, it.kms.kms, it.from_block).await?;
    let mut apps = Vec::new();
    for app in &it.app_id {
        apps.push(app_status(&endpoints, &view, *app, it.from_block).await?);
    }
    let proven = match known_code(&it.reading) {
        Some(code) => Some(confirm(&endpoints, &view, code, &kms, &apps).await?),
        None => None,
    };
    if it.json {
        let proven = proven.map(|entries| json!({ "blockHash": view.head.hash, "entries": entries }));
        let document = json!({ "command": "status", "kms": kms, "apps": apps, "proven": proven });
        return printed(print_json(out, document));
    }
    let printing = print_kms(&kms, out).and_then(|()| apps.iter().try_for_each(|app| print_app(app, out)));
    printed(printing.and_then(|()| match proven {
        Some(entries) => writeln!(out, "{entries} entries proven by the storage of block {}", view.head.hash),
        None => Ok(()),
    }))
}

/// The block that was asked for.
async fn view(endpoints: &Endpoints, reading: &Reading) -> Result<View> {
    match reading.block_hash {
        Some(hash) => endpoints.view_of(hash).await,
        None => endpoints.view().await,
    }
}

/// The code to prove by, when proofs were asked for; the arguments then demand both.
fn known_code(reading: &Reading) -> Option<KnownCode> {
    let (kms, app) = reading.kms_code.zip(reading.app_code)?;
    reading.prove.then_some(KnownCode { kms, app })
}

async fn confirm(
    endpoints: &Endpoints,
    view: &View,
    code: KnownCode,
    kms: &KmsStatus,
    apps: &[AppStatus],
) -> Result<usize> {
    let confirm = async |it| {
        let reader = ProvenReader::new(it, &view.head, kms.contract, code);
        let mut entries = reader.confirm_kms(kms).await?;
        for app in apps {
            entries += reader.confirm_app(app).await?;
        }
        Ok(entries)
    };
    endpoints.first_success(confirm).await
}

fn print_kms(kms: &KmsStatus, out: &mut dyn Write) -> std::io::Result<()> {
    writeln!(out, "KMS contract {} on chain {} at block {}", kms.contract, kms.chain_id, kms.block)?;
    print_owner(kms.owner, kms.pending_owner, out)?;
    writeln!(out, "  implementation     {} with code {}", kms.implementation, kms.implementation_code)?;
    writeln!(
        out,
        "  app implementation {} with code {}",
        kms.app_implementation, kms.app_implementation_code
    )?;
    let gateway = kms_protocol::wire::webhook::bounded_reason(&kms.gateway_app_id);
    writeln!(out, "  gateway app id     {}", if gateway.is_empty() { "none" } else { &gateway })?;
    print_list("images", &kms.images, out)?;
    print_list("KMS nodes", &kms.kms_nodes, out)?;
    print_list("KMS devices", &kms.kms_devices, out)?;
    print_list("apps", &kms.apps, out)
}

fn print_app(app: &AppStatus, out: &mut dyn Write) -> std::io::Result<()> {
    writeln!(out, "app {}", app.contract)?;
    print_owner(app.owner, app.pending_owner, out)?;
    writeln!(out, "  implementation     {}", app.implementation)?;
    writeln!(out, "  any device         {}", app.allow_any_device)?;
    writeln!(out, "  current TCB needed {}", app.require_tcb_up_to_date)?;
    print_list("compose hashes", &app.compose_hashes, out)?;
    print_list("devices", &app.devices, out)
}

fn print_owner(owner: Address, pending: Option<Address>, out: &mut dyn Write) -> std::io::Result<()> {
    match pending {
        Some(pending) => writeln!(out, "  owner              {owner}, offered to {pending}"),
        None => writeln!(out, "  owner              {owner}"),
    }
}

fn print_list<T: std::fmt::Display>(name: &str, items: &[T], out: &mut dyn Write) -> std::io::Result<()> {
    writeln!(out, "  {name}: {}", items.len())?;
    items.iter().try_for_each(|it| writeln!(out, "    {it}"))
}

pub(super) async fn explain(it: Explain, out: &mut dyn Write) -> Result<Exit, Failure> {
    let info = boot_info(&it)?;
    let endpoints = endpoints(&it.network)?.behind_head(it.reading.behind_head);
    let view = view(&endpoints, &it.reading).await?;
    let explained = match it.as_kms {
        true => explain_kms(&endpoints, &view, it.kms.kms, &info).await?,
        false => explain_app(&endpoints, &view, it.kms.kms, &info).await?,
    };
    let proven = match known_code(&it.reading) {
        Some(code) => {
            prove(&endpoints, &view, &it, code, &info, &explained).await?;
            Some(view.head.hash)
        }
        None => None,
    };
    let exit = if explained.is_allowed { Exit::Done } else { Exit::Refused };
    match it.json {
        true => {
            let document = json!({ "command": "explain", "explanation": explained, "provenByBlock": proven });
            printed(print_json(out, document))?
        }
        false => printed(print_explanation(&explained, out).and_then(|()| match proven {
            Some(hash) => writeln!(out, "proven by the storage of block {hash}"),
            None => Ok(()),
        }))?,
    };
    Ok(exit)
}

/// Makes sure that the proven storage leads to the decision that the endpoints told.
async fn prove(
    endpoints: &Endpoints,
    view: &View,
    it: &Explain,
    code: KnownCode,
    info: &BootInfo,
    explained: &Explanation,
) -> Result<()> {
    let who = app_boot_info(info)?;
    let (is_allowed, reason) = endpoints
        .first_success(async |endpoint| {
            let reader = ProvenReader::new(endpoint, &view.head, it.kms.kms, code);
            match it.as_kms {
                true => reader.is_kms_allowed(&who).await,
                false => reader.is_app_allowed(&who).await,
            }
        })
        .await?;
    match (is_allowed, reason) == (explained.is_allowed, explained.reason.as_str()) {
        true => Ok(()),
        false => Err(Error::Proof {
            what: "the decision".to_owned(),
            endpoint: "the agreed endpoints".to_owned(),
            problem: format!(
                "they say allowed {} ({:?}), the storage of block {} leads to {is_allowed} ({reason:?})",
                explained.is_allowed, explained.reason, view.head.hash
            ),
        }),
    }
}

fn print_explanation(it: &Explanation, out: &mut dyn Write) -> std::io::Result<()> {
    for rule in &it.rules {
        writeln!(out, "{} {}", if rule.holds { "yes" } else { "NO " }, rule.rule)?;
        if !rule.holds {
            writeln!(out, "      the contract says: {}", rule.refusal)?;
        }
        if let Some(remedy) = &rule.remedy {
            writeln!(out, "      to change it: {remedy}")?;
        }
    }
    match it.is_allowed {
        true => writeln!(out, "allowed at block {}", it.block)?,
        false => writeln!(out, "denied at block {}: {}", it.block, it.reason)?,
    }
    if !it.consistent {
        writeln!(out, "the contract decides by rules of its own: its answer does not follow from the above")?;
    }
    Ok(())
}

/// The boot info of a file, or the one a KMS would make for an image.
fn boot_info(it: &Explain) -> Result<BootInfo> {
    match (&it.file, it.image, it.app_id) {
        (Some(path), ..) => from_file(path, it.app_id),
        (None, Some(image), Some(app_id)) => Ok(nitro(&image[..], app_id)),
        (None, ..) => Err(Error::Usage("give a FILE, or --image with --app-id".to_owned())),
    }
}

/// A boot info as JSON, or one made of an attestation document the way a KMS does. The document is only looked at:
/// whoever asks wants to know what would be decided, and gets no key for it.
fn from_file(path: &Path, app_id: Option<Address>) -> Result<BootInfo> {
    let wrong = |problem: String| Error::Usage(format!("{}: {problem}", path.display()));
    let mut bytes = Vec::new();
    let read = match path == Path::new("-") {
        true => stdin().take(MAX_INPUT).read_to_end(&mut bytes),
        false => File::open(path).and_then(|it| it.take(MAX_INPUT).read_to_end(&mut bytes)),
    };
    read.map_err(|error| wrong(error.to_string()))?;
    if bytes.trim_ascii_start().starts_with(b"{") {
        let mut info = from_json(&bytes)?;
        if let Some(app_id) = app_id {
            info.app_id = app_id.to_vec();
        }
        return Ok(info);
    }
    let document = AttestationDocument::decode(&bytes);
    let document =
        document.map_err(|error| wrong(format!("neither JSON nor an attestation document: {error}")))?;
    let app_id =
        app_id.ok_or_else(|| wrong("an attestation document names no app; give --app-id".to_owned()))?;
    Ok(nitro(document.os_image_hash().as_bytes(), app_id))
}

/// What a KMS asks about a Nitro enclave with this image.
fn nitro(image: &[u8], app_id: Address) -> BootInfo {
    BootInfo {
        tee_variant: TEE_VARIANT_NITRO.to_owned(),
        mr_aggregated: image.to_vec(),
        mr_system: image.to_vec(),
        os_image_hash: image.to_vec(),
        compose_hash: image.to_vec(),
        app_id: app_id.to_vec(),
        device_id: hex::decode(NITRO_DEVICE_ID).unwrap_or_default(),
        ..BootInfo::default()
    }
}

pub(super) async fn watch(it: Watch, out: &mut dyn Write) -> Result<Exit, Failure> {
    let endpoints = endpoints(&it.network)?;
    let contracts: Vec<Address> = [it.kms.kms].into_iter().chain(it.app_id).collect();
    let mut next = match it.from_block {
        Some(block) => block,
        None => endpoints.view().await?.block() + 1,
    };
    let mut left = it.count.unwrap_or(u64::MAX);
    let mut troubles: u32 = 0;
    while left > 0 {
        let looked = async {
            let head = endpoints.view().await?.block();
            let logs =
                if head < next { Vec::new() } else { logs(&endpoints, &contracts, next, head).await? };
            Ok((head, logs))
        };
        match looked.await {
            Ok((head, logs)) => {
                troubles = 0;
                for event in logs.iter().filter_map(event) {
                    let line = match it.json {
                        true => print_json(out, json!({ "event": event })),
                        false => {
                            let block = event.block.unwrap_or_default();
                            writeln!(out, "block {block} {} {} {}", event.contract, event.name, event.values)
                                .and_then(|()| out.flush())
                        }
                    };
                    if let Err(error) = line {
                        return printed(Err(error));
                    }
                    left -= 1;
                    if left == 0 {
                        return Ok(Exit::Done);
                    }
                }
                next = next.max(head + 1);
            }
            Err(error @ Error::WrongChain { .. }) => return Err(error.into()),
            Err(error) if troubles < 10 => {
                troubles += 1;
                tracing::warn!(%error, "looking again");
            }
            Err(error) => return Err(error.into()),
        }
        sleep(Duration::from_secs(it.every)).await;
    }
    Ok(Exit::Done)
}

pub(super) async fn doctor(it: Doctor, out: &mut dyn Write) -> Result<Exit, Failure> {
    let endpoints = endpoints(&it.network)?;
    let expected = Expected {
        chain_id: it.network.chain_id,
        contract: it.kms,
        now: now(),
        max_head_age: it.network.max_head_age,
    };
    let found = diagnose(&endpoints, expected).await;
    let usable = found.iter().filter(|it| it.is_usable()).count();
    match it.json {
        true => {
            printed(print_json(out, json!({ "command": "doctor", "endpoints": found, "usable": usable })))?
        }
        false => printed(found.iter().try_for_each(|it| print_diagnosis(it, out)))?,
    };
    Ok(if usable >= endpoints.agreement() { Exit::Done } else { Exit::Refused })
}

fn print_diagnosis(it: &Diagnosis, out: &mut dyn Write) -> std::io::Result<()> {
    writeln!(out, "{} {}", it.endpoint, if it.is_usable() { "is usable" } else { "is NOT usable" })?;
    for finding in &it.findings {
        writeln!(out, "  {} {}: {}", if finding.ok { "ok" } else { "NO" }, finding.probe, finding.detail)?;
        if !finding.ok {
            writeln!(out, "     costs: {}", finding.cost)?;
        }
    }
    Ok(())
}
