//! One line of the allow-list.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;

use super::address::{AddressClass, canonical, classify, names};
use super::target::{Host, HostName, TargetError, parse_port};

/// What a rule opens: hosts and ports.
///
/// | text | opens |
/// | --- | --- |
/// | `kms.example.com:12001` | that name |
/// | `*.example.com:443` | every name below example.com, at any depth; not example.com itself |
/// | `192.0.2.7:443`, `[2001:db8::7]:443` | that address, whatever its class |
/// | `10.1.0.0/16:443`, `[fd00:1::/32]:443` | the addresses of that range |
/// | `10.1.0.0/16` | the same on every port |
///
/// Ports are one number, a list and ranges (`443,8443,9000-9010`), or `*`.
///
/// A name never opens an address that is not public: `db.internal:5432` that resolves to 10.1.2.3 also needs a rule
/// such as `10.1.2.3:5432` or `10.1.0.0/16:5432`. A range names special addresses only when it lies wholly inside
/// their block, so `0.0.0.0/0` opens neither the loopback nor private networks; metadata services and this
/// machine's own addresses need a rule with exactly that address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub(crate) host: HostPattern,
    pub(crate) ports: PortSet,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum HostPattern {
    Name(HostName),
    /// The names below this one.
    Below(HostName),
    Net(IpNet),
}

impl Rule {
    /// Whether the rule is about this name, port aside.
    pub(crate) fn covers_name(&self, name: &HostName) -> bool {
        match &self.host {
            HostPattern::Name(own) => own == name,
            HostPattern::Below(suffix) => {
                let head = name.as_str().strip_suffix(suffix.as_str());
                // Something, then a dot: neither the suffix itself nor evilexample.com.
                head.is_some_and(|head| head.len() > 1 && head.ends_with('.'))
            }
            HostPattern::Net(_) => false,
        }
    }

    /// Whether the rule opens this address, port aside. `class` is the address's class on this machine.
    pub(crate) fn opens_address(&self, address: IpAddr, class: AddressClass) -> bool {
        let HostPattern::Net(net) = self.host else { return false };
        match class {
            AddressClass::Public => net.contains(&canonical(address)),
            class if class.needs_exact_rule() => {
                net.prefix_len() == net.max_prefix_len() && net.contains(&canonical(address))
            }
            _ => names(net, address),
        }
    }

    /// Whether the rule contains the address at all; for explanations.
    pub(crate) fn contains_address(&self, address: IpAddr) -> bool {
        matches!(self.host, HostPattern::Net(net) if net.contains(&canonical(address)))
    }

    /// Things about the rule that its author may not have meant, as whole sentences.
    pub fn warnings(&self) -> Vec<String> {
        let mut found = Vec::new();
        match &self.host {
            HostPattern::Below(suffix) if !suffix.as_str().contains('.') => {
                found.push(format!("rule {self} opens a whole top-level domain"));
            }
            HostPattern::Net(net) if net.prefix_len() < 8 => {
                found.push(format!("rule {self} opens a large part of all addresses"));
            }
            HostPattern::Net(net) if classify(net.network()) == AddressClass::Metadata => {
                found.push(format!(
                    "rule {self} opens a metadata service, which hands out the parent's credentials"
                ));
            }
            _ => {}
        }
        if self.ports == PortSet::any() {
            found.push(format!("rule {self} opens every port"));
        }
        found
    }
}

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let failed = |reason| RuleError { rule: text.chars().take(80).collect(), reason };
        parse(text).map_err(failed)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            HostPattern::Name(name) => write!(f, "{name}")?,
            HostPattern::Below(name) => write!(f, "*.{name}")?,
            HostPattern::Net(net) => match (net, net.prefix_len() == net.max_prefix_len()) {
                (IpNet::V4(net), true) => write!(f, "{}", net.addr())?,
                (IpNet::V4(net), false) => write!(f, "{net}")?,
                (IpNet::V6(net), true) => write!(f, "[{}]", net.addr())?,
                (IpNet::V6(net), false) => write!(f, "[{net}]")?,
            },
        }
        write!(f, ":{}", self.ports)
    }
}

/// A text that is not a rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rule {rule:?}: {reason}")]
pub struct RuleError {
    rule: String,
    reason: RuleReason,
}

/// What is wrong with the text of a rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum RuleReason {
    #[error("{0}")]
    Target(#[from] TargetError),
    #[error("no ports; expected HOST:PORTS such as kms.example.com:12001")]
    NoPorts,
    #[error("{0:?} is not a port, a range such as 9000-9010, or *")]
    Ports(String),
    #[error("{0:?} is not an address range such as 10.0.0.0/8 or [fd00::/8]")]
    Net(String),
    #[error("bits set behind the prefix; did you mean {0}?")]
    HostBits(IpNet),
    #[error("an IPv4 address in IPv6 clothes; write it as IPv4")]
    Mapped,
    #[error("a rule for every host is no allow-list; name hosts, or *.suffix")]
    EveryHost,
}

fn parse(text: &str) -> Result<Rule, RuleReason> {
    if let Some((net, ports)) = split_net(text) {
        let ports = ports.map_or(Ok(PortSet::any()), PortSet::parse)?;
        return Ok(Rule { host: HostPattern::Net(parse_net(&net)?), ports });
    }
    let (host, ports) = text.rsplit_once(':').ok_or(RuleReason::NoPorts)?;
    let ports = PortSet::parse(ports)?;
    let host = match host.strip_prefix("*.") {
        _ if host == "*" => return Err(RuleReason::EveryHost),
        Some(suffix) => HostPattern::Below(suffix.parse::<HostName>()?),
        None => match host.parse::<Host>()? {
            Host::Name(name) => HostPattern::Name(name),
            Host::Address(IpAddr::V4(_)) if host.starts_with('[') => return Err(RuleReason::Mapped),
            Host::Address(address) => HostPattern::Net(address.into()),
        },
    };
    Ok(Rule { host, ports })
}

