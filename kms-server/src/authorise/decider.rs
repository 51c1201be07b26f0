//! What holds for every authoriser: questions at once are bounded, one that gives no answers is not asked for a while,
//! allowances are remembered no longer than the settings say, and nobody's question hangs on another's.

mod cache;

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use kms_protocol::wire::webhook::{AuthInfo, bounded_reason};
use tokio::sync::Semaphore;
use tokio::time::sleep;
use tracing::{info, warn};

use self::cache::Cache;
use super::{Authoriser, Grant, Question, Refusal};
use crate::breaker::Breaker;
use crate::text::chain;

/// Questions to an authoriser at the same time; further ones are refused at once.
const MAX_QUESTIONS: usize = 256;
/// How often the authoriser is asked what it knows, for `GetMeta`; sooner after a failure.
const DESCRIBE_INTERVAL: Duration = Duration::from_secs(60);
const DESCRIBE_RETRY: Duration = Duration::from_secs(5);

/// An authoriser and what protects it and us.
pub(crate) struct Decider {
    authoriser: Arc<dyn Authoriser>,
    breaker: Arc<Breaker>,
    open: Arc<Semaphore>,
    cache: Arc<Cache>,
    /// The last description; nobody waits for a new one.
    description: RwLock<Option<AuthInfo>>,
}

/// How an authoriser is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Health {
    pub(crate) kind: &'static str,
    /// Questions without an answer, in a row.
    pub(crate) failures: u32,
    /// Whether it is not asked at the moment.
    pub(crate) paused: bool,
    /// What an operator should look at.
    pub(crate) trouble: Option<String>,
}

impl Health {
    pub(crate) fn is_good(&self) -> bool {
        self.failures == 0 && self.trouble.is_none()
    }
}

impl Decider {
    /// Allowances of a remote authoriser are remembered for `remember`, which may be zero.
    pub(crate) fn new(authoriser: Box<dyn Authoriser>, remember: Duration) -> Self {
        let remember = if authoriser.is_remote() { remember } else { Duration::ZERO };
        Self {
            authoriser: authoriser.into(),
            breaker: Arc::default(),
            open: Arc::new(Semaphore::new(MAX_QUESTIONS)),
            cache: Arc::new(Cache::new(remember)),
            description: RwLock::new(None),
        }
    }

    pub(crate) fn is_dev(&self) -> bool {
        self.authoriser.is_dev()
    }

    /// The decision. An authoriser that was asked is heard to the end even when the caller goes away, so that its
    /// silence counts.
    pub(crate) async fn decide(&self, question: Question) -> Result<Grant, Refusal> {
        if !self.authoriser.is_remote() {
            return self.authoriser.authorise(&question).await;
        }
        let key = Cache::key(&question);
        if let Some(grant) = self.cache.get(&key) {
            return Ok(grant);
        }
        let room = Arc::clone(&self.open)
            .try_acquire_owned()
            .map_err(|_| Refusal::unavailable("too many questions to the authoriser at once"))?;
        let kind = self.authoriser.kind();
        let pass = self
            .breaker
            .pass()
            .map_err(|paused| Refusal::unavailable(&format!("the {kind} authoriser {paused}")))?;
        let (authoriser, cache) = (Arc::clone(&self.authoriser), Arc::clone(&self.cache));
        let asking = tokio::spawn(async move {
            let _room = room;
            let answer = authoriser.authorise(&question).await;
            match &answer {
                Err(Refusal::Unavailable(_)) => pass.failed(),
                Err(Refusal::Denied { .. }) => {
                    cache.forget(&key);
                    pass.answered();
                }
                Ok(grant) => {
                    cache.put(key, grant);
                    pass.answered();
                }
            }
            answer
        });
        // Only a panic or the runtime's end lets the task fail.
        asking.await.unwrap_or_else(|_| Err(Refusal::unavailable("the question to the authoriser was lost")))
    }

    pub(crate) fn health(&self) -> Health {
        Health {
            kind: self.authoriser.kind(),
            failures: self.breaker.failures(),
            paused: self.breaker.is_open(),
            trouble: self.authoriser.trouble(),
        }
    }

    /// What the authoriser last said about itself; never waits.
    pub(crate) fn description(&self) -> Option<AuthInfo> {
        self.description.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Keeps the description fresh until the future is dropped. A failure leaves the last one in place.
    pub(crate) async fn describe_for_ever(&self) {
        loop {
            let pause = match self.authoriser.describe().await {
                Ok(Some(description)) => {
                    *self.description.write().unwrap_or_else(PoisonError::into_inner) =
                        Some(bounded(description));
                    DESCRIBE_INTERVAL
                }
                // Nothing to fetch, now or later.
                Ok(None) => {
                    info!(authoriser = self.authoriser.kind(), "the authoriser has no description");
                    return;
                }
                Err(error) => {
                    warn!(error = chain(&error), "the authoriser does not describe itself");
                    DESCRIBE_RETRY
                }
            };
            sleep(pause).await;
        }
    }
}

/// The texts of a description, short enough to be repeated to every client.
fn bounded(info: AuthInfo) -> AuthInfo {
    let bound = |text: String| bounded_reason(&text);
    AuthInfo {
        status: bound(info.status),
        kms_contract_addr: bound(info.kms_contract_addr),
        gateway_app_id: bound(info.gateway_app_id),
        chain_id: info.chain_id,
        app_implementation: bound(info.app_implementation),
        eth_rpc_url: info.eth_rpc_url.map(bound),
    }
}

#[cfg(test)]
mod tests;
