//! A bounded memory of fetched things that outlives the service they come from.
//!
//! Something that was fetched lately is used as it is. Something older is used too, while it is fetched anew in the
//! background: everything kept here carries its own end of validity, which the verifier enforces. Only what was never
//! fetched is waited for. A service that fails is left alone for a while.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::error::CollateralError;

/// Things fetched at the same time.
const FETCHES: usize = 4;
/// How long a thing is left alone after a failure.
const PAUSE: Duration = Duration::from_secs(5);

/// A memory of things by key.
pub(super) struct Cache<K, V> {
    slots: Mutex<BTreeMap<K, Arc<Slot<V>>>>,
    fetches: Arc<Semaphore>,
    capacity: usize,
    refresh: Duration,
}

struct Slot<V> {
    state: Mutex<State<V>>,
    /// Held while this thing is fetched.
    fetching: tokio::sync::Mutex<()>,
}

struct State<V> {
    value: Option<(Arc<V>, Instant)>,
    failed: Option<Instant>,
    used: Instant,
}

/// How old a value may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// Whatever is there.
    Any,
    /// Fetched after that, when the service answers; otherwise whatever is there.
    After(Instant),
}

impl<K: Ord + Clone + Send + 'static, V: Send + Sync + 'static> Cache<K, V> {
    /// At most `capacity` things, each fetched anew after `refresh`.
    pub(super) fn new(capacity: usize, refresh: Duration) -> Self {
        Self { slots: Mutex::default(), fetches: Arc::new(Semaphore::new(FETCHES)), capacity, refresh }
    }

    /// The thing, fetched by `fetch` when needed. `fetch` has a deadline of its own.
    pub(super) async fn get<F>(&self, key: K, need: Need, fetch: F) -> Result<Arc<V>, CollateralError>
    where
        F: Future<Output = Result<V, CollateralError>> + Send + 'static,
    {
        let slot = self.slot(key);
        let (value, age) = match &lock(&slot.state).value {
            Some((value, fetched)) => (Some(Arc::clone(value)), Some(*fetched)),
            None => (None, None),
        };
        let stale = match (need, age) {
            (Need::After(moment), Some(fetched)) => fetched <= moment,
            (Need::Any, Some(fetched)) if fetched.elapsed() >= self.refresh => {
                // Used as it is, and fetched beside.
                let (slot, fetches) = (Arc::clone(&slot), Arc::clone(&self.fetches));
                tokio::spawn(async move {
                    // Somebody else may be at it, and a failure was logged where it happened.
                    let _kept = slot.fetch(&fetches, fetched, fetch).await;
                });
                return value.ok_or(CollateralError::Service);
            }
            (Need::Any, Some(_)) => false,
            (_, None) => true,
        };
        match value {
            Some(value) if !stale => Ok(value),
            None => slot.fetch(&self.fetches, Instant::now(), fetch).await,
            Some(value) => {
                let seen = age.unwrap_or_else(Instant::now);
                Ok(slot.fetch(&self.fetches, seen, fetch).await.unwrap_or(value))
            }
        }
    }

    fn slot(&self, key: K) -> Arc<Slot<V>> {
        let mut slots = lock(&self.slots);
        let now = Instant::now();
        if let Some(slot) = slots.get(&key) {
            lock(&slot.state).used = now;
            return Arc::clone(slot);
        }
        if slots.len() >= self.capacity {
            // What holds nothing goes first, then what was not used for longest: a stranger's inventions do not push
            // out what was fetched.
            let oldest = slots.iter().min_by_key(|(_, slot)| {
                let state = lock(&slot.state);
                (state.value.is_some(), state.used)
            });
            if let Some(oldest) = oldest.map(|(key, _)| key.clone()) {
                slots.remove(&oldest);
            }
        }
        let state = Mutex::new(State { value: None, failed: None, used: now });
        let slot = Arc::new(Slot { state, fetching: tokio::sync::Mutex::new(()) });
        slots.insert(key, Arc::clone(&slot));
        slot
    }
}

impl<V> Slot<V> {
    /// Fetches, unless somebody else has done so after `seen` or failed a moment ago.
    async fn fetch(
        &self,
        fetches: &Semaphore,
        seen: Instant,
        fetch: impl Future<Output = Result<V, CollateralError>>,
    ) -> Result<Arc<V>, CollateralError> {
        let _alone = self.fetching.lock().await;
        {
            let state = lock(&self.state);
            if let Some((value, fetched)) = &state.value
                && *fetched > seen
            {
                return Ok(Arc::clone(value));
            }
            if state.failed.is_some_and(|failed| failed.elapsed() < PAUSE) {
                return Err(CollateralError::Pause(PAUSE.as_secs()));
            }
        }
        let _place = fetches.try_acquire().map_err(|_| CollateralError::Busy)?;
        let fetched = fetch.await;
        let mut state = lock(&self.state);
        match fetched {
            Ok(value) => {
                let value = Arc::new(value);
                state.value = Some((Arc::clone(&value), Instant::now()));
                state.failed = None;
                Ok(value)
            }
            Err(error) => {
                state.failed = Some(Instant::now());
                Err(error)
            }
        }
    }
}

