//! Whether a registry has a container image, asked before a machine that needs it is made. Anonymous, and nothing is pulled.
//!
//! Source: OCI distribution specification 1.1; docker's rules for names without a registry.

use std::fmt::{self, Display, Formatter};
use std::str::FromStr;
use std::time::Duration;

use reqwest::{Client, Method, Response, StatusCode, Url, header};
use serde::Deserialize;
use tokio::time::timeout;
use zeroize::Zeroizing;

use crate::{Deadline, http};

/// Everything one image may take.
const CHECK: Duration = Duration::from_secs(15);
/// A token, or a list of tags.
const LONGEST: usize = 1 << 20;
/// Tags named in a message.
const SHOWN_TAGS: usize = 8;
const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
                         application/vnd.docker.distribution.manifest.list.v2+json, \
                         application/vnd.docker.distribution.manifest.v2+json";

/// The name of a container image, as a compose file spells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageName {
    /// As it was written.
    written: String,
    /// Host and port.
    registry: String,
    repository: String,
    /// A tag, or `sha256:…`.
    reference: String,
}

impl ImageName {
    /// Whether it is named by its digest, so that it cannot be exchanged.
    #[must_use]
    pub fn is_pinned(&self) -> bool {
        self.reference.contains(':')
    }
}

impl FromStr for ImageName {
    type Err = Error;

    fn from_str(written: &str) -> Result<Self, Error> {
        let bad = |problem| Error::Name { name: written.to_owned(), problem };
        let (rest, digest) = match written.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest)),
            None => (written, None),
        };
        let (registry, path) = match rest.split_once('/') {
            Some((first, path)) if first.contains(['.', ':']) || first == "localhost" => (first, path),
            _ => ("registry-1.docker.io", rest),
        };
        let registry = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
        let (path, tag) = match path.rsplit_once(':') {
            Some((path, tag)) => (path, tag),
            None => (path, "latest"),
        };
        let reference = digest.unwrap_or(tag);
        let letters = |text: &str, more: &str| {
            !text.is_empty() && text.chars().all(|it| it.is_ascii_alphanumeric() || more.contains(it))
        };
        if written.contains('$') {
            return Err(bad("holds a variable that is not set here"));
        }
        if !letters(registry, ".:-[]") || !letters(path, "._-/") || path.contains("..") {
            return Err(bad("is no name of an image"));
        }
        let hash = digest.map(|it| it.strip_prefix("sha256:").unwrap_or_default());
        let hash_is_good =
            hash.is_none_or(|it| it.len() == 64 && it.bytes().all(|it| it.is_ascii_hexdigit()));
        if !letters(tag, "._-") || !hash_is_good {
            return Err(bad("has neither a tag nor a SHA-256 digest that can be one"));
        }
        let alone = registry == "registry-1.docker.io" && !path.contains('/');
        Ok(Self {
            written: written.to_owned(),
            registry: registry.to_owned(),
            repository: if alone { format!("library/{path}") } else { path.to_owned() },
            reference: reference.to_owned(),
        })
    }
}

impl Display for ImageName {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(&self.written)
    }
}

/// Why an image cannot be counted on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The name cannot be one.
    #[error("image {name}: {problem}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The registry has no such image.
    #[error("image {name}: not in the registry{}", tags_told(tags))]
    Absent {
        /// The image.
        name: String,
        /// Some tags it has.
        tags: Vec<String>,
    },
    /// The registry wants a login.
    #[error("image {name}: the registry refuses an anonymous reader, status {status}")]
    Denied {
        /// The image.
        name: String,
        /// What it answered.
        status: u16,
    },
    /// The certificate of the registry is not valid.
    #[error("image {name}: the certificate of {registry} is not valid: {problem}")]
    Certificate {
        /// The image.
        name: String,
        /// The registry.
        registry: String,
        /// Why not.
        problem: String,
    },
    /// The registry does not answer, or not as one.
    #[error("image {name}: {registry}: {problem}")]
    Unreachable {
        /// The image.
        name: String,
        /// The registry.
        registry: String,
        /// The reason.
        problem: String,
    },
}

impl Error {
    /// What to do.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::Name { .. } => "write REGISTRY/NAME@sha256:DIGEST".into(),
            Self::Absent { .. } => "push the image, or name a tag or digest that is there".into(),
            Self::Denied { .. } => "make the image public: a guest pulls without a login".into(),
            Self::Certificate { .. } => {
                "give the registry a certificate that the guest's own roots know; a guest has no other".into()
            }
            Self::Unreachable { .. } => {
                "start the registry, and mind that the guest must reach it too".into()
            }
        }
    }

    /// Whether nobody answered.
    #[must_use]
    pub fn is_no_answer(&self) -> bool {
        matches!(self, Self::Unreachable { .. })
    }
}

