//! The EC2 host of a Nitro Enclave: planned, made, adopted and removed.
//!
//! ```text
//! options ──▶ Wanted ─┐
//! AWS ─────▶ Found ───┼─▶ plan (pure) ──▶ steps ──▶ apply ──▶ ledger, deployment.json, keyferry-host.json
//! ledger ─────────────┘
//! ```
//!
//! Two files in `.keyferry` of the host's directory: `ec2.json`, the [ledger](crate::ledger) of what was made, and
//! `host.json`, the [`State`]. Names of key pairs and security groups are unique where they live, and a launch is asked
//! for under a token that is recorded first: a repeated call meets what it made. Everything carries the deployment's id
//! in a tag, by which it is found again when an answer was lost.

mod apply;
mod change;
mod client;
mod console;
mod deployment;
mod error;
mod found;
mod key_pair;
mod plan;
mod read;
mod removal;
mod state;

pub use apply::Observer;
pub use client::{Client, Patience, Place};
pub use deployment::{Deployment, DeploymentFile};
pub use error::AwsError;
pub use found::Instance;
pub use plan::{Plan, Refusal, Step};
pub use read::Which;
pub use removal::Removal;
pub use state::{Access, ImageChoice, KernelLine, Launch, State, Wanted, default_key_file};

/// Tag on everything made here.
pub const MANAGED_BY: (&str, &str) = ("managed-by", "keyferry");
/// Tag with the id of the deployment something belongs to.
pub const DEPLOYMENT_TAG: &str = "deployment-id";
