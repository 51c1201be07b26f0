//! A small typed client for the calls a KMS on GCP needs: Compute Engine v1 and Cloud Storage v1.
//!
//! Each call has a deadline and is repeated while that makes sense: what makes or deletes something carries one
//! `requestId`, so that Google ignores a repetition. Bodies follow the discovery documents of revision 20261106
//! (compute) and 20261009 (storage).

mod client;
mod compute;
mod credentials;
mod error;
mod storage;
mod types;

pub use client::{Client, Endpoints};
pub use credentials::Credentials;
pub use error::{Error, Reason};
pub use storage::{Object, Upload};
pub use types::{
    AccessConfig, AttachedDisk, ConfidentialInstanceConfig, Disk, Firewall, GuestOsFeature, Image,
    InitializeParams, Instance, NetworkInterface, NewImage, NewInstance, Permission, RawDisk, Scheduling,
    SerialOutput, ServiceAccount, ShieldedInstanceConfig, Tags, Zone,
};
