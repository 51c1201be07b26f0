//! Where access tokens come from.

use std::fmt;
use std::sync::Arc;

use gcp_auth::TokenProvider;
use tokio::sync::Mutex;
use zeroize::Zeroizing;

use super::Error;
use crate::patience::Deadline;

/// What the calls here need, and no more.
const SCOPES: [&str; 2] =
    ["https://www.googleapis.com/auth/compute", "https://www.googleapis.com/auth/devstorage.read_write"];
/// Impersonation is asked for through the IAM API, which takes only this scope.
const IMPERSONATION_SCOPES: [&str; 1] = ["https://www.googleapis.com/auth/cloud-platform"];

/// Access tokens for Google's APIs.
#[derive(Clone)]
pub struct Credentials(Kind);

#[derive(Clone)]
enum Kind {
    Fixed(Arc<Zeroizing<String>>),
    Found(Arc<dyn TokenProvider>),
    Impersonated(Arc<Impersonation>),
}

/// A service account whose tokens the caller may ask for.
pub(super) struct Impersonation {
    pub(super) account: String,
    pub(super) caller: Credentials,
    /// The token in use, and the moment after which another is asked for.
    pub(super) current: Mutex<Option<(Zeroizing<String>, Deadline)>>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Kind::Fixed(_) => "Credentials(a given token)",
            Kind::Found(_) => "Credentials(found)",
            Kind::Impersonated(_) => "Credentials(impersonated)",
        })
    }
}

impl Credentials {
    /// A token made elsewhere, as in gcloud's `CLOUDSDK_AUTH_ACCESS_TOKEN`. It is never renewed.
    #[must_use]
    pub fn token(token: String) -> Self {
        Self(Kind::Fixed(Arc::new(Zeroizing::new(token))))
    }

    /// The usual search: `GOOGLE_APPLICATION_CREDENTIALS`, the application default credentials, the metadata server,
    /// gcloud.
    ///
    /// # Errors
    ///
    /// [`Error::Credentials`] when none is found.
    pub async fn find() -> Result<Self, Error> {
        match gcp_auth::provider().await {
            Ok(provider) => Ok(Self(Kind::Found(provider))),
            Err(source) => Err(Error::Credentials { problem: "none found".into(), source: Some(source) }),
        }
    }

    /// Tokens of the service account `account`, which the caller behind `self` may impersonate.
    #[must_use]
    pub fn impersonate(self, account: String) -> Self {
        Self(Kind::Impersonated(Arc::new(Impersonation { account, caller: self, current: Mutex::new(None) })))
    }

    /// The account to impersonate, if tokens come that way.
    pub(super) fn impersonation(&self) -> Option<&Impersonation> {
        match &self.0 {
            Kind::Impersonated(impersonation) => Some(impersonation),
            _ => None,
        }
    }

    /// A token of the caller itself; `for_impersonation` asks for the scope the IAM API takes.
    pub(super) async fn own_token(&self, for_impersonation: bool) -> Result<Zeroizing<String>, Error> {
        let scopes: &[&str] = if for_impersonation { &IMPERSONATION_SCOPES } else { &SCOPES };
        match &self.0 {
            Kind::Fixed(token) => Ok(Zeroizing::clone(token)),
            Kind::Found(provider) => match provider.token(scopes).await {
                Ok(token) => Ok(Zeroizing::new(token.as_str().to_owned())),
                Err(source) => Err(Error::Credentials { problem: "no token".into(), source: Some(source) }),
            },
            Kind::Impersonated(_) => Err(Error::Credentials {
                problem: "one account cannot impersonate through another".into(),
                source: None,
            }),
        }
    }

    /// The scopes an impersonated token is asked for.
    pub(super) fn scopes() -> &'static [&'static str] {
        &SCOPES
    }
}
