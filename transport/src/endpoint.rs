//! [`Endpoint`]: the one way this project writes an address.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Longest path of a Unix socket: `sun_path` holds 108 bytes and ends in NUL (unix(7)).
pub const MAX_SOCKET_PATH: usize = 107;
/// Longest host name in the DNS (RFC 1035 §2.3.4, without the final dot).
const MAX_HOST_NAME: usize = 253;

/// Where to connect to, or what to listen on.
///
/// | text | meaning |
/// | --- | --- |
/// | `vsock:CID:PORT` | a vsock port of the machine with that context id; `vsock:any:PORT` to listen |
/// | `unix:PATH` | a stream socket in the file system |
/// | `tcp:HOST:PORT` | a host name, an IPv4 address, or an IPv6 address in square brackets |
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// `vsock:CID:PORT`.
    Vsock {
        /// The context id, or [`VsockCid::ANY`] to listen on all of this machine's.
        cid: VsockCid,
        /// The port.
        port: VsockPort,
    },
    /// `unix:PATH`.
    Unix {
        /// The socket file.
        path: PathBuf,
    },
    /// `tcp:HOST:PORT`.
    Tcp {
        /// Name or address.
        host: TcpHost,
        /// The port; 0 lets the system choose one when listening.
        port: u16,
    },
}

impl Endpoint {
    /// An endpoint for a host and port that come from elsewhere, such as a URL.
    ///
    /// # Errors
    /// [`ParseEndpointError::Host`] when `host` is neither a name nor an address.
    pub fn tcp(host: &str, port: u16) -> Result<Self, ParseEndpointError> {
        Ok(Self::Tcp { host: host.parse()?, port })
    }

    /// An endpoint for a vsock port.
    pub fn vsock(cid: VsockCid, port: VsockPort) -> Self {
        Self::Vsock { cid, port }
    }

    /// An endpoint for a Unix socket.
    ///
    /// # Errors
    /// [`ParseEndpointError::Path`] when the path is empty, holds NUL, or is longer than a socket address can hold.
    pub fn unix(path: impl Into<PathBuf>) -> Result<Self, ParseEndpointError> {
        let path = path.into();
        let bytes = path.as_os_str().as_encoded_bytes();
        if bytes.is_empty() || bytes.len() > MAX_SOCKET_PATH || bytes.contains(&0) {
            return Err(ParseEndpointError::Path { len: bytes.len() });
        }
        Ok(Self::Unix { path })
    }

    /// The socket file of a `unix:` endpoint.
    pub fn unix_path(&self) -> Option<&Path> {
        match self {
            Self::Unix { path } => Some(path),
            Self::Vsock { .. } | Self::Tcp { .. } => None,
        }
    }
}

impl FromStr for Endpoint {
    type Err = ParseEndpointError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let Some((scheme, rest)) = text.split_once(':') else {
            return Err(ParseEndpointError::Scheme { scheme: shorten(text) });
        };
        match scheme {
            "vsock" => {
                let (cid, port) =
                    rest.split_once(':').ok_or_else(|| ParseEndpointError::NoPort { text: shorten(text) })?;
                Ok(Self::Vsock { cid: cid.parse()?, port: port.parse()? })
            }
            "unix" => Self::unix(rest),
            "tcp" => {
                let (host, port) = rest
                    .rsplit_once(':')
                    .ok_or_else(|| ParseEndpointError::NoPort { text: shorten(text) })?;
                Ok(Self::Tcp { host: parse_bracketed(host)?, port: parse_tcp_port(port)? })
            }
            _ => Err(ParseEndpointError::Scheme { scheme: shorten(scheme) }),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
            Self::Unix { path } => write!(f, "unix:{}", path.display()),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
        }
    }
}

/// A vsock context id: who is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VsockCid(u32);

impl VsockCid {
    /// This machine itself, through the loopback transport (vsock(7), `VMADDR_CID_LOCAL`).
    pub const LOCAL: Self = Self(1);
    /// The host, as a guest of QEMU or Firecracker sees it (`VMADDR_CID_HOST`).
    pub const HOST: Self = Self(2);
    /// The EC2 instance that owns a Nitro enclave, as the enclave sees it.
    pub const PARENT: Self = Self(3);
    /// Every context id of this machine; only for listening (`VMADDR_CID_ANY`).
    pub const ANY: Self = Self(u32::MAX);

    /// The context id with this number.
    pub const fn new(cid: u32) -> Self {
        Self(cid)
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl FromStr for VsockCid {
    type Err = ParseEndpointError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "any" {
            return Ok(Self::ANY);
        }
        let cid = parse_decimal(text).map(Self);
        // The all-ones number has the one spelling "any", so that nobody gets it by an overflow elsewhere.
        cid.filter(|cid| *cid != Self::ANY).ok_or_else(|| ParseEndpointError::Cid { text: shorten(text) })
    }
}

impl fmt::Display for VsockCid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::ANY { f.write_str("any") } else { self.0.fmt(f) }
    }
}

