//! Intel's collateral from a provisioning certification service or a cache of it (PCCS).

use std::sync::Arc;
use std::time::Duration;

use attestation::tdx::{Collateral, CollateralKey, MAX_COLLATERAL_LEN, PcsAnswers};
use hyper::HeaderMap;
use tokio::time::timeout;

use super::cache::{Cache, Need};
use super::error::CollateralError;
use crate::breaker::Breaker;
use crate::client::{self, Url};
use crate::metrics::Dependency;
use command_line::chain;

/// Platform models that are remembered.
const MODELS: usize = 64;
/// Intel's collateral is valid for thirty days; once an hour is soon enough for a new revocation.
const REFRESH: Duration = Duration::from_secs(3600);

/// A client of the service.
pub(super) struct Pccs {
    service: Arc<Service>,
    cache: Cache<CollateralKey, Collateral>,
}

struct Service {
    url: Url,
    tls: Arc<rustls::ClientConfig>,
    /// For all requests that one platform model takes.
    deadline: Duration,
    breaker: Arc<Breaker>,
}

impl Pccs {
    pub(super) fn new(url: Url, tls: Arc<rustls::ClientConfig>, deadline: Duration) -> Self {
        Self {
            service: Arc::new(Service { url, tls, deadline, breaker: Arc::default() }),
            cache: Cache::new(MODELS, REFRESH),
        }
    }

    pub(super) fn health(&self) -> Dependency {
        Dependency::of("pccs", &self.service.breaker)
    }

    pub(super) async fn collateral(
        &self,
        key: CollateralKey,
        need: Need,
    ) -> Result<Arc<Collateral>, CollateralError> {
        let service = Arc::clone(&self.service);
        self.cache.get(key, need, async move { service.fetch(key).await }).await
    }
}

impl Service {
    async fn fetch(&self, key: CollateralKey) -> Result<Collateral, CollateralError> {
        let pass = self.breaker.pass().map_err(|paused| CollateralError::paused("PCCS", paused))?;
        let fetched = timeout(self.deadline, self.ask(key)).await;
        let fetched = fetched.unwrap_or(Err(client::Error::Deadline(self.deadline)));
        pass.ended_with(&fetched);
        let answers = fetched.map_err(|error| CollateralError::service("PCCS", &error))?;
        let answers = answers.ok_or_else(|| {
            tracing::warn!(url = %self.url, "the PCCS left out an issuer chain");
            CollateralError::Service
        })?;
        Collateral::from_pcs(answers).map_err(|error| {
            tracing::warn!(url = %self.url, error = chain(&error), "the PCCS gave unusable collateral");
            CollateralError::Service
        })
    }

    /// `None` when a header is missing.
    async fn ask(&self, key: CollateralKey) -> Result<Option<PcsAnswers>, client::Error> {
        let get = |path: String| {
            let url = self.url.join(&path);
            async move { client::get(&url, &self.tls, MAX_COLLATERAL_LEN, self.deadline).await }
        };
        let fmspc = hex::encode_upper(key.fmspc());
        let crl = get(format!("sgx/certification/v4/pckcrl?ca={}&encoding=der", key.ca())).await?;
        let tcb = get(format!("tdx/certification/v4/tcb?fmspc={fmspc}&update=standard")).await?;
        let qe = get("tdx/certification/v4/qe/identity?update=standard".into()).await?;
        let root = get("sgx/certification/v4/rootcacrl".into()).await?;
        // A PCCS answers this one in hex, Intel's own service in DER.
        let root_ca_crl = std::str::from_utf8(&root.body).ok().and_then(|text| hex::decode(text.trim()).ok());
        let answers = || {
            Some(PcsAnswers {
                pck_crl_issuer_chain: issuers(&crl.headers, &["sgx-pck-crl-issuer-chain"])?,
                tcb_info_issuer_chain: issuers(
                    &tcb.headers,
                    &["tcb-info-issuer-chain", "sgx-tcb-info-issuer-chain"],
                )?,
                qe_identity_issuer_chain: issuers(&qe.headers, &["sgx-enclave-identity-issuer-chain"])?,
                pck_crl: crl.body.to_vec(),
                tcb_info: tcb.body.to_vec(),
                qe_identity: qe.body.to_vec(),
                root_ca_crl: root_ca_crl.unwrap_or_else(|| root.body.to_vec()),
            })
        };
        Ok(answers())
    }
}

/// A chain of PEM certificates in a header, percent-encoded.
fn issuers(headers: &HeaderMap, names: &[&str]) -> Option<String> {
    let value = names.iter().find_map(|name| headers.get(*name))?;
    let mut bytes = Vec::with_capacity(value.len());
    let mut rest = value.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        if *first == b'%' {
            let (digits, tail) = tail.split_at_checked(2)?;
            bytes.extend(hex::decode(digits).ok()?);
            rest = tail;
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn issuer_chains_are_unescaped() {
        let mut headers = HeaderMap::new();
        headers.insert("tcb-info-issuer-chain", "-----BEGIN%20X-----%0Aa%2Bb+c%0a".parse().unwrap());
        assert_eq!(issuers(&headers, &["tcb-info-issuer-chain"]).unwrap(), "-----BEGIN X-----\na+b+c\n");
        assert_eq!(issuers(&headers, &["other"]), None);
        for cut in ["%", "%2", "%zz", "%ff"] {
            headers.insert("tcb-info-issuer-chain", cut.parse().unwrap());
            assert_eq!(issuers(&headers, &["tcb-info-issuer-chain"]), None, "{cut}");
        }
    }
}
