//! Who may set up a KMS that has no keys yet. Upstream lets in whoever reaches the listener; here the settings can ask
//! for a source network and for a token that is printed on the console at start, and no page of another site gets in.

use std::fmt;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use hyper::header::{HOST, HeaderName, ORIGIN, USER_AGENT};
use hyper::http::request::Parts;
use hyper::{Method as Verb, StatusCode};
use ipnet::IpNet;
use kms_protocol::wire::{Method, Service};
use zeroize::Zeroizing;

use crate::admin::TokenHash;

/// Where a client puts the token.
const TOKEN: HeaderName = HeaderName::from_static("x-onboard-token");
/// What browsers say about the page a request comes from, where they trust the connection.
const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
/// After so many wrong tokens none is right any more, until the next start. A guess has 2^-128 anyway; the bound ends a
/// machine's guessing early, and shows it.
const MAX_WRONG_TOKENS: u32 = 20;
/// Length of a token in bytes, before it is written in hex.
const TOKEN_LEN: usize = 16;

/// Decides about every request to the Onboard service.
pub(crate) struct Gate {
    /// Anybody without a list.
    allow_from: Option<Vec<IpNet>>,
    token: Option<TokenHash>,
    wrong: Mutex<u32>,
}

/// The token, to be printed once.
pub struct SetupToken(Zeroizing<String>);

impl SetupToken {
    /// 32 hexadecimal digits.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SetupToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SetupToken")
    }
}

/// Why somebody may not. The text goes to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refused {
    #[error("this address may not set up the KMS (core.onboard.allow_from)")]
    Source,
    #[error("a page of another site may not set up the KMS")]
    OtherSite,
    #[error("the setup token is missing or wrong; the server printed it on its console")]
    Token,
    #[error("too many wrong setup tokens; restart the server for a new one")]
    Locked,
}

impl Refused {
    pub(crate) fn status(self) -> StatusCode {
        match self {
            Self::Source | Self::OtherSite => StatusCode::FORBIDDEN,
            Self::Token => StatusCode::UNAUTHORIZED,
            Self::Locked => StatusCode::TOO_MANY_REQUESTS,
        }
    }
}

impl Gate {
    /// A gate, and the token it asks for if it is to ask for one.
    ///
    /// # Errors
    /// [`aws_lc_rs::error::Unspecified`] without randomness.
    pub(crate) fn new(
        allow_from: Option<Vec<IpNet>>,
        with_token: bool,
    ) -> Result<(Self, Option<SetupToken>), aws_lc_rs::error::Unspecified> {
        let token = with_token
            .then(|| {
                let mut bytes = Zeroizing::new([0; TOKEN_LEN]);
                aws_lc_rs::rand::fill(bytes.as_mut_slice())?;
                let text = Zeroizing::new(hex::encode(bytes.as_slice()));
                Ok::<_, aws_lc_rs::error::Unspecified>(SetupToken(text))
            })
            .transpose()?;
        let hash = token.as_ref().map(|token| TokenHash::of(token.reveal()));
        Ok((Self { allow_from, token: hash, wrong: Mutex::new(0) }, token))
    }

    /// Whether a request from `ip` may see the page at all.
    pub(crate) fn admit(&self, parts: &Parts, ip: Option<IpAddr>) -> Result<(), Refused> {
        if let Some(networks) = &self.allow_from {
            // An IPv4 peer of a listener for both families shows as ::ffff:a.b.c.d.
            let ip = ip.ok_or(Refused::Source)?.to_canonical();
            if !networks.iter().any(|network| network.contains(&ip)) {
                return Err(Refused::Source);
            }
        }
        if is_of_other_site(parts) { Err(Refused::OtherSite) } else { Ok(()) }
    }

    /// Whether it may also learn about this KMS and change it.
    pub(crate) fn authorise(&self, parts: &Parts, ip: Option<IpAddr>) -> Result<(), Refused> {
        self.admit(parts, ip)?;
        let Some(expected) = &self.token else { return Ok(()) };
        let offered = parts.headers.get(&TOKEN).and_then(|value| value.to_str().ok());
        let mut wrong = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        if *wrong >= MAX_WRONG_TOKENS {
            return Err(Refused::Locked);
        }
        match offered {
            Some(offered) if expected.is_of(offered) => Ok(()),
            // Nothing was guessed: the page asks this way whether a token is needed.
            None => Err(Refused::Token),
            Some(_) => {
                *wrong += 1;
                Err(Refused::Token)
            }
        }
    }
}

/// Whether a browser sends this on behalf of a page that is not ours. Programs say nothing about pages.
///
/// The protocol lets a method be called with `GET` and a query string, which any page can make a browser do without a
/// word about itself; so what makes keys is not called that way by a browser at all.
fn is_of_other_site(parts: &Parts) -> bool {
    let header = |name: &HeaderName| parts.headers.get(name).map(|value| value.to_str().unwrap_or("?"));
    if header(&FETCH_SITE).is_some_and(|site| site != "same-origin" && site != "none") {
        return true;
    }
    if let Some(origin) = header(&ORIGIN) {
        let own = header(&HOST).map(|host| format!("http://{host}"));
        return own.as_deref() != Some(origin);
    }
    let by_browser = header(&USER_AGENT).is_some_and(|agent| agent.starts_with("Mozilla/"));
    let method = parts.uri.path().strip_prefix("/prpc/").and_then(|segment| Service::Onboard.method(segment));
    by_browser && parts.method == Verb::GET && matches!(method, Some(Method::Bootstrap | Method::Onboard))
}

