//! The head of a request, read strictly: what two programs could read differently is an error.
//!
//! The parser is a function from the bytes so far to "more", a [`Head`], or an error. Bytes behind the head belong to
//! the tunnel; [`Head::len`] says where they start.

use crate::policy::target::{Host, Target, TargetError};

/// Most header lines in a head.
const MAX_LINES: usize = 64;
/// Longest method that is not obviously something else than HTTP.
const MAX_METHOD: usize = 16;

/// What a head asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// `CONNECT host:port`.
    Connect(Target),
    /// Another method with `http://host:port/...`: plain HTTP through a proxy.
    Absolute(Target),
    /// Another method with `/...`: not a proxy request. The path up to a `?`.
    Origin {
        /// The method.
        method: String,
        /// The path.
        path: String,
    },
}

/// A complete head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// What it asks for.
    pub request: Request,
    /// Length in bytes, with the empty line.
    pub len: usize,
}

/// Why bytes are not a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// No end of the head within the limit.
    #[error("the request head is larger than {max} bytes")]
    TooLarge {
        /// The limit.
        max: usize,
    },
    /// More header lines than anybody needs.
    #[error("the request head has more than {MAX_LINES} header lines")]
    TooManyLines,
    /// The first bytes are no HTTP method.
    #[error("the first bytes are not an HTTP request")]
    NotHttp,
    /// The request line is not `METHOD SP TARGET SP HTTP/1.x`.
    #[error("the request line is not METHOD TARGET HTTP/1.x with single spaces")]
    RequestLine,
    /// A version other than 1.0 and 1.1.
    #[error("the HTTP version is not 1.0 or 1.1")]
    Version,
    /// A control character, a bare CR or a bare LF.
    #[error("a control character or a line that does not end in CR LF")]
    Control,
    /// A header line without a plain name, with a blank before the colon, or folded.
    #[error("a header line that is not NAME: VALUE (folded lines are obsolete)")]
    HeaderLine,
    /// Two `Host` headers.
    #[error("more than one Host header")]
    TwoHosts,
    /// The `Host` header names another host or port.
    #[error("the Host header differs from the request's target")]
    HostDiffers,
    /// `Content-Length` or `Transfer-Encoding`.
    #[error("a CONNECT with a Content-Length or Transfer-Encoding")]
    Body,
    /// The target cannot be read.
    #[error("the target is refused")]
    Target(#[from] TargetError),
}

impl HeadError {
    /// Stable name for logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::TooLarge { .. } => "head-too-large",
            Self::TooManyLines => "head-too-many-lines",
            Self::NotHttp => "not-http",
            Self::RequestLine => "bad-request-line",
            Self::Version => "bad-http-version",
            Self::Control => "control-character",
            Self::HeaderLine => "bad-header-line",
            Self::TwoHosts => "two-host-headers",
            Self::HostDiffers => "host-differs",
            Self::Body => "connect-with-body",
            Self::Target(error) => error.name(),
        }
    }

    /// The status that answers it.
    pub fn status(self) -> u16 {
        match self {
            Self::TooLarge { .. } | Self::TooManyLines => 431,
            Self::Version => 505,
            _ => 400,
        }
    }
}

/// Reads a head from the bytes received so far; `None` when it is not complete yet.
///
/// # Errors
/// [`HeadError`], as soon as the bytes so far cannot become a head of at most `max` bytes.
pub fn parse(bytes: &[u8], max: usize) -> Result<Option<Head>, HeadError> {
    let Some(len) = find_end(bytes) else {
        check_start(bytes)?;
        return if bytes.len() >= max { Err(HeadError::TooLarge { max }) } else { Ok(None) };
    };
    if len > max {
        return Err(HeadError::TooLarge { max });
    }
    check_start(bytes)?;
    // Without the empty line; every line but the last keeps its CR LF.
    let text = &bytes[..len - 4];
    let mut lines = Lines { rest: Some(text) };
    let request_line = lines.next().transpose()?.ok_or(HeadError::RequestLine)?;
    let (method, target) = split_request_line(request_line)?;
    let fields = Fields::read(lines)?;
    let request = read_target(method, target, &fields)?;
    Ok(Some(Head { request, len }))
}

/// The end of the head: behind the first CR LF CR LF.
fn find_end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|four| four == b"\r\n\r\n").map(|at| at + 4)
}

