//! Who may have keys: one trait, and the ways to decide.
//!
//! An authoriser is asked only about clients whose evidence was verified and whose image hash was derived from it, so
//! nothing it is told is the client's word, except for the app id and the instance id, which are what it decides about.

pub mod policy;
pub mod webhook;

use std::future::Future;
use std::pin::Pin;

use kms_protocol::wire::webhook::{AuthInfo, BootInfo, bounded_reason};

use crate::attest::AttestedClient;

/// A boxed future, so that authorisers can be chosen at run time.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Decides which application gets its keys.
pub trait Authoriser: Send + Sync {
    /// Whether this client may have the keys of the app it names. Answers within a deadline of its own.
    fn authorise_app<'a>(
        &'a self,
        client: &'a AttestedClient,
        boot_info: &'a BootInfo,
    ) -> Pending<'a, Result<Grant, Refusal>>;

    /// Facts for `GetMeta`, fetched in the background; `None` when there are none to fetch.
    fn describe(&self) -> Pending<'_, Result<Option<AuthInfo>, Refusal>>;

    /// Whether it allows everything, which `GetMeta` tells every client.
    fn is_dev(&self) -> bool {
        false
    }
}

/// An authoriser's yes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Handed to the application; may be empty.
    pub gateway_app_id: String,
}

/// An authoriser's no, or its silence; both refuse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It said no.
    #[error("Boot denied: {reason}")]
    Denied {
        /// In its own words, bounded and without control characters.
        reason: String,
    },
    /// It could not be asked, or gave no usable answer.
    #[error("{0}")]
    Unavailable(String),
}

impl Refusal {
    /// A no, in words that may come from anybody.
    #[must_use]
    pub fn denied(reason: &str) -> Self {
        Self::Denied { reason: bounded_reason(reason) }
    }
}

/// Says yes to everything. For development only.
pub(crate) struct DangerAllowAll {
    pub(crate) gateway_app_id: String,
}

impl Authoriser for DangerAllowAll {
    fn authorise_app<'a>(
        &'a self,
        _client: &'a AttestedClient,
        _boot_info: &'a BootInfo,
    ) -> Pending<'a, Result<Grant, Refusal>> {
        let gateway_app_id = self.gateway_app_id.clone();
        Box::pin(std::future::ready(Ok(Grant { gateway_app_id })))
    }

    fn describe(&self) -> Pending<'_, Result<Option<AuthInfo>, Refusal>> {
        Box::pin(std::future::ready(Ok(None)))
    }

    fn is_dev(&self) -> bool {
        true
    }
}
