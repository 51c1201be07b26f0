//! HTTP `CONNECT` (RFC 9110 §9.3.6), the client's side: a tunnel to a host through a proxy, on any stream.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::timeout;

use crate::TcpHost;

/// Largest response head taken from a proxy, interim responses included.
pub const MAX_HEAD: usize = 8 * 1024;
/// Most header lines in one head.
const MAX_HEADERS: usize = 64;
/// Most characters of a proxy's reason phrase that reach an error message.
const MAX_REASON: usize = 80;

/// Where the tunnel is to end, and what the proxy wants to see for it.
#[derive(Clone)]
pub struct ConnectTarget {
    host: TcpHost,
    port: u16,
    authorization: Option<String>,
}

impl ConnectTarget {
    /// A tunnel to this host and port.
    pub fn new(host: TcpHost, port: u16) -> Self {
        Self { host, port, authorization: None }
    }

    /// Sends this value as `Proxy-Authorization`.
    ///
    /// # Errors
    /// [`Error::Authorization`] when the value holds anything but visible ASCII and blanks.
    pub fn with_authorization(mut self, value: String) -> Result<Self, Error> {
        if value.is_empty() || !value.bytes().all(|b| b == b' ' || b.is_ascii_graphic()) {
            return Err(Error::Authorization);
        }
        self.authorization = Some(value);
        Ok(self)
    }

    fn encode(&self) -> String {
        let Self { host, port, authorization } = self;
        let mut head = format!("CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n");
        if let Some(value) = authorization {
            head.push_str("Proxy-Authorization: ");
            head.push_str(value);
            head.push_str("\r\n");
        }
        head.push_str("\r\n");
        head
    }
}

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The proxy answered with another status than 2xx.
    #[error("the proxy answered {status}{}", reason_suffix(.reason))]
    Status {
        /// The status code.
        status: u16,
        /// The reason phrase, printable characters only, shortened.
        reason: String,
    },
    /// What the proxy sent is not an HTTP/1 response head.
    #[error("the proxy's answer is not HTTP")]
    NotHttp,
    /// The head is too large.
    #[error("the proxy's response head is larger than {MAX_HEAD} bytes or {MAX_HEADERS} lines")]
    HeadTooLarge,
    /// The proxy closed the connection before its head was complete.
    #[error("the proxy closed the connection after {received} bytes of its answer")]
    Closed {
        /// Bytes received.
        received: usize,
    },
    /// The proxy did not answer in time.
    #[error("no answer from the proxy within {after:?}")]
    TimedOut {
        /// The deadline that passed.
        after: Duration,
    },
    /// The value for `Proxy-Authorization` would break the request.
    #[error("the proxy authorisation holds characters that a header cannot carry")]
    Authorization,
    /// The connection to the proxy failed.
    #[error("connection to the proxy")]
    Io(#[from] io::Error),
}

impl Error {
    /// Whether the same request may succeed a moment later: the proxy could not reach the target, is overloaded, or
    /// the connection to it broke. A 403 or a 407 is final.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Status { status, .. } => matches!(status, 429 | 502 | 503 | 504),
            Self::Closed { .. } | Self::TimedOut { .. } | Self::Io(_) => true,
            Self::NotHttp | Self::HeadTooLarge | Self::Authorization => false,
        }
    }
}

/// Asks the proxy at the other end of `proxy` for a tunnel, with `deadline` for its whole answer. Not cancel safe: a
/// dropped future closes the connection to the proxy.
///
/// Bytes that came with the head belong to the tunnel and are the first the result yields.
///
/// # Errors
/// See [`Error`].
pub async fn connect_through<S>(
    mut proxy: S,
    target: &ConnectTarget,
    deadline: Duration,
) -> Result<Prefixed<S>, Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let answered = timeout(deadline, async {
        proxy.write_all(target.encode().as_bytes()).await?;
        proxy.flush().await?;
        read_head(&mut proxy).await
    });
    let rest = answered.await.map_err(|_elapsed| Error::TimedOut { after: deadline })??;
    Ok(Prefixed { prefix: rest, inner: proxy })
}

