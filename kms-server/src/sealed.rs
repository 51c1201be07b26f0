//! Sealed release: `GetChallenge` and `GetAppKeySealed` (docs/sealed-release.md).
//!
//! The order of a release: version, exporter, ids, a nonce of this very connection (taken, so that it is used up
//! whatever follows), the document's signature, its binding, the authoriser, derivation, sealing. A stranger without a
//! nonce costs no signature check.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use attestation::{AttestationDocument, Policy, UnixMillis};
use kms_protocol::derive::sign_sealed_app_keys;
use kms_protocol::sealed::{
    Binding, ChallengeError, Challenges, Commitment, Exporter, FreshNonce, MAX_DOCUMENT, NONCE_LEN,
    NONCE_LIFETIME, PUBLIC_KEY_LEN, VERSION,
};
use kms_protocol::wire::{
    AppKeyResponse, ChallengeRequest, ChallengeResponse, SealedAppKeyRequest, SealedAppKeyResponse,
};
use kms_protocol::{AppId, InstanceId};
use prost::Message as _;
use zeroize::Zeroizing;

use crate::attest::ClientEvidence;
use crate::rpc::{self, Kms};
use command_line::chain;

/// Whether keys are released sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SealedRelease {
    /// To clients that ask for it; `GetAppKey` serves the others.
    #[default]
    Offer,
    /// In no other way: `GetAppKey` is refused. Whoever can get evidence out of an enclave by other means, but not a
    /// document with a key of his own, gets nothing then.
    Require,
    /// Never; both methods are unknown, as they are to an upstream KMS.
    Off,
}

/// One connection, as far as sealed release is concerned.
pub(crate) struct Session {
    /// None for TLS 1.2.
    exporter: Option<Exporter>,
    challenges: Mutex<Challenges>,
}

impl Session {
    pub(crate) fn new(exporter: Option<Exporter>) -> Self {
        Self { exporter, challenges: Mutex::default() }
    }

    /// No step under the lock leaves the challenges half changed.
    fn with_challenges<T>(&self, act: impl FnOnce(&mut Challenges) -> T) -> T {
        act(&mut self.challenges.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Why keys are not released sealed. The text goes to the client.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("Unsupported sealed release version: {0} (this KMS speaks {VERSION})")]
    Version(u32),
    #[error("sealed release needs TLS 1.3")]
    NoExporter,
    #[error("cannot make a nonce")]
    Random,
    #[error("App not allowed: app_id must be 20 bytes")]
    AppId,
    #[error("App not allowed: instance_id must be 0 or 20 bytes")]
    InstanceId,
    #[error("invalid document: {0} bytes, expected at most {MAX_DOCUMENT}")]
    DocumentLength(usize),
    #[error("invalid document: {}", chain(.0))]
    Document(attestation::Error),
    #[error("invalid document: {0} is absent or has a wrong length")]
    Field(&'static str),
    #[error("challenge refused: {0}")]
    Challenge(#[from] ChallengeError),
    #[error(
        "invalid document: it is not bound to this request: nonce, key, app, instance, KMS and connection must all be \
         the document's"
    )]
    NotBound,
    #[error("cannot seal to the document's public_key")]
    PublicKey,
}

impl Error {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Version(_) => "sealed-version",
            Self::NoExporter => "sealed-no-exporter",
            Self::Random => "sealed-random",
            Self::AppId => "app-id-length",
            Self::InstanceId => "instance-id-length",
            Self::DocumentLength(_) => "sealed-document-length",
            Self::Document(error) => error.name(),
            Self::Field(_) => "sealed-document-field",
            Self::Challenge(ChallengeError::Unknown) => "sealed-nonce-unknown",
            Self::Challenge(ChallengeError::Expired) => "sealed-nonce-expired",
            Self::NotBound => "sealed-not-bound",
            Self::PublicKey => "sealed-public-key",
        }
    }
}

/// A request whose nonce was good: what is left to check is the document.
struct Claim {
    document: Vec<u8>,
    nonce: FreshNonce,
    exporter: Exporter,
    app_id: AppId,
    instance_id: InstanceId,
}

/// Where the answer goes, proved by the document.
struct Recipient {
    public_key: [u8; PUBLIC_KEY_LEN],
    commitment: Commitment,
}

