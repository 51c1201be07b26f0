//! A key that never leaves its service. Nothing the service says is taken on trust: a signature counts when it verifies
//! under the public key that the address was made from.

use std::future::Future;
use std::time::Duration;

use alloy::consensus::SignableTransaction;
use alloy::network::TxSigner;
use alloy::primitives::{Address, B256, Signature};
use alloy::signers;
use async_trait::async_trait;
use k256::ecdsa::{self, RecoveryId, VerifyingKey};
use tokio::time::timeout;

/// Why a key service did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum KeyServiceError {
    /// The deadline passed.
    #[error("{key} gave no answer to {what} within {} s", after.as_secs_f32())]
    NoAnswer {
        /// The key, with its service.
        key: String,
        /// What was asked.
        what: &'static str,
        /// How long it was given.
        after: Duration,
    },
    /// The service could not be asked: no way to it, or no credentials.
    #[error("{key} cannot be asked for {what}: {problem}")]
    Unreachable {
        /// The key, with its service.
        key: String,
        /// What was asked.
        what: &'static str,
        /// Why.
        problem: String,
        /// What to set up.
        hint: &'static str,
    },
    /// The service said no.
    #[error("{key} refuses {what}: {problem}")]
    Refused {
        /// The key, with its service.
        key: String,
        /// What was asked.
        what: &'static str,
        /// Its words.
        problem: String,
        /// What to look at.
        hint: &'static str,
    },
    /// The key is of another kind than transactions need.
    #[error("{key} is of kind {actual}, expected {expected}")]
    WrongKind {
        /// The key, with its service.
        key: String,
        /// Its kind, in the service's words.
        actual: String,
        /// The kind that signs transactions.
        expected: &'static str,
    },
    /// An answer that is not what the method returns.
    #[error("{key} answered {what} with something else than expected: {problem}")]
    Malformed {
        /// The key, with its service.
        key: String,
        /// What was asked.
        what: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// A signature by somebody else, or over something else.
    #[error("{key} answered with a signature that is not by it")]
    WrongSignature {
        /// The key, with its service.
        key: String,
    },
}

impl KeyServiceError {
    /// The next step, when one is known.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::NoAnswer { .. } => {
                Some("check the way to the key service, or give it longer with --timeout")
            }
            Self::Unreachable { hint, .. } | Self::Refused { hint, .. } => Some(hint),
            Self::WrongKind { .. } => Some("create an asymmetric key on the curve secp256k1, for signing"),
            Self::Malformed { .. } | Self::WrongSignature { .. } => None,
        }
    }
}

/// A service that keeps a secp256k1 key.
pub(super) trait KeyService: Send + Sync {
    /// The key and its service, for messages.
    fn name(&self) -> &str;

    /// The public key, once it is known to be one that signs transactions.
    fn public_key(&self) -> impl Future<Output = Result<VerifyingKey, KeyServiceError>> + Send;

    /// A signature over `digest`, in DER.
    fn sign(&self, digest: &B256) -> impl Future<Output = Result<Vec<u8>, KeyServiceError>> + Send;
}

/// Signs with a key in a service.
pub(super) struct RemoteSigner<S> {
    service: S,
    public_key: VerifyingKey,
    address: Address,
    deadline: Duration,
}

impl<S: KeyService> RemoteSigner<S> {
    /// Asks for the public key. This and every signature must come within `deadline`.
    pub(super) async fn open(service: S, deadline: Duration) -> Result<Self, KeyServiceError> {
        let public_key = in_time(&service, "its public key", deadline, service.public_key()).await?;
        let address = Address::from_public_key(&public_key);
        Ok(Self { service, public_key, address, deadline })
    }

    async fn signature(&self, digest: &B256) -> Result<Signature, KeyServiceError> {
        let answer = in_time(&self.service, "a signature", self.deadline, self.service.sign(digest)).await?;
        let signature = ecdsa::Signature::from_der(&answer).map_err(|error| KeyServiceError::Malformed {
            key: self.service.name().to_owned(),
            what: "a signature",
            problem: format!("{} bytes that are not a signature in DER: {error}", answer.len()),
        })?;
        // Chains accept the lower of the two possible values of s (EIP-2); key services return either.
        let signature = signature.normalize_s().unwrap_or(signature);
        // Tries every recovery id and gives the one that leads to our key, if any does.
        let recovery = RecoveryId::trial_recovery_from_prehash(&self.public_key, &digest[..], &signature);
        let recovery =
            recovery.map_err(|_| KeyServiceError::WrongSignature { key: self.service.name().to_owned() })?;
        Ok((signature, recovery).into())
    }
}

