//! The target of a `CONNECT`, read strictly: every way to write a host that two programs could read differently is
//! an error here.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use super::address::canonical;

/// Longest host name in the DNS (RFC 1035 §2.3.4, without the final dot).
const MAX_NAME: usize = 253;
/// Longest label (RFC 1035 §2.3.4).
const MAX_LABEL: usize = 63;

/// A host name in its one spelling: lower case, ASCII, no final dot.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostName(Box<str>);

impl HostName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for HostName {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if !text.is_ascii() {
            return Err(TargetError::NotAscii);
        }
        let bare = text.strip_suffix('.').unwrap_or(text);
        if bare.is_empty() || bare.len() > MAX_NAME {
            return Err(TargetError::Name);
        }
        if !bare.split('.').all(is_label) {
            return Err(TargetError::Name);
        }
        // What ends in a number is an IPv4 address to many resolvers: 127.1, 0x7f.1, 2130706433, 0177.0.0.1.
        if bare.rsplit('.').next().is_some_and(looks_numeric) {
            return Err(TargetError::OddNumber);
        }
        Ok(Self(bare.to_ascii_lowercase().into()))
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A host: a name to be resolved, or an address.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Host {
    /// A name.
    Name(HostName),
    /// An address; an IPv4-mapped IPv6 address is the IPv4 address it means.
    Address(IpAddr),
}

impl FromStr for Host {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(rest) = text.strip_prefix('[') {
            let inner = rest.strip_suffix(']').ok_or(TargetError::Brackets)?;
            // Rust's parser takes no zone, so `fe80::1%eth0` ends here.
            let address: Ipv6Addr = inner.parse().map_err(|_| TargetError::Brackets)?;
            return Ok(Self::Address(canonical(address.into())));
        }
        // Rust's parser takes four decimal numbers without leading zeros and nothing else.
        match text.parse::<Ipv4Addr>() {
            Ok(address) => Ok(Self::Address(address.into())),
            Err(_) => text.parse().map(Self::Name),
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => name.fmt(f),
            Self::Address(IpAddr::V4(address)) => address.fmt(f),
            Self::Address(IpAddr::V6(address)) => write!(f, "[{address}]"),
        }
    }
}

/// Where a tunnel is to end: `host:port` as in a `CONNECT` line.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Target {
    /// Name or address.
    pub host: Host,
    /// 1 to 65535.
    pub port: u16,
}

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.contains('@') {
            return Err(TargetError::UserInfo);
        }
        let (host, port) = text.rsplit_once(':').ok_or(TargetError::NoPort)?;
        // An IPv6 address without brackets, or two ports.
        if host.contains(':') && !(host.starts_with('[') && host.ends_with(']')) {
            return Err(TargetError::Colons);
        }
        Ok(Self { port: parse_port(port)?, host: host.parse()? })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// Why a text is not a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// There is no `:PORT`.
    #[error("the target has no port; expected HOST:PORT")]
    NoPort,
    /// The port is not 1 to 65535 in plain decimal.
    #[error("the port is not a decimal number from 1 to 65535 without sign, blank or leading zero")]
    Port,
    /// More than one colon outside brackets.
    #[error("more than one colon; an IPv6 address stands in [brackets]")]
    Colons,
    /// `user@host`.
    #[error("user information in the target")]
    UserInfo,
    /// Brackets around something else than an IPv6 address.
    #[error("brackets around something that is not an IPv6 address without zone")]
    Brackets,
    /// A byte outside ASCII.
    #[error("a byte outside ASCII; international names are written in punycode (xn--...)")]
    NotAscii,
    /// Not a host name.
    #[error("not a host name: labels of 1 to 63 letters, digits, '-' and '_', 253 bytes in all")]
    Name,
    /// A number form of an IPv4 address that is not a.b.c.d.
    #[error("a host that ends in a number and is not an IPv4 address a.b.c.d")]
    OddNumber,
}

impl TargetError {
    /// Stable name for logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoPort => "target-without-port",
            Self::Port => "target-bad-port",
            Self::Colons => "target-extra-colons",
            Self::UserInfo => "target-user-info",
            Self::Brackets => "target-bad-brackets",
            Self::NotAscii => "target-not-ascii",
            Self::Name => "target-bad-name",
            Self::OddNumber => "target-odd-number",
        }
    }
}

