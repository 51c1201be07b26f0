//! Why AWS did not do what it was asked.

use std::time::Duration;

/// The longest message of AWS that is shown. Refusals can carry kilobytes of encoded policy.
const LONGEST_MESSAGE: usize = 300;

/// Why a call gave nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AwsError {
    /// There are no credentials that could be used.
    #[error("no AWS credentials: {problem}")]
    Credentials {
        /// What the chain of providers said last.
        problem: String,
    },
    /// No region is known.
    #[error("no AWS region")]
    NoRegion,
    /// AWS answered, and refused.
    #[error("{call}: {code}: {message}")]
    Refused {
        /// The call, `RunInstances`.
        call: &'static str,
        /// The region it was made in.
        region: String,
        /// AWS's code, `UnauthorizedOperation`.
        code: String,
        /// AWS's message, shortened.
        message: String,
        /// Whether the same call may succeed later: AWS was overloaded or failed inside.
        transient: bool,
    },
    /// No answer came.
    #[error("{call}: no answer from AWS in {region}: {problem}")]
    NoAnswer {
        /// The call.
        call: &'static str,
        /// The region.
        region: String,
        /// The innermost reason.
        problem: String,
    },
    /// The answer lacks what it must have.
    #[error("{call}: the answer has no {missing}")]
    Incomplete {
        /// The call.
        call: &'static str,
        /// What is missing.
        missing: &'static str,
    },
    /// What was waited for did not come in time.
    #[error("{what}: not after {} seconds", allowed.as_secs())]
    Deadline {
        /// What was waited for, `instance i-… is running`.
        what: String,
        /// How long was allowed.
        allowed: Duration,
    },
    /// The instance ended by itself.
    #[error("instance {instance} is {state}: {reason}")]
    Ended {
        /// The instance.
        instance: String,
        /// The state it is in.
        state: String,
        /// AWS's reason.
        reason: String,
    },
    /// The instance runs without what enclaves need.
    #[error("instance {instance} runs without its enclave option")]
    EnclavesOff {
        /// The instance.
        instance: String,
    },
}

impl AwsError {
    /// AWS's code, when it refused.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Refused { code, .. } => Some(code),
            _ => None,
        }
    }

    /// Whether AWS said no, so that nothing was done. An overloaded or broken AWS has not said anything.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { transient: false, .. })
    }

    /// Whether nothing came back in time.
    #[must_use]
    pub fn is_no_answer(&self) -> bool {
        matches!(self, Self::NoAnswer { .. } | Self::Deadline { .. } | Self::Refused { transient: true, .. })
    }

    /// Whether the thing that was asked for is not there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.code().is_some_and(|code| code.ends_with(".NotFound") || code.ends_with(".Unknown"))
    }

    /// Whether this zone cannot give the machine and another might.
    #[must_use]
    pub fn is_about_the_zone(&self) -> bool {
        matches!(
            self.code(),
            Some("InsufficientInstanceCapacity" | "Unsupported" | "InsufficientFreeAddressesInSubnet")
        )
    }

    /// The next step, when one is known.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Credentials { problem } => Some(credentials_hint(problem)),
            Self::NoRegion => Some("give --region, or set AWS_REGION or the profile's region".into()),
            Self::Refused { region, code, message, .. } => refusal_hint(region, code, message),
            Self::NoAnswer { region, .. } => Some(format!(
                "check that {region} is a region (us-east-1), the network, and AWS_ENDPOINT_URL if it is set; run it again"
            )),
            Self::Deadline { .. } => Some("run it again: it goes on from here".into()),
            Self::Ended { .. } => Some("run `keyferry host up` again, or `keyferry host down`".into()),
            Self::EnclavesOff { .. } => Some("run `keyferry host down`, then up again".into()),
            Self::Incomplete { .. } => None,
        }
    }

    /// AWS's message without the encoded policy, at most as long as a person reads.
    pub(super) fn shorten(message: &str) -> String {
        let plain = message.split("Encoded authorization failure message").next().unwrap_or_default().trim();
        let mut line: String = plain.chars().map(|it| if it.is_control() { ' ' } else { it }).collect();
        if let Some((cut, _)) = line.char_indices().nth(LONGEST_MESSAGE) {
            line.truncate(cut);
            line.push('…');
        }
        line
    }
}

