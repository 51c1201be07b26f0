//! [`KmsUrl`]: where a KMS is.

use std::fmt;
use std::str::FromStr;

use hyper::Uri;
use rustls_pki_types::ServerName;
use transport::{Endpoint, ParseEndpointError, TcpHost};

/// The port of `https://` without one.
const HTTPS_PORT: u16 = 443;

/// An `https://` URL of a dstack KMS, with its `/prpc` path.
///
/// The path ends in `/prpc`, which is appended where it is missing; slashes at the end do not count. (Upstream makes
/// `/prpc/prpc` of `/prpc/` and gets 404.)
///
/// ```
/// use enclave_agent::KmsUrl;
///
/// for text in ["https://kms.example.com:12001", "https://kms.example.com:12001/prpc/"] {
///     assert_eq!(text.parse::<KmsUrl>()?.to_string(), "https://kms.example.com:12001/prpc");
/// }
/// # Ok::<(), enclave_agent::ParseUrlError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KmsUrl {
    host: TcpHost,
    /// `None`: the scheme's own, which is then not written either.
    port: Option<u16>,
    path: String,
}

/// Why a text is not the URL of a KMS.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseUrlError {
    /// Not a URL at all.
    #[error("{text:?} is not a URL; expected https://HOST[:PORT]")]
    Syntax {
        /// What was given, shortened.
        text: String,
    },
    /// Another scheme.
    #[error("{scheme:?} cannot protect keys; expected an https:// URL")]
    Scheme {
        /// The scheme.
        scheme: String,
    },
    /// The host cannot be one.
    #[error("host of the URL")]
    Host(#[source] ParseEndpointError),
    /// A user name or password in the URL, which would end up in logs and output.
    #[error("a user name in the URL means nothing to a KMS")]
    UserInfo,
    /// A query string.
    #[error("the URL of a KMS has no query string")]
    Query,
}

impl KmsUrl {
    /// Host and port to connect to, or to ask a proxy for.
    pub fn endpoint(&self) -> Endpoint {
        Endpoint::Tcp { host: self.host.clone(), port: self.port() }
    }

    /// The host.
    pub fn host(&self) -> &TcpHost {
        &self.host
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port.unwrap_or(HTTPS_PORT)
    }

    /// The name that the server's certificate must have.
    ///
    /// # Errors
    /// [`ParseUrlError::Syntax`] when the name cannot be in a certificate, as one with `_` at its end.
    pub fn server_name(&self) -> Result<ServerName<'static>, ParseUrlError> {
        let name = match &self.host {
            TcpHost::Address(address) => return Ok(ServerName::IpAddress((*address).into())),
            TcpHost::Name(name) => name.trim_end_matches('.').to_owned(),
        };
        ServerName::try_from(name).map_err(|_| ParseUrlError::Syntax { text: self.to_string() })
    }

    /// Value of the `Host` header.
    pub(crate) fn authority(&self) -> String {
        match self.port {
            Some(port) => format!("{}:{port}", self.host),
            None => self.host.to_string(),
        }
    }

    /// Path and query of a method called in JSON.
    pub(crate) fn method(&self, method: &str) -> String {
        format!("{}/{method}?json", self.path)
    }
}

impl FromStr for KmsUrl {
    type Err = ParseUrlError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let syntax = || ParseUrlError::Syntax { text: text.chars().take(100).collect() };
        let uri: Uri = text.parse().map_err(|_| syntax())?;
        match uri.scheme_str() {
            Some("https") => {}
            Some(scheme) => return Err(ParseUrlError::Scheme { scheme: scheme.to_owned() }),
            None => return Err(syntax()),
        }
        let authority = uri.authority().ok_or_else(syntax)?;
        if authority.as_str().contains('@') {
            return Err(ParseUrlError::UserInfo);
        }
        if uri.query().is_some() || text.contains('#') {
            return Err(ParseUrlError::Query);
        }
        // `Authority` takes a port out of range for none at all.
        let after_host = &authority.as_str()[authority.host().len()..];
        let port = match after_host.strip_prefix(':') {
            None => None,
            Some(_) => Some(authority.port_u16().filter(|port| *port != 0).ok_or_else(syntax)?),
        };
        let host = authority.host().parse().map_err(ParseUrlError::Host)?;
        let path = uri.path().trim_end_matches('/');
        let path = if path.ends_with("/prpc") { path.to_owned() } else { format!("{path}/prpc") };
        Ok(Self { host, port: port.filter(|port| *port != HTTPS_PORT), path })
    }
}

impl fmt::Display for KmsUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "https://{}{}", self.authority(), self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_ends_in_prpc_once() {
        for (text, expected) in [
            ("https://h", "https://h/prpc"),
            ("https://h/", "https://h/prpc"),
            ("https://h:443", "https://h/prpc"),
            ("https://h:8000/prpc", "https://h:8000/prpc"),
            ("https://h:8000/prpc/", "https://h:8000/prpc"),
            ("https://h:8000/prpc//", "https://h:8000/prpc"),
            ("https://h/kms/", "https://h/kms/prpc"),
            ("https://h/xprpc", "https://h/xprpc/prpc"),
            ("https://[::1]:8000", "https://[::1]:8000/prpc"),
            ("https://10.0.0.1:8000", "https://10.0.0.1:8000/prpc"),
        ] {
            let url: KmsUrl = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(url.to_string(), expected);
            assert_eq!(url.to_string().parse::<KmsUrl>().as_ref(), Ok(&url));
        }
    }

    #[test]
    fn a_wrong_url_says_what_is_wrong() {
        for (text, expected) in [
            ("", "\"\" is not a URL; expected https://HOST[:PORT]"),
            ("kms.example.com", "\"kms.example.com\" is not a URL; expected https://HOST[:PORT]"),
            ("/prpc", "\"/prpc\" is not a URL; expected https://HOST[:PORT]"),
            ("http://h", "\"http\" cannot protect keys; expected an https:// URL"),
            ("https://h:99999", "\"https://h:99999\" is not a URL; expected https://HOST[:PORT]"),
            ("https://h:0", "\"https://h:0\" is not a URL; expected https://HOST[:PORT]"),
            ("https://h:", "\"https://h:\" is not a URL; expected https://HOST[:PORT]"),
            ("https://u:p@h", "a user name in the URL means nothing to a KMS"),
            ("https://h/?app=1", "the URL of a KMS has no query string"),
            ("https://h/#x", "the URL of a KMS has no query string"),
        ] {
            let error = text.parse::<KmsUrl>().expect_err(text);
            assert_eq!(error.to_string(), expected, "for {text:?}");
        }
    }

    #[test]
    fn the_certificate_name_is_the_host() {
        for (text, expected) in [
            ("https://h.example:1", "h.example"),
            ("https://h.example.", "h.example"),
            ("https://[::1]", "::1"),
        ] {
            let name = text.parse::<KmsUrl>().unwrap().server_name().unwrap();
            assert_eq!(name.to_str(), expected);
        }
    }
}
