//! Which method a path names and which encoding a request asks for (kms-protocol §1.2 and §1.3).

/// One of the three services; each has a listener of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// The main listener.
    Kms,
    /// The listener of a KMS that has no keys yet.
    Onboard,
    /// The loopback listener of operators (generation C).
    Admin,
}

impl Service {
    /// The optional prefix of its method names, case-sensitive.
    #[must_use]
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Kms => "KMS.",
            Self::Onboard => "Onboard.",
            Self::Admin => "Admin.",
        }
    }

    /// The path segment without the service prefix, which peers may repeat any number of times.
    #[must_use]
    pub fn bare_name(self, segment: &str) -> &str {
        segment.trim_start_matches(self.prefix())
    }

    /// The method that a path segment (what follows `/prpc/`) names on this service's listener.
    #[must_use]
    pub fn method(self, segment: &str) -> Option<Method> {
        let name = self.bare_name(segment);
        Method::ALL.into_iter().find(|method| method.service() == self && method.name() == name)
    }
}

/// Every method of the three services.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names are the wire's own; the messages are documented")]
pub enum Method {
    GetAppKey,
    GetKmsKey,
    GetAppEnvEncryptPubKey,
    GetMeta,
    GetTempCaCert,
    SignCert,
    /// Ours: a nonce for sealed release.
    GetChallenge,
    /// Ours: an app's keys, for the enclave's eyes only.
    GetAppKeySealed,
    /// `ClearImageCache` in the KMS service (generations A and B).
    LegacyClearImageCache,
    Bootstrap,
    Onboard,
    GetAttestationInfo,
    Finish,
    ClearImageCache,
}

impl Method {
    /// All of them, in the order of the reference.
    pub const ALL: [Self; 14] = [
        Self::GetAppKey,
        Self::GetKmsKey,
        Self::GetAppEnvEncryptPubKey,
        Self::GetMeta,
        Self::GetTempCaCert,
        Self::SignCert,
        Self::GetChallenge,
        Self::GetAppKeySealed,
        Self::LegacyClearImageCache,
        Self::Bootstrap,
        Self::Onboard,
        Self::GetAttestationInfo,
        Self::Finish,
        Self::ClearImageCache,
    ];

    /// The bare name, as clients put it behind `/prpc/`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::GetAppKey => "GetAppKey",
            Self::GetKmsKey => "GetKmsKey",
            Self::GetAppEnvEncryptPubKey => "GetAppEnvEncryptPubKey",
            Self::GetMeta => "GetMeta",
            Self::GetTempCaCert => "GetTempCaCert",
            Self::SignCert => "SignCert",
            Self::GetChallenge => "GetChallenge",
            Self::GetAppKeySealed => "GetAppKeySealed",
            Self::LegacyClearImageCache | Self::ClearImageCache => "ClearImageCache",
            Self::Bootstrap => "Bootstrap",
            Self::Onboard => "Onboard",
            Self::GetAttestationInfo => "GetAttestationInfo",
            Self::Finish => "Finish",
        }
    }

    /// The service it belongs to.
    #[must_use]
    pub fn service(self) -> Service {
        match self {
            Self::GetAppKey
            | Self::GetKmsKey
            | Self::GetAppEnvEncryptPubKey
            | Self::GetMeta
            | Self::GetTempCaCert
            | Self::SignCert
            | Self::GetChallenge
            | Self::GetAppKeySealed
            | Self::LegacyClearImageCache => Service::Kms,
            Self::Bootstrap | Self::Onboard | Self::GetAttestationInfo | Self::Finish => Service::Onboard,
            Self::ClearImageCache => Service::Admin,
        }
    }

    /// Whether the request is the empty message, so that nobody looks at its body.
    #[must_use]
    pub fn has_empty_request(self) -> bool {
        matches!(self, Self::GetMeta | Self::GetTempCaCert | Self::GetAttestationInfo | Self::Finish)
    }

    /// Whether the peer must have presented an attestation in its TLS certificate.
    #[must_use]
    pub fn needs_client_attestation(self) -> bool {
        matches!(self, Self::GetAppKey | Self::GetKmsKey)
    }
}

/// How a body is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// JSON in the mapping of [`super::json`].
    Json,
    /// Protocol Buffers.
    Protobuf,
}

impl Encoding {
    /// The `Content-Type` of a successful response.
    #[must_use]
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Protobuf => "application/octet-stream",
        }
    }
}

/// Where the request message is and how it, and the answer, are encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestForm {
    /// `GET`: the query string is the message; the answer is JSON.
    Query,
    /// `POST`: the body is the message, the answer uses the same encoding.
    Body(Encoding),
}

impl RequestForm {
    /// Reads the rules of §1.3 off a `GET` request.
    #[must_use]
    pub fn of_get() -> Self {
        Self::Query
    }

    /// Reads the rules of §1.3 off a `POST` request: its query string (without `?`) and its `Content-Type`.
    #[must_use]
    pub fn of_post(query: &str, content_type: Option<&str>) -> Self {
        let json = asks_for_json(query) || content_type.is_some_and(is_json);
        Self::Body(if json { Encoding::Json } else { Encoding::Protobuf })
    }

    /// The encoding of the answer.
    #[must_use]
    pub fn response(self) -> Encoding {
        match self {
            Self::Query => Encoding::Json,
            Self::Body(encoding) => encoding,
        }
    }

    /// The encoding of errors raised before the method runs (client attestation, reading the body). Upstream forgets
    /// the `Content-Type` there (§1.5, a quirk that upstream's clients may rely on).
    #[must_use]
    pub fn of_early_error(is_get: bool, query: &str) -> Encoding {
        if is_get || asks_for_json(query) { Encoding::Json } else { Encoding::Protobuf }
    }
}

/// `?json`, `?json=true` and `?json=1` ask; `?json=0` does not. The first mention counts.
fn asks_for_json(query: &str) -> bool {
    query
        .split('&')
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .find(|(name, _)| *name == "json")
        .is_some_and(|(_, value)| ["", "1", "true", "yes", "on"].contains(&value))
}

/// `application/json`, whatever the parameters.
fn is_json(content_type: &str) -> bool {
    let media_type = content_type.split(';').next().unwrap_or_default();
    media_type.trim().eq_ignore_ascii_case("application/json")
}
