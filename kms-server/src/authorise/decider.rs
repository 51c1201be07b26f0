//! What holds for every authoriser: questions at once are bounded, one that gives no answers is not asked for a while,
//! allowances are remembered no longer than the settings say, and nobody's question hangs on another's.

mod cache;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use kms_protocol::wire::webhook::{AuthInfo, bounded_reason};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use self::cache::Cache;
use super::{Authoriser, Grant, Question, Refusal};
use crate::audit::{Audit, Event, Outcome};
use crate::breaker::Breaker;
use crate::context;
use crate::metrics::{Dependency, Histogram};
use command_line::chain;

/// Questions to an authoriser at the same time; further ones are refused at once.
const MAX_QUESTIONS: usize = 256;
/// How often the authoriser is asked what it knows, for `GetMeta`; sooner after a failure.
const DESCRIBE_INTERVAL: Duration = Duration::from_secs(60);
const DESCRIBE_RETRY: Duration = Duration::from_secs(5);
/// How long a remote authoriser's yes to this KMS itself holds.
const REMEMBER_SELF: Duration = Duration::from_secs(5);

/// An authoriser and what protects it and us.
pub(crate) struct Decider {
    authoriser: Arc<dyn Authoriser>,
    breaker: Arc<Breaker>,
    open: Arc<Semaphore>,
    cache: Arc<Cache>,
    /// Every decision is in it before anybody acts on it.
    audit: Option<Arc<Audit>>,
    statistics: Mutex<Statistics>,
    /// What was last decided about this KMS itself, and how long that holds.
    about_self: Mutex<Option<(Result<Grant, Refusal>, Instant)>>,
    /// The last description; nobody waits for a new one.
    description: RwLock<Option<AuthInfo>>,
    /// Whether the last time it was asked for one it gave it.
    described: AtomicBool,
    /// Why it did not describe itself when it was asked last.
    silence: RwLock<Option<String>>,
}

/// What the authoriser has done.
#[derive(Debug, Clone, Default)]
pub(crate) struct Statistics {
    /// Decisions by outcome.
    pub(crate) decisions: BTreeMap<&'static str, u64>,
    /// How long it took, when it was asked.
    pub(crate) time: Histogram,
}

impl Decider {
    /// Allowances of a remote authoriser are remembered for `remember`, which may be zero.
    pub(crate) fn new(
        authoriser: Box<dyn Authoriser>,
        remember: Duration,
        audit: Option<Arc<Audit>>,
    ) -> Self {
        let remember = if authoriser.is_remote() { remember } else { Duration::ZERO };
        Self {
            authoriser: authoriser.into(),
            breaker: Arc::default(),
            open: Arc::new(Semaphore::new(MAX_QUESTIONS)),
            cache: Arc::new(Cache::new(remember)),
            audit,
            statistics: Mutex::default(),
            about_self: Mutex::new(None),
            description: RwLock::new(None),
            described: AtomicBool::new(false),
            silence: RwLock::new(None),
        }
    }

    pub(crate) fn is_dev(&self) -> bool {
        self.authoriser.is_dev()
    }

    /// The decision, once it is in the audit log.
    pub(crate) async fn decide(&self, question: Question) -> Result<Grant, Refusal> {
        let question = Arc::new(question);
        let answer = self.answer(&question).await;
        self.record(&question, answer).await
    }

    /// Counts the decision and puts it into the audit log; what cannot be recorded is not allowed.
    async fn record(&self, question: &Question, answer: Result<Grant, Refusal>) -> Result<Grant, Refusal> {
        if let Some(audit) = &self.audit {
            let outcome = Outcome::from(&answer);
            let event = Event::decision(question, self.authoriser.kind(), outcome, context::peer());
            // A refusal stays one, whatever becomes of its line.
            if let (Err(error), Ok(_)) = (audit.write(event).await, &answer) {
                self.count("not-audited");
                return Err(Refusal::unavailable(&error.to_string()));
            }
        }
        self.count(match &answer {
            Ok(_) => "allowed",
            Err(Refusal::Denied { .. }) => "denied",
            Err(Refusal::Unavailable(_)) => "unavailable",
        });
        answer
    }

