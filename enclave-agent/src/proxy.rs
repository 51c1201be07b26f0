//! How to reach a KMS: directly, or through an HTTP `CONNECT` proxy.

use std::fmt;

use hyper::Uri;
use hyper_util::client::proxy::matcher::Matcher;
use transport::{ConnectTarget, Endpoint};

use crate::KmsUrl;

/// Which proxy to use, if any.
#[derive(Debug)]
pub enum Proxy {
    /// Always this one, with `CONNECT` spoken on it directly.
    Endpoint(Endpoint),
    /// What `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` said when the program started.
    Environment(Box<Matcher>),
    /// None.
    Direct,
}

/// Why the environment's proxy cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProxyError {
    /// A proxy that is spoken to in another way.
    #[error("the proxy in the environment is {scheme}://, expected http://")]
    Scheme {
        /// Its scheme.
        scheme: String,
    },
    /// Its address cannot be used.
    #[error("the proxy in the environment has no usable host")]
    Host,
    /// Its user name or password cannot be sent.
    #[error("the proxy's user name or password")]
    Authorization(#[source] transport::connect::Error),
}

impl Proxy {
    /// The process's environment, read once; lower-case names count as well.
    pub fn from_env() -> Self {
        Self::Environment(Box::new(Matcher::from_env()))
    }

    /// The way to this KMS.
    ///
    /// # Errors
    /// [`ProxyError`] when the environment names a proxy that cannot be used; it is never left out in silence.
    pub(crate) fn route(&self, url: &KmsUrl) -> Result<Route, ProxyError> {
        let target = || ConnectTarget::new(url.host().clone(), url.port());
        match self {
            Self::Direct => Ok(Route { first_hop: url.endpoint(), tunnel: None }),
            Self::Endpoint(proxy) => Ok(Route { first_hop: proxy.clone(), tunnel: Some(target()) }),
            Self::Environment(matcher) => {
                let uri: Uri = url.to_string().parse().map_err(|_| ProxyError::Host)?;
                let Some(proxy) = matcher.intercept(&uri) else {
                    return Ok(Route { first_hop: url.endpoint(), tunnel: None });
                };
                let mut tunnel = target();
                if let Some(value) = proxy.basic_auth() {
                    let value = value.to_str().map_err(|_| ProxyError::Host)?.to_owned();
                    tunnel = tunnel.with_authorization(value).map_err(ProxyError::Authorization)?;
                }
                Ok(Route { first_hop: proxy_endpoint(proxy.uri())?, tunnel: Some(tunnel) })
            }
        }
    }
}

fn proxy_endpoint(uri: &Uri) -> Result<Endpoint, ProxyError> {
    if uri.scheme_str() != Some("http") {
        return Err(ProxyError::Scheme { scheme: uri.scheme_str().unwrap_or("unknown").to_owned() });
    }
    let host = uri.host().ok_or(ProxyError::Host)?;
    Endpoint::tcp(host, uri.port_u16().unwrap_or(80)).map_err(|_| ProxyError::Host)
}

/// Where to connect, and what to ask for there.
pub(crate) struct Route {
    pub(crate) first_hop: Endpoint,
    pub(crate) tunnel: Option<ConnectTarget>,
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.tunnel {
            Some(_) => write!(f, "proxy {}", self.first_hop),
            None => f.write_str("direct"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url() -> KmsUrl {
        "https://kms.example.com:8000".parse().unwrap()
    }

    fn matched(matcher: Matcher) -> Result<Route, ProxyError> {
        Proxy::Environment(Box::new(matcher)).route(&url())
    }

    #[test]
    fn a_given_endpoint_is_always_the_proxy() {
        let route = Proxy::Endpoint("vsock:3:3128".parse().unwrap()).route(&url()).unwrap();
        assert_eq!(route.first_hop.to_string(), "vsock:3:3128");
        assert!(route.tunnel.is_some());
    }

    #[test]
    fn the_environment_is_honoured_with_its_exceptions() {
        let builder = || Matcher::builder().https("http://127.0.0.1:3128");
        let route = matched(builder().build()).unwrap();
        assert_eq!(route.first_hop.to_string(), "tcp:127.0.0.1:3128");
        let route = matched(builder().no("example.com").build()).unwrap();
        assert_eq!(
            (route.first_hop.to_string(), route.tunnel.is_none()),
            ("tcp:kms.example.com:8000".into(), true)
        );
        let route = matched(Matcher::builder().http("http://127.0.0.1:1").build()).unwrap();
        assert!(route.tunnel.is_none(), "HTTP_PROXY is for http:// only");
        let route = matched(Matcher::builder().all("http://[::1]:8").build()).unwrap();
        assert_eq!(route.first_hop.to_string(), "tcp:[::1]:8");
    }

    #[test]
    fn a_proxy_of_another_kind_is_refused_and_not_left_out() {
        for proxy in ["https://proxy:1", "socks5://proxy:1"] {
            assert!(matched(Matcher::builder().all(proxy).build()).is_err(), "{proxy}");
        }
    }
}
