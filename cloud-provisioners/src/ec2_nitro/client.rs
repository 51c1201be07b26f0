//! EC2 in domain words: every call has a deadline, every answer is checked for what it must have.

use std::error::Error as _;
use std::time::Duration;

use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_sdk_ec2::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_ec2::types::Filter;

use super::error::AwsError;
use crate::patience::Pauses;

/// Between two looks at what takes minutes.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// How long is waited for what takes its time.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// One call with its repetitions.
    pub call: Duration,
    /// An instance that starts, stops or ends.
    pub instance: Duration,
    /// The console of an instance that boots.
    pub console: Duration,
    /// A launch whose answer was lost, until it would show.
    pub lost_launch: Duration,
    /// The first pause between two looks; later ones are longer, up to ten seconds.
    pub first_pause: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            call: Duration::from_secs(60),
            instance: Duration::from_secs(10 * 60),
            console: Duration::from_secs(10 * 60),
            lost_launch: Duration::from_secs(60),
            first_pause: Duration::from_millis(100),
        }
    }
}

/// Where AWS's settings come from, where it is not what every AWS tool reads.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// The profile of `~/.aws/config`.
    pub profile: Option<String>,
    /// The region.
    pub region: Option<String>,
}

/// AWS in one region, with an account's credentials.
#[derive(Clone, Debug)]
pub struct Client {
    pub(super) ec2: aws_sdk_ec2::Client,
    sts: aws_sdk_sts::Client,
    config: SdkConfig,
    region: String,
    pub(super) patience: Patience,
}

impl Client {
    /// Takes region, credentials and endpoints from where every AWS tool takes them.
    ///
    /// # Errors
    ///
    /// [`AwsError::NoRegion`]; [`AwsError::Credentials`] when there are none or they have expired.
    pub async fn connect(place: &Place, patience: Patience) -> Result<Self, AwsError> {
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(Duration::from_secs(10))
            .operation_attempt_timeout(patience.call / 2)
            .operation_timeout(patience.call)
            .build();
        let mut loader = aws_config::defaults(BehaviorVersion::latest()).timeout_config(timeouts);
        if let Some(profile) = &place.profile {
            loader = loader.profile_name(profile);
        }
        if let Some(region) = &place.region {
            loader = loader.region(Region::new(region.clone()));
        }
        Self::new(loader.load().await, patience).await
    }

    /// The client of a configuration that is complete.
    ///
    /// # Errors
    ///
    /// As [`Self::connect`].
    pub async fn new(config: SdkConfig, patience: Patience) -> Result<Self, AwsError> {
        let region = config.region().map(ToString::to_string).ok_or(AwsError::NoRegion)?;
        let client = Self {
            ec2: aws_sdk_ec2::Client::new(&config),
            sts: aws_sdk_sts::Client::new(&config),
            config,
            region,
            patience,
        };
        client.check_credentials().await?;
        Ok(client)
    }

    /// The region.
    #[must_use]
    pub fn region(&self) -> &str {
        &self.region
    }

    /// Asks for credentials once, on their own: inside a call their absence looks like a broken network.
    async fn check_credentials(&self) -> Result<(), AwsError> {
        use aws_sdk_ec2::config::ProvideCredentials as _;
        let missing = |problem: String| AwsError::Credentials { problem };
        let provider = self.config.credentials_provider();
        let provider = provider.ok_or_else(|| missing("no provider is set up".into()))?;
        let asked = tokio::time::timeout(self.patience.call, provider.provide_credentials()).await;
        match asked {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(missing(causes(&error))),
            Err(_) => Err(missing(format!("no provider answered in {} s", self.patience.call.as_secs()))),
        }
    }

    /// The pauses between two looks.
    pub(super) fn pauses(&self) -> Pauses {
        Pauses::new(self.patience.first_pause, LONGEST_PAUSE)
    }

    /// The account the credentials belong to.
    ///
    /// # Errors
    ///
    /// When AWS refuses or does not answer.
    pub async fn account(&self) -> Result<String, AwsError> {
        const CALL: &str = "GetCallerIdentity";
        let answer = self.sts.get_caller_identity().send().await.map_err(|error| self.failed(CALL, error))?;
        answer.account.ok_or(AwsError::Incomplete { call: CALL, missing: "account" })
    }

    /// What a failed call means.
    pub(super) fn failed<E>(&self, call: &'static str, error: SdkError<E>) -> AwsError
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        let region = self.region.clone();
        match &error {
            SdkError::ServiceError(said) => {
                let status = said.raw().status().as_u16();
                let code = said.err().code().unwrap_or("UnknownError").to_owned();
                let message = AwsError::shorten(said.err().message().unwrap_or_default());
                let busy = ["RequestLimitExceeded", "Throttling", "ThrottlingException", "Unavailable"];
                // EC2 answers 500 and 503 for some refusals too, such as a lack of capacity.
                let transient = busy.contains(&code.as_str())
                    || (status >= 500 && !code.starts_with("Insufficient") && code != "Unsupported");
                AwsError::Refused { call, region, code, message, transient }
            }
            SdkError::TimeoutError(_) => {
                let problem = format!("within {} s", self.patience.call.as_secs());
                AwsError::NoAnswer { call, region, problem }
            }
            SdkError::ResponseError(answer) => {
                let problem = format!("HTTP status {} and no answer of EC2", answer.raw().status().as_u16());
                AwsError::NoAnswer { call, region, problem }
            }
            _ => AwsError::NoAnswer { call, region, problem: innermost(&error) },
        }
    }
}

pub(super) fn filter(name: &str, values: &[&str]) -> Filter {
    Filter::builder().name(name).set_values(Some(values.iter().map(|it| (*it).to_owned()).collect())).build()
}

/// Every cause on one line, from the outermost in, without the repetitions that wrappers make.
fn causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(cause) = next {
        let text = cause.to_string();
        if !parts.iter().any(|part| part.contains(&text)) {
            parts.push(text);
        }
        next = cause.source();
    }
    AwsError::shorten(&parts.join(": "))
}

fn innermost<E: std::error::Error + 'static>(error: &SdkError<E>) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(it) = cause {
        text = it.to_string();
        cause = it.source();
    }
    AwsError::shorten(&text)
}
