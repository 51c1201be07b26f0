//! Names to addresses, as the system is configured: `/etc/resolv.conf` and `/etc/hosts`, with the answers' own time
//! to live between a floor and a ceiling.

use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::LookupIpStrategy;
use hickory_resolver::proto::rr::Name;

use crate::policy::target::HostName;

/// Answers kept; each is a few hundred bytes.
const CACHE_ENTRIES: u64 = 1024;
/// One try with one name server; the dial's deadline bounds all of them.
const TRY: Duration = Duration::from_secs(2);

/// What a look-up gives.
pub type Answer<'a> = Pin<Box<dyn Future<Output = Result<Vec<IpAddr>, ResolveError>> + Send + 'a>>;

/// Something that knows the addresses of names. The caller judges every address it gives, on every connection.
pub trait Resolve: Send + Sync {
    /// The addresses of `name`, in the order of preference. The caller holds the deadline.
    fn resolve<'a>(&'a self, name: &'a HostName) -> Answer<'a>;
}

/// Why a name has no address.
#[derive(Debug, thiserror::Error)]
#[error("cannot resolve {name}: {reason}")]
pub struct ResolveError {
    /// The name.
    pub name: String,
    /// The resolver's words.
    pub reason: String,
}

/// How long answers are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheTimes {
    /// An answer with a shorter time to live is kept this long.
    pub min: Duration,
    /// An answer with a longer time to live is asked for again after this.
    pub max: Duration,
}

impl Default for CacheTimes {
    /// 5 seconds to 5 minutes.
    fn default() -> Self {
        Self { min: Duration::from_secs(5), max: Duration::from_secs(300) }
    }
}

/// The system's resolver.
pub struct SystemResolver(TokioResolver);

impl SystemResolver {
    /// Reads the system's configuration; a change of it takes another `SystemResolver`.
    ///
    /// # Errors
    /// When `/etc/resolv.conf` cannot be read or names no server.
    pub fn new(times: CacheTimes) -> Result<Self, io::Error> {
        let mut builder = TokioResolver::builder_tokio().map_err(io::Error::other)?;
        let options = builder.options_mut();
        options.cache_size = CACHE_ENTRIES;
        options.timeout = TRY;
        options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
        options.positive_min_ttl = Some(times.min);
        options.positive_max_ttl = Some(times.max);
        options.negative_max_ttl = Some(times.min);
        Ok(Self(builder.build().map_err(io::Error::other)?))
    }
}

impl Resolve for SystemResolver {
    fn resolve<'a>(&'a self, name: &'a HostName) -> Answer<'a> {
        Box::pin(async move {
            let failed = |reason: String| ResolveError { name: name.to_string(), reason };
            let mut fqdn = Name::from_ascii(name.as_str()).map_err(|error| failed(error.to_string()))?;
            // Complete as it stands: search domains would look up names that no rule allowed.
            fqdn.set_fqdn(true);
            let answer = self.0.lookup_ip(fqdn).await.map_err(|error| failed(error.to_string()))?;
            Ok(answer.iter().collect())
        })
    }
}

/// Fixed answers, for explanations and tests.
#[derive(Clone, Debug, Default)]
pub struct FixedResolver(Vec<(HostName, Vec<IpAddr>)>);

impl FixedResolver {
    /// Adds an address of a name.
    pub fn add(&mut self, name: HostName, address: IpAddr) {
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, addresses)) => addresses.push(address),
            None => self.0.push((name, vec![address])),
        }
    }

    /// The addresses of a name, when it is known.
    pub fn get(&self, name: &HostName) -> Option<&[IpAddr]> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, addresses)| addresses.as_slice())
    }
}

impl Resolve for FixedResolver {
    fn resolve<'a>(&'a self, name: &'a HostName) -> Answer<'a> {
        Box::pin(async move {
            let unknown = || ResolveError { name: name.to_string(), reason: "no such name".to_owned() };
            self.get(name).map(<[_]>::to_vec).ok_or_else(unknown)
        })
    }
}
