//! Boots enclave images on this machine, with a Nitro Security Module that signs.
//!
//! ```text
//!   guest                          this machine
//! ┌───────────────────────┐      ┌──────────────────────────────────────────────────┐
//! │ init and application  │vsock │ vhost-device-vsock ── Unix sockets ── host-proxy │
//! │ stock Linux nsm driver│virtio│ this process: nsm-emulator, local root           │
//! └───────────────────────┘      └──────────────────────────────────────────────────┘
//! ```
//!
//! An enclave image consists of a kernel, a command line and ramdisks. QEMU's microvm boots them as the Nitro
//! hypervisor would; our NSM is a vhost-user device in it, so the guest's own driver gets documents that a verifier
//! accepts with nothing changed but its trust anchor. The guest differs from one on AWS in what is appended to its
//! command line ([`MachineConfig::append`] and `keyferry.parent_cid=2`: the parent is at CID 2 here, not 3), which is
//! not measured there either.
//!
//! Nothing here needs privileges. Every process started dies with the thread that watches it, every file has no name
//! or lies in a directory that the next [`Registry::list`] removes if its owner was killed.

#![deny(unsafe_op_in_unsafe_fn)]

mod arguments;
mod console;
mod error;
mod image;
mod machine;
mod nsm;
mod process;
mod state;
mod supervisor;
mod tools;
mod vm;

pub use console::{ExitReport, GuestEnd, Log, MAX_LOG, Plain, PlainText, Sink};
pub use error::Error;
pub use image::{BootImage, ImageParts, Registers, Spool};
pub use machine::{Accelerator, GuestCid, MachineConfig, MachineError, MachineKind, Memory};
pub use state::{EnclaveState, Home, Name, Phase, Registry};
pub use tools::{Search, Tools};
pub use vm::{BootTime, Ending, Launch, Stopper, Vm, vsock_path};
