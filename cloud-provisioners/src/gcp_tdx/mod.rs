//! A dstack guest on a GCP TDX Confidential VM: planned, made, replaced and removed.
//!
//! ```text
//! project folder ──▶ Wanted ─┐
//! Google ─────────▶ Found ───┼─▶ plan (pure) ──▶ steps ──▶ apply ──▶ ledger, state.json
//! ledger ────────────────────┘
//! ```
//!
//! Every check and every upload comes before the first deletion, because deleting a machine whose disk key is sealed to
//! its TPM deletes its keys for good.

mod apply;
mod deployment;
pub mod firewall;
mod machine;
mod plan;
mod wanted;

pub use apply::Observer;
pub use deployment::{Deployment, Prepared};
pub use machine::GcpMachine;
pub use plan::{Plan, Refusal, Replace, Step};
pub use wanted::{BootDisk, Wanted};

/// Label on everything made here.
pub const MANAGED_BY: (&str, &str) = ("managed-by", "keyferry");
/// Label with the id of the deployment something belongs to.
pub const DEPLOYMENT_LABEL: &str = "deployment-id";
/// Label of a configuration image with the zone of its instance: images are global, instances are not.
pub const ZONE_LABEL: &str = "zone";

/// Label of a machine with the beginning of the hash of its configuration volume.
pub const CONFIGURATION_LABEL: &str = "configuration";

/// The network tag by which firewall rules find the machine.
#[must_use]
pub fn firewall_tag(instance: &str) -> String {
    format!("fw-{instance}")
}