/// A method is upper-case letters; a TLS record, a PROXY header or a line end is told from it by the first bytes.
fn check_start(bytes: &[u8]) -> Result<(), HeadError> {
    let word = bytes.iter().take_while(|b| b.is_ascii_uppercase()).count();
    match bytes.get(word) {
        _ if word > MAX_METHOD => Err(HeadError::NotHttp),
        Some(b' ') if word > 0 => Ok(()),
        Some(_) => Err(HeadError::NotHttp),
        None => Ok(()),
    }
}

/// Lines that end in CR LF and hold no control character.
struct Lines<'a> {
    rest: Option<&'a [u8]>,
}

impl<'a> Iterator for Lines<'a> {
    type Item = Result<&'a [u8], HeadError>;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = self.rest?;
        let end = rest.iter().position(|b| (*b < b' ' && *b != b'\t') || *b == 0x7f);
        let (line, rest) = match end {
            None => (rest, None),
            Some(at) if rest[at..].starts_with(b"\r\n") => (&rest[..at], Some(&rest[at + 2..])),
            Some(_) => {
                self.rest = None;
                return Some(Err(HeadError::Control));
            }
        };
        self.rest = rest;
        Some(Ok(line))
    }
}

fn split_request_line(line: &[u8]) -> Result<(&str, &[u8]), HeadError> {
    let mut words = line.split(|b| *b == b' ');
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(HeadError::RequestLine);
    };
    if target.is_empty() || target.contains(&b'\t') {
        return Err(HeadError::RequestLine);
    }
    let known = match version {
        b"HTTP/1.1" | b"HTTP/1.0" => Ok(()),
        other if other.starts_with(b"HTTP/") => Err(HeadError::Version),
        _ => Err(HeadError::RequestLine),
    };
    known?;
    let method = std::str::from_utf8(method).map_err(|_| HeadError::NotHttp)?;
    Ok((method, target))
}

/// The header fields that matter for a proxy's decision.
struct Fields<'a> {
    host: Option<&'a [u8]>,
    has_body: bool,
}

impl<'a> Fields<'a> {
    fn read(lines: Lines<'a>) -> Result<Self, HeadError> {
        let mut fields = Self { host: None, has_body: false };
        for (at, line) in lines.enumerate() {
            if at >= MAX_LINES {
                return Err(HeadError::TooManyLines);
            }
            let (name, value) = split_field(line?)?;
            if name.eq_ignore_ascii_case(b"host") && fields.host.replace(value).is_some() {
                return Err(HeadError::TwoHosts);
            }
            fields.has_body |= name.eq_ignore_ascii_case(b"content-length")
                || name.eq_ignore_ascii_case(b"transfer-encoding");
        }
        Ok(fields)
    }
}

fn split_field(line: &[u8]) -> Result<(&[u8], &[u8]), HeadError> {
    let colon = line.iter().position(|b| *b == b':').ok_or(HeadError::HeaderLine)?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    // A name is a token (RFC 9110 §5.6.2); a blank in front is a folded line, one behind is how requests are smuggled.
    let token = |b: &u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(b);
    if name.is_empty() || !name.iter().all(token) {
        return Err(HeadError::HeaderLine);
    }
    Ok((name, value.trim_ascii()))
}

fn read_target(method: &str, target: &[u8], fields: &Fields<'_>) -> Result<Request, HeadError> {
    let text = std::str::from_utf8(target).map_err(|_| TargetError::NotAscii)?;
    if method == "CONNECT" {
        if fields.has_body {
            return Err(HeadError::Body);
        }
        let target: Target = text.parse()?;
        check_host(fields, &target, target.port)?;
        return Ok(Request::Connect(target));
    }
    if text.starts_with('/') || text == "*" {
        let path = text.split('?').next().unwrap_or_default();
        return Ok(Request::Origin { method: method.to_owned(), path: path.to_owned() });
    }
    let authority = text.strip_prefix("http://").ok_or(HeadError::RequestLine)?;
    let authority = authority.split(['/', '?']).next().unwrap_or_default();
    let target = with_default_port(authority, 80)?;
    check_host(fields, &target, 80)?;
    Ok(Request::Absolute(target))
}

