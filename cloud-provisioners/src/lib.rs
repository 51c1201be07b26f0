//! Stands up what the trip runs on: a dstack KMS on a GCP TDX Confidential VM or a TDX host of one's own, and the EC2 host
//! of a Nitro Enclave.
//!
//! | module | what |
//! | --- | --- |
//! | [`project`] | the project folder of dstack-cloud: `app.json`, the measured `app-compose.json`, the configuration volume |
//! | [`bring_up`] | a KMS from nothing to serving, on whatever machine |
//! | [`command`] | the command line |
//! | [`doctor`] | looks at a TDX host before a KMS is put on it |
//! | [`disk`] | the two small disks a Confidential VM starts with, made in process |
//! | [`ec2_nitro`] | the EC2 host of a Nitro Enclave: plan and apply |
//! | [`gcp`] | a small typed client for Compute Engine and Cloud Storage |
//! | [`gcp_tdx`] | a dstack guest on a GCP TDX Confidential VM: plan and apply |
//! | [`ledger`] | what was made in a cloud, on disk before and after each call |
//! | [`nitro_host`] | the parent instance of a Nitro Enclave, over SSH |
//! | [`pull`] | fetches an OS image |
//! | [`registry`] | whether a container image is where guests would pull it |
//! | [`vmm`] | a dstack guest on a bare-metal host, through its dstack-vmm |

#![forbid(unsafe_code)]

mod durable;
mod env_key;
mod error;
mod http;
mod lock;
mod patience;

pub mod bring_up;
pub mod command;
pub mod disk;
pub mod doctor;
pub mod ec2_nitro;
pub mod gcp;
pub mod gcp_tdx;
pub mod ledger;
pub mod nitro_host;
pub mod project;
pub mod pull;
pub mod registry;
pub mod vmm;

pub use error::Error;
pub use lock::Lock;
pub use patience::Deadline;