fn tags_told(tags: &[String]) -> String {
    match tags {
        [] => String::new(),
        tags => format!(", which has {}", tags.join(", ")),
    }
}

/// The images a compose file names, without the services that are built. A variable is looked for among the lines
/// `NAME=value` of the script that runs before the containers, where guests get theirs from.
#[must_use]
pub fn images_of(docker_compose: &str, prelaunch: &str) -> Vec<Result<ImageName, Error>> {
    let values = docker_compose.lines().filter_map(|line| line.trim().strip_prefix("image:"));
    let value = |value: &str| {
        let value = value.split(" #").next().unwrap_or(value).trim().trim_matches(['"', '\'']);
        let resolved = match value.strip_prefix("${").and_then(|it| it.strip_suffix('}')) {
            None => Some(value.to_owned()),
            Some(variable) => resolve(variable, prelaunch),
        };
        resolved.unwrap_or_else(|| value.to_owned()).parse()
    };
    values.map(value).collect()
}

/// `NAME`, `NAME:-default` or `NAME:?message`.
fn resolve(variable: &str, prelaunch: &str) -> Option<String> {
    let (name, default) = match variable.split_once(":-") {
        Some((name, default)) => (name, Some(default.to_owned())),
        None => (variable.split(":?").next().unwrap_or(variable), None),
    };
    let mut set = prelaunch.lines().filter_map(|line| line.trim().strip_prefix(name)?.strip_prefix('='));
    set.next_back()
        .map(|value| value.trim_matches(['"', '\'']).to_owned())
        .filter(|it| !it.is_empty())
        .or(default)
}

/// Asks the registry for the image. Cancel safe.
///
/// # Errors
///
/// [`Error`] says why a guest could not pull it.
pub async fn check(client: &Client, image: &ImageName) -> Result<(), Error> {
    let unreachable = |problem: String| Error::Unreachable {
        name: image.written.clone(),
        registry: image.registry.clone(),
        problem,
    };
    let late = |_| unreachable(format!("no answer after {} s", CHECK.as_secs()));
    timeout(CHECK, Registry { client, image }.check()).await.map_err(late)?
}

struct Registry<'a> {
    client: &'a Client,
    image: &'a ImageName,
}

/// What a registry may answer to a request for a token. The token itself is good for reading one public image.
#[derive(Deserialize)]
struct Token {
    #[serde(alias = "access_token")]
    token: String,
}

#[derive(Deserialize)]
struct Tags {
    #[serde(default)]
    tags: Vec<String>,
}

