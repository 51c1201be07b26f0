//! Reproducible enclave images and their measurements.
//!
//! Reads and writes the AWS enclave image format (EIF) in one pass with constant memory, measures it as the
//! Nitro hypervisor does, and builds images from static binaries, directories and container images. The same
//! inputs give the same bytes on any machine: nothing here looks at a clock, a host name or a directory's order.
#![forbid(unsafe_code)]

pub mod agent_config;
mod assemble;
pub mod build;
#[cfg(feature = "command")]
pub mod cli;
mod compress;
pub mod cpio;
mod cpio_read;
#[cfg(feature = "command")]
mod credentials;
mod diff;
#[cfg(feature = "command")]
mod distribution;
mod error;
pub mod format;
mod image;
mod inspect;
pub mod layer;
mod linuxkit;
mod measure;
pub mod metadata;
pub mod oci;
pub mod oci_pack;
mod problem;
pub mod project;
pub mod provenance;
pub mod ramdisk;
mod recipe;
#[cfg(feature = "command")]
pub mod registry;
#[doc(hidden)]
pub mod replay;
mod scratch;
mod sign;
mod signature;
pub mod source;
pub mod tree;

pub use assemble::{Assembled, Assembler, Payload};
pub use compress::Compression;
pub use cpio_read::read_ramdisk;
pub use diff::{Difference, Snapshot};
pub use error::Error;
pub use format::{Arch, HeaderFlags, SectionKind};
pub use image::{Image, Scan, Section};
pub use inspect::{Inspection, SignatureState, SignerFacts};
pub use measure::{Region, Registers, extend};
pub use problem::{Finding, Lenient, Problem, Report, Strict};
pub use recipe::{Fill, Ramdisk, Recipe, check_kernel};
pub use sign::Signer;
pub use signature::{Algorithm, Signature, read_certificate};
