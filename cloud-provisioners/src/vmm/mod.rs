//! A dstack guest on a bare-metal TDX host, through the HTTP API of its dstack-vmm.

mod client;
pub mod command;
mod console;
mod deployment;
mod machine;
mod types;

pub use client::{Client, Error};
pub(crate) use deployment::published;
pub use deployment::{Config, Deployment, Outcome, Prepared, Refusal, SECTION};
pub use machine::VmmMachine;
pub use types::{Configuration, GuestImage, Machine, PortMapping, UserConfig};
