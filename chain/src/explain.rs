//! Why a boot info is allowed or not: each rule with the state it reads, and the contract's own answer beside it.

use alloy::primitives::Address;
use kms_protocol::wire::webhook::{BootInfo, bounded_reason};
use serde::Serialize;

use crate::Result;
use crate::abi::{AppBootInfo, DstackApp, DstackKms};
use crate::boot_info::app_boot_info;
use crate::contracts::Reader;
use crate::rpc::{Endpoints, View};
use crate::status::requires_tcb;

/// What both contracts compare a measurement status with.
const UP_TO_DATE: &str = "UpToDate";

/// One condition of the contracts.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Rule {
    /// The condition, in words.
    pub rule: String,
    /// Whether it holds.
    pub holds: bool,
    /// The contract's words when it does not.
    pub refusal: &'static str,
    /// What would make it hold.
    pub remedy: Option<String>,
}

/// A decision and what led to it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// At which block.
    pub block: u64,
    /// The contract's decision.
    pub is_allowed: bool,
    /// The contract's words.
    pub reason: String,
    /// The rules in the contract's order; those after a missing contract are left out.
    pub rules: Vec<Rule>,
    /// Whether the rules lead to the contract's answer. If not, the contract decides by rules of its own.
    pub consistent: bool,
}

/// Explains the answer about an application.
///
/// # Errors
/// See [`Reader::read`].
pub async fn explain_app(
    endpoints: &Endpoints,
    view: &View,
    kms: Address,
    info: &BootInfo,
) -> Result<Explanation> {
    let who = app_boot_info(info)?;
    let contract = Reader::new(endpoints, view, kms);
    let app = Reader::new(endpoints, view, who.appId);
    let mut rules = vec![
        rule(
            format!("the app {} is registered", who.appId),
            contract.app_registered(who.appId).await?,
            "App not registered",
            format!("keyferry chain register-app {}", who.appId),
        ),
        image_rule(contract, &who).await?,
    ];
    let deployed = app.exists().await?;
    rules.push(Rule {
        rule: format!("there is a contract at {}", who.appId),
        holds: deployed,
        refusal: "App not deployed or invalid address",
        remedy: (!deployed).then(|| "keyferry chain create-app".to_owned()),
    });
    if deployed {
        // A contract of somebody else's making need not have these functions; its own answer counts below.
        rules.extend(app_rules(app, &who).await.unwrap_or_default());
    }
    let (is_allowed, reason) = contract.is_app_allowed(who).await?;
    Ok(explanation(view, rules, is_allowed, &reason))
}

/// Explains the answer about a KMS.
///
/// # Errors
/// See [`Reader::read`].
pub async fn explain_kms(
    endpoints: &Endpoints,
    view: &View,
    kms: Address,
    info: &BootInfo,
) -> Result<Explanation> {
    let who = app_boot_info(info)?;
    let contract = Reader::new(endpoints, view, kms);
    let node = DstackKms::kmsAllowedAggregatedMrsCall { mrAggregated: who.mrAggregated };
    let device = DstackKms::kmsAllowedDeviceIdsCall { deviceId: who.deviceId };
    let rules = vec![
        Rule {
            rule: format!("the TCB status {:?} is {UP_TO_DATE:?}", who.tcbStatus),
            holds: who.tcbStatus == UP_TO_DATE,
            refusal: "TCB status is not up to date",
            remedy: None,
        },
        image_rule(contract, &who).await?,
        rule(
            format!("the aggregated measurement {} is allowed", who.mrAggregated),
            contract.read(node).await?,
            "Aggregated MR not allowed",
            format!("keyferry chain add-kms {}", who.mrAggregated),
        ),
        rule(
            format!("the device {} may run a KMS", who.deviceId),
            contract.read(device).await?,
            "KMS is not allowed to boot on this device",
            format!("keyferry chain add-device {}", who.deviceId),
        ),
    ];
    let (is_allowed, reason) = contract.is_kms_allowed(who).await?;
    Ok(explanation(view, rules, is_allowed, &reason))
}

async fn image_rule(kms: Reader<'_>, who: &AppBootInfo) -> Result<Rule> {
    Ok(rule(
        format!("the image {} is allowed", who.osImageHash),
        kms.image_allowed(who.osImageHash).await?,
        "OS image is not allowed",
        format!("keyferry chain add-image {}", who.osImageHash),
    ))
}

async fn app_rules(app: Reader<'_>, who: &AppBootInfo) -> Result<Vec<Rule>> {
    let required = requires_tcb(app).await?;
    let any_device = app.read(DstackApp::allowAnyDeviceCall {}).await?;
    let device = DstackApp::allowedDeviceIdsCall { deviceId: who.deviceId };
    let listed = app.read(device).await?;
    Ok(vec![
        rule(
            match required {
                true => format!("the TCB status {:?} is {UP_TO_DATE:?}", who.tcbStatus),
                false => "the app does not ask for a TCB status".to_owned(),
            },
            !required || who.tcbStatus == UP_TO_DATE,
            "TCB status is not up to date",
            format!(
                "keyferry chain require-tcb --off --app-id {} (a Nitro enclave never has a status)",
                who.appId
            ),
        ),
        rule(
            format!("the compose hash {} is allowed", who.composeHash),
            app.compose_hash_allowed(who.composeHash).await?,
            "Compose hash not allowed",
            format!("keyferry chain add-hash --app-id {} {}", who.appId, who.composeHash),
        ),
        rule(
            match any_device {
                true => "the app may run on any device".to_owned(),
                false => format!("the device {} is allowed", who.deviceId),
            },
            any_device || listed,
            "Device not allowed",
            format!("keyferry chain add-device --app-id {} {}", who.appId, who.deviceId),
        ),
    ])
}

fn rule(rule: String, holds: bool, refusal: &'static str, remedy: String) -> Rule {
    Rule { rule, holds, refusal, remedy: (!holds).then_some(remedy) }
}

fn explanation(view: &View, rules: Vec<Rule>, is_allowed: bool, reason: &str) -> Explanation {
    let first_refusal = rules.iter().find(|it| !it.holds).map(|it| it.refusal);
    Explanation {
        block: view.block(),
        is_allowed,
        consistent: match first_refusal {
            Some(refusal) => !is_allowed && refusal == reason,
            None => is_allowed,
        },
        reason: bounded_reason(reason),
        rules,
    }
}
