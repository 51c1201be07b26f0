//! The EC2 host of a Nitro Enclave: planned, made, adopted and removed.
//!
//! ```text
//! options ──▶ Wanted ─┐
//! AWS ─────▶ Found ───┼─▶ plan (pure) ──▶ steps ──▶ apply ──▶ ledger, host.json, deployment.json
//! ledger ─────────────┘
//! ```
//!
//! Two files in `.keyferry` of the host's directory: `ec2.json`, the [ledger](crate::ledger) of what was made, and
//! `host.json`, the [`State`]: what was asked for, and what is known of the [`Host`] once it runs.

mod state;

pub use state::{Access, Architecture, Host, ImageChoice, KernelLine, Launch, State, Wanted};

/// Tag on everything made here.
pub const MANAGED_BY: (&str, &str) = ("managed-by", "keyferry");
/// Tag with the id of the deployment something belongs to.
pub const DEPLOYMENT_TAG: &str = "deployment-id";
