//! One module per noun.

pub(crate) mod attestation;
pub(crate) mod chain;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod enclave;
pub(crate) mod get_keys;
pub(crate) mod host;
pub(crate) mod keys;
pub(crate) mod kms;
pub(crate) mod kms_image;
mod local_enclave;
