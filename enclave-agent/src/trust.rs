//! What makes a server the KMS, decided before anything it says is used.
//!
//! | anchor | what it authenticates |
//! | --- | --- |
//! | root CA | both connections: server certificates issued by this key itself, with usage `kms:rpc` |
//! | evidence policy | both connections: TDX evidence in the server certificate; the root CA it names counts from then on |
//! | root k256 key | the answer: the app's k256 key carries a signature of it (see below) |
//! | danger: any | nothing, as with upstream's command without a root CA |
//!
//! Several anchors must all hold. **The k256 key alone leaves TLS unauthenticated.** Its signature covers the app id and
//! the app's k256 key; the disk and environment keys beside it are covered by nothing. What follows is that the
//! answer was put together by somebody who knows the app's k256 private key: the KMS, or an attacker who already has
//! the app's keys. Where that matters, pin the root CA as well.

use std::sync::Arc;

use kms_protocol::derive::K256PublicKey;
use ratls::client::{PinnedRoot, ServerTrust};
use ratls::evidence::EvidencePolicy;

/// What makes a server the KMS. There is no value that stands for "nothing configured".
#[derive(Clone, Debug)]
pub struct KmsTrust {
    root: Option<PinnedRoot>,
    policy: Option<Arc<dyn EvidencePolicy>>,
    k256: Option<K256PublicKey>,
}

/// No anchor was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("nothing says which KMS to trust; whoever answers could hand out keys it knows")]
pub struct NoTrustAnchor;

impl KmsTrust {
    /// Trusts a KMS that satisfies all given anchors.
    ///
    /// # Errors
    /// [`NoTrustAnchor`] when there is none.
    pub fn anchored(
        root: Option<PinnedRoot>,
        policy: Option<Arc<dyn EvidencePolicy>>,
        k256: Option<K256PublicKey>,
    ) -> Result<Self, NoTrustAnchor> {
        if root.is_none() && policy.is_none() && k256.is_none() {
            return Err(NoTrustAnchor);
        }
        Ok(Self { root, policy, k256 })
    }

    /// Trusts whoever answers. Anybody on the way, the parent first, can be the KMS and choose the keys.
    #[must_use]
    pub fn danger_accept_any_kms() -> Self {
        Self { root: None, policy: None, k256: None }
    }

    /// Whether no anchor holds.
    #[must_use]
    pub fn is_danger(&self) -> bool {
        self.root.is_none() && self.policy.is_none() && self.k256.is_none()
    }

    /// Names of the anchors, for output.
    #[must_use]
    pub fn names(&self) -> Vec<&'static str> {
        let Self { root, policy, k256 } = self;
        [
            root.as_ref().map(|_| "root-ca"),
            policy.as_ref().map(|_| "kms-policy"),
            k256.as_ref().map(|_| "k256-pubkey"),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    /// The pinned root CA.
    pub(crate) fn root(&self) -> Option<&PinnedRoot> {
        self.root.as_ref()
    }

    /// The pinned root k256 key.
    pub(crate) fn k256(&self) -> Option<&K256PublicKey> {
        self.k256.as_ref()
    }

    /// Whether the first connection is authenticated, so that what is learned on it can be built on.
    pub(crate) fn authenticates_first_connection(&self) -> bool {
        self.root.is_some() || self.policy.is_some()
    }

    /// For the connection on which the root CA is learned.
    pub(crate) fn first_connection(&self) -> ServerTrust {
        match (&self.root, &self.policy) {
            (Some(root), Some(policy)) => {
                ServerTrust::pinned_root_and_evidence(root.clone(), Arc::clone(policy))
            }
            (Some(root), None) => ServerTrust::pinned_root(root.clone()),
            (None, Some(policy)) => ServerTrust::evidence(Arc::clone(policy)),
            (None, None) => ServerTrust::danger_accept_any_kms(),
        }
    }

    /// For the connection on which keys come: the same anchors, and in any case a certificate that `root`, pinned or
    /// learned, issued itself for a KMS.
    pub(crate) fn key_connection(&self, root: &PinnedRoot) -> ServerTrust {
        match &self.policy {
            Some(policy) => ServerTrust::pinned_root_and_evidence(root.clone(), Arc::clone(policy)),
            None => ServerTrust::pinned_root(root.clone()),
        }
    }
}
