use std::time::Duration;

use super::node::{NodeError, Refusal};
use super::{Cause, Gate};

/// Why a KMS was not brought up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The machine could not be made, or its record not be kept.
    #[error(transparent)]
    Machine(#[from] crate::Error),
    /// What was waited for did not come.
    #[error("waited {} s for {}: {last}", allowed.as_secs(), gate.waits_for())]
    Late {
        /// What was waited for.
        gate: Gate,
        /// How long.
        allowed: Duration,
        /// What was seen last.
        last: String,
        /// Where to look.
        look: String,
    },
    /// The KMS served, and then did not answer several times in a row.
    #[error("the KMS answered for {} s and then no more: {last}", after.as_secs())]
    FellSilent {
        /// How long it answered.
        after: Duration,
        /// What was seen last.
        last: String,
        /// Where to look.
        look: String,
    },
    /// The guest cannot get any further.
    #[error("the guest does not start: {said}")]
    Guest {
        /// What its console said.
        said: String,
        /// What to do.
        remedy: &'static str,
    },
    /// The KMS cannot be asked, or says no for good.
    #[error("{call}: the KMS {answer}")]
    Node {
        /// What it was asked for.
        call: &'static str,
        /// Why not; told by the message itself.
        answer: NodeError,
    },
    /// What the machine measures, or shows, is not what it should be.
    #[error("{what} is {actual}, expected {expected}")]
    Unexpected {
        /// Which value.
        what: &'static str,
        /// As found.
        actual: String,
        /// As it should be.
        expected: String,
    },
    /// Evidence does not verify.
    #[error("evidence of {of} does not verify")]
    Evidence {
        /// Of what.
        of: &'static str,
        /// Why not.
        source: Cause,
    },
    /// The keys were not made here.
    #[error("the KMS has keys, and no record that they were made on this machine")]
    NotMadeHere,
    /// The KMS gives keys to everybody.
    #[error("the KMS has no authoriser: it gives keys to everybody (is_dev)")]
    Development,
    /// Measurements could not be registered.
    #[error("the measurements were not registered")]
    Registration {
        /// Why not.
        source: Cause,
        /// The commands by which they are registered by hand.
        commands: Vec<String>,
    },
    /// The machine's KMS was begun in another way.
    #[error("this machine's KMS was begun as {begun}, and now {now} is asked for")]
    OtherRole {
        /// As recorded.
        begun: String,
        /// As asked for.
        now: String,
    },
    /// `kms.json` cannot be made, or not be used.
    #[error("kms.json: {0}")]
    File(#[from] kms_protocol::kms_file::Error),
}

impl Error {
    /// Whether the time allowed was over.
    #[must_use]
    pub fn is_late(&self) -> bool {
        matches!(
            self,
            Self::Late { .. }
                | Self::FellSilent { .. }
                | Self::Node { answer: NodeError::Unreachable(_), .. }
        )
    }

    /// The next step.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Self::Machine(error) => return error.hint(),
            Self::Late { look, .. } | Self::FellSilent { look, .. } => {
                return Some(format!("look at: {look}"));
            }
            Self::Guest { remedy, .. } => remedy,
            Self::Node { answer, .. } => refusal_hint(answer.refusal()?)?,
            Self::Unexpected { what: "os_image_hash", .. } => {
                "the machine runs another image than the project names, or the image's hash is of another \
                 generation; if you know the hash to be right, give it with --os-image-hash"
            }
            Self::Unexpected { what: "compose_hash" | "app_id", .. } => {
                "the machine runs another app-compose.json than this project's: deploy the project again"
            }
            Self::Unexpected { what: "tee_variant", .. } => {
                "the machine is not the kind it should be; nothing it says is worth anything"
            }
            Self::Unexpected { what: "the certificate", .. } => {
                "somebody stands between you and the machine, or the name leads elsewhere"
            }
            Self::Unexpected { .. } => "do not use these keys: remove the machine and bring it up anew",
            Self::Evidence { .. } => {
                "do not use these keys; --trust names the roots and the collateral service evidence is verified with"
            }
            Self::NotMadeHere => {
                "somebody else set this KMS up, with keys of their own: remove the machine and bring it up anew, \
                 with --operator naming your own address only"
            }
            Self::Development => "name an authoriser in its settings: chain, webhook or policy",
            Self::Registration { commands, .. } => {
                return Some(format!(
                    "mend that and run the same command again: it goes on from here. By hand, and then without \
                     --register:\n  {}",
                    commands.join("\n  ")
                ));
            }
            Self::OtherRole { .. } => "run it as before, or remove the machine first",
            Self::File(_) => return None,
        };
        Some(text.to_owned())
    }
}

/// What to do about a refusal.
fn refusal_hint(refusal: Refusal) -> Option<&'static str> {
    Some(match refusal {
        Refusal::HasKeys => "run the same command again: it goes on to the end of onboarding",
        Refusal::NotAllowed => {
            "register the measurements of this machine with the KMS's authoriser; any change of the compose file or \
             the pre-launch script changes mr_aggregated"
        }
        Refusal::Token => {
            "the KMS printed a token when it started (core.onboard.token): give it with --onboard-token-file or \
             KMS_ONBOARD_TOKEN and run the same command again; each start has a new one"
        }
        Refusal::Outdated => {
            "registering cannot help: the contract allows machines whose TCB status is UpToDate and no others; update \
             the host's firmware, on GCP take another machine"
        }
        Refusal::Elsewhere => "run this from an address that the KMS's core.onboard.allow_from names",
        Refusal::AuthoriserAway => {
            "the KMS's authoriser does not answer: look at its container and its endpoint"
        }
        Refusal::LightClient => {
            "the light client is behind, or its endpoint has no eth_getProof: wait, then try another endpoint \
             (`keyferry chain doctor --rpc-url URL`)"
        }
        Refusal::SourceNotServing => {
            "the source's name leads to a KMS that is still being set up: stale DNS, or the wrong port"
        }
        Refusal::SourceAway => {
            "the new machine cannot reach the source: its name must resolve from there, and its port be open to the \
             new machine's address (`keyferry kms fw allow`)"
        }
        Refusal::Other => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> Error {
        let source = NodeError::Refused { status: 400, text: text.to_owned() };
        Error::Node { call: "Bootstrap", answer: source }
    }

    /// The failures that users reported, and what they are told.
    #[test]
    fn every_reported_failure_has_a_next_step() {
        for (text, hint) in [
            (
                "error sending request for url (http://auth-api:8000/bootAuth/kms): Connection refused (os error 111)",
                "authoriser does not answer",
            ),
            ("boot denied: Aggregated MR not allowed", "register the measurements"),
            ("Boot denied: OS image is not allowed", "register the measurements"),
            ("boot denied: Device not allowed", "register the measurements"),
            ("500 missing revert data", "eth_getProof"),
            ("CALL_EXCEPTION", "eth_getProof"),
            ("KMS has already been bootstrapped", "goes on to the end"),
            ("received corrupt message of type InvalidContentType", "stale DNS"),
            ("the setup token is missing or wrong", "--onboard-token-file"),
            ("KMS is not allowed: TCB status is not up to date", "update the host's firmware"),
            (
                "this address may not set up the KMS (core.onboard.allow_from)",
                "core.onboard.allow_from names",
            ),
        ] {
            let found = refused(text).hint().expect(text);
            assert!(found.contains(hint), "{text}: {found}");
        }
        assert_eq!(refused("domain contains an invalid DNS label").hint(), None);
    }
}
