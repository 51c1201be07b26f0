//! The parent instance of a Nitro Enclave, over SSH: what it needs to run enclaves, and the run of one.

mod reach;

pub use reach::{HostKey, REACH_FILE, Reach, ReachError};
