//! Fetches an enclave's application keys from a dstack KMS.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`trip`] | [`get_keys`]: evidence, two connections, checks, [`Keys`] |
//! | [`trust`] | [`KmsTrust`]: what makes a server the KMS |
//! | [`nsm`], [`evidence`] | the Nitro Security Module, and what it says about this enclave |
//! | [`policy`] | TDX evidence of the KMS against a policy file |
//! | [`output`] | files that are complete or absent |
//! | [`delivery`] | where the keys go: file, descriptor, export; and how they are renewed |
//! | [`guest_api`] | the dstack guest API for the app |
//! | [`service`] | both of them around one app |
//! | [`config`] | the measured configuration of an enclave |
//! | [`init`] | the enclave's first process: mounts, randomness, keys, the app's life |
//! | [`network`] | the app's way to the parent, and the parent's to the app |
//! | [`command`] | the command line, shared with other programs |
//!
//! **Names.** Through a proxy this program resolves nothing: the proxy gets the host name. Without one the C library
//! resolves it, and a static binary (`-C target-feature=+crt-static`) can do that only where the shared modules of
//! the same glibc are installed. So inside an enclave, which has no DNS either, name a proxy or use an IP address that
//! the KMS's certificate holds.
//!
//! **Memory.** Keys live in wiped types, and bodies in wiped buffers. What TLS, HTTP and JSON keep of them in their own
//! buffers is wiped by the program's allocator, which clears all memory it frees; a program that embeds this library
//! and cares has to do the same. Stacks are not wiped.
//!
//! Trust is decided by roots and never by a mode: this crate behaves the same for a real module and a stand-in, for a
//! KMS in the cloud and one in a test.

#![deny(unsafe_code)]

pub mod command;
pub mod config;
mod deadlines;
pub mod delivery;
mod error;
pub mod evidence;
pub mod guest_api;
mod http;
pub mod init;
mod keys;
pub mod network;
pub mod nsm;
pub mod output;
pub mod policy;
mod process;
mod proxy;
pub mod service;
pub mod trip;
pub mod trust;
mod url;

pub use deadlines::{Deadlines, DurationArg, ParseDurationError, Retry};
pub use error::Error;
pub use http::HttpError;
pub use keys::{Exchange, KeySummary, Keys};
pub use process::forbid_core_dumps;
pub use proxy::{Proxy, ProxyError};
pub use trip::{DebugMode, GetKeys, SealedRelease, Step, get_keys};
pub use trust::{KmsTrust, NoTrustAnchor};
pub use url::{KmsUrl, ParseUrlError};
