//! Registration and authorisation on the dstack contracts.
//!
//! ```text
//! reads    Endpoints ──view──▶ one block that k of n endpoints agree on ──Reader──▶ state of a contract
//!                                                              └──Authorizer──▶ Decision about a boot info
//! proofs   a block's state root ──ProvenReader──▶ the same decision, from storage proven by eth_getProof
//! writes   Operation ──Sender──▶ plan, journal, transaction, confirmation, state read back (module `write`)
//! ```
//!
//! Endpoints are not trusted: each request has a deadline and a size limit, an endpoint on another chain or with an
//! old head does not count, and a revert is told in the contract's words.

#![forbid(unsafe_code)]

pub mod abi;
pub mod boot_info;
#[cfg(feature = "command")]
pub mod command;
pub mod contracts;
pub mod doctor;
pub mod explain;
#[cfg(feature = "write")]
pub mod keys;
#[cfg(feature = "command")]
pub mod local;
pub mod proof;
pub mod revert;
pub mod rpc;
pub mod status;
#[cfg(feature = "write")]
pub mod write;

mod authorizer;
mod error;
mod http;

pub use alloy::primitives::{Address, B256};
pub use authorizer::{Authorizer, ContractInfo, Decision};
pub use error::{Error, Result};

/// Chain id of local development chains (anvil, Hardhat). They make blocks on demand, so the age of their newest
/// block says nothing.
pub const LOCAL_CHAIN_ID: u64 = 31337;
