//! Stands up what the trip runs on: a dstack KMS on a GCP TDX Confidential VM, and the EC2 host of a Nitro Enclave.
//!
//! | module | what |
//! | --- | --- |
//! | [`pull`] | OS images, fetched and checked
//! | [`project`] | the project folder of dstack-cloud: `app.json`, the measured `app-compose.json`, the configuration volume |
//! | [`bring_up`] | a KMS from nothing to serving, on whatever machine |
//! | [`command`] | the command line |
//! | [`disk`] | the two small disks a Confidential VM starts with, made in process |
//! | [`ec2_nitro`] | the EC2 host of a Nitro Enclave: plan and apply |
//! | [`gcp`] | a small typed client for Compute Engine and Cloud Storage |
//! | [`gcp_tdx`] | a dstack guest on a GCP TDX Confidential VM: plan and apply |
//! | [`nitro_host`] | the parent instance of a Nitro Enclave, over SSH |
//! | [`ledger`] | what was made in a cloud, on disk before and after each call |

#![forbid(unsafe_code)]

mod durable;
mod env_key;
mod error;
mod patience;

pub mod bring_up;
pub mod command;
pub mod disk;
pub mod ec2_nitro;
pub mod gcp;
pub mod gcp_tdx;
pub mod ledger;
pub mod nitro_host;
pub mod project;
pub mod pull;

pub use error::Error;
pub use patience::Deadline;
