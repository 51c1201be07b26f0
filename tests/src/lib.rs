//! What the end-to-end tests share: the project's programs, started as a user would start them and ended with the test.

#![forbid(unsafe_code)]

mod agent;
pub mod aws;
mod contracts;
mod file_server;
pub mod google;
mod images;
mod kms_machine;
mod machine;
mod process;
mod programs;
mod readme;
mod relay;
pub mod serve;
mod sshd;
mod tdx;
mod trip;
pub mod vmm;

pub use agent::Agent;
pub use contracts::{Contracts, anvil};
pub use file_server::serve_file;
pub use images::{kernel, static_agent};
pub use kms_machine::{Hold, KmsMachine, Setup, free_port};
pub use machine::{Guest, Machine};
pub use process::{Daemon, Finished, answer, finish, run};
pub use programs::program;
pub use readme::{readme_blocks, shell_blocks};
pub use relay::Recorder;
pub use sshd::NitroHost;
pub use tdx::TdxHost;
pub use trip::{APP_ID, IMAGE, Trip, Variation, kms_settings, start_kms};
