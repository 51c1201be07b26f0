//! One HTTP/1.1 connection to a KMS and the calls on it. Everything the peer sends has a limit and a deadline.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{ACCEPT, HOST, RETRY_AFTER};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use kms_protocol::wire::{ErrorBody, Method};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use zeroize::{Zeroize, Zeroizing};

use crate::KmsUrl;

/// Largest answer taken: keys and three certificates are about 3 KiB, evidence in `GetMeta` adds some tens.
const MAX_BODY: usize = 1024 * 1024;
/// Largest body of an error that is read for its reason.
const MAX_ERROR_BODY: usize = 16 * 1024;
/// Largest head of an answer; hyper's smallest limit is 8 KiB.
const MAX_HEAD: usize = 16 * 1024;
/// Most header lines of an answer.
const MAX_HEADERS: usize = 64;
/// Most characters of the KMS's reason that are shown.
const MAX_REASON: usize = 400;
/// The longest `Retry-After` that is believed.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(3600);

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HttpError {
    /// The connection broke, or the answer is not HTTP/1.
    #[error("{method}: exchange failed")]
    Exchange {
        /// The method called.
        method: &'static str,
        /// What hyper makes of it.
        source: hyper::Error,
    },
    /// No whole answer in time.
    #[error("{method}: no answer within {after:?}")]
    TimedOut {
        /// The method called.
        method: &'static str,
        /// The deadline that passed.
        after: Duration,
    },
    /// The answer is too large.
    #[error("{method}: answer is larger than {max} bytes")]
    TooLarge {
        /// The method called.
        method: &'static str,
        /// The limit.
        max: usize,
    },
    /// The KMS said no, and why.
    #[error("{method}: the KMS refused: {reason}")]
    Refused {
        /// The method called.
        method: &'static str,
        /// Its status.
        status: u16,
        /// The KMS's words, printable characters only, shortened.
        reason: String,
    },
    /// 503: try again later.
    #[error("{method}: the KMS cannot answer now: {reason}")]
    Busy {
        /// The method called.
        method: &'static str,
        /// The KMS's words, or those of a proxy before it, printable characters only, shortened.
        reason: String,
        /// Its `Retry-After`, in seconds from now.
        retry_after: Option<Duration>,
    },
    /// Another status than a KMS gives; redirects are not followed.
    #[error("{method}: answered with status {status}, which no KMS gives")]
    Status {
        /// The method called.
        method: &'static str,
        /// The status.
        status: u16,
    },
}

impl HttpError {
    /// hyper's finding that the peer does not speak HTTP/1, as opposed to a connection that broke.
    pub(crate) fn is_not_http(&self) -> bool {
        matches!(self, Self::Exchange { source, .. } if source.is_parse())
    }

    /// The KMS's answer to a method it does not have.
    pub(crate) fn is_unknown_method(&self) -> bool {
        matches!(self, Self::Refused { method, reason, .. }
            if reason.strip_prefix("Service not found: ") == Some(*method))
    }
}

/// A connection that calls can be made on, one after the other.
pub(crate) struct KmsConnection {
    sender: SendRequest<Full<Bytes>>,
    driver: JoinHandle<()>,
    url: KmsUrl,
    deadline: Duration,
}

impl KmsConnection {
    /// Takes a stream on which the KMS has been authenticated. `deadline` is for each call.
    pub(crate) async fn new<S>(stream: S, url: KmsUrl, deadline: Duration) -> Result<Self, hyper::Error>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(MAX_HEAD)
            .max_headers(MAX_HEADERS)
            .handshake(TokioIo::new(stream))
            .await?;
        // What goes wrong on the connection comes back from the call; the driver's own result says it twice.
        let driver = tokio::spawn(async move { drop(connection.await) });
        Ok(Self { sender, driver, url, deadline })
    }

    /// Calls a method in JSON and returns the body of its 200. Not cancel safe: a dropped call breaks the connection.
    pub(crate) async fn call(
        &mut self,
        method: Method,
        body: impl Into<Bytes>,
    ) -> Result<Zeroizing<Vec<u8>>, HttpError> {
        let name = method.name();
        let after = self.deadline;
        match timeout(after, self.exchange(name, body.into())).await {
            Ok(result) => result,
            Err(_elapsed) => Err(HttpError::TimedOut { method: name, after }),
        }
    }

    async fn exchange(&mut self, method: &'static str, body: Bytes) -> Result<Zeroizing<Vec<u8>>, HttpError> {
        let failed = |source| HttpError::Exchange { method, source };
        let mut request = Request::post(self.url.method(method));
        if let Some(headers) = request.headers_mut() {
            if let Ok(host) = self.url.authority().parse() {
                headers.insert(HOST, host);
            }
            headers.insert(ACCEPT, hyper::header::HeaderValue::from_static("application/json"));
        }
        // A parsed URL gives a valid path; hyper finds out about anything else.
        let request = request.body(Full::new(body)).unwrap_or_default();
        self.sender.ready().await.map_err(failed)?;
        let response = self.sender.send_request(request).await.map_err(failed)?;
        match response.status() {
            StatusCode::OK => read_body(method, response.into_body(), MAX_BODY).await,
            StatusCode::SERVICE_UNAVAILABLE => {
                let retry_after = retry_after(&response);
                Err(HttpError::Busy { method, reason: reason(method, response).await, retry_after })
            }
            StatusCode::BAD_REQUEST
            | StatusCode::UNAUTHORIZED
            | StatusCode::FORBIDDEN
            | StatusCode::UNPROCESSABLE_ENTITY
            | StatusCode::TOO_MANY_REQUESTS
            | StatusCode::INTERNAL_SERVER_ERROR => {
                let status = response.status().as_u16();
                Err(HttpError::Refused { method, status, reason: reason(method, response).await })
            }
            status => Err(HttpError::Status { method, status: status.as_u16() }),
        }
    }
}