/// The context id of an enclave: 4 or more, for 0 to 3 and all-ones mean something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EnclaveCid(VsockCid);

impl EnclaveCid {
    /// The context id as a number.
    pub const fn get(self) -> u32 {
        self.0.get()
    }
}

impl TryFrom<VsockCid> for EnclaveCid {
    type Error = ParseEndpointError;

    fn try_from(cid: VsockCid) -> Result<Self, Self::Error> {
        if cid <= VsockCid::PARENT || cid == VsockCid::ANY {
            return Err(ParseEndpointError::EnclaveCid { cid });
        }
        Ok(Self(cid))
    }
}

impl From<EnclaveCid> for VsockCid {
    fn from(cid: EnclaveCid) -> Self {
        cid.0
    }
}

impl FromStr for EnclaveCid {
    type Err = ParseEndpointError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse::<VsockCid>()?.try_into()
    }
}

impl fmt::Display for EnclaveCid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A vsock port: 32 bits, unlike TCP's 16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VsockPort(u32);

impl VsockPort {
    /// The port with this number.
    pub const fn new(port: u32) -> Self {
        Self(port)
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl FromStr for VsockPort {
    type Err = ParseEndpointError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // All ones is VMADDR_PORT_ANY, "choose one", which neither side of ours ever wants.
        parse_decimal(text)
            .filter(|port| *port != u32::MAX)
            .map(Self)
            .ok_or_else(|| ParseEndpointError::Port { text: shorten(text), max: u32::MAX - 1 })
    }
}

impl fmt::Display for VsockPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A host name or address, checked for its form only.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TcpHost {
    /// A name for the resolver: letters, digits, `-`, `_` and dots.
    Name(String),
    /// An address.
    Address(IpAddr),
}

impl FromStr for TcpHost {
    type Err = ParseEndpointError;

    /// Takes a name or an address; an IPv6 address with or without brackets.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        if let Some(address) = bare {
            let address: Ipv6Addr =
                address.parse().map_err(|_| ParseEndpointError::Host { text: shorten(text) })?;
            return Ok(Self::Address(address.into()));
        }
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self::Address(address));
        }
        let wanted = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        if text.is_empty()
            || text.len() > MAX_HOST_NAME
            || !text.bytes().all(wanted)
            || text.starts_with(['.', '-'])
        {
            return Err(ParseEndpointError::Host { text: shorten(text) });
        }
        Ok(Self::Name(text.to_owned()))
    }
}

impl fmt::Display for TcpHost {
    /// An IPv6 address in brackets, as a port can follow it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Address(IpAddr::V4(address)) => address.fmt(f),
            Self::Address(IpAddr::V6(address)) => write!(f, "[{address}]"),
        }
    }
}

/// What is wrong with the text of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseEndpointError {
    /// The part before the first colon is not one of ours.
    #[error("{scheme:?} is not vsock:CID:PORT, unix:PATH or tcp:HOST:PORT")]
    Scheme {
        /// What was found.
        scheme: String,
    },
    /// There is no second colon.
    #[error("{text:?} has no port; expected vsock:CID:PORT or tcp:HOST:PORT")]
    NoPort {
        /// What was found.
        text: String,
    },
    /// The context id is not a decimal number.
    #[error("{text:?} is not a vsock context id; expected a decimal number or \"any\"")]
    Cid {
        /// What was found.
        text: String,
    },
    /// The context id cannot be an enclave's.
    #[error("context id {cid} is not an enclave's; those are 4 or more")]
    EnclaveCid {
        /// What was found.
        cid: VsockCid,
    },
    /// The port is not a decimal number in range.
    #[error("{text:?} is not a port; expected a decimal number up to {max}")]
    Port {
        /// What was found.
        text: String,
        /// The largest port of this kind of endpoint.
        max: u32,
    },
    /// The host is neither a name nor an address.
    #[error("{text:?} is not a host name, an IPv4 address or an IPv6 address in [brackets]")]
    Host {
        /// What was found.
        text: String,
    },
    /// The path cannot be a socket address.
    #[error("a socket path of {len} bytes; expected 1 to {MAX_SOCKET_PATH}, without NUL")]
    Path {
        /// Length in bytes.
        len: usize,
    },
}

/// In an endpoint the brackets are required: `tcp:::1:80` could be read in two ways.
fn parse_bracketed(host: &str) -> Result<TcpHost, ParseEndpointError> {
    if host.contains(':') && !host.starts_with('[') {
        return Err(ParseEndpointError::Host { text: shorten(host) });
    }
    host.parse()
}