    /// The decision about this KMS itself, on which every anonymous request for a temporary CA depends: one question to
    /// a remote authoriser is enough for many of them, and only what is new is recorded.
    pub(crate) async fn decide_about_self(&self, question: Question) -> Result<Grant, Refusal> {
        if let Some((Ok(grant), until)) = &*self.about_self()
            && Instant::now() < *until
        {
            return Ok(grant.clone());
        }
        let question = Arc::new(question);
        let answer = self.answer(&question).await;
        let remember = if self.authoriser.is_remote() { REMEMBER_SELF } else { Duration::ZERO };
        let is_news = {
            let mut about_self = self.about_self();
            let last = about_self.replace((answer.clone(), Instant::now() + remember));
            last.is_none_or(|(last, _)| last != answer)
        };
        if is_news { self.record(&question, answer).await } else { answer }
    }

    fn about_self(&self) -> MutexGuard<'_, Option<(Result<Grant, Refusal>, Instant)>> {
        self.about_self.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An authoriser that was asked is heard to the end even when the caller goes away, so that its silence counts.
    async fn answer(&self, question: &Arc<Question>) -> Result<Grant, Refusal> {
        if !self.authoriser.is_remote() {
            return self.authoriser.authorise(question).await;
        }
        let key = Cache::key(question);
        if let Some(grant) = self.cache.get(&key) {
            self.count("remembered");
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
        let question = Arc::clone(question);
        let asked = Instant::now();
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
        let answer = asking.await;
        self.statistics().time.record(asked.elapsed());
        // Only a panic or the runtime's end lets the task fail.
        answer.unwrap_or_else(|_| Err(Refusal::unavailable("the question to the authoriser was lost")))
    }

    pub(crate) fn health(&self) -> Dependency {
        // A light client that does not follow the chain yet shows here, before anybody has asked for keys.
        let mute = self.authoriser.is_remote() && !self.described.load(Ordering::Relaxed);
        let mute = mute.then(|| "gives no description of itself; it is asked again".to_owned());
        Dependency {
            trouble: self.authoriser.trouble().or(mute),
            ..Dependency::of("authoriser", &self.breaker)
        }
    }

    pub(crate) fn statistics(&self) -> MutexGuard<'_, Statistics> {
        self.statistics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, outcome: &'static str) {
        *self.statistics().decisions.entry(outcome).or_default() += 1;
    }

    /// What the authoriser last said about itself; never waits.
    pub(crate) fn description(&self) -> Option<AuthInfo> {
        self.description.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The description for those who ask whether this authoriser is ready: none while it gives none. One that needs
    /// nobody always is.
    pub(crate) fn description_if_ready(&self) -> Option<AuthInfo> {
        if self.authoriser.is_remote() {
            return self.description().filter(|_| self.described.load(Ordering::Relaxed));
        }
        Some(AuthInfo {
            status: "ok".into(),
            kms_contract_addr: String::new(),
            gateway_app_id: String::new(),
            chain_id: 0,
            app_implementation: String::new(),
            eth_rpc_url: None,
        })
    }

    /// Why the authoriser did not describe itself when it was asked last, if it did not.
    pub(crate) fn silence(&self) -> Option<String> {
        self.silence.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The authoriser's short name.
    pub(crate) fn kind(&self) -> &'static str {
        self.authoriser.kind()
    }

    /// Whether it asks somebody elsewhere.
    pub(crate) fn is_remote(&self) -> bool {
        self.authoriser.is_remote()
    }

    /// Keeps what is known fresh until the future is dropped.
    pub(crate) async fn tend(&self) {
        tokio::join!(self.describe_for_ever(), self.authoriser.tend());
    }

    /// A failure leaves the last description in place.
    async fn describe_for_ever(&self) {
        loop {
            let mut silence = None;
            let pause = match self.authoriser.describe().await {
                Ok(Some(description)) => {
                    *self.description.write().unwrap_or_else(PoisonError::into_inner) =
                        Some(bounded(description));
                    self.described.store(true, Ordering::Relaxed);
                    DESCRIBE_INTERVAL
                }
                // Nothing to fetch, now or later.
                Ok(None) => {
                    self.described.store(true, Ordering::Relaxed);
                    info!(authoriser = self.authoriser.kind(), "the authoriser has no description");
                    return;
                }
                Err(error) => {
                    self.described.store(false, Ordering::Relaxed);
                    silence = Some(bounded_reason(&chain(&error)));
                    warn!(error = chain(&error), "the authoriser does not describe itself");
                    DESCRIBE_RETRY
                }
            };
            *self.silence.write().unwrap_or_else(PoisonError::into_inner) = silence;
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
