//! Connections of apps: HTTP/1.1, bounded in number, size and time.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method as Verb, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use kms_protocol::wire::guest::GuestMethod;
use kms_protocol::wire::{Encoding, ErrorBody, RequestForm, WireMessage};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use transport::{Listener, Stream};
use zeroize::Zeroizing;

use super::GuestApi;

/// Connections served at a time; more wait in the sockets' queues.
const MAX_CONNECTIONS: usize = 32;
/// Largest request body. All connections together so hold 8 MiB.
const MAX_BODY: usize = 256 * 1024;
/// Largest head of a request, and most header lines.
const MAX_HEAD: usize = 16 * 1024;
const MAX_HEADERS: usize = 64;
/// For the head of a request, which includes the time a connection may lie idle.
const HEAD_DEADLINE: Duration = Duration::from_secs(60);
/// For a whole body.
const BODY_DEADLINE: Duration = Duration::from_secs(10);
/// After this a connection ends with the answer under way, and after [`LAST_ANSWER`] in any case.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(600);
const LAST_ANSWER: Duration = Duration::from_secs(180);
/// Pause after a failed accept: running out of descriptors must not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Room for an answer, so that a buffer with keys in it does not grow and leave a copy behind.
const ANSWER_CAPACITY: usize = 4 << 10;

/// An answer; its buffer is wiped when it has been sent.
type Answer = Response<Full<Bytes>>;

/// A call that ends in an error body. The reader is the app itself, so it gets the whole reason.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) status: StatusCode,
    pub(super) text: String,
}

impl Failure {
    /// 400: the request is wrong.
    pub(super) fn bad(text: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, text: text.into() }
    }

    /// 409: the enclave's state does not allow it any more.
    pub(super) fn conflict(text: impl Into<String>) -> Self {
        Self { status: StatusCode::CONFLICT, text: text.into() }
    }

    /// 502: the KMS or the module failed.
    pub(super) fn upstream(error: &(dyn std::error::Error + 'static)) -> Self {
        Self { status: StatusCode::BAD_GATEWAY, text: command_line::chain(error) }
    }

    /// 500: something here failed that should not.
    pub(super) fn internal(error: &(dyn std::error::Error + 'static)) -> Self {
        Self { status: StatusCode::INTERNAL_SERVER_ERROR, text: command_line::chain(error) }
    }
}

/// Where the request message is.
pub(super) struct Message<'a> {
    form: RequestForm,
    query: &'a str,
    body: &'a [u8],
}

impl Message<'_> {
    pub(super) fn decode<M: WireMessage>(&self) -> Result<M, Failure> {
        let decoded = match self.form {
            RequestForm::Query => M::decode_query(self.query),
            RequestForm::Body(encoding) => M::decode_body(encoding, self.body),
        };
        decoded.map_err(|error| Failure::bad(command_line::chain(&error)))
    }

    /// Encodes an answer into a buffer that is wiped, and large enough not to be moved while it holds a key.
    pub(super) fn encode<M: WireMessage>(&self, message: &M) -> Zeroizing<Vec<u8>> {
        let mut bytes = Zeroizing::new(Vec::with_capacity(ANSWER_CAPACITY));
        let written = match self.form.response() {
            Encoding::Json => serde_json::to_writer(&mut *bytes, message).is_ok(),
            Encoding::Protobuf => message.encode(&mut *bytes).is_ok(),
        };
        debug_assert!(written, "messages always encode, and a vector has room");
        bytes
    }

    pub(super) fn empty(&self) -> Zeroizing<Vec<u8>> {
        Zeroizing::new(kms_protocol::wire::empty_body(self.form.response()).to_vec())
    }
}

pub(super) async fn serve(listeners: Vec<Listener>, api: Arc<GuestApi>) -> Infallible {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut sockets = JoinSet::new();
    for listener in listeners {
        sockets.spawn(accept(listener, Arc::clone(&api), Arc::clone(&slots)));
    }
    // They never end; dropping the set ends them.
    while let Some(_ended) = sockets.join_next().await {}
    std::future::pending().await
}

async fn accept(listener: Listener, api: Arc<GuestApi>, slots: Arc<Semaphore>) {
    let mut connections = JoinSet::new();
    // The semaphore is never closed.
    while let Ok(slot) = Arc::clone(&slots).acquire_owned().await {
        let stream = loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, _app)) => break stream,
                    Err(_error) => sleep(ACCEPT_PAUSE).await,
                },
                Some(_ended) = connections.join_next() => {}
            }
        };
        let api = Arc::clone(&api);
        connections.spawn(async move {
            connection(stream, &api).await;
            drop(slot);
        });
    }
}

async fn connection(stream: Stream, api: &GuestApi) {
    let service = service_fn(|request| async { Ok::<_, Infallible>(answer(api, request).await) });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_DEADLINE)
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    // What goes wrong on a connection is its app's to see.
    if let Ok(_ended) = timeout(CONNECTION_LIFETIME, connection.as_mut()).await {
        return;
    }
    connection.as_mut().graceful_shutdown();
    let _ended = timeout(LAST_ANSWER, connection).await;
}

async fn answer(api: &GuestApi, request: Request<Incoming>) -> Answer {
    let (parts, body) = request.into_parts();
    let query = parts.uri.query().unwrap_or_default();
    let content_type = parts.headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let form = match parts.method {
        Verb::GET => RequestForm::of_get(),
        Verb::POST => RequestForm::of_post(query, content_type),
        _ => return refusal(Encoding::Json, StatusCode::METHOD_NOT_ALLOWED, "expected GET or POST"),
    };
    let encoding = form.response();
    let Some(method) = GuestMethod::of_path(parts.uri.path()) else {
        return refusal(encoding, StatusCode::NOT_FOUND, "Service not found");
    };
    let body = match timeout(BODY_DEADLINE, receive(body)).await {
        Ok(Ok(body)) => body,
        Ok(Err(failure)) => return refusal(encoding, failure.status, &failure.text),
        Err(_elapsed) => return refusal(encoding, StatusCode::REQUEST_TIMEOUT, "no whole body in time"),
    };
    match api.call(method, &Message { form, query, body: &body }).await {
        Ok(bytes) => response(StatusCode::OK, encoding, Bytes::from_owner(Wiped(bytes))),
        Err(failure) => refusal(encoding, failure.status, &failure.text),
    }
}

/// Reads a body of at most [`MAX_BODY`] bytes.
async fn receive(mut body: Incoming) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let too_large = || Failure {
        status: StatusCode::PAYLOAD_TOO_LARGE,
        text: format!("body is larger than {MAX_BODY} bytes"),
    };
    let announced = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
    if announced > MAX_BODY {
        return Err(too_large());
    }
    let mut all = Zeroizing::new(Vec::with_capacity(announced));
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Failure::bad(command_line::chain(&error)))?;
        let Ok(data) = frame.into_data() else { continue };
        if all.len() + data.len() > MAX_BODY {
            return Err(too_large());
        }
        all.extend_from_slice(&data);
    }
    Ok(all)
}

/// Lets an answer own bytes that are wiped after the last use.
struct Wiped(Zeroizing<Vec<u8>>);

impl AsRef<[u8]> for Wiped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

fn refusal(encoding: Encoding, status: StatusCode, text: &str) -> Answer {
    response(status, encoding, ErrorBody::new(text).encode_as(encoding).into())
}

fn response(status: StatusCode, encoding: Encoding, body: Bytes) -> Answer {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(encoding.content_type()));
    response
}
