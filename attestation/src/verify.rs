//! From evidence to a document that AWS's hardware vouches for.

use std::num::NonZeroUsize;
use std::ops::Deref;
use std::time::Duration;

use crate::UnixMillis;
use crate::anchor::TrustAnchor;
use crate::cache::ChainCache;
use crate::chain;
use crate::cose::CoseSign1;
use crate::document::{AttestationDocument, Payload};
use crate::error::Error;

/// How far a document's timestamp may be from the verifier's clock. Both ends are allowed.
///
/// A leaf certificate lives three hours, so without this a document could be replayed that long; and even this is no
/// replacement for a nonce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Freshness {
    /// How old a document may be.
    pub max_age: Duration,
    /// How far ahead of the verifier's clock a document may be dated.
    pub max_skew: Duration,
}

impl Default for Freshness {
    /// One hour back and five minutes ahead, as the upstream KMS has it.
    fn default() -> Self {
        Self { max_age: Duration::from_secs(3600), max_skew: Duration::from_secs(300) }
    }
}

impl Freshness {
    fn check(&self, timestamp: UnixMillis, now: UnixMillis) -> Result<(), Error> {
        let Self { max_age, max_skew } = *self;
        let age = Duration::from_millis(now.0.saturating_sub(timestamp.0));
        let ahead = Duration::from_millis(timestamp.0.saturating_sub(now.0));
        if age > max_age {
            return Err(Error::Stale { age, max: max_age });
        }
        if ahead > max_skew {
            return Err(Error::FromFuture { ahead, max: max_skew });
        }
        Ok(())
    }
}

/// Verifies evidence against one root. Share it: a verifier with a cache remembers for all its users.
pub struct Verifier {
    anchor: TrustAnchor,
    freshness: Freshness,
    cache: Option<ChainCache>,
}

impl Verifier {
    /// A verifier with the default [`Freshness`] that remembers nothing.
    pub fn new(anchor: TrustAnchor) -> Self {
        Self { anchor, freshness: Freshness::default(), cache: None }
    }

    /// Sets how far a document's timestamp may be from the time of its verification.
    #[must_use]
    pub fn with_freshness(self, freshness: Freshness) -> Self {
        Self { freshness, ..self }
    }

    /// Remembers the keys of at most `capacity` instances, and of as many enclaves, whose chains were verified.
    ///
    /// This saves signature checks and changes no verdict. An entry takes about one kilobyte.
    #[must_use]
    pub fn with_chain_cache(self, capacity: NonZeroUsize) -> Self {
        Self { cache: Some(ChainCache::new(capacity)), ..self }
    }

    /// Decodes and verifies evidence: format, freshness, the chain to the root, the signature of the document.
    ///
    /// `now` is read once and used throughout. What the document says is still to be appraised.
    ///
    /// # Errors
    /// The first check that fails. What costs least is checked first.
    pub fn verify(&self, evidence: &[u8], now: UnixMillis) -> Result<VerifiedDocument, Error> {
        let cose = CoseSign1::decode(evidence)?;
        let payload = Payload::decode(cose.payload)?;
        self.freshness.check(payload.timestamp(), now)?;
        let key = chain::verified_leaf_key(&payload, &self.anchor, self.cache.as_ref(), now.as_secs())?;
        key.verify_digest(&cose.signed_digest(), cose.signature).map_err(|_| Error::Signature)?;
        Ok(VerifiedDocument(payload.to_document()))
    }
}

/// A document whose chain and signature were checked. Only [`Verifier::verify`] makes one.
///
/// It says truly what an enclave is; whether that enclave is wanted is for [`VerifiedDocument::appraise`] to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifiedDocument(pub(crate) AttestationDocument);

impl Deref for VerifiedDocument {
    type Target = AttestationDocument;

    fn deref(&self) -> &AttestationDocument {
        &self.0
    }
}