/// Reads until the final head is complete; returns what came after it.
async fn read_head<S: AsyncRead + Unpin>(proxy: &mut S) -> Result<Vec<u8>, Error> {
    let mut head = Vec::with_capacity(1024);
    let mut received = 0;
    loop {
        while let Some((status, len)) = parse_head(&head)? {
            head.drain(..len);
            match status {
                Status { code: 200..=299, .. } => return Ok(head),
                // An interim response precedes the final one (RFC 9110 §15.2); 101 would be another protocol.
                Status { code: 100 | 102..=199, .. } => {}
                Status { code, reason } => return Err(Error::Status { status: code, reason }),
            }
        }
        let left = MAX_HEAD - received;
        if left == 0 {
            return Err(Error::HeadTooLarge);
        }
        let left = u64::try_from(left).unwrap_or(u64::MAX);
        match (&mut *proxy).take(left).read_buf(&mut head).await? {
            0 => return Err(Error::Closed { received }),
            n => received += n,
        }
    }
}

struct Status {
    code: u16,
    reason: String,
}

/// Status and length of the head at the start of `bytes`; `None` while it is incomplete.
fn parse_head(bytes: &[u8]) -> Result<Option<(Status, usize)>, Error> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    match response.parse(bytes) {
        Ok(httparse::Status::Partial) => Ok(None),
        Ok(httparse::Status::Complete(len)) => {
            let code = response.code.ok_or(Error::NotHttp)?;
            let reason = response.reason.unwrap_or_default();
            let reason =
                reason.chars().filter(|c| c.is_ascii_graphic() || *c == ' ').take(MAX_REASON).collect();
            Ok(Some((Status { code, reason }, len)))
        }
        Err(httparse::Error::TooManyHeaders) => Err(Error::HeadTooLarge),
        Err(_) => Err(Error::NotHttp),
    }
}

fn reason_suffix(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(" ({reason})") }
}

/// A stream whose first bytes have been read already.
#[derive(Debug)]
pub struct Prefixed<S> {
    prefix: Vec<u8>,
    inner: S,
}

impl<S> Prefixed<S> {
    /// A stream that yields `prefix` before what `inner` yields.
    pub fn new(prefix: Vec<u8>, inner: S) -> Self {
        Self { prefix, inner }
    }

    /// The bytes not yet read again, and the stream.
    pub fn into_parts(self) -> (Vec<u8>, S) {
        (self.prefix, self.inner)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.prefix.is_empty() || buf.remaining() == 0 {
            return Pin::new(&mut this.inner).poll_read(cx, buf);
        }
        let n = this.prefix.len().min(buf.remaining());
        buf.put_slice(&this.prefix[..n]);
        this.prefix.drain(..n);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefixed<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(30);

    fn target() -> ConnectTarget {
        ConnectTarget::new("kms.example.com".parse().unwrap(), 8000)
    }

    /// A proxy that reads one request head, then writes `answer` in pieces of `piece` bytes and closes.
    async fn against(answer: &[u8], piece: usize) -> Result<Vec<u8>, Error> {
        let (ours, mut theirs) = duplex(64 * 1024);
        let proxy = async move {
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                request.push(theirs.read_u8().await.unwrap());
            }
            for part in answer.chunks(piece) {
                if theirs.write_all(part).await.is_err() {
                    break;
                }
            }
            request
        };
        let target = target();
        let (request, tunnel) = tokio::join!(proxy, connect_through(ours, &target, DEADLINE));
        let expected = "CONNECT kms.example.com:8000 HTTP/1.1\r\nHost: kms.example.com:8000\r\n\r\n";
        assert_eq!(String::from_utf8(request).unwrap(), expected);
        let mut all = Vec::new();
        tunnel?.read_to_end(&mut all).await.unwrap();
        Ok(all)
    }

    #[tokio::test]
    async fn bytes_after_the_head_belong_to_the_tunnel() {
        let answer = b"HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\nfirst bytes";
        for piece in [1, 7, 48, answer.len()] {
            assert_eq!(against(answer, piece).await.unwrap(), b"first bytes", "pieces of {piece}");
        }
    }