async fn in_time<T>(
    service: &impl KeyService,
    what: &'static str,
    deadline: Duration,
    work: impl Future<Output = Result<T, KeyServiceError>>,
) -> Result<T, KeyServiceError> {
    timeout(deadline, work).await.unwrap_or_else(|_| {
        Err(KeyServiceError::NoAnswer { key: service.name().to_owned(), what, after: deadline })
    })
}

#[async_trait]
impl<S: KeyService> TxSigner<Signature> for RemoteSigner<S> {
    fn address(&self) -> Address {
        self.address
    }

    async fn sign_transaction(
        &self,
        transaction: &mut dyn SignableTransaction<Signature>,
    ) -> signers::Result<Signature> {
        self.signature(&transaction.signature_hash()).await.map_err(signers::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use alloy::primitives::{U256, keccak256};
    use k256::ecdsa::SigningKey;
    use k256::ecdsa::signature::hazmat::PrehashSigner;

    use super::*;

    /// What the service does with a signature before it answers.
    type Twist = fn(ecdsa::Signature) -> Vec<u8>;

    struct Fake {
        key: SigningKey,
        twist: Option<Twist>,
    }

    impl KeyService for Fake {
        fn name(&self) -> &str {
            "fake key"
        }

        async fn public_key(&self) -> Result<VerifyingKey, KeyServiceError> {
            Ok(*self.key.verifying_key())
        }

        async fn sign(&self, digest: &B256) -> Result<Vec<u8>, KeyServiceError> {
            let Some(twist) = self.twist else { return std::future::pending().await };
            Ok(twist(self.key.sign_prehash(&digest[..]).unwrap()))
        }
    }

    async fn signed(twist: Option<Twist>, digest: B256) -> Result<(Signature, Address), KeyServiceError> {
        let key = SigningKey::from_slice(&[7; 32]).unwrap();
        let signer = RemoteSigner::open(Fake { key, twist }, Duration::from_millis(200)).await.unwrap();
        signer.signature(&digest).await.map(|signature| (signature, signer.address()))
    }

    fn der(signature: ecdsa::Signature) -> Vec<u8> {
        signature.to_der().as_bytes().to_vec()
    }

    fn with_the_higher_s(signature: ecdsa::Signature) -> Vec<u8> {
        let (r, s) = signature.normalize_s().unwrap_or(signature).split_scalars();
        der(ecdsa::Signature::from_scalars(r, -s).unwrap())
    }

    #[tokio::test]
    async fn both_values_of_s_end_as_the_lower_one_and_recover_to_the_address() {
        let half = U256::MAX >> 1; // the order of the curve is just below 2^256
        for number in 0u8..32 {
            let digest = keccak256([number]);
            for twist in [der as Twist, with_the_higher_s] {
                let (signature, address) = signed(Some(twist), digest).await.unwrap();
                assert!(signature.s() <= half && signature.normalize_s().is_none(), "{signature:?}");
                assert_eq!(signature.recover_address_from_prehash(&digest).unwrap(), address);
            }
        }
    }

    #[tokio::test]
    async fn a_signature_over_something_else_is_refused() {
        let by_another = |_: ecdsa::Signature| {
            let another = SigningKey::from_slice(&[8; 32]).unwrap();
            let signature: ecdsa::Signature = another.sign_prehash(&[1; 32]).unwrap();
            der(signature)
        };
        let error = signed(Some(by_another), B256::ZERO).await.unwrap_err();
        assert_eq!(error.to_string(), "fake key answered with a signature that is not by it");
    }

    #[tokio::test]
    async fn every_cut_of_a_signature_is_refused() {
        let whole = signed_bytes();
        for length in 0..whole.len() {
            assert!(ecdsa::Signature::from_der(&whole[..length]).is_err(), "cut at {length}");
        }
        let cut = |signature: ecdsa::Signature| der(signature)[..20].to_vec();
        let error = signed(Some(cut), B256::ZERO).await.unwrap_err();
        assert!(matches!(error, KeyServiceError::Malformed { .. }), "{error}");
    }

    fn signed_bytes() -> Vec<u8> {
        let key = SigningKey::from_slice(&[7; 32]).unwrap();
        der(key.sign_prehash(&[1; 32]).unwrap())
    }

    #[tokio::test]
    async fn silence_ends_at_the_deadline() {
        let error = signed(None, B256::ZERO).await.unwrap_err();
        assert_eq!(error.to_string(), "fake key gave no answer to a signature within 0.2 s");
    }
}
