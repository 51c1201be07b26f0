//! The KMS on the machine, as it is asked over the network.

use std::future::Future;
use std::net::{IpAddr, SocketAddr};

use kms_protocol::wire::{AttestationInfoResponse, BootstrapResponse, GetMetaResponse, OnboardResponse};
use ratls::client::PinnedRoot;

/// Where a KMS is, and what it is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Address and port; names are not asked for, they may still lead elsewhere.
    pub address: SocketAddr,
    /// Its name, for TLS.
    pub domain: String,
}

/// What answers at a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Front {
    /// The onboarding service, over HTTP.
    Onboarding,
    /// The key service, over TLS.
    Serving,
    /// Nothing usable, and why.
    Nothing(String),
}

/// How the KMS's authoriser is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Authoriser {
    /// It answers.
    Ready,
    /// Not yet, and why.
    NotYet(String),
    /// This KMS does not say; its first question will show.
    Unknown,
}

/// What a serving KMS showed.
#[derive(Clone, Debug)]
pub struct Served {
    /// What it says about itself.
    pub meta: GetMetaResponse,
    /// The certificate it showed, DER.
    pub certificate: Vec<u8>,
}

/// Why a KMS refused, as its texts tell it. Source: upstream's error texts, and those of kms-server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It has keys already, of its own or of another KMS.
    HasKeys,
    /// A measurement of this machine is not registered.
    NotAllowed,
    /// It asks those who set it up for a token, and was given none or a wrong one.
    Token,
    /// It takes those who set it up from other addresses only.
    Elsewhere,
    /// The machine's firmware is below what its vendor asks for.
    Outdated,
    /// Its authoriser gives no answer yet.
    AuthoriserAway,
    /// The light client behind its authoriser lags, or its endpoint cannot prove what it says.
    LightClient,
    /// The source answers with its own onboarding service.
    SourceNotServing,
    /// The source cannot be reached from the new machine.
    SourceAway,
    /// Anything else.
    Other,
}

impl Refusal {
    /// Reads an error text.
    #[must_use]
    pub fn of(text: &str) -> Self {
        let lower = text.to_ascii_lowercase();
        let has = |what: &str| lower.contains(what);
        if has("already been bootstrapped") || has("already been onboarded") {
            Self::HasKeys
        } else if has("setup token") {
            Self::Token
        } else if has("core.onboard.allow_from") {
            Self::Elsewhere
        } else if has("invalidcontenttype") {
            Self::SourceNotServing
        } else if has("missing revert data") || has("call_exception") {
            Self::LightClient
        } else if has("source kms") && (has("cannot be reached") || has("gave no answer")) {
            Self::SourceAway
        } else if has("connection refused")
            || has("bootauth/kms")
            || has("no answer")
            || has("authoriser is not available")
            || has("left alone")
        {
            Self::AuthoriserAway
        } else if has("tcb status") {
            Self::Outdated
        } else if has("not allowed") || has("boot denied") {
            Self::NotAllowed
        } else {
            Self::Other
        }
    }
}

/// Why a KMS did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeError {
    /// It cannot be reached, or broke off.
    #[error("{0}")]
    Unreachable(String),
    /// It said no.
    #[error("answered {status}: {text}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// Its own words.
        text: String,
    },
    /// The answer is not one.
    #[error("gave an unexpected answer: {0}")]
    Answer(String),
    /// It is not the KMS that was pinned, or not for this name.
    #[error("{0}")]
    Identity(String),
}

impl NodeError {
    /// Why it refused, when it did.
    #[must_use]
    pub fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::Refused { text, .. } => Some(Refusal::of(text)),
            _ => None,
        }
    }
}

impl NodeError {
    /// Whether asking again cannot help: it has no such question, or will not hear us.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Refused { status: 404, .. })
            || matches!(self.refusal(), Some(Refusal::Token | Refusal::Elsewhere))
    }
}

/// Asks a KMS. Each call has a deadline of its own.
pub trait Node: Send + Sync {
    /// The addresses a name has.
    fn resolve(&self, domain: &str) -> impl Future<Output = Result<Vec<IpAddr>, String>> + Send;

    /// What answers at the place.
    fn front(&self, place: &Place) -> impl Future<Output = Front> + Send;

    /// How the authoriser of an onboarding KMS is.
    fn authoriser(&self, place: &Place) -> impl Future<Output = Authoriser> + Send;

    /// What the machine measures.
    fn attestation_info(
        &self,
        place: &Place,
    ) -> impl Future<Output = Result<AttestationInfoResponse, NodeError>> + Send;

    /// Makes keys.
    fn bootstrap(&self, place: &Place) -> impl Future<Output = Result<BootstrapResponse, NodeError>> + Send;

    /// Takes over the keys of the KMS at `source`.
    fn onboard(
        &self,
        place: &Place,
        source: &str,
    ) -> impl Future<Output = Result<OnboardResponse, NodeError>> + Send;

    /// Ends onboarding.
    fn finish(&self, place: &Place) -> impl Future<Output = Result<(), NodeError>> + Send;

    /// What a serving KMS says about itself. With `root`, only the KMS whose root CA that is, under its name.
    fn meta(
        &self,
        place: &Place,
        root: Option<&PinnedRoot>,
    ) -> impl Future<Output = Result<Served, NodeError>> + Send;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Texts that users reported, and those of kms-server.
    #[test]
    fn refusals_are_told_apart() {
        for (text, refusal) in [
            ("KMS has already been bootstrapped", Refusal::HasKeys),
            ("KMS has already been onboarded", Refusal::HasKeys),
            (
                "error sending request for url (http://auth-api:8000/bootAuth/kms): Connection refused (os error 111)",
                Refusal::AuthoriserAway,
            ),
            ("KMS is not allowed to bootstrap: boot denied: Aggregated MR not allowed", Refusal::NotAllowed),
            ("Boot denied: OS image is not allowed", Refusal::NotAllowed),
            ("Boot denied: missing revert data (action=\"call\", code=CALL_EXCEPTION)", Refusal::LightClient),
            (
                "Failed to onboard: received corrupt message of type InvalidContentType",
                Refusal::SourceNotServing,
            ),
            ("Failed to onboard: source KMS cannot be reached: connection refused", Refusal::SourceAway),
            ("the setup token is missing or wrong; the server printed it on its console", Refusal::Token),
            ("too many wrong setup tokens; restart the server for a new one", Refusal::Token),
            ("this address may not set up the KMS (core.onboard.allow_from)", Refusal::Elsewhere),
            ("KMS is not allowed: TCB status is not up to date", Refusal::Outdated),
            ("domain contains an invalid DNS label", Refusal::Other),
        ] {
            assert_eq!(Refusal::of(text), refusal, "{text}");
        }
    }
}
