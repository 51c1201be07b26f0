//! The chain from the pinned root to the leaf, in the one order AWS writes it.
//!
//! ```text
//! pinned root = cabundle[0] → cabundle[1] → … → cabundle[n] → certificate → document
//! ```
//!
//! No path is searched: what is out of order is refused. All that costs nothing (names, validity, constraints, usages)
//! is checked for every certificate before the first signature, and every signature is checked at most once, so the
//! dearest evidence costs nine checks.

use std::sync::Arc;

use crate::anchor::TrustAnchor;
use crate::cache::{ChainCache, ChainId};
use crate::certificate::{Certificate, CertificateFault, Validity};
use crate::document::{MAX_CA_BUNDLE, Payload};
use crate::error::{CertificatePosition, Error};
use crate::key::{IssuerKey, LeafKey};

/// The key that must have signed the document, from a chain that holds at `now` (seconds since 1970).
///
/// The cache saves signature checks and nothing else.
pub(crate) fn verified_leaf_key(
    payload: &Payload<'_>,
    anchor: &TrustAnchor,
    cache: Option<&ChainCache>,
    now: u64,
) -> Result<Arc<LeafKey>, Error> {
    let chain = Chain::checked(payload, anchor, now)?;
    let Some(cache) = cache else {
        let issuer = chain.verify_issuers(anchor.key())?;
        return chain.verify_leaf(issuer.as_ref().unwrap_or(anchor.key())).map(Arc::new);
    };

    let leaf_id = ChainId::of(payload.cabundle().chain([payload.certificate()]));
    if let Some(key) = cache.leaf_key(&leaf_id) {
        return Ok(key);
    }
    let bundle_id = ChainId::of(payload.cabundle());
    let issuer = match cache.issuer_key(&bundle_id) {
        Some(key) => key,
        None => {
            let key = chain.verify_issuers(anchor.key())?.unwrap_or_else(|| anchor.key().clone());
            let key = Arc::new(key);
            cache.insert_issuer(bundle_id, &key, chain.issuers_validity, now);
            key
        }
    };
    let key = Arc::new(chain.verify_leaf(&issuer)?);
    cache.insert_leaf(leaf_id, &key, chain.issuers_validity.intersect(chain.leaf.validity), now);
    Ok(key)
}

/// A chain of which everything but the signatures is checked.
struct Chain<'a> {
    /// The certificates between root and leaf, each at its index in the cabundle.
    intermediates: [Option<Certificate<'a>>; MAX_CA_BUNDLE],
    leaf: Certificate<'a>,
    /// When root and intermediates are all valid.
    issuers_validity: Validity,
}

impl<'a> Chain<'a> {
    fn checked(payload: &Payload<'a>, anchor: &'a TrustAnchor, now: u64) -> Result<Self, Error> {
        let mut bundle = payload.cabundle().enumerate();
        let last = bundle.len() - 1;
        // Where the document names another root nothing below it is worth a look.
        if bundle.next().is_none_or(|(_, root)| root != anchor.as_der()) {
            return Err(Error::UntrustedRoot);
        }
        let root = anchor.certificate();
        at(CertificatePosition::CaBundle(0), root.check_ca(last))?;
        at(CertificatePosition::CaBundle(0), root.validity.check(now))?;

        let mut intermediates = [None; MAX_CA_BUNDLE];
        let mut issuer = root;
        let mut issuers_validity = root.validity;
        for (index, der) in bundle {
            let position = CertificatePosition::CaBundle(index);
            let certificate = at(position, Certificate::decode(der))?;
            at(position, certificate.check_issuer(&issuer))?;
            at(position, certificate.check_ca(last - index))?;
            at(position, certificate.validity.check(now))?;
            issuers_validity = issuers_validity.intersect(certificate.validity);
            intermediates[index] = Some(certificate);
            issuer = certificate;
        }

        let position = CertificatePosition::Leaf;
        let leaf = at(position, Certificate::decode(payload.certificate()))?;
        at(position, leaf.check_issuer(&issuer))?;
        at(position, leaf.check_leaf())?;
        at(position, leaf.validity.check(now))?;
        Ok(Self { intermediates, leaf, issuers_validity })
    }

    /// Checks the signatures from the root down; gives the last intermediate's key, if there is an intermediate.
    fn verify_issuers(&self, root: &IssuerKey) -> Result<Option<IssuerKey>, Error> {
        let mut above = None;
        for (index, certificate) in self.intermediates.iter().enumerate() {
            let Some(certificate) = certificate else { continue };
            let position = CertificatePosition::CaBundle(index);
            at(position, certificate.check_signature(above.as_ref().unwrap_or(root)))?;
            above = Some(at(position, IssuerKey::new(certificate.public_key))?);
        }
        Ok(above)
    }

    fn verify_leaf(&self, issuer: &IssuerKey) -> Result<LeafKey, Error> {
        at(CertificatePosition::Leaf, self.leaf.check_signature(issuer))?;
        at(CertificatePosition::Leaf, LeafKey::new(self.leaf.public_key))
    }
}

fn at<T>(position: CertificatePosition, result: Result<T, CertificateFault>) -> Result<T, Error> {
    result.map_err(|fault| Error::Certificate { position, fault })
}
