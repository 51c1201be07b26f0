//! The page that an operator sets a KMS up with: its three files, and what it asks to know how things are.
//!
//! Nothing on it comes from elsewhere and nothing inline runs: the content security policy allows its own two files. It
//! is served over plain HTTP like the service it calls, so it works without what browsers keep for secure pages.

use hyper::StatusCode;
use hyper::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, HeaderName, HeaderValue, REFERRER_POLICY, X_FRAME_OPTIONS,
};
use serde::Serialize;

use crate::authorise::decider::Decider;
use crate::http::{Answer, plain};

const HTML: &str = include_str!("page/index.html");
const CSS: &str = include_str!("page/onboard.css");
const JS: &str = include_str!("page/onboard.js");

const POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; \
     form-action 'none'; frame-ancestors 'none'",
);

/// The files by their path.
pub(super) fn file(path: &str) -> Option<Answer> {
    let (content_type, content) = match path {
        "/" => ("text/html; charset=utf-8", HTML),
        "/onboard.css" => ("text/css; charset=utf-8", CSS),
        "/onboard.js" => ("text/javascript; charset=utf-8", JS),
        _ => return None,
    };
    Some(guarded(plain(StatusCode::OK, content_type, content)))
}

/// How things are, for `/status`.
#[derive(Debug, Serialize)]
pub(super) struct Status<'a> {
    /// Whether the setup token is missing; then nothing else is told.
    pub(super) locked: bool,
    pub(super) site_name: &'a str,
    /// Port of the key service that follows.
    pub(super) port: u16,
    pub(super) authoriser: Option<AuthoriserStatus>,
    pub(super) keys: Option<&'a Made>,
}

/// The light at the top of the page.
#[derive(Debug, Serialize)]
pub(super) struct AuthoriserStatus {
    kind: &'static str,
    good: bool,
    /// Neither good nor bad: it was not heard of yet.
    waiting: bool,
    trouble: String,
}

impl AuthoriserStatus {
    pub(super) fn of(decider: &Decider) -> Self {
        let health = decider.health();
        let trouble = health.trouble.or_else(|| decider.silence()).or_else(|| {
            (health.failures > 0).then(|| format!("{} questions without an answer", health.failures))
        });
        // One that is asked elsewhere has to have answered once; what decides here is ready when it is loaded.
        let heard = !decider.is_remote() || decider.description().is_some();
        Self {
            kind: decider.kind(),
            good: trouble.is_none() && heard,
            waiting: trouble.is_none() && !heard,
            trouble: trouble.unwrap_or_default(),
        }
    }
}

/// What Bootstrap or Onboard left behind; all of it is public.
#[derive(Debug, Serialize)]
pub(crate) struct Made {
    pub(crate) domain: String,
    pub(crate) k256_pubkey: String,
    pub(crate) ca_pubkey: String,
    /// Empty after Onboard: the evidence for the keys is where they were made.
    pub(crate) attestation: String,
}

impl Status<'_> {
    pub(super) fn answer(&self) -> Answer {
        let json = serde_json::to_vec(self).unwrap_or_default();
        guarded(plain(StatusCode::OK, "application/json", json))
    }
}

/// With everything that keeps other pages out.
pub(super) fn guarded(mut answer: Answer) -> Answer {
    let headers = answer.headers_mut();
    headers.insert(CONTENT_SECURITY_POLICY, POLICY);
    headers.insert(X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    let same_origin = HeaderValue::from_static("same-origin");
    headers.insert(HeaderName::from_static("cross-origin-resource-policy"), same_origin.clone());
    headers.insert(HeaderName::from_static("cross-origin-opener-policy"), same_origin);
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_comes_from_elsewhere_and_nothing_runs_inline() {
        for (name, text) in [("html", HTML), ("css", CSS), ("js", JS)] {
            for foreign in
                ["http://", "//cdn", "@import", "eval(", "innerHTML", "insertAdjacentHTML", "document.write"]
            {
                assert!(!text.contains(foreign), "{name} contains {foreign}");
            }
        }
        assert!(!CSS.contains("url("));
        assert_eq!(HTML.matches("<script").count(), HTML.matches("<script src=\"/onboard.js\"").count());
        for inline in ["style=", "<style", " onclick", " onload", " onsubmit", "javascript:"] {
            assert!(!HTML.contains(inline), "{inline}");
        }
    }

    #[test]
    fn every_input_has_a_label_and_every_id_is_there_once() {
        let ids: Vec<&str> = HTML.split(" id=\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
        for id in &ids {
            assert_eq!(ids.iter().filter(|other| *other == id).count(), 1, "{id}");
        }
        for input in HTML.split("<input id=\"").skip(1).filter_map(|rest| rest.split('"').next()) {
            assert!(HTML.contains(&format!("<label for=\"{input}\"")), "{input}");
        }
        for wanted in JS.split("$(\"").skip(1).filter_map(|rest| rest.split('"').next()) {
            assert!(ids.contains(&wanted), "the script asks for {wanted}");
        }
    }

    #[test]
    fn files_carry_the_policy() {
        for path in ["/", "/onboard.css", "/onboard.js"] {
            let answer = file(path).unwrap();
            assert_eq!(answer.headers()[CONTENT_SECURITY_POLICY], POLICY);
        }
        assert!(file("/index.html").is_none() && file("/../Cargo.toml").is_none());
    }
}
