//! The keys in use, replaced in one step.

use std::sync::Arc;

use subtle::{Choice, ConstantTimeEq};
use tokio::sync::watch;

use crate::Keys;

/// The owner's end: the only one that replaces keys.
pub struct Ring(watch::Sender<Arc<Keys>>);

/// Reads the keys in use.
#[derive(Clone)]
pub struct RingReader(watch::Receiver<Arc<Keys>>);

impl Ring {
    /// A ring with its first keys.
    pub fn new(keys: Arc<Keys>) -> Self {
        Self(watch::Sender::new(keys))
    }

    /// Another reader.
    pub fn reader(&self) -> RingReader {
        RingReader(self.0.subscribe())
    }

    /// Replaces the keys, and says whether they are others than before. Who reads while this happens has either.
    pub fn replace(&self, keys: Arc<Keys>) -> bool {
        let changed = !same(&self.0.borrow(), &keys);
        // Readers are woken only by other keys.
        self.0.send_if_modified(|current| {
            *current = keys;
            changed
        });
        changed
    }
}

impl RingReader {
    /// The keys in use now. Whoever keeps them keeps old keys.
    pub fn current(&self) -> Arc<Keys> {
        Arc::clone(&self.0.borrow())
    }

    /// Waits until the keys are others than at the last call. Cancel safe. Never returns once the ring is gone.
    pub async fn changed(&mut self) -> Arc<Keys> {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        Arc::clone(&self.0.borrow_and_update())
    }
}

/// Compares the secrets without telling by the time where they differ.
fn same(a: &Keys, b: &Keys) -> bool {
    let (a, b) = (&a.app_keys, &b.app_keys);
    let env = match (&a.env_crypt_key, &b.env_crypt_key) {
        (Some(a), Some(b)) => a.expose().ct_eq(b.expose()),
        (a, b) => Choice::from(u8::from(a.is_none() && b.is_none())),
    };
    let equal = a.disk_crypt_key.expose().ct_eq(b.disk_crypt_key.expose())
        & a.k256_key.expose().ct_eq(b.k256_key.expose())
        & env;
    equal.into() && a.ca_cert == b.ca_cert
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ring")
    }
}

impl std::fmt::Debug for RingReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RingReader")
    }
}