    #[tokio::test]
    async fn interim_responses_are_passed_over() {
        let answer = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 204 \r\n\r\nx";
        assert_eq!(against(answer, 1024).await.unwrap(), b"x");
        let switching = against(b"HTTP/1.1 101 Switching\r\n\r\n", 1024).await.unwrap_err();
        assert!(matches!(switching, Error::Status { status: 101, .. }));
    }

    #[tokio::test]
    async fn a_refusal_names_its_status_and_reason() {
        let denied = against(b"HTTP/1.1 403 Filtered\x07\x1b[31m\r\n\r\nbody", 9).await;
        assert!(matches!(denied, Err(Error::NotHttp)), "control characters are not HTTP");
        let denied = against(b"HTTP/1.1 403 Filtered \xf0\x9f\x92\xa9 here\r\n\r\nbody", 9).await;
        assert!(denied.is_err());
        let denied = against(b"HTTP/1.1 403 Filtered\r\n\r\nbody", 9).await.unwrap_err();
        assert_eq!(denied.to_string(), "the proxy answered 403 (Filtered)");
        assert!(!denied.is_transient());
        let busy = against(b"HTTP/1.1 503\r\n\r\n", 9).await.unwrap_err();
        assert_eq!(busy.to_string(), "the proxy answered 503");
        assert!(busy.is_transient());
    }

    #[tokio::test]
    async fn a_long_reason_is_cut() {
        let answer = format!("HTTP/1.1 502 {}\r\n\r\n", "r".repeat(4000));
        let error = against(answer.as_bytes(), 4096).await.unwrap_err();
        assert!(error.to_string().len() < 120, "{error}");
    }

    #[tokio::test]
    async fn every_truncation_is_rejected() {
        let head = b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n";
        for len in 0..head.len() {
            let error = against(&head[..len], 4).await.expect_err("accepted half a head");
            assert!(matches!(error, Error::Closed { received } if received == len), "{len}: {error}");
        }
    }

    #[tokio::test]
    async fn an_endless_head_ends_at_the_limit() {
        let mut many = b"HTTP/1.1 200 OK\r\n".to_vec();
        many.extend(b"A: b\r\n".repeat(65));
        assert!(matches!(against(&many, 64).await, Err(Error::HeadTooLarge)));
        let mut long = b"HTTP/1.1 200 OK\r\nA: ".to_vec();
        long.resize(MAX_HEAD + 100, b'x');
        assert!(matches!(against(&long, 64).await, Err(Error::HeadTooLarge)));
        let interim = b"HTTP/1.1 100 Continue\r\n\r\n".repeat(1000);
        assert!(matches!(against(&interim, 64).await, Err(Error::HeadTooLarge)));
    }

    #[tokio::test]
    async fn what_is_not_http_is_refused() {
        for answer in [&b"SSH-2.0-OpenSSH\r\n\r\n"[..], b"\0\0\0\x01", b"HTTP/2 200\r\n\r\n"] {
            assert!(matches!(against(answer, 100).await, Err(Error::NotHttp)), "{answer:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_proxy_meets_the_deadline() {
        let (ours, _theirs) = duplex(1024);
        let error = connect_through(ours, &target(), DEADLINE).await.unwrap_err();
        assert!(matches!(error, Error::TimedOut { after: DEADLINE }), "{error}");
    }

    #[test]
    fn authorization_cannot_smuggle_a_header() {
        assert!(target().with_authorization("Basic eDp5\r\nX: y".into()).is_err());
        assert!(target().with_authorization(String::new()).is_err());
        let request = target().with_authorization("Basic eDp5".into()).unwrap().encode();
        assert!(request.ends_with("\r\nProxy-Authorization: Basic eDp5\r\n\r\n"));
    }

    #[test]
    fn an_ipv6_target_is_written_in_brackets() {
        let request = ConnectTarget::new("::1".parse().unwrap(), 443).encode();
        assert!(request.starts_with("CONNECT [::1]:443 HTTP/1.1\r\nHost: [::1]:443\r\n"));
    }
}