fn credentials_hint(problem: &str) -> String {
    let lower = problem.to_lowercase();
    match lower.contains("sso") || lower.contains("token") || lower.contains("expired") {
        true => "sign in again with `aws sso login`, with the same --profile".into(),
        false => "sign in with `aws sso login` or `aws configure`, or name a profile with --profile; \
                  `aws sts get-caller-identity` shows what works"
            .into(),
    }
}

fn refusal_hint(region: &str, code: &str, message: &str) -> Option<String> {
    let hint = match code {
        "ExpiredToken" | "ExpiredTokenException" | "RequestExpired" => {
            "the credentials have expired: sign in again, for example with `aws sso login`".into()
        }
        "AuthFailure" | "UnrecognizedClientException" | "InvalidClientTokenId" | "OptInRequired" => format!(
            "check the credentials, and that the region {region} is the right one and enabled for the account"
        ),
        "UnauthorizedOperation" | "AccessDenied" | "AccessDeniedException" => match action(message) {
            Some(action) => format!("the caller needs the permission {action}"),
            None => "docs/ec2-host.md lists the permissions the caller needs".into(),
        },
        "VcpuLimitExceeded" => format!(
            "ask for a higher quota L-1216C47A (Running On-Demand Standard instances) in {region}: Service Quotas, Amazon EC2; \
             or use --region"
        ),
        "MaxSpotInstanceCountExceeded" => {
            format!(
                "ask for a higher quota L-34B43A08 (All Standard Spot Instance Requests) in {region}, or leave --spot out"
            )
        }
        "InsufficientInstanceCapacity" | "Unsupported" => {
            "try again later, or with another --instance-type or --region".into()
        }
        "InsufficientFreeAddressesInSubnet" => "give another --subnet".into(),
        "InvalidSubnetID.NotFound" => format!("check --subnet: it is not one of {region}"),
        "InvalidAMIID.NotFound" | "InvalidAMIID.Malformed" | "InvalidAMIID.Unavailable" => {
            format!("check --image: it is not one of {region}")
        }
        "InvalidInstanceID.NotFound" | "InvalidInstanceID.Malformed" => {
            format!("check the instance id and that it is in {region}")
        }
        "VPCIdNotSpecified" | "DefaultVpcDoesNotExist" => {
            "give --subnet, or make a default VPC with `aws ec2 create-default-vpc`".into()
        }
        "RequestLimitExceeded" | "Throttling" | "ThrottlingException" => {
            "AWS asks to be asked less often: run it again in a minute".into()
        }
        "InternalError" | "InternalFailure" | "Unavailable" | "ServiceUnavailable" => {
            "a failure inside AWS: run it again, it goes on from here".into()
        }
        _ => return None,
    };
    Some(hint)
}

/// The action AWS names: `… is not authorized to perform: ec2:RunInstances on resource …`.
fn action(message: &str) -> Option<&str> {
    let named = message.split("not authorized to perform: ").nth(1)?;
    named.split([' ', ',']).next().filter(|action| action.contains(':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: &str, message: &str) -> AwsError {
        AwsError::Refused {
            call: "RunInstances",
            region: "us-east-1".into(),
            code: code.into(),
            message: AwsError::shorten(message),
            transient: false,
        }
    }

    #[test]
    fn a_missing_permission_is_named_and_the_encoded_policy_is_not_shown() {
        let encoded = "x".repeat(2000);
        let error = refused(
            "UnauthorizedOperation",
            &format!(
                "You are not authorized to perform this operation. User: arn:aws:iam::1:user/a is not authorized to \
                 perform: ec2:RunInstances on resource: arn:… Encoded authorization failure message: {encoded}"
            ),
        );
        assert_eq!(error.hint().unwrap(), "the caller needs the permission ec2:RunInstances");
        assert!(!error.to_string().contains("xxx"), "{error}");
    }

    #[test]
    fn what_aws_says_stays_on_one_line() {
        let shown = AwsError::shorten(&format!("a\nb\u{1b}[2J{}", "ü".repeat(400)));
        assert!(!shown.contains(char::is_control) && shown.chars().count() == LONGEST_MESSAGE + 1, "{shown}");
    }

    #[test]
    fn only_a_refusal_says_that_nothing_was_done() {
        assert!(refused("InvalidParameterValue", "").is_refusal());
        let overloaded = AwsError::Refused {
            call: "RunInstances",
            region: String::new(),
            code: "RequestLimitExceeded".into(),
            message: String::new(),
            transient: true,
        };
        assert!(!overloaded.is_refusal() && overloaded.is_no_answer());
    }
}
