//! AWS KMS. Credentials, region and endpoint come from where every AWS tool takes them (`AWS_PROFILE`, `AWS_REGION`,
//! `AWS_ENDPOINT_URL_KMS`, the instance's role, …).

use std::error::Error as _;
use std::time::Duration;

use alloy::primitives::B256;
use aws_config::BehaviorVersion;
use aws_config::timeout::TimeoutConfig;
use aws_sdk_kms::Client;
use aws_sdk_kms::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_kms::primitives::Blob;
use aws_sdk_kms::types::{KeySpec, KeyUsageType, MessageType, SigningAlgorithmSpec};
use k256::ecdsa::VerifyingKey;
use k256::pkcs8::DecodePublicKey;
use kms_protocol::wire::webhook::bounded_reason;

use super::remote::{KeyService, KeyServiceError};

/// A key of AWS KMS.
pub(super) struct AwsKey {
    client: Client,
    id: String,
    name: String,
    deadline: Duration,
}

impl AwsKey {
    /// The key with this id, ARN or alias. Finding out the region may ask the instance's metadata service.
    pub(super) async fn new(id: String, deadline: Duration) -> Self {
        let timeouts = TimeoutConfig::builder().operation_timeout(deadline).build();
        let config = aws_config::defaults(BehaviorVersion::latest()).timeout_config(timeouts).load().await;
        Self { client: Client::new(&config), name: format!("AWS KMS key {id}"), id, deadline }
    }

    fn failed<E: ProvideErrorMetadata + std::error::Error + 'static>(
        &self,
        what: &'static str,
        error: &SdkError<E>,
    ) -> KeyServiceError {
        let key = self.name.clone();
        let said = match error {
            SdkError::ServiceError(said) => said,
            SdkError::TimeoutError(_) => {
                return KeyServiceError::NoAnswer { key, what, after: self.deadline };
            }
            _ => {
                return KeyServiceError::Unreachable {
                    key,
                    what,
                    problem: innermost(error),
                    hint: "set up AWS credentials and AWS_REGION; `aws sts get-caller-identity` shows whether they work",
                };
            }
        };
        let code = said.err().code().unwrap_or("unknown error");
        let hint = match code {
            "AccessDeniedException" => "the caller needs kms:GetPublicKey and kms:Sign on this key",
            "NotFoundException" => "check the key's id or alias, and AWS_REGION",
            "DisabledException" | "KMSInvalidStateException" => "enable the key, or use another",
            "InvalidKeyUsageException" | "UnsupportedOperationException" => {
                "the key must be asymmetric, of kind ECC_SECG_P256K1, for SIGN_VERIFY"
            }
            _ => "check the AWS credentials, their region and the key's policy",
        };
        let problem = bounded_reason(&format!("{code}: {}", said.err().message().unwrap_or_default()));
        KeyServiceError::Refused { key, what, problem, hint }
    }
}

impl KeyService for AwsKey {
    fn name(&self) -> &str {
        &self.name
    }

    async fn public_key(&self) -> Result<VerifyingKey, KeyServiceError> {
        let what = "its public key";
        let asked = self.client.get_public_key().key_id(&self.id).send().await;
        let answer = asked.map_err(|error| self.failed(what, &error))?;
        let (spec, usage) = (answer.key_spec(), answer.key_usage());
        // Services that imitate AWS leave the kind out; the key itself says it too.
        let right =
            spec.is_none_or(|it| *it == KeySpec::EccSecgP256K1) && usage == Some(&KeyUsageType::SignVerify);
        let der = answer.public_key().map_or(&[][..], Blob::as_ref);
        match VerifyingKey::from_public_key_der(der) {
            Ok(key) if right => Ok(key),
            Err(error) if right && spec.is_some() => {
                let key = self.name.clone();
                Err(KeyServiceError::Malformed { key, what, problem: error.to_string() })
            }
            _ => {
                let spec = spec.map_or("another curve", KeySpec::as_str);
                let usage = usage.map_or("unknown", KeyUsageType::as_str);
                Err(KeyServiceError::WrongKind {
                    key: self.name.clone(),
                    actual: bounded_reason(&format!("{spec} for {usage}")),
                    expected: "ECC_SECG_P256K1 for SIGN_VERIFY",
                })
            }
        }
    }

    async fn sign(&self, digest: &B256) -> Result<Vec<u8>, KeyServiceError> {
        let what = "a signature";
        let asked = self
            .client
            .sign()
            .key_id(&self.id)
            .message(Blob::new(digest.to_vec()))
            .message_type(MessageType::Digest)
            .signing_algorithm(SigningAlgorithmSpec::EcdsaSha256);
        let answer = asked.send().await.map_err(|error| self.failed(what, &error))?;
        Ok(answer.signature().map(|it| it.as_ref().to_vec()).unwrap_or_default())
    }
}

/// The cause of the cause: the outer messages of this library only name the phase.
fn innermost<E: std::error::Error + 'static>(error: &SdkError<E>) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(it) = cause {
        text = it.to_string();
        cause = it.source();
    }
    bounded_reason(&text)
}