impl Kms {
    /// A nonce for this connection.
    pub(crate) fn challenge(
        &self,
        request: &ChallengeRequest,
        session: &Session,
    ) -> Result<ChallengeResponse, Error> {
        check_version(request.version)?;
        session.exporter.ok_or(Error::NoExporter)?;
        let mut nonce = [0; NONCE_LEN];
        aws_lc_rs::rand::fill(&mut nonce).map_err(|_| Error::Random)?;
        let now = since_epoch((self.clock)());
        session.with_challenges(|challenges| challenges.issue(nonce, now));
        let valid_for = u32::try_from(NONCE_LIFETIME.as_secs()).unwrap_or(u32::MAX);
        Ok(ChallengeResponse { version: VERSION, nonce: nonce.to_vec(), valid_for })
    }

    /// An app's keys for the enclave whose document is in the request, and for nobody else.
    pub(crate) async fn app_key_sealed(
        self: &Arc<Self>,
        request: SealedAppKeyRequest,
        session: &Session,
    ) -> Result<SealedAppKeyResponse, rpc::Error> {
        let now = (self.clock)();
        let claim = Claim::accept(request, session, now)?;
        let kms = Arc::clone(self);
        let (evidence, recipient) = self.offload.run(move || kms.verify_claim(claim, now)).await??;
        let keys = self.release(evidence, "").await?;
        let kms = Arc::clone(self);
        self.offload.run(move || kms.seal(&keys, &recipient)).await?
    }

    fn verify_claim(&self, claim: Claim, now: UnixMillis) -> Result<(ClientEvidence, Recipient), rpc::Error> {
        let Claim { document, nonce, exporter, app_id, instance_id } = claim;
        // What the document says about itself chooses the key; the policy then holds the signed content to it.
        let decoded = AttestationDocument::decode(&document).map_err(Error::Document)?;
        let public_key: [u8; PUBLIC_KEY_LEN] =
            decoded.public_key().and_then(|key| key.try_into().ok()).ok_or(Error::Field("public_key"))?;
        let commitment = Binding {
            nonce: nonce.as_bytes(),
            public_key: &public_key,
            app_id: &app_id,
            instance_id: &instance_id,
            root_ca_spki: &self.root_ca_spki()?,
            root_k256: &self.identity.roots.k256_public_key(),
            exporter: &exporter,
        }
        .commitment();
        let policy = Policy::any_image_that_caller_authorises()
            .with_nonce(nonce.as_bytes())
            .with_public_key(&public_key)
            .with_user_data(commitment.as_bytes());
        let evidence = self.attester.verify_bound(document, &policy, &app_id, &instance_id, now)?;
        Ok((evidence, Recipient { public_key, commitment }))
    }

    fn root_ca_spki(&self) -> Result<Vec<u8>, rpc::Error> {
        Ok(self.identity.roots.ca().spki_der()?.to_vec())
    }

    fn seal(&self, keys: &AppKeyResponse, recipient: &Recipient) -> Result<SealedAppKeyResponse, rpc::Error> {
        let mut plain = Zeroizing::new(Vec::with_capacity(keys.encoded_len()));
        let encoded = keys.encode(&mut *plain);
        debug_assert!(encoded.is_ok(), "the vector has room");
        let Recipient { public_key, commitment } = recipient;
        let sealed = ratls::sealed::seal(public_key, commitment, &plain).map_err(|_| Error::PublicKey)?;
        let signature =
            sign_sealed_app_keys(&self.identity.roots, commitment, &sealed.enc, &sealed.ciphertext);
        Ok(SealedAppKeyResponse {
            enc: sealed.enc.to_vec(),
            ciphertext: sealed.ciphertext,
            signature: signature.as_bytes().to_vec(),
        })
    }
}

impl Claim {
    /// Takes the nonce out of the session, or refuses.
    fn accept(request: SealedAppKeyRequest, session: &Session, now: UnixMillis) -> Result<Self, Error> {
        let SealedAppKeyRequest { version, document, app_id, instance_id } = request;
        check_version(version)?;
        let exporter = session.exporter.ok_or(Error::NoExporter)?;
        let app_id = AppId::try_from(app_id.as_slice()).map_err(|_| Error::AppId)?;
        let instance_id = InstanceId::try_from(instance_id.as_slice()).map_err(|_| Error::InstanceId)?;
        if document.len() > MAX_DOCUMENT {
            return Err(Error::DocumentLength(document.len()));
        }
        let decoded = AttestationDocument::decode(&document).map_err(Error::Document)?;
        let nonce = decoded.nonce().ok_or(Error::Field("nonce"))?;
        let nonce = session.with_challenges(|challenges| challenges.redeem(nonce, since_epoch(now)))?;
        Ok(Self { document, nonce, exporter, app_id, instance_id })
    }
}

fn check_version(version: u32) -> Result<(), Error> {
    if version == VERSION { Ok(()) } else { Err(Error::Version(version)) }
}

fn since_epoch(now: UnixMillis) -> Duration {
    Duration::from_millis(now.0)
}
