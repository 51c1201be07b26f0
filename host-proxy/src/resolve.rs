//! Names to addresses, as the system is configured: `/etc/resolv.conf` and `/etc/hosts`, with the answers' own time
//! to live between a floor and a ceiling.

use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::time::Duration;

use hickory_resolver::config::LookupIpStrategy;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::Name;
use hickory_resolver::{ResolverBuilder, TokioResolver};

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
        Self::build(TokioResolver::builder_tokio().map_err(io::Error::other)?, times)
    }

    fn build(mut builder: ResolverBuilder<TokioRuntimeProvider>, times: CacheTimes) -> io::Result<Self> {
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

#[cfg(test)]
mod tests {
    use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig};
    use tokio::net::UdpSocket;
    use tokio::time::{interval, timeout};

    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    /// A resolver that asks a name server which never answers the same: 203.0.113.1, then .2 and so on, with this time
    /// to live in seconds.
    async fn resolver(ttl: u32, min: Duration, max: Duration) -> SystemResolver {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let mut connection = ConnectionConfig::udp();
        connection.port = socket.local_addr().unwrap().port();
        tokio::spawn(answer(socket, ttl));
        let server = NameServerConfig::new("127.0.0.1".parse().unwrap(), true, vec![connection]);
        let config = ResolverConfig::from_parts(None, Vec::new(), vec![server]);
        let builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
        SystemResolver::build(builder, CacheTimes { min, max }).unwrap()
    }

    async fn answer(socket: UdpSocket, ttl: u32) {
        let mut query = [0; 512];
        let mut given = 0;
        loop {
            let (_, from) = socket.recv_from(&mut query).await.unwrap();
            // A header of 12 bytes; the name, which ends with a zero; two bytes each of type and class (RFC 1035 §4.1).
            let end = 12 + query[12..].iter().position(|byte| *byte == 0).unwrap() + 5;
            let asks_for_ipv4 = query[end - 4..end - 2] == [0, 1];
            let mut answer = query[..end].to_vec();
            answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, u8::from(asks_for_ipv4), 0, 0, 0, 0]);
            if asks_for_ipv4 {
                given += 1;
                answer.extend([0xc0, 12, 0, 1, 0, 1]);
                answer.extend(ttl.to_be_bytes());
                answer.extend([0, 4, 203, 0, 113, given]);
            }
            socket.send_to(&answer, from).await.unwrap();
        }
    }

    /// The last number of the address that the name has now.
    async fn look_up(resolver: &SystemResolver) -> u8 {
        let name = "kms.example.com".parse().unwrap();
        let found = timeout(Duration::from_secs(20), resolver.resolve(&name)).await.unwrap().unwrap();
        let [IpAddr::V4(address)] = found[..] else { panic!("{found:?}") };
        address.octets()[3]
    }

    #[tokio::test]
    async fn an_answer_is_kept_for_the_shortest_time_at_least() {
        let resolver = resolver(0, DAY, DAY).await;
        assert_eq!([look_up(&resolver).await, look_up(&resolver).await], [1, 1]);
    }

    #[tokio::test]
    async fn an_answer_is_kept_for_the_longest_time_at_most() {
        let resolver = resolver(86_400, Duration::ZERO, Duration::ZERO).await;
        assert_eq!([look_up(&resolver).await, look_up(&resolver).await], [1, 2]);
    }

    #[tokio::test]
    async fn between_them_an_answers_own_time_to_live_counts() {
        let long = resolver(86_400, Duration::ZERO, DAY).await;
        assert_eq!([look_up(&long).await, look_up(&long).await], [1, 1]);
        let short = resolver(1, Duration::ZERO, DAY).await;
        let mut tick = interval(Duration::from_millis(20));
        let moved = timeout(Duration::from_secs(20), async {
            while look_up(&short).await == 1 {
                tick.tick().await;
            }
        });
        moved.await.expect("the old address is used for ever");
    }
}
