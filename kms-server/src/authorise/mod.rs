//! Who may have keys: one trait, and the ways to decide.
//!
//! An authoriser is asked only about clients whose evidence was verified and whose measurements were derived from it, so
//! nothing it is told is the client's word, except for the app id and the instance id, which are what it decides about.
//!
//! An [`Authoriser`] only knows how to ask. What must be so for all of them lives in `decider`: a bound on questions
//! at once, a circuit breaker, the cache of allowances.
//!
//! | `core.auth_api.type` | authoriser |
//! | --- | --- |
//! | `webhook` | [`webhook`]: the service at an address, by upstream's contract |
//! | `chain` | [`chain`]: the contracts on a chain, asked directly |
//! | `policy` | [`policy`]: the rules in a file |
//! | `dev` | everything is allowed; shown to every client |

pub(crate) mod api;
pub mod chain;
pub(crate) mod decider;
pub mod policy;
pub mod webhook;

use std::future::Future;
use std::pin::Pin;

use attestation::{Pcr, PcrIndex};
use kms_protocol::wire::webhook::{AuthInfo, BootInfo, bounded_reason};

use crate::config::AuthoriserConfig;

/// A boxed future, so that authorisers can be chosen at run time.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Decides who gets keys.
pub trait Authoriser: Send + Sync {
    /// A fixed short name, for logs, `/health` and metrics.
    fn kind(&self) -> &'static str;

    /// Whether who is asked about may have what it asks for. Answers within a deadline of its own, and holds no memory
    /// that somebody else can make grow.
    fn authorise<'a>(&'a self, question: &'a Question) -> Pending<'a, Result<Grant, Refusal>>;

    /// Facts for `GetMeta`, fetched in the background; `None` when there are none to fetch. Has a deadline of its own.
    fn describe(&self) -> Pending<'_, Result<Option<AuthInfo>, Refusal>>;

    /// What it does besides answering, such as looking for a new version of its rules, until the future is dropped.
    fn tend(&self) -> Pending<'_, ()> {
        Box::pin(std::future::ready(()))
    }

    /// Whether it asks somebody else: then there is a circuit breaker before it, and allowances may be cached.
    fn is_remote(&self) -> bool {
        true
    }

    /// What an operator should look at although decisions are still made.
    fn trouble(&self) -> Option<String> {
        None
    }

    /// Whether it allows everything, which `GetMeta` tells every client.
    fn is_dev(&self) -> bool {
        false
    }
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// An app's keys, or a certificate under its CA (`bootAuth/app`).
    App,
    /// To be a KMS with these root keys (`bootAuth/kms`).
    Kms,
}

impl Purpose {
    /// A fixed short name, for logs and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::App => "app",
            Self::Kms => "kms",
        }
    }
}

/// One question to an authoriser.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// What is asked for.
    pub purpose: Purpose,
    /// Who asks: what upstream's contract and the contracts on chain know of it.
    pub boot_info: BootInfo,
    /// The registers of a verified Nitro document. Empty for other platforms, and where only a boot info is known.
    pub registers: Vec<(PcrIndex, Pcr)>,
    /// SHA-256 over the evidence as it came, for the audit log; no decision depends on it.
    pub evidence: Option<[u8; 32]>,
}

impl Question {
    /// The value of a register, if it is known.
    #[must_use]
    pub fn pcr(&self, index: PcrIndex) -> Option<&Pcr> {
        self.registers.iter().find(|(known, _)| *known == index).map(|(_, pcr)| pcr)
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
    /// It could not be asked, or gave no usable answer. The same question may be answered later.
    #[error("{0}")]
    Unavailable(String),
}

impl Refusal {
    /// A no, in words that may come from anybody.
    #[must_use]
    pub fn denied(reason: &str) -> Self {
        Self::Denied { reason: bounded_reason(reason) }
    }

    /// Silence, in words that may come from anybody.
    #[must_use]
    pub fn unavailable(reason: &str) -> Self {
        Self::Unavailable(bounded_reason(reason))
    }
}

/// Why there is no authoriser.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The policy cannot be used.
    #[error("the policy cannot be used")]
    Policy(#[from] policy::PolicyError),
    /// The chain cannot be asked as configured.
    #[error("the chain cannot be asked")]
    Chain(#[from] ::chain::Error),
    /// The authorisation service could not be trusted.
    #[error("the authorisation service cannot be asked")]
    Trust(#[from] webhook::TrustError),
}

/// The authoriser that the settings ask for. Reads files, so it belongs on a blocking thread.
///
/// # Errors
///
/// [`Error`]: a server without its authoriser does not start.
pub fn from_config(config: AuthoriserConfig) -> Result<Box<dyn Authoriser>, Error> {
    Ok(match config {
        AuthoriserConfig::Webhook(config) => Box::new(webhook::Webhook::new(config)?),
        AuthoriserConfig::Chain(config) => Box::new(chain::OnChain::new(&config)?),
        AuthoriserConfig::Policy { file, reload } => Box::new(policy::PolicyFile::open(file, reload)?),
        AuthoriserConfig::DangerAllowAll { gateway_app_id } => Box::new(DangerAllowAll { gateway_app_id }),
    })
}

/// Says yes to everything. For development only.
struct DangerAllowAll {
    gateway_app_id: String,
}

impl Authoriser for DangerAllowAll {
    fn kind(&self) -> &'static str {
        "dev"
    }

    fn authorise<'a>(&'a self, _question: &'a Question) -> Pending<'a, Result<Grant, Refusal>> {
        let gateway_app_id = self.gateway_app_id.clone();
        Box::pin(std::future::ready(Ok(Grant { gateway_app_id })))
    }

    fn describe(&self) -> Pending<'_, Result<Option<AuthInfo>, Refusal>> {
        Box::pin(std::future::ready(Ok(None)))
    }

    fn is_remote(&self) -> bool {
        false
    }

    fn is_dev(&self) -> bool {
        true
    }
}
