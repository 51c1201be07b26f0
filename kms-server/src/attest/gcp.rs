//! What leads from the attestation key of a Google virtual TPM to Google's root: certificates and revocation lists that
//! the certificates themselves name.
//!
//! The names come from a certificate that nobody has verified yet, so only Google's own places are asked, without TLS
//! credentials and with bounds: whatever comes back has to verify under the pinned root.

use std::sync::Arc;
use std::time::Duration;

use attestation::tpm::Chain;
use tokio::time::timeout;
use x509_parser::extensions::{DistributionPointName, GeneralName, ParsedExtension};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::cache::{Cache, Need};
use super::error::CollateralError;
use crate::breaker::Breaker;
use crate::client::{self, Url};
use crate::metrics::Dependency;

/// Certificates and lists that are remembered.
const ENTRIES: usize = 64;
const REFRESH: Duration = Duration::from_secs(3600);
/// Longest certificate or list.
const MAX_ANSWER: usize = 1 << 20;
/// Certificates between the attestation key's and the root.
const MAX_DEPTH: usize = 4;
/// `id-ad-caIssuers`.
const CA_ISSUERS: [u64; 9] = [1, 3, 6, 1, 5, 5, 7, 48, 2];

/// Fetches chains.
pub(super) struct GcpPki {
    fetcher: Arc<Fetcher>,
    cache: Cache<String, Vec<u8>>,
    deadline: Duration,
}

struct Fetcher {
    places: Vec<String>,
    tls: Arc<rustls::ClientConfig>,
    deadline: Duration,
    breaker: Arc<Breaker>,
}

impl GcpPki {
    /// Asks only hosts that are one of `places` or below one of them.
    pub(super) fn new(places: Vec<String>, tls: Arc<rustls::ClientConfig>, deadline: Duration) -> Self {
        let fetcher = Fetcher { places, tls, deadline, breaker: Arc::default() };
        Self { fetcher: Arc::new(fetcher), cache: Cache::new(ENTRIES, REFRESH), deadline }
    }

    pub(super) fn health(&self) -> Dependency {
        Dependency::of("gcp-pki", &self.fetcher.breaker)
    }

    /// Everything between `leaf` (DER) and the root.
    pub(super) async fn chain(&self, leaf: &[u8], need: Need) -> Result<Chain, CollateralError> {
        match timeout(self.deadline, self.collect(leaf, need)).await {
            Ok(chain) => chain,
            Err(_) => Err(CollateralError::service("Google's PKI", &client::Error::Deadline(self.deadline))),
        }
    }

    async fn collect(&self, leaf: &[u8], need: Need) -> Result<Chain, CollateralError> {
        let mut chain = Chain::default();
        let mut current = leaf.to_vec();
        for _ in 0..=MAX_DEPTH {
            let Names { issuer, list, self_issued } = Names::of(&current).ok_or(CollateralError::Place)?;
            if self_issued {
                // The root: the verifier has its own copy.
                break;
            }
            if current != leaf {
                chain.intermediates.push(current);
            }
            if let Some(url) = list {
                chain.crls.push(self.get(url, need).await?.to_vec());
            }
            let Some(url) = issuer else { break };
            current = self.get(url, need).await?.to_vec();
        }
        Ok(chain)
    }

    async fn get(&self, url: String, need: Need) -> Result<Arc<Vec<u8>>, CollateralError> {
        let fetcher = Arc::clone(&self.fetcher);
        let asked = url.clone();
        self.cache.get(url, need, async move { fetcher.fetch(&asked).await }).await
    }
}

impl Fetcher {
    async fn fetch(&self, url: &str) -> Result<Vec<u8>, CollateralError> {
        let url =
            Url::parse(url).ok().filter(|url| self.is_allowed(&url.host)).ok_or(CollateralError::Place)?;
        let pass = self.breaker.pass().map_err(|paused| CollateralError::paused("Google's PKI", paused))?;
        let answer = client::get(&url, &self.tls, MAX_ANSWER, self.deadline).await;
        pass.ended_with(&answer);
        answer
            .map(|answer| answer.body.to_vec())
            .map_err(|error| CollateralError::service("Google's PKI", &error))
    }

    fn is_allowed(&self, host: &str) -> bool {
        self.places.iter().any(|place| {
            host.strip_suffix(place.as_str()).is_some_and(|below| below.is_empty() || below.ends_with('.'))
        })
    }
}

/// The places a certificate names.
struct Names {
    issuer: Option<String>,
    list: Option<String>,
    self_issued: bool,
}

impl Names {
    fn of(der: &[u8]) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        let mut names =
            Self { issuer: None, list: None, self_issued: certificate.subject() == certificate.issuer() };
        for extension in certificate.extensions() {
            match extension.parsed_extension() {
                ParsedExtension::AuthorityInfoAccess(access) => {
                    names.issuer = access.accessdescs.iter().find_map(|description| {
                        let is_issuer =
                            description.access_method.iter().is_some_and(|arcs| arcs.eq(CA_ISSUERS));
                        uri(&description.access_location).filter(|_| is_issuer)
                    });
                }
                ParsedExtension::CRLDistributionPoints(points) => {
                    names.list = points.points.iter().find_map(|point| match &point.distribution_point {
                        Some(DistributionPointName::FullName(names)) => names.iter().find_map(uri),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        Some(names)
    }
}

fn uri(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::URI(uri) => Some((*uri).to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_googles_places_are_asked() {
        let fetcher = Fetcher {
            places: vec!["storage.googleapis.com".into(), "pki.goog".into()],
            tls: client::public_tls().unwrap(),
            deadline: Duration::from_secs(1),
            breaker: Arc::default(),
        };
        for host in ["storage.googleapis.com", "a.b.storage.googleapis.com", "i.pki.goog"] {
            assert!(fetcher.is_allowed(host), "{host}");
        }
        for host in [
            "169.254.169.254",
            "localhost",
            "evilstorage.googleapis.com.evil.org",
            "evil-storage.googleapis.com",
            "xpki.goog",
            "googleapis.com",
            "",
        ] {
            assert!(!fetcher.is_allowed(host), "{host}");
        }
    }
}