impl Registry<'_> {
    async fn check(&self) -> Result<(), Error> {
        let path = format!("manifests/{}", self.image.reference);
        let mut base = self.base("https");
        let mut answer = self.ask(Method::HEAD, &base, &path, None).await;
        // A registry on this machine may speak plain HTTP, as docker allows it; a bad certificate is still one.
        if matches!(&answer, Err(Error::Unreachable { .. })) && self.is_local() {
            base = self.base("http");
            answer = self.ask(Method::HEAD, &base, &path, None).await;
        }
        let mut answer = answer?;
        let mut token = None;
        if answer.status() == StatusCode::UNAUTHORIZED {
            token = self.token(&answer).await?;
            answer = self.ask(Method::HEAD, &base, &path, token.as_ref()).await?;
        }
        let name = self.image.written.clone();
        match answer.status() {
            status if status.is_success() => Ok(()),
            StatusCode::NOT_FOUND => {
                // Which tags there are only helps; that the image is absent is known.
                let tags = self.tags(&base, token.as_ref()).await.unwrap_or_default();
                Err(Error::Absent { name, tags })
            }
            status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
                Err(Error::Denied { name, status: status.as_u16() })
            }
            status => Err(self.unreachable(format!("status {status}"))),
        }
    }

    fn base(&self, scheme: &str) -> String {
        format!("{scheme}://{}/v2/{}/", self.image.registry, self.image.repository)
    }

    fn is_local(&self) -> bool {
        let host =
            self.image.registry.rsplit_once(':').map_or(self.image.registry.as_str(), |(host, _)| host);
        let host = host.trim_matches(['[', ']']);
        host == "localhost" || host.parse().is_ok_and(|it: std::net::IpAddr| it.is_loopback())
    }

    fn unreachable(&self, problem: String) -> Error {
        Error::Unreachable {
            name: self.image.written.clone(),
            registry: self.image.registry.clone(),
            problem,
        }
    }

    async fn ask(
        &self,
        method: Method,
        base: &str,
        path: &str,
        token: Option<&Zeroizing<String>>,
    ) -> Result<Response, Error> {
        let url: Url =
            format!("{base}{path}").parse().map_err(|error| self.unreachable(format!("{error}")))?;
        let mut request = self.client.request(method, url).header(header::ACCEPT, MANIFESTS);
        if let Some(token) = token {
            request = request.bearer_auth(token.as_str());
        }
        request.send().await.map_err(|error| {
            let problem = command_line::chain(&error.without_url());
            match problem.contains("invalid peer certificate") {
                true => Error::Certificate {
                    name: self.image.written.clone(),
                    registry: self.image.registry.clone(),
                    problem,
                },
                false => self.unreachable(problem),
            }
        })
    }

    /// A token for anybody, from where the registry sends us.
    async fn token(&self, answer: &Response) -> Result<Option<Zeroizing<String>>, Error> {
        let challenge = answer.headers().get(header::WWW_AUTHENTICATE).and_then(|it| it.to_str().ok());
        let challenges = http_auth::parse_challenges(challenge.unwrap_or_default()).unwrap_or_default();
        let Some(bearer) = challenges.iter().find(|it| it.scheme.eq_ignore_ascii_case("bearer")) else {
            return Ok(None);
        };
        let parameter = |name: &str| {
            let found = bearer.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.to_unescaped())
        };
        let realm = parameter("realm").and_then(|it| it.parse::<Url>().ok());
        let realm = realm.filter(|it| it.scheme() == "https" || self.is_local());
        let mut realm = realm.ok_or_else(|| self.unreachable("asks for a login at no address".into()))?;
        for name in ["service", "scope"] {
            if let Some(value) = parameter(name) {
                realm.query_pairs_mut().append_pair(name, &value);
            }
        }
        let told = |error: reqwest::Error| self.unreachable(command_line::chain(&error.without_url()));
        let answer = self.client.get(realm).send().await.map_err(told)?;
        let body = http::body("token", answer, LONGEST, Deadline::within(CHECK)).await;
        let body = Zeroizing::new(body.map_err(|error| self.unreachable(error.to_string()))?);
        let token: Result<Token, _> = serde_json::from_slice(&body);
        token.map(|it| Some(Zeroizing::new(it.token))).map_err(|_| self.unreachable("gives no token".into()))
    }

    async fn tags(&self, base: &str, token: Option<&Zeroizing<String>>) -> Result<Vec<String>, Error> {
        let answer = self.ask(Method::GET, base, "tags/list", token).await?;
        let body = http::body("tags", answer, LONGEST, Deadline::within(CHECK)).await;
        let body = body.map_err(|error| self.unreachable(error.to_string()))?;
        let tags: Tags =
            serde_json::from_slice(&body).map_err(|error| self.unreachable(error.to_string()))?;
        let clean = tags.tags.into_iter().filter(|tag| !tag.contains(char::is_control));
        let mut tags: Vec<String> = clean.collect();
        Ok(tags.split_off(tags.len().saturating_sub(SHOWN_TAGS)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_docker_reads_them() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (written, registry, repository, reference) in [
            ("debian", "registry-1.docker.io", "library/debian", "latest"),
            ("dstacktee/dstack-kms:0.5.5", "registry-1.docker.io", "dstacktee/dstack-kms", "0.5.5"),
            ("docker.io/library/node:20", "registry-1.docker.io", "library/node", "20"),
            ("cr.kvin.wang/dstack-kms", "cr.kvin.wang", "dstack-kms", "latest"),
            ("localhost:5000/kms:1", "localhost:5000", "kms", "1"),
            (&format!("ghcr.io/a/b:1@{digest}"), "ghcr.io", "a/b", &digest),
        ] {
            let name: ImageName = written.parse().unwrap();
            let parts = (name.registry.as_str(), name.repository.as_str(), name.reference.as_str());
            assert_eq!(parts, (registry, repository, reference), "{written}");
            assert_eq!(name.is_pinned(), written.contains('@'), "{written}");
        }
        for written in ["", "a b", "kms:", "a/../b", "kms@sha256:00", "kms@md5:00", "${KMS_IMAGE}", "x/$A:1"]
        {
            assert!(written.parse::<ImageName>().is_err(), "{written}");
        }
    }

    #[test]
    fn images_of_a_compose_with_the_script_that_sets_their_names() {
        let compose = "services:\n  a:\n    image: node:20 # x\n  b:\n    image: \"${KMS_IMAGE:?set}\"\n  c:\n    \
                       image: ${OTHER:-debian:12}\n  d:\n    image: ${MISSING}\n";
        let images = images_of(compose, "#!/bin/sh\ncat > .env <<E\nKMS_IMAGE=cr.example/kms:1\nE\n");
        let told: Vec<String> = images
            .iter()
            .map(|it| it.as_ref().map_or_else(ToString::to_string, ToString::to_string))
            .collect();
        let missing = "image ${MISSING}: holds a variable that is not set here";
        assert_eq!(told, ["node:20", "cr.example/kms:1", "debian:12", missing]);
    }
}