#[cfg(test)]
mod tests {
    use hyper::Request;

    use super::*;

    const HOME: &str = "10.1.2.3";

    fn parts(verb: &str, path: &str, headers: &[(&str, &str)]) -> Parts {
        let mut request = Request::builder().method(verb).uri(path).header("host", "kms.internal:8000");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    fn gate(networks: &[&str], with_token: bool) -> (Gate, Option<SetupToken>) {
        let networks = networks.iter().map(|text| text.parse().unwrap()).collect::<Vec<_>>();
        Gate::new((!networks.is_empty()).then_some(networks), with_token).unwrap()
    }

    fn ip(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    #[test]
    fn only_listed_networks_get_in() {
        let (gate, _) = gate(&["10.0.0.0/8", "fd00::/8"], false);
        let request = parts("GET", "/", &[]);
        for inside in [HOME, "::ffff:10.9.9.9", "fd00::1"] {
            assert_eq!(gate.authorise(&request, ip(inside)), Ok(()), "{inside}");
        }
        for outside in ["11.0.0.1", "192.168.0.1", "::1", "fe80::1", "::ffff:11.0.0.1"] {
            assert_eq!(gate.admit(&request, ip(outside)), Err(Refused::Source), "{outside}");
        }
        assert_eq!(gate.admit(&request, None), Err(Refused::Source));
    }

    #[test]
    fn the_token_is_asked_for_and_never_printed() {
        let (gate, token) = gate(&[], true);
        let token = token.unwrap();
        assert_eq!(format!("{token:?}"), "SetupToken");
        assert_eq!(token.reveal().len(), 32);
        let with = |value: &str| parts("POST", "/prpc/Bootstrap?json", &[("x-onboard-token", value)]);
        assert_eq!(gate.admit(&parts("GET", "/", &[]), ip(HOME)), Ok(()));
        assert_eq!(gate.authorise(&parts("GET", "/status", &[]), ip(HOME)), Err(Refused::Token));
        assert_eq!(gate.authorise(&with(""), ip(HOME)), Err(Refused::Token));
        assert_eq!(gate.authorise(&with(&token.reveal()[..31]), ip(HOME)), Err(Refused::Token));
        assert_eq!(gate.authorise(&with(token.reveal()), ip(HOME)), Ok(()));
        let (other, _) = super::tests::gate(&[], true);
        assert_eq!(other.authorise(&with(token.reveal()), ip(HOME)), Err(Refused::Token));
    }

    #[test]
    fn guessing_ends() {
        let (gate, token) = gate(&[], true);
        let token = token.unwrap();
        let with = |value: &str| parts("POST", "/prpc/Finish?json", &[("x-onboard-token", value)]);
        for _ in 0..100 {
            // Asking without a token is no guess.
            assert_eq!(gate.authorise(&parts("GET", "/status", &[]), ip(HOME)), Err(Refused::Token));
        }
        for _ in 0..MAX_WRONG_TOKENS {
            assert_eq!(gate.authorise(&with("guess"), ip(HOME)), Err(Refused::Token));
        }
        assert_eq!(gate.authorise(&with("guess"), ip(HOME)), Err(Refused::Locked));
        assert_eq!(gate.authorise(&with(token.reveal()), ip(HOME)), Err(Refused::Locked));
    }

    #[test]
    fn pages_of_other_sites_are_refused_and_programs_are_not() {
        let (gate, _) = gate(&[], false);
        let browser = ("user-agent", "Mozilla/5.0 (X11; Linux x86_64)");
        let own = ("origin", "http://kms.internal:8000");
        type Headers<'a> = &'a [(&'a str, &'a str)];
        let cases: [(&str, &str, Headers<'_>, bool); 11] = [
            ("POST", "/prpc/Bootstrap?json", &[], true),
            ("POST", "/prpc/Bootstrap?json", &[browser, own], true),
            ("POST", "/prpc/Bootstrap?json", &[browser, ("origin", "http://evil.example")], false),
            ("POST", "/prpc/Bootstrap?json", &[browser, ("origin", "null")], false),
            ("POST", "/prpc/Bootstrap?json", &[browser, ("origin", "https://kms.internal:8000")], false),
            ("POST", "/prpc/Bootstrap?json", &[("sec-fetch-site", "cross-site"), own], false),
            ("POST", "/prpc/Bootstrap?json", &[("sec-fetch-site", "same-origin"), own], true),
            ("GET", "/prpc/Bootstrap?domain=evil.example", &[browser], false),
            ("GET", "/prpc/Onboard.Onboard?source_url=x", &[browser], false),
            ("GET", "/prpc/Bootstrap?domain=kms.example", &[("user-agent", "curl/8.5.0")], true),
            ("GET", "/", &[browser, ("sec-fetch-site", "none")], true),
        ];
        for (verb, path, headers, admitted) in cases {
            let result = gate.admit(&parts(verb, path, headers), ip(HOME));
            assert_eq!(result.is_ok(), admitted, "{verb} {path} {headers:?}: {result:?}");
        }
    }
}
