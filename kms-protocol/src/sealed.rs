//! Sealed release: what evidence is bound to, and the challenges of one connection (docs/sealed-release.md).
//!
//! ```text
//! enclave                                    KMS
//!    ── GetChallenge ─────────────────────▶  Challenges::issue
//!    ◀── nonce ───────────────────────────
//!  NSM document over nonce, fresh key,
//!  Binding::commitment
//!    ── GetAppKeySealed(document) ────────▶  Challenges::redeem → FreshNonce, once
//!                                            verify, Binding::commitment again, authorise
//!    ◀── HPKE to the fresh key, signed ───
//! ```
//!
//! Sealing itself needs randomness and is done above this crate; here are the inputs to it.

use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::derive::K256PublicKey;
use crate::ids::{AppId, InstanceId};

/// The version of everything here. Another version has other labels, so that nothing of one is good in the other.
pub const VERSION: u32 = 1;
/// Label of the TLS exporter (RFC 8446 §7.5), used without a context.
pub const EXPORTER_LABEL: &[u8] = b"EXPORTER-keyferry-sealed-release-v1";
/// First field of the commitment. It names the direction too: what an enclave attests can be no statement of a KMS.
const COMMITMENT_LABEL: &[u8] = b"keyferry sealed release v1: enclave to KMS";
/// What HPKE's `info` begins with.
const INFO_LABEL: &[u8] = b"keyferry sealed release v1: app keys";

/// Length of a nonce in bytes.
pub const NONCE_LEN: usize = 32;
/// Length of a public key of the HPKE suite (X25519) in bytes.
pub const PUBLIC_KEY_LEN: usize = 32;
/// Length of the exported keying material in bytes.
pub const EXPORTER_LEN: usize = 32;
/// How long a nonce is good for.
pub const NONCE_LIFETIME: Duration = Duration::from_secs(60);
/// Challenges that one connection may have open. One more makes the oldest unknown.
pub const MAX_OPEN_CHALLENGES: usize = 4;
/// Longest attestation document taken, in bytes: the NSM's answer is no longer (reference §1.6).
pub const MAX_DOCUMENT: usize = 0x3000;
/// Longest ciphertext taken by an enclave, in bytes: keys and one certificate are about 1 KiB.
pub const MAX_CIPHERTEXT: usize = 64 * 1024;

/// Exported keying material of a TLS 1.3 connection: equal at both ends of one connection, and of no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exporter(pub [u8; EXPORTER_LEN]);

/// Everything that a document for sealed release speaks about.
#[derive(Clone, Copy, Debug)]
pub struct Binding<'a> {
    /// The KMS's nonce; also in the document's `nonce`.
    pub nonce: &'a [u8; NONCE_LEN],
    /// The enclave's fresh HPKE key; also in the document's `public_key`.
    pub public_key: &'a [u8; PUBLIC_KEY_LEN],
    /// Whose keys are asked for.
    pub app_id: &'a AppId,
    /// Which instance asks.
    pub instance_id: &'a InstanceId,
    /// SubjectPublicKeyInfo (DER) of the KMS's root CA.
    pub root_ca_spki: &'a [u8],
    /// The KMS's root k256 key.
    pub root_k256: &'a K256PublicKey,
    /// The connection.
    pub exporter: &'a Exporter,
}

impl Binding<'_> {
    /// The hash that goes into the document's `user_data`.
    #[must_use]
    pub fn commitment(&self) -> Commitment {
        let Self { nonce, public_key, app_id, instance_id, root_ca_spki, root_k256, exporter } = *self;
        let root_ca = Sha256::digest(root_ca_spki);
        let fields: [&[u8]; 8] = [
            COMMITMENT_LABEL,
            nonce,
            public_key,
            app_id.as_bytes(),
            instance_id.as_bytes(),
            &root_ca,
            root_k256.as_bytes(),
            &exporter.0,
        ];
        let mut hash = Sha256::new();
        for field in fields {
            // Every field is far shorter; the length keeps neighbours apart.
            let length = u16::try_from(field.len()).unwrap_or(u16::MAX);
            hash.update(length.to_be_bytes());
            hash.update(field);
        }
        Commitment(hash.finalize().into())
    }
}

/// SHA-256 over a [`Binding`]: the document's `user_data`. Report data of RA-TLS is 64 bytes long, so neither passes for
/// the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commitment([u8; Commitment::LEN]);

impl Commitment {
    /// Length in bytes.
    pub const LEN: usize = 32;

    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }

    /// HPKE's `info` for the answer; its `aad` is empty.
    #[must_use]
    pub fn hpke_info(&self) -> Vec<u8> {
        [INFO_LABEL, &self.0].concat()
    }
}

/// A nonce that was issued on this connection, is in its lifetime, and has not been used: only
/// [`Challenges::redeem`] makes one, and it is not copied.
#[derive(Debug, PartialEq, Eq)]
pub struct FreshNonce([u8; NONCE_LEN]);

impl FreshNonce {
    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; NONCE_LEN] {
        &self.0
    }
}

/// Why a nonce is not good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChallengeError {
    /// Issued on another connection, used before, replaced by newer ones, or made up.
    #[error("the nonce is not one that this connection was given and has not used")]
    Unknown,
    /// Older than [`NONCE_LIFETIME`], or issued in the future of a clock that was set back.
    #[error("the nonce is older than {} seconds", NONCE_LIFETIME.as_secs())]
    Expired,
}

/// The open challenges of one connection. They live and die with it, so no peer's challenges can push out another's, and
/// all together are bounded by the number of connections.
#[derive(Debug, Default)]
pub struct Challenges {
    /// Oldest first.
    open: Vec<Challenge>,
}

#[derive(Debug)]
struct Challenge {
    nonce: [u8; NONCE_LEN],
    issued: Duration,
}

impl Challenges {
    /// Remembers a nonce from a random source. `now` is the time since any fixed point.
    pub fn issue(&mut self, nonce: [u8; NONCE_LEN], now: Duration) {
        self.open.retain(|challenge| challenge.is_alive(now));
        if self.open.len() == MAX_OPEN_CHALLENGES {
            self.open.remove(0);
        }
        self.open.push(Challenge { nonce, issued: now });
    }

    /// Takes a nonce out: it will be unknown from now on, whatever comes of it.
    ///
    /// # Errors
    /// [`ChallengeError`].
    pub fn redeem(&mut self, nonce: &[u8], now: Duration) -> Result<FreshNonce, ChallengeError> {
        let at = self.open.iter().position(|challenge| challenge.nonce == nonce);
        let challenge = self.open.remove(at.ok_or(ChallengeError::Unknown)?);
        if challenge.is_alive(now) { Ok(FreshNonce(challenge.nonce)) } else { Err(ChallengeError::Expired) }
    }

    /// How many are open, dead ones included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.open.len()
    }

    /// Whether none is open.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }
}

impl Challenge {
    fn is_alive(&self, now: Duration) -> bool {
        now.checked_sub(self.issued).is_some_and(|age| age <= NONCE_LIFETIME)
    }
}

#[cfg(test)]
mod tests;