pub(crate) fn parse_port(text: &str) -> Result<u16, TargetError> {
    let plain = !text.starts_with('0') && text.len() <= 5 && text.bytes().all(|b| b.is_ascii_digit());
    // The empty text and everything over 65535 fail in `parse`.
    if plain { text.parse().map_err(|_| TargetError::Port) } else { Err(TargetError::Port) }
}

fn is_label(label: &str) -> bool {
    (1..=MAX_LABEL).contains(&label.len())
        && !label.starts_with('-')
        && !label.ends_with('-')
        && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

fn looks_numeric(label: &str) -> bool {
    let hex = label.strip_prefix("0x").or_else(|| label.strip_prefix("0X"));
    label.bytes().all(|b| b.is_ascii_digit())
        || hex.is_some_and(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_target_has_one_meaning() {
        for (text, canonical) in [
            ("kms.example.com:12001", "kms.example.com:12001"),
            ("KMS.Example.COM:12001", "kms.example.com:12001"),
            ("kms.example.com.:12001", "kms.example.com:12001"),
            ("xn--bcher-kva.example:443", "xn--bcher-kva.example:443"),
            ("a_b.example:1", "a_b.example:1"),
            ("localhost:65535", "localhost:65535"),
            ("3com.example:80", "3com.example:80"),
            ("192.0.2.1:443", "192.0.2.1:443"),
            ("[2001:DB8::1]:443", "[2001:db8::1]:443"),
            ("[2001:db8:0:0:0:0:0:1]:443", "[2001:db8::1]:443"),
            ("[::ffff:192.0.2.1]:443", "192.0.2.1:443"),
        ] {
            let target: Target = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(target.to_string(), canonical);
        }
    }

    #[test]
    fn every_ambiguous_form_is_named() {
        use TargetError::*;
        for (text, error) in [
            ("", NoPort),
            ("host", NoPort),
            ("host:", Port),
            (":443", Name),
            ("host:0", Port),
            ("host:0443", Port),
            ("host:+443", Port),
            ("host: 443", Port),
            ("host:443 ", Port),
            ("host:65536", Port),
            ("host:65979", Port),
            ("host:4٣3", Port),
            ("host:443:443", Colons),
            ("::1:443", Colons),
            ("user@host:443", UserInfo),
            ("host@evil:443", UserInfo),
            ("host:443@evil:443", UserInfo),
            ("[host]:443", Brackets),
            ("[::1:443", Colons),
            ("[fe80::1%eth0]:443", Brackets),
            ("[127.0.0.1]:443", Brackets),
            ("[]:443", Brackets),
            ("host..:443", Name),
            (".host:443", Name),
            ("a..b:443", Name),
            ("-a.example:443", Name),
            ("a-.example:443", Name),
            ("ho%2est:443", Name),
            ("ho\0st:443", Name),
            ("ho\tst:443", Name),
            ("ho st:443", Name),
            ("host/..:443", Name),
            ("*.example.com:443", Name),
            ("bücher.example:443", NotAscii),
            ("kms\u{ff0e}example\u{ff0e}com:443", NotAscii),
            ("2130706433:80", OddNumber),
            ("0x7f.1:80", OddNumber),
            ("0x7f000001:80", OddNumber),
            ("0X7F000001:80", OddNumber),
            ("0177.0.0.1:80", OddNumber),
            ("127.1:80", OddNumber),
            ("127.0.0.1.:80", OddNumber),
            ("1.2.3.4.5:80", OddNumber),
            ("256.0.0.1:80", OddNumber),
            ("127.0.0.0x1:80", OddNumber),
            ("a.0x:80", OddNumber),
        ] {
            assert_eq!(text.parse::<Target>(), Err(error), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_again(text in "[a-zA-Z0-9_.:\\[\\]-]{1,40}:[0-9]{1,5}") {
            if let Ok(target) = text.parse::<Target>() {
                prop_assert_eq!(target.to_string().parse::<Target>(), Ok(target));
            }
        }

        #[test]
        fn no_text_panics(text in ".{0,300}") {
            drop(text.parse::<Target>());
        }
    }
}
