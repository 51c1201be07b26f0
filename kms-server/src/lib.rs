//! A KMS that interoperates with dstack-kms.
//!
//! It serves the protocol that upstream's clients speak, over TLS with optional client certificates, and releases an
//! app's keys to Nitro Enclaves whose evidence it has verified and whose image an [`authorise::Authoriser`] allows.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`config`] | kms.toml, checked |
//! | [`store`] | the directory of keys: made once, never overwritten |
//! | [`attest`] | from a client's certificate to verified evidence: Nitro Enclaves, TDX, TDX at Google |
//! | [`agent`], [`own`] | this machine's own evidence, and whether it may be a KMS |
//! | [`authorise`] | who decides: a policy file, a webhook |
//! | `rpc`, `sealed`, [`admin`], `onboard`, `http` | the methods, and HTTP in front of them |
//! | `start` | from settings to a running KMS, through onboarding when there are no keys |
//! | [`server`] | connections and their deadlines; [`Server::start`] runs it all in this process |
//! | [`command`] | the command line |
//!
//! Order for `GetAppKey`: TLS, evidence, claims against evidence, authoriser, derivation. Each step consumes what the
//! one before has proved, so none can be left out.

#![forbid(unsafe_code)]

pub mod admin;
pub mod agent;
pub mod attest;
pub mod audit;
pub mod authorise;
mod breaker;
mod client;
pub mod command;
pub mod config;
mod context;
mod http;
mod metrics;
mod notify;
mod offload;
mod onboard;
pub mod own;
mod peers;
mod rpc;
mod sealed;
pub mod server;
mod start;
pub mod store;
mod text;
pub mod verify;

pub use config::Config;
pub use onboard::gate::SetupToken;
pub use rpc::Clock;
pub use sealed::SealedRelease;
pub use server::{Server, ServerHandle, StartError};
pub use start::{OnboardHandle, Opened};
