//! How many connections there may be: in all, per enclave, per service and per rule.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Resource, getrlimit, setrlimit};

/// Descriptors kept for listeners, the resolver, files and pipes.
const RESERVED_DESCRIPTORS: u64 = 128;

/// Bounds for the whole proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at once, over all services.
    pub max_connections: u32,
    /// Connections at once of one vsock context id, so that no enclave crowds out another.
    pub max_connections_per_cid: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_connections: 10_000, max_connections_per_cid: 4_096 }
    }
}

/// Bounds for each tunnel of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TunnelLimits {
    /// Time for the whole request head, or for the ClientHello where it is looked at.
    pub head: Duration,
    /// Largest request head in bytes.
    pub max_head_bytes: usize,
    /// Time to resolve the name and connect to one of its addresses.
    pub connect: Duration,
    /// Longest time without a byte in either direction.
    pub idle: Duration,
    /// Longest life of a tunnel; `None` for no bound.
    pub total: Option<Duration>,
    /// Bytes a second of one tunnel, both directions together; `None` for no bound.
    pub bytes_per_second: Option<NonZeroU64>,
    /// Connections at once of the service; `None` leaves it to [`Limits`].
    pub max_connections: Option<u32>,
    /// Whether bulk between TCP and Unix sockets may be moved with splice(2).
    pub splice: bool,
}

impl Default for TunnelLimits {
    fn default() -> Self {
        Self {
            head: Duration::from_secs(10),
            max_head_bytes: 8 * 1024,
            connect: Duration::from_secs(10),
            idle: Duration::from_secs(600),
            total: None,
            bytes_per_second: None,
            max_connections: None,
            splice: true,
        }
    }
}

/// Raises this process's limit of open files as far as allowed, and gives the connections it is good for: each tunnel
/// has two descriptors.
pub fn descriptors_allow() -> u32 {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let wanted = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
        if setrlimit(Resource::Nofile, wanted).is_ok() {
            limit = wanted;
        }
    }
    let files = limit.current.unwrap_or(u64::MAX).saturating_sub(RESERVED_DESCRIPTORS) / 2;
    u32::try_from(files).unwrap_or(u32::MAX).max(1)
}

/// What connections are counted by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Key {
    All,
    Cid(u32),
    Service(Arc<str>),
    Rule(Arc<str>),
    /// Refusals that are being answered.
    Refusals,
}

impl Key {
    /// Stable name of the limit, for logs, metrics and the body of a 503.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::All => "limit-connections",
            Self::Cid(_) => "limit-cid",
            Self::Service(_) => "limit-service",
            Self::Rule(_) => "limit-rule",
            Self::Refusals => "limit-refusals",
        }
    }
}

/// The connections there are now.
#[derive(Debug, Default)]
pub(crate) struct Counts(Mutex<HashMap<Key, u32>>);

impl Counts {
    /// Counts one more under `key`.
    ///
    /// # Errors
    /// The limit's name when `max` are there already.
    pub(crate) fn enter(self: &Arc<Self>, key: Key, max: u32) -> Result<Permit, &'static str> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let name = key.name();
        let count = counts.entry(key.clone()).or_default();
        if *count >= max {
            return Err(name);
        }
        *count += 1;
        drop(counts);
        Ok(Permit { counts: Arc::clone(self), key })
    }

    /// The number under `key`.
    pub(crate) fn get(&self, key: &Key) -> u32 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(key).copied().unwrap_or(0)
    }
}

/// One counted connection; dropping it counts it out.
#[derive(Debug)]
pub(crate) struct Permit {
    counts: Arc<Counts>,
    key: Key,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut counts = self.counts.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Entries at zero go, or peers with many context ids would fill the map.
        if let Entry::Occupied(mut entry) = counts.entry(self.key.clone()) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permit_counts_in_and_out() {
        let counts = Arc::new(Counts::default());
        let one = counts.enter(Key::Cid(16), 2).unwrap();
        let two = counts.enter(Key::Cid(16), 2).unwrap();
        assert_eq!(counts.enter(Key::Cid(16), 2).unwrap_err(), "limit-cid");
        assert!(counts.enter(Key::Cid(17), 2).is_ok());
        drop(one);
        assert!(counts.enter(Key::Cid(16), 2).is_ok());
        drop(two);
        assert_eq!(counts.get(&Key::Cid(16)), 0);
    }
}