/// A panic elsewhere leaves a whole value or none.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const REFRESH: Duration = Duration::from_secs(3600);

    fn cache(capacity: usize) -> Cache<u32, usize> {
        Cache::new(capacity, REFRESH)
    }

    /// Counts its calls, and fails while `broken`.
    #[derive(Default, Clone)]
    struct Service {
        calls: Arc<AtomicUsize>,
        broken: Arc<std::sync::atomic::AtomicBool>,
    }

    impl Service {
        async fn fetch(self) -> Result<usize, CollateralError> {
            let call = self.calls.fetch_add(1, Ordering::SeqCst);
            if self.broken.load(Ordering::SeqCst) { Err(CollateralError::Service) } else { Ok(call) }
        }

        fn calls(&self) -> usize {
            self.calls.load(Ordering::SeqCst)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_fetched_lately_is_not_fetched_again() {
        let (cache, service) = (cache(2), Service::default());
        for _ in 0..3 {
            assert_eq!(*cache.get(1, Need::Any, service.clone().fetch()).await.unwrap(), 0);
        }
        assert_eq!(service.calls(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn an_outage_leaves_the_old_value_in_use() {
        let (cache, service) = (cache(2), Service::default());
        cache.get(1, Need::Any, service.clone().fetch()).await.unwrap();
        service.broken.store(true, Ordering::SeqCst);
        tokio::time::advance(REFRESH * 2).await;
        for _ in 0..3 {
            assert_eq!(*cache.get(1, Need::Any, service.clone().fetch()).await.unwrap(), 0);
            assert_eq!(*cache.get(1, Need::After(Instant::now()), service.clone().fetch()).await.unwrap(), 0);
        }
        // The first attempt failed, and then the service was left alone.
        assert_eq!(service.calls(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_never_there_is_asked_for_again_after_a_pause() {
        let (cache, service) = (cache(2), Service::default());
        service.broken.store(true, Ordering::SeqCst);
        let first = cache.get(1, Need::Any, service.clone().fetch()).await;
        assert!(matches!(first, Err(CollateralError::Service)));
        service.broken.store(false, Ordering::SeqCst);
        let second = cache.get(1, Need::Any, service.clone().fetch()).await;
        assert!(matches!(second, Err(CollateralError::Pause(5))));
        tokio::time::advance(PAUSE).await;
        assert_eq!(*cache.get(1, Need::Any, service.clone().fetch()).await.unwrap(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_newer_value_is_fetched_when_asked_for() {
        let (cache, service) = (cache(2), Service::default());
        cache.get(1, Need::Any, service.clone().fetch()).await.unwrap();
        tokio::time::advance(Duration::from_secs(1)).await;
        let newer = cache.get(1, Need::After(Instant::now()), service.clone().fetch()).await.unwrap();
        assert_eq!(*newer, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn strangers_do_not_push_out_what_was_fetched() {
        let (cache, service) = (cache(2), Service::default());
        cache.get(1, Need::Any, service.clone().fetch()).await.unwrap();
        service.broken.store(true, Ordering::SeqCst);
        for key in 2..100 {
            assert!(cache.get(key, Need::Any, service.clone().fetch()).await.is_err());
        }
        assert_eq!(*cache.get(1, Need::Any, service.clone().fetch()).await.unwrap(), 0);
        assert_eq!(lock(&cache.slots).len(), 2);
    }

    #[tokio::test]
    async fn one_fetch_serves_everybody_who_waits() {
        let (cache, service) = (Arc::new(cache(2)), Service::default());
        let (release, released) = tokio::sync::watch::channel(false);
        let asks: Vec<_> = (0..8)
            .map(|_| {
                let (cache, service, mut released) = (Arc::clone(&cache), service.clone(), released.clone());
                tokio::spawn(async move {
                    let fetch = async move {
                        assert!(released.wait_for(|open| *open).await.is_ok());
                        service.fetch().await
                    };
                    cache.get(1, Need::Any, fetch).await.map(|value| *value)
                })
            })
            .collect();
        release.send(true).unwrap();
        for ask in asks {
            assert_eq!(ask.await.unwrap().unwrap(), 0);
        }
        assert_eq!(service.calls(), 1);
    }
}
