//! A key that lives for one login: EC2 Instance Connect tells the instance of its public half, which counts for a minute,
//! and its private half is never written anywhere.

use std::sync::Arc;
use std::time::Duration;

use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region};
use aws_sdk_ec2instanceconnect::error::{DisplayErrorContext, SdkError};
use russh::keys::PrivateKey;
use russh::keys::ssh_key::private::{Ed25519Keypair, KeypairData};
use zeroize::Zeroizing;

use super::error::Error;
use super::login::LoginKey;
use super::reach::Aws;

/// For the call with its repetitions.
const CALL: Duration = Duration::from_secs(30);

/// Makes a key and has it let in as `user`.
pub(super) async fn ephemeral_key(aws: &Aws, instance: &str, user: &str) -> Result<LoginKey, Error> {
    let internal = |error: Box<dyn std::error::Error + Send + Sync>| Error::Internal(error);
    let mut seed = Zeroizing::new([0; 32]);
    aws_lc_rs::rand::fill(&mut *seed).map_err(|error| internal(error.into()))?;
    let pair = KeypairData::from(Ed25519Keypair::from_seed(&seed));
    let key = PrivateKey::new(pair, "").map_err(|error| internal(error.into()))?;
    let public = key.public_key().to_openssh().map_err(|error| internal(error.into()))?;

    let timeouts = TimeoutConfig::builder().operation_timeout(CALL).build();
    let mut loader = aws_config::defaults(BehaviorVersion::latest()).timeout_config(timeouts);
    loader = loader.region(Region::new(aws.region.clone()));
    if let Some(profile) = &aws.profile {
        loader = loader.profile_name(profile);
    }
    let client = aws_sdk_ec2instanceconnect::Client::new(&loader.load().await);
    let call = client.send_ssh_public_key().instance_id(instance).instance_os_user(user);
    match call.ssh_public_key(public.trim_end()).send().await {
        Ok(answer) if answer.success() => Ok(LoginKey::Own(Arc::new(key))),
        Ok(_) => Err(Error::KeyNotSent {
            instance: instance.to_owned(),
            refused: true,
            source: "AWS says that it did not".into(),
        }),
        Err(error) => Err(Error::KeyNotSent {
            instance: instance.to_owned(),
            refused: matches!(&error, SdkError::ServiceError(_)),
            source: DisplayErrorContext(&error).to_string().into(),
        }),
    }
}
