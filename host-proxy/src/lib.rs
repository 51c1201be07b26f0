//! The enclave's only way out: an allow-listing CONNECT proxy on the parent.

#![forbid(unsafe_code)]

pub mod http;
pub mod policy;
