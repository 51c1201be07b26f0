//! The parent instance of a Nitro Enclave, over SSH: what it needs to run enclaves, and the run of one.
//!
//! ```text
//! Reach ──▶ Host ──▶ setup: look, act, look again … ──▶ run: upload, measure, start, wait, fetch, end
//! ```
//!
//! Everything on the host is done by commands that can be done again. Nothing is recorded on this machine: a run that was
//! cut, wherever that was, is followed by one that looks at what is there and goes on.

mod allocator;
mod doctor;
mod error;
mod facts;
mod host;
mod instance_connect;
mod login;
mod nitro;
mod reach;
mod run;
mod setup;
mod ssh;
mod tunnel;
mod upload;

pub use allocator::{Allocator, Cpus, Problem};
pub use doctor::{Finding, Severity, diagnose, try_target};
pub use error::Error;
pub use facts::Facts;
pub(crate) use host::quoted;
pub use host::{Host, HostLog, Patience};
pub(crate) use login::LoginKey;
pub use nitro::{Code, Enclave, hint_for};
pub use reach::{Aws, HostKey, REACH_FILE, Reach, ReachError};
pub use run::{Launch, Ran, Told, enclave_name, run};
pub use setup::{Action, Restart, Unfit, Unit, Wanted, setup};
pub use upload::Upload;
