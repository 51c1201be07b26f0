use std::time::Duration;

use serde::Deserialize;

/// Why a call to Google did not do what it should.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The HTTP client could not be set up.
    #[error("http client")]
    HttpClient(#[source] reqwest::Error),
    /// No answer arrived.
    #[error("{call}: no answer")]
    Unreachable {
        /// The call, `create instance kms`.
        call: String,
        /// The last reason.
        source: reqwest::Error,
    },
    /// Google said no.
    #[error("{call}: {status} {}: {message}", reason.name())]
    Refused {
        /// The call.
        call: String,
        /// HTTP status.
        status: u16,
        /// Google's reason, as far as it is known here.
        reason: Reason,
        /// Google's own words.
        message: String,
    },
    /// The operation was accepted and then failed.
    #[error("{call}: {code}: {message}")]
    Operation {
        /// The call.
        call: String,
        /// Google's code, `ZONE_RESOURCE_POOL_EXHAUSTED`.
        code: String,
        /// Google's own words.
        message: String,
    },
    /// The answer is not one this call can have.
    #[error("{call}: {problem}")]
    Answer {
        /// The call.
        call: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The time allowed is over.
    #[error("{call}: not done within {} s", allowed.as_secs())]
    Deadline {
        /// The call.
        call: String,
        /// The time allowed.
        allowed: Duration,
    },
    /// No credentials, or none that work.
    #[error("credentials: {problem}")]
    Credentials {
        /// What was tried and failed.
        problem: String,
        /// The library's reason.
        source: Option<gcp_auth::Error>,
    },
    /// What was uploaded is not what arrived.
    #[error("upload {object}: {problem}")]
    Upload {
        /// Bucket and name.
        object: String,
        /// What differs.
        problem: String,
    },
    /// The file to upload could not be read.
    #[error("upload {object}: cannot read the file")]
    File {
        /// Bucket and name.
        object: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The operating system gave no randomness.
    #[error("no randomness from the operating system")]
    Random,
}

/// Google's reasons that lead somewhere. Source: the error lists of compute v1 and storage v1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The resource is not there.
    NotFound,
    /// A resource of this name is there.
    AlreadyExists,
    /// The caller lacks a permission.
    Forbidden,
    /// The API is not enabled in the project.
    NotEnabled,
    /// Too many calls.
    RateLimit,
    /// A fingerprint or generation is stale.
    ConditionNotMet,
    /// The token was not accepted.
    Unauthorized,
    /// Any other, in Google's spelling.
    Other(String),
}

impl Reason {
    fn parse(text: &str, status: u16) -> Self {
        match (text, status) {
            ("notFound", _) | ("", 404) => Self::NotFound,
            ("alreadyExists" | "conflict", _) => Self::AlreadyExists,
            ("accessNotConfigured" | "SERVICE_DISABLED", _) => Self::NotEnabled,
            ("rateLimitExceeded" | "userRateLimitExceeded", _) | (_, 429) => Self::RateLimit,
            ("conditionNotMet", _) | (_, 412) => Self::ConditionNotMet,
            ("authError" | "required", 401) | ("", 401) => Self::Unauthorized,
            ("forbidden" | "insufficientPermissions" | "", 403) => Self::Forbidden,
            (other, _) => Self::Other(other.to_owned()),
        }
    }

    fn name(&self) -> &str {
        match self {
            Self::NotFound => "not found",
            Self::AlreadyExists => "already exists",
            Self::Forbidden => "forbidden",
            Self::NotEnabled => "service not enabled",
            Self::RateLimit => "rate limit",
            Self::ConditionNotMet => "condition not met",
            Self::Unauthorized => "unauthorized",
            Self::Other(name) => name,
        }
    }
}

impl Error {
    /// Google's reason, when Google refused.
    #[must_use]
    pub fn reason(&self) -> Option<&Reason> {
        match self {
            Self::Refused { reason, .. } => Some(reason),
            _ => None,
        }
    }

    /// Whether the resource was not there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.reason() == Some(&Reason::NotFound)
    }

    /// Whether a resource of this name was there already.
    #[must_use]
    pub fn is_already_exists(&self) -> bool {
        self.reason() == Some(&Reason::AlreadyExists)
    }

    /// Whether the time allowed was over before an answer came.
    #[must_use]
    pub fn is_no_answer(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Deadline { .. })
    }

    /// The next step, when one is known.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Self::Refused { reason: Reason::NotEnabled, message, .. } => match message.contains("storage") {
                true => "enable the service: storage.googleapis.com",
                false => "enable the service: compute.googleapis.com",
            },
            Self::Refused { reason: Reason::Forbidden, message, .. } => match permission(message) {
                Some(permission) => return Some(format!("the account needs the permission {permission}")),
                None => "the account lacks a permission for this call",
            },
            Self::Refused { reason: Reason::Unauthorized, .. } => {
                "the access token was not accepted: log in again (`gcloud auth application-default login`)"
            }
            Self::Refused { message, .. } if message.contains("constraints/") => {
                "an organisation policy forbids this; the message names the constraint"
            }
            Self::Refused { status: 400, message, .. } if message.contains("onfidential") => {
                "TDX needs a c3-standard machine type and a boot image with TDX_CAPABLE"
            }
            Self::Operation { code, .. } => match code.as_str() {
                "ZONE_RESOURCE_POOL_EXHAUSTED" | "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS" => {
                    "the zone has no capacity now, or has no TDX machines at all: try another zone"
                }
                "QUOTA_EXCEEDED" => "raise the quota the message names, or use another region",
                _ => return None,
            },
            Self::Credentials { .. } => {
                "set GOOGLE_APPLICATION_CREDENTIALS, or log in with `gcloud auth application-default login`"
            }
            _ => return None,
        };
        Some(text.to_owned())
    }
}

