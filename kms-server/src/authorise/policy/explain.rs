//! Which rule decides, and why.

use std::collections::BTreeSet;
use std::fmt;

use attestation::PcrIndex;
use kms_protocol::AppId;
use kms_protocol::wire::webhook::{BootInfo, TEE_VARIANT_NITRO};
use serde::Serialize;

use super::{AppRule, Image, KmsRule, Policy};
use crate::authorise::{Grant, Purpose, Question, Refusal};

/// One rule and what it said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    /// The key in the file.
    pub rule: String,
    /// Whether it lets the question pass.
    pub passed: bool,
    /// What was compared.
    pub detail: String,
}

/// A decision, rule by rule. The first rule that says no decides; none after it is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// The decision.
    pub allowed: bool,
    /// Why not; empty when allowed. This is what the client is told.
    pub reason: String,
    /// The rules, in the order in which they were asked.
    pub steps: Vec<Step>,
}

impl fmt::Display for Explanation {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Step { rule, passed, detail } in &self.steps {
            writeln!(out, "{} {rule}: {detail}", if *passed { "yes" } else { "no " })?;
        }
        if self.allowed { write!(out, "allowed") } else { write!(out, "refused: {}", self.reason) }
    }
}

/// The rules so far; `Err` with the reason once one has said no.
#[derive(Default)]
struct Walk {
    steps: Vec<Step>,
}

impl Walk {
    fn step(
        &mut self,
        rule: impl Into<String>,
        passed: bool,
        detail: impl Into<String>,
        reason: impl FnOnce() -> String,
    ) -> Result<(), String> {
        self.steps.push(Step { rule: rule.into(), passed, detail: detail.into() });
        if passed { Ok(()) } else { Err(reason()) }
    }

    fn listed(
        &mut self,
        rule: String,
        list: &BTreeSet<[u8; 32]>,
        actual: &[u8],
        reason: &str,
    ) -> Result<(), String> {
        let passed = list.iter().any(|listed| listed == actual);
        let verb = if passed { "is" } else { "is not" };
        self.step(rule, passed, format!("{} {verb} in the list", hex::encode(actual)), || reason.to_owned())
    }

    fn image(
        &mut self,
        rule: String,
        list: &[Image],
        question: &Question,
        reason: &str,
    ) -> Result<(), String> {
        let actual = question.boot_info.os_image_hash.as_slice();
        if let Some(position) = list.iter().position(|image| image.hash == actual) {
            let detail = format!("{} is entry {position}", hex::encode(actual));
            return self.step(rule, true, detail, String::new);
        }
        let detail = format!("{} is not in the list", hex::encode(actual));
        let difference = nearest(list, question);
        let detail = difference.as_ref().map_or(detail.clone(), |it| format!("{detail}: {it}"));
        let reason = difference.map_or_else(|| reason.to_owned(), |it| format!("{reason}: {it}"));
        self.step(rule, false, detail, || reason)
    }

    fn tcb(&mut self, policy: &Policy, info: &BootInfo) -> Result<(), String> {
        if info.tcb_status.is_empty() && info.tee_variant == TEE_VARIANT_NITRO {
            return Ok(());
        }
        let passed = policy.tcb_statuses.contains(&info.tcb_status);
        let detail = format!("the TCB is {:?}", info.tcb_status);
        self.step("tcb_statuses", passed, detail, || "TCB status is not allowed".into())?;
        let unknown = info.advisory_ids.iter().find(|id| !policy.advisory_ids.contains(*id));
        let detail =
            unknown.map_or_else(|| "no other advisory applies".into(), |id| format!("{id:?} applies"));
        self.step("advisory_ids", unknown.is_none(), detail, || "advisory ID is not allowed".into())
    }
}

/// Which registers differ from the listed image that has most of them.
fn nearest(list: &[Image], question: &Question) -> Option<String> {
    let indices = [PcrIndex::IMAGE, PcrIndex::KERNEL, PcrIndex::APPLICATION];
    let differences = |image: &Image| {
        let expected = image.registers.as_ref()?;
        let mut differing = Vec::new();
        for (index, expected) in indices.iter().zip(expected) {
            let actual = question.pcr(*index)?;
            if actual != expected {
                differing.push(format!("PCR{} is {actual}, expected {expected}", index.get()));
            }
        }
        Some(differing)
    };
    let nearest = list.iter().filter_map(differences).min_by_key(Vec::len)?;
    Some(nearest.join("; "))
}

