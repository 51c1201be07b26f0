//! This enclave's own evidence: asked for, and looked at before anybody else sees it.

use std::sync::Arc;
use std::time::Duration;

use attestation::{AttestationDocument, OsImageHash, UnixMillis};

use crate::nsm::{self, AttestFields, Nsm, NsmError};

/// A document of this enclave's NSM that says what it was asked to say.
///
/// The signature is for others to judge: this side knows where it asked.
#[derive(Debug)]
pub struct OwnDocument {
    bytes: Vec<u8>,
    decoded: AttestationDocument,
}

/// Why this enclave has no evidence worth sending.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvidenceError {
    /// The NSM gave no document.
    #[error(transparent)]
    Nsm(#[from] NsmError),
    /// The document cannot be read.
    #[error("own attestation document")]
    Document(#[source] attestation::Error),
    /// The document answers something else.
    #[error("own attestation document: {field} is not what the NSM was asked to sign")]
    OtherField {
        /// Which field.
        field: &'static str,
    },
    /// The enclave runs in debug mode: its parent can read its memory and console.
    #[error("this enclave runs in debug mode (PCR0 to PCR2 are zero); its keys would be open to the parent")]
    Debug,
    /// This enclave's clock and the NSM's are too far apart to judge certificates and freshness.
    #[error("this clock is {by:?} {direction} the NSM's, expected at most {max:?}")]
    ClockSkew {
        /// How far.
        by: Duration,
        /// `ahead of` or `behind`.
        direction: &'static str,
        /// The limit.
        max: Duration,
    },
}

impl OwnDocument {
    /// Asks the NSM for a document with these fields, within `deadline`, and checks that it carries them.
    ///
    /// # Errors
    /// [`EvidenceError`], except for debug mode and the clock, which are the caller's to check.
    pub async fn ask(
        nsm: &Arc<dyn Nsm>,
        fields: AttestFields,
        deadline: Duration,
    ) -> Result<Self, EvidenceError> {
        let bytes = nsm::attest(nsm, fields.clone(), deadline).await?;
        let decoded = AttestationDocument::decode(&bytes).map_err(EvidenceError::Document)?;
        for (field, asked, got) in [
            ("user_data", &fields.user_data, decoded.user_data()),
            ("nonce", &fields.nonce, decoded.nonce()),
            ("public_key", &fields.public_key, decoded.public_key()),
        ] {
            // Some modules write an empty string for an absent field.
            if asked.as_deref().unwrap_or_default() != got.unwrap_or_default() {
                return Err(EvidenceError::OtherField { field });
            }
        }
        Ok(Self { bytes, decoded })
    }

    /// The bytes as the NSM gave them.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes, to be put into something larger.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// What the document says.
    pub fn decoded(&self) -> &AttestationDocument {
        &self.decoded
    }

    /// The image hash a KMS will find in it: SHA-256 over PCR0 to PCR2, or zero for debug mode, as upstream has it.
    pub fn os_image_hash(&self) -> OsImageHash {
        if self.decoded.is_debug() {
            return OsImageHash::new([0; OsImageHash::LEN]);
        }
        self.decoded.os_image_hash()
    }

    /// Refuses debug mode.
    ///
    /// # Errors
    /// [`EvidenceError::Debug`].
    pub fn refuse_debug(&self) -> Result<(), EvidenceError> {
        if self.decoded.is_debug() { Err(EvidenceError::Debug) } else { Ok(()) }
    }

    /// Compares a clock with the document's signed time.
    ///
    /// # Errors
    /// [`EvidenceError::ClockSkew`].
    pub fn check_clock(&self, now: UnixMillis, max: Duration) -> Result<(), EvidenceError> {
        let signed = self.decoded.timestamp().0;
        let by = Duration::from_millis(now.0.abs_diff(signed));
        let direction = if now.0 > signed { "ahead of" } else { "behind" };
        if by > max { Err(EvidenceError::ClockSkew { by, direction, max }) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use nsm_emulator::{Config, Emulator};

    use super::*;
    use crate::nsm::{Request, Response};

    /// The emulator without a socket; `alter` may falsify what it was asked.
    struct Module {
        emulator: Emulator,
        alter: fn(&mut AttestFields),
    }

    impl Module {
        fn open(config: Config, alter: fn(&mut AttestFields)) -> Arc<dyn Nsm> {
            Arc::new(Self { emulator: Emulator::new(config).unwrap(), alter })
        }
    }

    impl Nsm for Module {
        fn request(&self, request: Request) -> Result<Response, NsmError> {
            nsm::ask_with(&request, |request| Ok(self.emulator.process(request)))
        }

        fn attest(&self, fields: &AttestFields) -> Result<Vec<u8>, NsmError> {
            let mut fields = fields.clone();
            (self.alter)(&mut fields);
            match self.request(nsm::request(&fields))? {
                Response::Attestation { document } => Ok(document),
                _ => Err(NsmError::Response),
            }
        }
    }

    async fn ask(nsm: &Arc<dyn Nsm>) -> Result<OwnDocument, EvidenceError> {
        let fields =
            AttestFields { user_data: Some(vec![7; 64]), nonce: Some(vec![8]), ..AttestFields::default() };
        OwnDocument::ask(nsm, fields, Duration::from_secs(30)).await
    }

    #[tokio::test]
    async fn an_honest_document_is_taken() {
        let document = ask(&Module::open(Config::default(), |_| {})).await.unwrap();
        assert_eq!(document.decoded().user_data(), Some(&[7; 64][..]));
        assert_eq!(document.os_image_hash(), document.decoded().os_image_hash());
        document.refuse_debug().unwrap();
    }

    #[tokio::test]
    async fn a_document_that_says_something_else_is_refused() {
        type Alter = fn(&mut AttestFields);
        let cases: [(&str, Alter); 4] = [
            ("user_data", |fields| fields.user_data = Some(vec![6; 64])),
            ("user_data", |fields| fields.user_data = None),
            ("nonce", |fields| fields.nonce = None),
            ("public_key", |fields| fields.public_key = Some(vec![1])),
        ];
        for (expected, alter) in cases {
            let error = ask(&Module::open(Config::default(), alter)).await.unwrap_err();
            assert!(matches!(error, EvidenceError::OtherField { field } if field == expected), "{error}");
        }
    }

    #[tokio::test]
    async fn debug_mode_shows_and_hashes_to_zero() {
        let config = Config { pcrs: BTreeMap::new(), ..Config::default() };
        let document = ask(&Module::open(config, |_| {})).await.unwrap();
        assert!(matches!(document.refuse_debug(), Err(EvidenceError::Debug)));
        assert_eq!(document.os_image_hash().as_bytes(), &[0; 32]);
    }

    #[tokio::test]
    async fn a_clock_that_is_off_is_found_in_both_directions() {
        let document = ask(&Module::open(Config::default(), |_| {})).await.unwrap();
        let signed = document.decoded().timestamp().0;
        let max = Duration::from_secs(300);
        for (now, expected) in [
            (signed, None),
            (signed + 300_000, None),
            (signed - 300_000, None),
            (signed + 300_001, Some("this clock is 300.001s ahead of the NSM's, expected at most 300s")),
            (signed - 86_400_000, Some("this clock is 86400s behind the NSM's, expected at most 300s")),
        ] {
            let found = document.check_clock(UnixMillis(now), max).err().map(|error| error.to_string());
            assert_eq!(found.as_deref(), expected);
        }
    }
}