impl Drop for KmsConnection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// Why the KMS did not answer the question.
async fn reason(method: &'static str, response: Response<Incoming>) -> String {
    let status = response.status().as_u16();
    let reason = match read_body(method, response.into_body(), MAX_ERROR_BODY).await {
        Ok(body) => ErrorBody::sniff(&body).map(|text| printable(&text)),
        Err(_unreadable) => None,
    };
    reason.unwrap_or_else(|| format!("status {status}, without a reason"))
}

/// Reads a body of at most `max` bytes into memory that is wiped, together with hyper's own pieces of it where this is
/// their last owner.
async fn read_body(
    method: &'static str,
    mut body: Incoming,
    max: usize,
) -> Result<Zeroizing<Vec<u8>>, HttpError> {
    let announced = body.size_hint().lower();
    if announced > u64::try_from(max).unwrap_or(u64::MAX) {
        return Err(HttpError::TooLarge { method, max });
    }
    let mut all = Zeroizing::new(Vec::with_capacity(usize::try_from(announced).unwrap_or(0).max(4096)));
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|source| HttpError::Exchange { method, source })?;
        let Ok(data) = frame.into_data() else { continue };
        if all.len() + data.len() > max {
            return Err(HttpError::TooLarge { method, max });
        }
        append(&mut all, &data);
        if let Ok(mut data) = data.try_into_mut() {
            data.zeroize();
        }
    }
    Ok(all)
}

/// A growing `Vec` leaves its old buffer behind unwiped; this one does not.
fn append(all: &mut Zeroizing<Vec<u8>>, data: &[u8]) {
    let needed = all.len() + data.len();
    if needed > all.capacity() {
        let mut larger = Zeroizing::new(Vec::with_capacity(needed.max(all.capacity() * 2)));
        larger.extend_from_slice(all);
        *all = larger;
    }
    all.extend_from_slice(data);
}

fn retry_after(response: &Response<Incoming>) -> Option<Duration> {
    // The other form, a date, would need the peer's clock to be right.
    let seconds = response.headers().get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds).min(MAX_RETRY_AFTER))
}

/// What a stranger wrote, made fit for a terminal and a log: one line, no control characters, bounded.
fn printable(text: &str) -> String {
    let clean = |c: char| if c.is_control() || is_invisible(c) { ' ' } else { c };
    let shown: String = text.chars().take(MAX_REASON).map(clean).collect();
    let cut = if text.chars().nth(MAX_REASON).is_some() { " [cut]" } else { "" };
    format!("{}{cut}", shown.trim())
}

