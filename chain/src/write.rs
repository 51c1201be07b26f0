//! Writes: one plan, one dry run, one transaction, never two.
//!
//! ```text
//! Operation ──already done?──▶ Done
//!     └─ dry run ─▶ Plan ─(caller agrees)─▶ signed, journalled, fsynced ─▶ sent ─▶ mined ─▶ confirmed ─▶ read back
//!                                                 ▲                          │
//!                                                 └── after a crash: the same bytes again ──┘
//! ```
//!
//! A signed transaction is on disk before the first endpoint sees it. Whoever runs next finds it there, and waits for
//! it or sends the same bytes again; the chain mines them once.

mod artifact;
mod deploy;
mod fees;
mod journal;
mod operation;
mod sender;

pub use artifact::{Artifact, Artifacts};
pub use deploy::{Deployed, Deployment, deploy, run_unasked};
pub use fees::FeeCaps;
pub use journal::{Journal, default_folder};
pub use operation::{Check, Goal, Operation, operations};
pub use sender::{Outcome, Plan, Sender, SenderConfig};