impl Policy {
    /// The decision about a question, and how it comes about.
    #[must_use]
    pub fn explain(&self, question: &Question) -> Explanation {
        let mut walk = Walk::default();
        let decision = match question.purpose {
            Purpose::App => self.walk_app(&mut walk, question),
            Purpose::Kms => self.walk_kms(&mut walk, question),
        };
        Explanation {
            allowed: decision.is_ok(),
            reason: decision.err().unwrap_or_default(),
            steps: walk.steps,
        }
    }

    /// The decision alone.
    pub(super) fn decide(&self, question: &Question) -> Result<Grant, Refusal> {
        let Explanation { allowed, reason, steps: _ } = self.explain(question);
        if allowed {
            Ok(Grant { gateway_app_id: self.gateway_app_id.clone() })
        } else {
            Err(Refusal::denied(&reason))
        }
    }

    fn walk_app(&self, walk: &mut Walk, question: &Question) -> Result<(), String> {
        let info = &question.boot_info;
        let app = AppId::try_from(info.app_id.as_slice()).ok();
        let known = app.and_then(|app| self.apps.get(&app).map(|rule| (app, rule)));
        let Some((app, AppRule { images, compose_hashes, devices, registers })) = known else {
            let detail = format!("there is no app {}", hex::encode(&info.app_id));
            return walk.step("apps", false, detail, || "app not registered".into());
        };
        let key = format!("apps.{app}");
        walk.step(&key, true, "the app is there", String::new)?;
        if let Some(images) = &self.images {
            walk.image("images".into(), images, question, "OS image is not allowed")?;
        }
        // Upstream's word for it: to an enclave, image and compose hash are one.
        walk.image(format!("{key}.images"), images, question, "compose hash not allowed")?;
        let compose_key = format!("{key}.compose_hashes");
        match compose_hashes {
            Some(list) => walk.listed(compose_key, list, &info.compose_hash, "compose hash not allowed")?,
            // An enclave's image is all there is to it; other platforms run something on theirs.
            None if info.tee_variant == TEE_VARIANT_NITRO && info.compose_hash == info.os_image_hash => {}
            None => {
                let detail =
                    format!("{:?} runs something on its image, and no list says what", info.tee_variant);
                walk.step(compose_key, false, detail, || "compose hash not allowed".into())?;
            }
        }
        if let Some(devices) = devices {
            let reason = "app is not allowed to boot on this device";
            walk.listed(format!("{key}.devices"), devices, &info.device_id, reason)?;
        }
        for (index, allowed) in registers {
            let actual = question.pcr(*index);
            let passed = actual.is_some_and(|actual| allowed.contains(actual));
            let name = format!("PCR{}", index.get());
            let detail = match actual {
                Some(actual) => format!("{name} is {actual}"),
                None => format!("{name} is not known"),
            };
            let rule = format!("{key}.pcr{}", index.get());
            walk.step(rule, passed, detail.clone(), || format!("{name} is not allowed: {detail}"))?;
        }
        walk.tcb(self, info)
    }

    fn walk_kms(&self, walk: &mut Walk, question: &Question) -> Result<(), String> {
        let info = &question.boot_info;
        let Some(KmsRule { images, mr_aggregated, devices }) = &self.kms else {
            let detail = "the policy has no rules for a KMS";
            return walk.step("kms", false, detail, || detail.into());
        };
        walk.tcb(self, info)?;
        walk.image("kms.images".into(), images, question, "OS image is not allowed")?;
        let key = "kms.mr_aggregated".to_owned();
        walk.listed(key, mr_aggregated, &info.mr_aggregated, "aggregated MR not allowed")?;
        if let Some(devices) = devices {
            let reason = "KMS is not allowed to boot on this device";
            walk.listed("kms.devices".into(), devices, &info.device_id, reason)?;
        }
        Ok(())
    }
}
