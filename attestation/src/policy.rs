//! From a verified document to one that meets a policy.

use std::collections::BTreeMap;
use std::ops::Deref;

use crate::document::AttestationDocument;
use crate::error::{Binding, Error};
use crate::pcr::{Pcr, PcrIndex};
use crate::verify::VerifiedDocument;

/// What a verified document must say.
///
/// ```
/// use attestation::{Pcr, PcrIndex, Policy};
///
/// let [pcr0, pcr1, pcr2] = [[1; 48], [2; 48], [3; 48]].map(Pcr::new);
/// let policy = Policy::for_image(pcr0, pcr1, pcr2)
///     .with_pcr(PcrIndex::ROLE, Pcr::new([4; 48]))
///     .with_nonce(b"asked once, good for a minute");
/// ```
#[derive(Clone, Debug)]
pub struct Policy {
    reference_pcrs: BTreeMap<PcrIndex, Pcr>,
    nonce: Option<Vec<u8>>,
    user_data: Option<Vec<u8>>,
    public_key: Option<Vec<u8>>,
    debug_allowed: bool,
}

impl Policy {
    /// Allows one image: PCR0, PCR1 and PCR2 must all be these. Debug enclaves are refused.
    ///
    /// PCR0 to PCR2 name an image and not its owner: anybody can start it. Add PCR3, PCR4 or PCR8 to say whose enclave.
    pub fn for_image(pcr0: Pcr, pcr1: Pcr, pcr2: Pcr) -> Self {
        Self::any_image_that_caller_authorises()
            .with_pcr(PcrIndex::IMAGE, pcr0)
            .with_pcr(PcrIndex::KERNEL, pcr1)
            .with_pcr(PcrIndex::APPLICATION, pcr2)
    }

    /// Allows any image that is no debug image. **The caller authorises**: before it acts on the appraised document it
    /// takes [`AttestationDocument::os_image_hash`] to an authoriser, as a KMS does, or it wants authenticity alone.
    pub fn any_image_that_caller_authorises() -> Self {
        Self {
            reference_pcrs: BTreeMap::new(),
            nonce: None,
            user_data: None,
            public_key: None,
            debug_allowed: false,
        }
    }

    /// Also asks for this value of a register. A later value for the same register replaces an earlier one.
    #[must_use]
    pub fn with_pcr(mut self, index: PcrIndex, pcr: Pcr) -> Self {
        self.reference_pcrs.insert(index, pcr);
        self
    }

    /// Also asks for this `nonce`. A null never equals an empty one.
    #[must_use]
    pub fn with_nonce(self, nonce: &[u8]) -> Self {
        Self { nonce: Some(nonce.into()), ..self }
    }

    /// Also asks for this `user_data`. A null never equals an empty one.
    #[must_use]
    pub fn with_user_data(self, user_data: &[u8]) -> Self {
        Self { user_data: Some(user_data.into()), ..self }
    }

    /// Also asks for this `public_key`. A null never equals an empty one.
    #[must_use]
    pub fn with_public_key(self, public_key: &[u8]) -> Self {
        Self { public_key: Some(public_key.into()), ..self }
    }

    /// Accepts debug enclaves, which keep nothing secret from their parent and whose registers name no image.
    #[must_use]
    pub fn danger_allow_debug(self) -> Self {
        Self { debug_allowed: true, ..self }
    }

    fn check(&self, document: &AttestationDocument) -> Result<(), Error> {
        if let (false, Some(index)) = (self.debug_allowed, document.first_zero_image_pcr()) {
            return Err(Error::Debug { index });
        }
        for (&index, &expected) in &self.reference_pcrs {
            let actual = *document.pcr(index).ok_or(Error::PcrAbsent { index, expected })?;
            if actual != expected {
                return Err(Error::PcrMismatch { index, expected, actual });
            }
        }
        check_binding(Binding::Nonce, self.nonce.as_deref(), document.nonce())?;
        check_binding(Binding::UserData, self.user_data.as_deref(), document.user_data())?;
        check_binding(Binding::PublicKey, self.public_key.as_deref(), document.public_key())
    }
}

/// These values are public, so they need no comparison in constant time.
fn check_binding(binding: Binding, expected: Option<&[u8]>, actual: Option<&[u8]>) -> Result<(), Error> {
    match expected {
        Some(_) if expected != actual => Err(Error::Binding { binding, absent: actual.is_none() }),
        _ => Ok(()),
    }
}

impl VerifiedDocument {
    /// Compares the document with a policy.
    ///
    /// # Errors
    /// The first rule of the policy that is not met.
    pub fn appraise(self, policy: &Policy) -> Result<AppraisedDocument, Error> {
        policy.check(&self.0)?;
        Ok(AppraisedDocument(self.0))
    }
}

/// A verified document that meets a policy. Only [`VerifiedDocument::appraise`] makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppraisedDocument(AttestationDocument);

impl Deref for AppraisedDocument {
    type Target = AttestationDocument;

    fn deref(&self) -> &AttestationDocument {
        &self.0
    }
}
