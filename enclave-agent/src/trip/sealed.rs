//! Sealed release, the enclave's side (docs/sealed-release.md).

use std::sync::atomic::Ordering;

use bytes::Bytes;
use kms_protocol::InstanceId;
use kms_protocol::derive::{Signature, verify_sealed_app_keys};
use kms_protocol::sealed::{Binding, Exporter, MAX_CIPHERTEXT, NONCE_LEN, VERSION};
use kms_protocol::wire::{
    AppKeyResponse, ChallengeRequest, ChallengeResponse, Encoding, Method, SealedAppKeyRequest,
    SealedAppKeyResponse, WireMessage, json,
};
use ratls::sealed::{RecipientKey, Sealed};

use super::{Attempt, Connection, Introduction, SealedRelease, Step};
use crate::evidence::OwnDocument;
use crate::nsm::AttestFields;
use crate::{Error, Keys};

/// A nonce of the KMS, for one document, on the connection it came on.
pub(super) struct Challenge {
    nonce: [u8; NONCE_LEN],
    exporter: Exporter,
}

/// Why an answer of the KMS is none.
#[derive(Debug, thiserror::Error)]
enum AnswerError {
    #[error("{field} is {actual} bytes, expected {expected}")]
    Length { field: &'static str, actual: usize, expected: &'static str },
    #[error("version {0}, asked for {VERSION}")]
    Version(u32),
}

impl Attempt<'_> {
    /// Asks for a challenge; `None` from a KMS that has no sealed release.
    pub(super) async fn challenge(&self, connection: &mut Connection) -> Result<Option<Challenge>, Error> {
        // Without an exporter there is nothing to bind to, and a KMS would refuse.
        let Some(exporter) = connection.exporter else { return Ok(None) };
        let method = Method::GetChallenge;
        let request = json::encode(&ChallengeRequest { version: VERSION });
        let body = match connection.http.call(method, request).await {
            Ok(body) => body,
            Err(error) if error.is_unknown_method() => return Ok(None),
            Err(error) => return Err(Error::call(self.url, error)),
        };
        let answer: ChallengeResponse = self.decode(method, &body)?;
        if answer.version != VERSION {
            return Err(self.unreadable(method, AnswerError::Version(answer.version)));
        }
        let nonce = fixed("nonce", &answer.nonce).map_err(|error| self.unreadable(method, error))?;
        Ok(Some(Challenge { nonce, exporter }))
    }

    /// What the absence of a challenge means for this run.
    pub(super) fn offered(&self, challenge: Option<Challenge>) -> Result<Option<Challenge>, Error> {
        match (&challenge, self.config.sealed) {
            (Some(_), _) => self.sealed_was_offered.store(true, Ordering::Relaxed),
            (None, SealedRelease::Require) => return Err(Error::NotSealed { url: self.url.clone() }),
            (None, SealedRelease::Prefer) if self.sealed_was_offered.load(Ordering::Relaxed) => {
                return Err(Error::SealedWithdrawn { url: self.url.clone() });
            }
            (None, SealedRelease::Prefer) => {}
        }
        Ok(challenge)
    }

    /// From a challenge on the first connection to keys.
    pub(super) async fn sealed_keys(
        &self,
        challenge: Challenge,
        first: Connection,
        mut introduction: Introduction,
        os_image_hash: [u8; 32],
        watch: &mut (dyn FnMut(Step<'_>) + Send),
    ) -> Result<Keys, Error> {
        let trust = &self.config.trust;
        // A root that is pinned authenticated the first connection as well. One that was learned on it has not: the
        // connection of the keys is held to it, as in upstream's exchange.
        let (challenge, mut connection) = if trust.root().is_some() {
            (challenge, first)
        } else {
            drop(first);
            let trust = trust.key_connection(&introduction.root);
            let mut second = self.connect(trust, None, 2, watch).await?;
            let again = self.challenge(&mut second).await?;
            (again.ok_or_else(|| Error::SealedWithdrawn { url: self.url.clone() })?, second)
        };
        let root_k256 = match introduction.k256_root {
            Some(key) => key,
            None => self.k256_root(&mut connection).await?,
        };
        introduction.k256_root = Some(root_k256);

        let method = Method::GetAppKeySealed;
        let key = RecipientKey::generate().map_err(Error::Tls)?;
        let commitment = Binding {
            nonce: &challenge.nonce,
            public_key: key.public_key(),
            app_id: &self.config.app_id,
            instance_id: &InstanceId::NONE,
            root_ca_spki: introduction.root.spki_der(),
            root_k256: &root_k256,
            exporter: &challenge.exporter,
        }
        .commitment();
        let fields = AttestFields {
            user_data: Some(commitment.as_bytes().to_vec()),
            nonce: Some(challenge.nonce.to_vec()),
            public_key: Some(key.public_key().to_vec()),
        };
        let document = OwnDocument::ask(self.nsm, fields, self.config.deadlines.nsm).await?;
        watch(Step::Attested { document: &document });
        let request = SealedAppKeyRequest {
            version: VERSION,
            document: document.into_bytes(),
            app_id: self.config.app_id.as_bytes().to_vec(),
            instance_id: Vec::new(),
        };
        let body = self.call(&mut connection, method, Bytes::from(json::encode(&request))).await?;

        let answer: SealedAppKeyResponse = self.decode(method, &body)?;
        let unreadable = |error| self.unreadable(method, error);
        let sealed =
            Sealed { enc: fixed("enc", &answer.enc).map_err(unreadable)?, ciphertext: answer.ciphertext };
        if sealed.ciphertext.len() > MAX_CIPHERTEXT {
            let actual = sealed.ciphertext.len();
            return Err(unreadable(AnswerError::Length {
                field: "ciphertext",
                actual,
                expected: "at most 65536",
            }));
        }
        let refused = |source| Error::SealedSignature { url: self.url.clone(), source: Box::new(source) };
        let signature = Signature::from_slice(&answer.signature).map_err(refused)?;
        verify_sealed_app_keys(&root_k256, &commitment, &sealed.enc, &sealed.ciphertext, &signature)
            .map_err(refused)?;
        let plain = key.open(&commitment, &sealed).map_err(|source| self.unreadable(method, source))?;
        let answer = AppKeyResponse::decode_body(Encoding::Protobuf, &plain)
            .map_err(|source| Error::answer(self.url, method.name(), source))?;
        self.release(method, answer, introduction, os_image_hash)
    }
}

fn fixed<const N: usize>(field: &'static str, bytes: &[u8]) -> Result<[u8; N], AnswerError> {
    bytes.try_into().map_err(|_| AnswerError::Length { field, actual: bytes.len(), expected: "32" })
}