/// Takes a rule with a slash apart: `NET/LEN`, `NET/LEN:PORTS`, `[NET/LEN]:PORTS` or `[NET]/LEN:PORTS`.
fn split_net(text: &str) -> Option<(String, Option<&str>)> {
    let (address, rest) = text.split_once('/')?;
    let (len, ports) = match rest.split_once(':') {
        Some((len, ports)) => (len, Some(ports)),
        None => (rest, None),
    };
    let inner = match (address.strip_prefix('['), len.strip_suffix(']')) {
        (Some(address), Some(len)) => format!("{address}/{len}"),
        (Some(address), None) => format!("{}/{len}", address.strip_suffix(']')?),
        (None, _) => format!("{address}/{len}"),
    };
    Some((inner, ports))
}

fn parse_net(text: &str) -> Result<IpNet, RuleReason> {
    let net: IpNet = text.parse().map_err(|_| RuleReason::Net(text.to_owned()))?;
    if net.addr() != net.network() {
        return Err(RuleReason::HostBits(net.trunc()));
    }
    match net {
        IpNet::V6(v6) if v6.prefix_len() >= 96 && v6.addr().to_ipv4_mapped().is_some() => {
            Err(RuleReason::Mapped)
        }
        _ => Ok(net),
    }
}

/// Ports, as sorted ranges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PortSet(Vec<(u16, u16)>);

impl PortSet {
    pub(crate) fn any() -> Self {
        Self(vec![(1, u16::MAX)])
    }

    pub(crate) fn contains(&self, port: u16) -> bool {
        self.0.iter().any(|(low, high)| (*low..=*high).contains(&port))
    }

    fn parse(text: &str) -> Result<Self, RuleReason> {
        if text == "*" {
            return Ok(Self::any());
        }
        let wrong = || RuleReason::Ports(text.chars().take(40).collect());
        let mut ranges = Vec::new();
        for part in text.split(',') {
            let (low, high) = part.split_once('-').unwrap_or((part, part));
            let (low, high) = (parse_port(low).map_err(|_| wrong())?, parse_port(high).map_err(|_| wrong())?);
            if low > high {
                return Err(wrong());
            }
            ranges.push((low, high));
        }
        ranges.sort_unstable();
        Ok(Self(ranges))
    }
}

impl fmt::Display for PortSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::any() {
            return f.write_str("*");
        }
        for (at, (low, high)) in self.0.iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            if low == high {
                write!(f, "{comma}{low}")?;
            } else {
                write!(f, "{comma}{low}-{high}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_print_as_they_are_read() {
        for (text, printed) in [
            ("kms.example.com:12001", "kms.example.com:12001"),
            ("KMS.example.com.:12001", "kms.example.com:12001"),
            ("*.example.com:443,8443", "*.example.com:443,8443"),
            ("*.example.com:8443,443", "*.example.com:443,8443"),
            ("a.example:9000-9010", "a.example:9000-9010"),
            ("a.example:*", "a.example:*"),
            ("192.0.2.1:443", "192.0.2.1:443"),
            ("[2001:db8::1]:443", "[2001:db8::1]:443"),
            ("10.0.0.0/8:443", "10.0.0.0/8:443"),
            ("10.0.0.0/8", "10.0.0.0/8:*"),
            ("fd00::/8:443", "[fd00::/8]:443"),
            ("[fd00::/8]:443", "[fd00::/8]:443"),
            ("[fd00::]/8:443", "[fd00::/8]:443"),
            ("192.0.2.1/32:443", "192.0.2.1:443"),
        ] {
            let rule: Rule = text.parse().unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(rule.to_string(), printed);
            assert_eq!(printed.parse::<Rule>().as_ref(), Ok(&rule));
        }
    }

    #[test]
    fn wrong_rules_say_what_is_wrong() {
        for (text, expected) in [
            ("", "no ports"),
            ("kms.example.com", "no ports"),
            ("*:443", "no allow-list"),
            ("*", "no ports"),
            ("*.*.example.com:443", "not a host name"),
            ("a*.example.com:443", "not a host name"),
            ("*.:443", "not a host name"),
            ("host:", "is not a port"),
            ("host:0", "is not a port"),
            ("host:443,", "is not a port"),
            ("host:9010-9000", "is not a port"),
            ("host:65536", "is not a port"),
            ("user@host:443", "not a host name"),
            ("127.1:80", "ends in a number"),
            ("10.0.0.1/8:443", "did you mean 10.0.0.0/8?"),
            ("10.0.0.0/33:443", "not an address range"),
            ("https://host:443", "not an address range"),
            ("[::ffff:1.2.3.4]:443", "write it as IPv4"),
            ("[::ffff:1.2.3.0/120]:443", "write it as IPv4"),
            ("bücher.example:443", "punycode"),
        ] {
            let error =
                text.parse::<Rule>().map_or_else(|e| e.to_string(), |rule| format!("accepted as {rule}"));
            assert!(error.contains(expected), "{text:?}: {error}");
        }
    }

    #[test]
    fn a_suffix_rule_opens_names_below_it_only() {
        let rule: Rule = "*.example.com:443".parse().unwrap();
        let covers = |name: &str| rule.covers_name(&name.parse().unwrap());
        assert!(covers("a.example.com"));
        assert!(covers("a.b.EXAMPLE.com."));
        assert!(!covers("example.com"));
        assert!(!covers("evilexample.com"));
        assert!(!covers("a.example.com.evil.org"));
    }
}