/// The permission in a message such as `Required 'compute.instances.create' permission for ..`.
fn permission(message: &str) -> Option<&str> {
    let (_, rest) = message.split_once("Required '")?;
    rest.split_once('\'').map(|(permission, _)| permission)
}

/// Google's error body.
#[derive(Deserialize)]
struct Body {
    error: BodyError,
}

#[derive(Deserialize)]
struct BodyError {
    #[serde(default)]
    message: String,
    #[serde(default)]
    errors: Vec<BodyDetail>,
}

#[derive(Deserialize)]
struct BodyDetail {
    #[serde(default)]
    reason: String,
}

/// Reads an answer that is not a success.
pub(super) fn refusal(call: &str, status: u16, body: &[u8]) -> Error {
    let call = call.to_owned();
    match serde_json::from_slice::<Body>(body) {
        Ok(Body { error }) => {
            let reason = error.errors.first().map_or("", |detail| detail.reason.as_str());
            Error::Refused { call, status, reason: Reason::parse(reason, status), message: error.message }
        }
        Err(_) => {
            let text = String::from_utf8_lossy(body);
            let message = text.trim().chars().filter(|it| !it.is_control()).take(300).collect();
            Error::Refused { call, status, reason: Reason::parse("", status), message }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(status: u16, reason: &str, message: &str) -> Error {
        let body = serde_json::json!({"error": {"code": status, "message": message, "errors": [{"reason": reason}]}});
        refusal("create instance kms", status, body.to_string().as_bytes())
    }

    #[test]
    fn google_s_refusals_become_a_reason_and_a_next_step() {
        for (error, shown, hint) in [
            (
                refused(403, "forbidden", "Required 'compute.instances.create' permission for 'projects/p'"),
                "create instance kms: 403 forbidden: Required 'compute.instances.create' permission for 'projects/p'",
                Some("the account needs the permission compute.instances.create"),
            ),
            (
                refused(403, "accessNotConfigured", "Compute Engine API has not been used"),
                "create instance kms: 403 service not enabled: Compute Engine API has not been used",
                Some("enable the service: compute.googleapis.com"),
            ),
            (refused(404, "notFound", "no"), "create instance kms: 404 not found: no", None),
            (refusal("list", 502, b"<html>\nBad"), "list: 502 : <html>Bad", None),
        ] {
            assert_eq!(error.to_string(), shown);
            assert_eq!(error.hint().as_deref(), hint, "{shown}");
        }
    }
}
