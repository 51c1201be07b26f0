//! Keys of chains whose signatures were checked before.
//!
//! Regional certificates live about 20 days, zonal ones 6 days, an instance's one day and an enclave's leaf three
//! hours, so most documents of a known instance need two signature checks instead of five, and a second document of
//! the same enclave needs one.
//!
//! An entry stands for the exact bytes of *all* certificates from the root down, so it holds for no other chain and no
//! other root. It saves signature checks only: everything else about the chain is checked on every use.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aws_lc_rs::digest::{Context, SHA256};

use crate::certificate::Validity;
use crate::key::{IssuerKey, LeafKey};

/// The name of a chain: SHA-256 over its certificates, each with its length.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ChainId([u8; 32]);

impl ChainId {
    pub(crate) fn of<'a>(certificates: impl Iterator<Item = &'a [u8]>) -> Self {
        let mut context = Context::new(&SHA256);
        for certificate in certificates {
            context.update(&(certificate.len() as u64).to_be_bytes());
            context.update(certificate);
        }
        let mut id = [0; 32];
        id.copy_from_slice(context.finish().as_ref());
        Self(id)
    }
}

/// A bounded memory of verified chains that belongs to one verifier, hence to one root.
pub(crate) struct ChainCache(Mutex<Tables>);

struct Tables {
    issuers: Table<IssuerKey>,
    leaves: Table<LeafKey>,
}

impl ChainCache {
    /// Remembers at most `capacity` instances and as many leaves.
    pub(crate) fn new(capacity: NonZeroUsize) -> Self {
        Self(Mutex::new(Tables { issuers: Table::new(capacity), leaves: Table::new(capacity) }))
    }

    /// The key of the last certificate of a known cabundle.
    pub(crate) fn issuer_key(&self, bundle: &ChainId) -> Option<Arc<IssuerKey>> {
        self.tables().issuers.get(bundle)
    }

    /// The key of the leaf of a known cabundle and leaf.
    pub(crate) fn leaf_key(&self, chain: &ChainId) -> Option<Arc<LeafKey>> {
        self.tables().leaves.get(chain)
    }

    pub(crate) fn insert_issuer(&self, bundle: ChainId, key: &Arc<IssuerKey>, validity: Validity, now: u64) {
        self.tables().issuers.insert(bundle, Arc::clone(key), validity, now);
    }

    pub(crate) fn insert_leaf(&self, chain: ChainId, key: &Arc<LeafKey>, validity: Validity, now: u64) {
        self.tables().leaves.insert(chain, Arc::clone(key), validity, now);
    }

    /// A panic elsewhere cannot leave a table half changed in a way that matters: an entry is there or it is not.
    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Table<K> {
    entries: BTreeMap<ChainId, Entry<K>>,
    capacity: NonZeroUsize,
    /// Counts uses, to find the entry that was not used for longest.
    uses: u64,
}

struct Entry<K> {
    key: Arc<K>,
    /// The earliest end of validity in the chain, in seconds since 1970.
    not_after: u64,
    last_use: u64,
}

impl<K> Table<K> {
    fn new(capacity: NonZeroUsize) -> Self {
        Self { entries: BTreeMap::new(), capacity, uses: 0 }
    }

    fn get(&mut self, id: &ChainId) -> Option<Arc<K>> {
        let entry = self.entries.get_mut(id)?;
        self.uses += 1;
        entry.last_use = self.uses;
        Some(Arc::clone(&entry.key))
    }

    /// Makes room by dropping what has expired, then what was not used for longest.
    fn insert(&mut self, id: ChainId, key: Arc<K>, validity: Validity, now: u64) {
        if self.entries.len() >= self.capacity.get() {
            self.entries.retain(|_, entry| entry.not_after >= now);
        }
        if self.entries.len() >= self.capacity.get() {
            let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.last_use).map(|(id, _)| *id);
            oldest.and_then(|id| self.entries.remove(&id));
        }
        self.uses += 1;
        self.entries.insert(id, Entry { key, not_after: validity.not_after, last_use: self.uses });
    }
}