fn parse_tcp_port(text: &str) -> Result<u16, ParseEndpointError> {
    parse_decimal(text)
        .and_then(|port| u16::try_from(port).ok())
        .ok_or_else(|| ParseEndpointError::Port { text: shorten(text), max: u16::MAX.into() })
}

/// Digits only, no sign, no blanks, no leading zero: one number has one spelling.
fn parse_decimal(text: &str) -> Option<u32> {
    let canonical = text == "0" || !text.starts_with('0');
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if canonical && digits { text.parse().ok() } else { None }
}

/// Enough of a wrong text to recognise it in an error message.
fn shorten(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn endpoints_have_one_spelling() {
        for text in [
            "vsock:3:3128",
            "vsock:any:9000",
            "vsock:0:0",
            "vsock:4294967294:4294967294",
            "unix:/run/keyferry/nsm.sock",
            "unix:relative.sock",
            "unix:with:colon",
            "tcp:kms.example.com:443",
            "tcp:127.0.0.1:0",
            "tcp:[::1]:8000",
            "tcp:a_b-c.:1",
        ] {
            let endpoint: Endpoint = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(endpoint.to_string(), text);
        }
    }

    #[test]
    fn wrong_endpoints_say_what_is_wrong() {
        let long = format!("unix:{}", "x".repeat(108));
        for (text, expected) in [
            ("", "\"\" is not vsock:CID:PORT, unix:PATH or tcp:HOST:PORT"),
            ("3:3128", "\"3\" is not vsock:CID:PORT, unix:PATH or tcp:HOST:PORT"),
            ("VSOCK:3:1", "\"VSOCK\" is not vsock:CID:PORT, unix:PATH or tcp:HOST:PORT"),
            ("vsock:3", "\"vsock:3\" has no port; expected vsock:CID:PORT or tcp:HOST:PORT"),
            ("vsock::1", "\"\" is not a vsock context id; expected a decimal number or \"any\""),
            (
                "vsock:4294967295:1",
                "\"4294967295\" is not a vsock context id; expected a decimal number or \"any\"",
            ),
            ("vsock:03:1", "\"03\" is not a vsock context id; expected a decimal number or \"any\""),
            ("vsock:3:-1", "\"-1\" is not a port; expected a decimal number up to 4294967294"),
            (
                "vsock:3:4294967295",
                "\"4294967295\" is not a port; expected a decimal number up to 4294967294",
            ),
            ("vsock:3:1:2", "\"1:2\" is not a port; expected a decimal number up to 4294967294"),
            ("unix:", "a socket path of 0 bytes; expected 1 to 107, without NUL"),
            (&long, "a socket path of 108 bytes; expected 1 to 107, without NUL"),
            ("tcp:host", "\"tcp:host\" has no port; expected vsock:CID:PORT or tcp:HOST:PORT"),
            ("tcp:host:65536", "\"65536\" is not a port; expected a decimal number up to 65535"),
            ("tcp:host:+1", "\"+1\" is not a port; expected a decimal number up to 65535"),
            ("tcp:::1:80", "\"::1\" is not a host name, an IPv4 address or an IPv6 address in [brackets]"),
            (
                "tcp:[host]:80",
                "\"[host]\" is not a host name, an IPv4 address or an IPv6 address in [brackets]",
            ),
            (
                "tcp:user@host:80",
                "\"user@host\" is not a host name, an IPv4 address or an IPv6 address in [brackets]",
            ),
            ("tcp::80", "\"\" is not a host name, an IPv4 address or an IPv6 address in [brackets]"),
        ] {
            let error = text.parse::<Endpoint>().expect_err(text);
            assert_eq!(error.to_string(), expected, "for {text:?}");
        }
    }

    #[test]
    fn an_enclave_has_no_reserved_cid() {
        for cid in ["0", "1", "2", "3", "any"] {
            assert!(cid.parse::<EnclaveCid>().is_err(), "{cid} taken for an enclave");
        }
        assert_eq!("16".parse::<EnclaveCid>().map(EnclaveCid::get), Ok(16));
    }

    proptest! {
        #[test]
        fn any_text_parses_to_its_own_spelling_or_not_at_all(text in "(vsock|unix|tcp):[0-9a-z:\\[\\]./-]{0,20}") {
            if let Ok(endpoint) = text.parse::<Endpoint>() {
                prop_assert_eq!(endpoint.to_string().parse::<Endpoint>(), Ok(endpoint));
            }
        }

        #[test]
        fn vsock_round_trip(cid in 0..u32::MAX, port in 0..u32::MAX) {
            let endpoint = Endpoint::vsock(VsockCid::new(cid), VsockPort::new(port));
            prop_assert_eq!(endpoint.to_string().parse::<Endpoint>(), Ok(endpoint));
        }
    }
}