/// The `Host` header, when there is one, must name the target; without a port it stands for `default_port`.
fn check_host(fields: &Fields<'_>, target: &Target, default_port: u16) -> Result<(), HeadError> {
    let Some(host) = fields.host else { return Ok(()) };
    let same = std::str::from_utf8(host)
        .ok()
        .and_then(|text| with_default_port(text, default_port).ok())
        .is_some_and(|named| named == *target);
    if same { Ok(()) } else { Err(HeadError::HostDiffers) }
}

fn with_default_port(authority: &str, default: u16) -> Result<Target, TargetError> {
    match authority.parse::<Target>() {
        Err(TargetError::NoPort) => Ok(Target { host: authority.parse::<Host>()?, port: default }),
        // The colon of an address in brackets is not the port's.
        Err(_) if authority.starts_with('[') && authority.ends_with(']') => {
            Ok(Target { host: authority.parse::<Host>()?, port: default })
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAX: usize = 8192;

    fn connect(target: &str) -> Request {
        Request::Connect(target.parse().unwrap())
    }

    #[test]
    fn a_head_ends_where_the_tunnel_begins() {
        let bytes = b"CONNECT kms.example.com:12001 HTTP/1.1\r\nHost: kms.example.com:12001\r\n\r\n\x16\x03\x01\r\n\r\n";
        let head = parse(bytes, MAX).unwrap().unwrap();
        assert_eq!(head.request, connect("kms.example.com:12001"));
        assert_eq!(&bytes[head.len..], b"\x16\x03\x01\r\n\r\n");
    }

    #[test]
    fn heads_that_real_clients_send() {
        for head in [
            "CONNECT h.example:443 HTTP/1.1\r\n\r\n",
            "CONNECT h.example:443 HTTP/1.0\r\n\r\n",
            "CONNECT h.example:443 HTTP/1.1\r\nHost: h.example:443\r\nUser-Agent: curl/8.5.0\r\nProxy-Connection: Keep-Alive\r\n\r\n",
            "CONNECT h.example:443 HTTP/1.1\r\nhost:h.example:443\r\n\r\n",
            "CONNECT h.example:443 HTTP/1.1\r\nHOST: H.EXAMPLE.\r\nX-Empty:\r\n\r\n",
            "CONNECT H.Example:443 HTTP/1.1\r\nHost:\t h.example:443 \t\r\nX-Obs: caf\u{e9}\r\n\r\n",
        ] {
            let parsed = parse(head.as_bytes(), MAX);
            assert_eq!(
                parsed,
                Ok(Some(Head { request: connect("h.example:443"), len: head.len() })),
                "{head:?}"
            );
        }
        let head = b"CONNECT [2001:db8::1]:443 HTTP/1.1\r\nHost: [2001:db8::1]\r\n\r\n";
        assert_eq!(parse(head, MAX).unwrap().unwrap().request, connect("[2001:db8::1]:443"));
    }

    #[test]
    fn heads_that_two_programs_could_read_differently_are_refused() {
        use HeadError::*;
        let ok = "CONNECT h.example:443 HTTP/1.1";
        let cases: Vec<(String, HeadError)> = vec![
            (format!("{ok}\r\nHost: h.example:443\r\nHost: h.example:443\r\n\r\n"), TwoHosts),
            (format!("{ok}\r\nHost: evil.example:443\r\n\r\n"), HostDiffers),
            (format!("{ok}\r\nHost: h.example:444\r\n\r\n"), HostDiffers),
            (format!("{ok}\r\nHost:\r\n\r\n"), HostDiffers),
            (format!("{ok}\r\nContent-Length: 0\r\n\r\n"), Body),
            (format!("{ok}\r\nTransfer-Encoding: chunked\r\n\r\n"), Body),
            (format!("{ok}\r\nX: a\r\n folded\r\n\r\n"), HeaderLine),
            (format!("{ok}\r\nX: a\r\n\tfolded: b\r\n\r\n"), HeaderLine),
            (format!("{ok}\r\nHost : h.example:443\r\n\r\n"), HeaderLine),
            (format!("{ok}\r\n: x\r\n\r\n"), HeaderLine),
            (format!("{ok}\r\nno colon\r\n\r\n"), HeaderLine),
            (format!("{ok}\r\nX: a\nHost: evil.example:443\r\n\r\n"), Control),
            (format!("{ok}\r\nX: a\rb\r\n\r\n"), Control),
            (format!("{ok}\r\nX: a\0b\r\n\r\n"), Control),
            (format!("{ok}\nHost: h.example:443\r\n\r\n"), Control),
            ("CONNECT  h.example:443 HTTP/1.1\r\n\r\n".into(), RequestLine),
            ("CONNECT h.example:443  HTTP/1.1\r\n\r\n".into(), RequestLine),
            ("CONNECT h.example:443\tHTTP/1.1\r\n\r\n".into(), RequestLine),
            ("CONNECT h.example:443 HTTP/1.1 x\r\n\r\n".into(), RequestLine),
            ("CONNECT h.example:443\r\n\r\n".into(), RequestLine),
            ("CONNECT h.example:443 HTTP/2.0\r\n\r\n".into(), Version),
            ("CONNECT h.example:443 ICY/1.1\r\n\r\n".into(), RequestLine),
            (" CONNECT h.example:443 HTTP/1.1\r\n\r\n".into(), NotHttp),
            ("\r\nCONNECT h.example:443 HTTP/1.1\r\n\r\n".into(), NotHttp),
            ("connect h.example:443 HTTP/1.1\r\n\r\n".into(), NotHttp),
            ("\x16\x03\x01\x02\r\n\r\n".into(), NotHttp),
            ("PROXY\r\n\r\n".into(), NotHttp),
            ("CONNECT http://h.example:443/ HTTP/1.1\r\n\r\n".into(), Target(TargetError::Colons)),
            ("CONNECT h.example:443/ HTTP/1.1\r\n\r\n".into(), Target(TargetError::Port)),
            ("CONNECT u@h.example:443 HTTP/1.1\r\n\r\n".into(), Target(TargetError::UserInfo)),
            ("CONNECT h.example HTTP/1.1\r\n\r\n".into(), Target(TargetError::NoPort)),
            ("GET ftp://h.example/ HTTP/1.1\r\n\r\n".into(), RequestLine),
            ("GET http://u@h.example/ HTTP/1.1\r\n\r\n".into(), Target(TargetError::UserInfo)),
            ("GET http://h.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n".into(), HostDiffers),
        ];
        for (head, error) in cases {
            assert_eq!(parse(head.as_bytes(), MAX), Err(error), "{head:?}");
        }
    }

    #[test]
    fn a_head_without_end_stops_at_the_limit() {
        let mut bytes = b"CONNECT h.example:443 HTTP/1.1\r\nX: ".to_vec();
        bytes.resize(MAX - 1, b'a');
        assert_eq!(parse(&bytes, MAX), Ok(None));
        bytes.push(b'a');
        assert_eq!(parse(&bytes, MAX), Err(HeadError::TooLarge { max: MAX }));
        let lines = "X: y\r\n".repeat(MAX_LINES + 1);
        let head = format!("CONNECT h.example:443 HTTP/1.1\r\n{lines}\r\n");
        assert_eq!(parse(head.as_bytes(), MAX), Err(HeadError::TooManyLines));
    }

    #[test]
    fn every_truncation_waits_for_more() {
        let whole = b"CONNECT kms.example.com:12001 HTTP/1.1\r\nHost: kms.example.com:12001\r\n\r\n";
        for len in 0..whole.len() {
            assert_eq!(parse(&whole[..len], MAX), Ok(None), "a prefix of {len} bytes");
        }
    }

    #[test]
    fn other_requests_are_told_apart() {
        let request = |head: &str| parse(head.as_bytes(), MAX).unwrap().unwrap().request;
        let absolute = request("GET http://h.example/a?b HTTP/1.1\r\nHost: h.example\r\n\r\n");
        assert_eq!(absolute, Request::Absolute("h.example:80".parse().unwrap()));
        let origin = request("GET /metrics?x HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert_eq!(origin, Request::Origin { method: "GET".into(), path: "/metrics".into() });
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            drop(parse(&bytes, 512));
        }

        #[test]
        fn later_bytes_change_nothing(extra in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut bytes = b"CONNECT h.example:443 HTTP/1.1\r\n\r\n".to_vec();
            let len = bytes.len();
            bytes.extend(extra);
            prop_assert_eq!(parse(&bytes, MAX), Ok(Some(Head { request: connect("h.example:443"), len })));
        }
    }
}
