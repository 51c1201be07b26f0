//! Allowances, for as long as the settings say and not a moment longer. Refusals are never kept: who has just been
//! registered must not wait, and a kept refusal protects nothing.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aws_lc_rs::digest::{self, Context, SHA256};
use kms_protocol::wire::webhook::BootInfoKeys;
use tokio::time::Instant;

use crate::authorise::{Grant, Question};

/// Allowances kept; the oldest makes room for the newest.
const MAX_KEPT: usize = 4096;

pub(super) type Key = [u8; digest::SHA256_OUTPUT_LEN];

pub(super) struct Cache {
    remember: Duration,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    grants: HashMap<Key, (Grant, Instant)>,
    /// Keys as they were put: all are kept equally long, so this is also the order in which they end.
    order: VecDeque<(Key, Instant)>,
}

impl Cache {
    pub(super) fn new(remember: Duration) -> Self {
        Self { remember, kept: Mutex::default() }
    }

    /// Names everything a decision can depend on.
    pub(super) fn key(question: &Question) -> Key {
        // Evidence is new for every connection, and what it proves is in the other fields.
        let Question { purpose, boot_info, registers, evidence: _ } = question;
        let mut hash = Context::new(&SHA256);
        hash.update(purpose.name().as_bytes());
        let boot_info = boot_info.to_json(BootInfoKeys::TeeVariant);
        hash.update(&(boot_info.len() as u64).to_be_bytes());
        hash.update(&boot_info);
        for (index, pcr) in registers {
            hash.update(&[index.get()]);
            hash.update(pcr.as_bytes());
        }
        let mut key = Key::default();
        key.copy_from_slice(hash.finish().as_ref());
        key
    }

    pub(super) fn get(&self, key: &Key) -> Option<Grant> {
        let kept = self.kept();
        let (grant, until) = kept.grants.get(key)?;
        (Instant::now() < *until).then(|| grant.clone())
    }

    pub(super) fn put(&self, key: Key, grant: &Grant) {
        if self.remember.is_zero() {
            return;
        }
        let now = Instant::now();
        let until = now + self.remember;
        let mut kept = self.kept();
        while let Some((oldest, ends)) = kept.order.front().copied()
            && (ends <= now || kept.order.len() >= MAX_KEPT)
        {
            kept.order.pop_front();
            // An entry that was put again has a later end, and stays.
            if kept.grants.get(&oldest).is_some_and(|(_, until)| *until == ends) {
                kept.grants.remove(&oldest);
            }
        }
        kept.order.push_back((key, until));
        kept.grants.insert(key, (grant.clone(), until));
    }

    /// A no ends an earlier yes at once.
    pub(super) fn forget(&self, key: &Key) {
        self.kept().grants.remove(key);
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        let kept = self.kept();
        assert_eq!(kept.grants.len(), kept.order.len());
        kept.grants.len()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