/// Marks that change how the rest of a line is displayed.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(30);

    /// A connection whose peer reads one request and writes `answer`, then keeps the connection open.
    async fn connection(answer: &[u8]) -> (KmsConnection, JoinHandle<(Vec<u8>, DuplexStream)>) {
        let (ours, mut theirs) = duplex(4 * 1024 * 1024);
        let answer = answer.to_vec();
        let peer = tokio::spawn(async move {
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\nnull") {
                request.push(theirs.read_u8().await.unwrap());
            }
            theirs.write_all(&answer).await.unwrap();
            (request, theirs)
        });
        let url = "https://kms.example.com:8000/".parse().unwrap();
        (KmsConnection::new(ours, url, DEADLINE).await.unwrap(), peer)
    }

    async fn call(answer: &[u8]) -> Result<Zeroizing<Vec<u8>>, HttpError> {
        let (mut connection, peer) = connection(answer).await;
        let result = connection.call(Method::GetMeta, &b"null"[..]).await;
        let (request, _open) = peer.await.unwrap();
        let request = String::from_utf8(request).unwrap();
        assert_eq!(
            request,
            "POST /prpc/GetMeta?json HTTP/1.1\r\nhost: kms.example.com:8000\r\naccept: application/json\r\n\
             content-length: 4\r\n\r\nnull"
        );
        result
    }

    fn answer(status: &str, headers: &str, body: &str) -> Vec<u8> {
        format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n{headers}\r\n{body}", body.len()).into_bytes()
    }

    #[tokio::test]
    async fn the_body_of_a_200_comes_back() {
        assert_eq!(call(&answer("200 OK", "", "{}")).await.unwrap().as_slice(), b"{}");
        let chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n";
        assert_eq!(call(chunked).await.unwrap().as_slice(), b"{}");
    }

    #[tokio::test]
    async fn a_refusal_carries_the_reason_made_harmless() {
        let body = "{\n  \"error\": \"App not allowed: Boot denied: \\u001b[31mno\\u202e\\nreally\"\n}";
        let error = call(&answer("400 Bad Request", "", body)).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "GetMeta: the KMS refused: App not allowed: Boot denied:  [31mno  really"
        );
        let protobuf = "\n\x05hello";
        let error = call(&answer("400 Bad Request", "", protobuf)).await.unwrap_err();
        assert_eq!(error.to_string(), "GetMeta: the KMS refused: hello");
        let error = call(&answer("403 Forbidden", "", "<html>")).await.unwrap_err();
        assert_eq!(error.to_string(), "GetMeta: the KMS refused: status 403, without a reason");
    }

    #[tokio::test]
    async fn a_long_reason_is_cut_between_characters() {
        let body = format!("{{\"error\":\"{}\"}}", "ü".repeat(3000));
        let error = call(&answer("400 Bad Request", "", &body)).await.unwrap_err().to_string();
        assert!(error.ends_with("üü [cut]") && error.chars().count() < MAX_REASON + 50, "{error}");
    }

    #[tokio::test]
    async fn busy_says_when_to_come_back() {
        for (header, expected) in [
            ("retry-after: 7\r\n", Some(7)),
            ("retry-after: 99999999\r\n", Some(3600)),
            ("retry-after: Wed, 21 Oct 2015 07:28:00 GMT\r\n", None),
            ("", None),
        ] {
            let error = call(&answer("503 Service Unavailable", header, "")).await.unwrap_err();
            let HttpError::Busy { retry_after, .. } = error else { panic!("{error}") };
            assert_eq!(retry_after.map(|it| it.as_secs()), expected, "{header}");
        }
    }

    #[tokio::test]
    async fn busy_says_why_in_the_words_of_the_kms() {
        for (body, expected) in [
            (r#"{"error":"the authorisation API did not answer"}"#, "the authorisation API did not answer"),
            ("<html>", "status 503, without a reason"),
        ] {
            let error = call(&answer("503 Service Unavailable", "", body)).await.unwrap_err();
            assert_eq!(error.to_string(), format!("GetMeta: the KMS cannot answer now: {expected}"));
        }
    }

    #[tokio::test]
    async fn redirects_are_not_followed() {
        for status in ["301 Moved", "302 Found", "307 Temporary Redirect", "404 Not Found", "204 No Content"]
        {
            let error = call(&answer(status, "location: https://evil.example/\r\n", "")).await.unwrap_err();
            assert!(matches!(error, HttpError::Status { .. }), "{status}: {error}");
        }
    }

    #[tokio::test]
    async fn an_endless_answer_ends_at_the_limit() {
        let announced = b"HTTP/1.1 200 OK\r\ncontent-length: 1048577\r\n\r\n";
        assert!(matches!(call(announced).await, Err(HttpError::TooLarge { .. })));
        let mut chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
        for _ in 0..17 {
            chunked.extend(b"10000\r\n");
            chunked.extend(vec![b' '; 0x10000]);
            chunked.extend(b"\r\n");
        }
        assert!(matches!(call(&chunked).await, Err(HttpError::TooLarge { .. })));
    }

    #[tokio::test]
    async fn what_is_not_http_is_told_apart() {
        for wrong in [&b"SSH-2.0-OpenSSH_9.9\r\n\r\n"[..], b"\x15\x03\x01\0\x02\x02\x46"] {
            let error = call(wrong).await.unwrap_err();
            assert!(error.is_not_http(), "{error:?}");
        }
        let mut head = b"HTTP/1.1 200 OK\r\nx: ".to_vec();
        head.resize(MAX_HEAD * 2, b'x');
        assert!(call(&head).await.unwrap_err().is_not_http());
    }

    #[tokio::test(start_paused = true)]
    async fn a_hanging_answer_meets_the_deadline() {
        for start in [
            "",
            "HTTP/1.1 200 OK\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n{",
            "HTTP/1.1 400 X\r\ncontent-length: 9\r\n\r\n",
        ] {
            let error = call(start.as_bytes()).await.unwrap_err();
            assert!(matches!(error, HttpError::TimedOut { after: DEADLINE, .. }), "{start:?}: {error}");
        }
    }

    #[test]
    fn growing_keeps_the_content() {
        let mut all = Zeroizing::new(Vec::with_capacity(2));
        for part in [&b"a"[..], b"bcd", b"", b"efghijk"] {
            append(&mut all, part);
        }
        assert_eq!(all.as_slice(), b"abcdefghijk");
    }
}
