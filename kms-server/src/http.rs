//! HTTP in front of the methods: routes, encodings, bodies and errors as upstream's clients know them (reference §1).

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body as _, Incoming};
use hyper::header::{ACCEPT, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER, X_CONTENT_TYPE_OPTIONS};
use hyper::http::request::Parts;
use hyper::{Method as Verb, Request, Response, StatusCode};
use kms_protocol::wire::webhook::bounded_reason;
use kms_protocol::wire::{Encoding, ErrorBody, Method, RequestForm, Service, WireMessage};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tracing::{debug, error};
use zeroize::Zeroizing;

use crate::attest::ClientEvidence;
use crate::authorise::Pending;
use crate::config::DEFAULT_BODY_LIMIT;
use crate::context;
use crate::metrics::Metrics;
use crate::sealed::Session;
use command_line::chain;

const APP_VERSION: HeaderName = HeaderName::from_static("x-app-version");
const VERSION: HeaderValue = HeaderValue::from_static(concat!("v", env!("CARGO_PKG_VERSION"), " (keyferry)"));
const TEXT: &str = "text/plain; charset=utf-8";
/// Seconds after which a client that was sent away may try again.
const RETRY_SECONDS: HeaderValue = HeaderValue::from_static("1");
/// The unit in which memory for bodies is counted; the first one of each body is free.
const BODY_UNIT: usize = 64 << 10;
/// Units that all bodies in flight may hold together: 64 MiB.
const BODY_UNITS: usize = 1024;
/// Room for the longest answer, so that a buffer with keys in it never grows and leaves a copy behind.
const ANSWER_CAPACITY: usize = 16 << 10;
/// Longest body of the methods of sealed release.
const SEALED_BODY_LIMIT: usize = 64 << 10;

/// An answer; its buffer is wiped when it has been sent.
pub(crate) type Answer = Response<Full<Bytes>>;

/// The bytes of a successful answer; wiped when they have been sent.
pub(crate) type Body = Zeroizing<Vec<u8>>;

/// What answers the methods of one listener.
pub(crate) trait Methods: Send + Sync + 'static {
    /// Whose methods they are.
    fn service(&self) -> Service;

    /// Whether this KMS has that method of the service.
    fn serves(&self, _method: Method) -> bool {
        true
    }

    /// For `/health`: `OK`, and what an operator should look at, a line each.
    fn health(&self) -> String {
        "OK".to_owned()
    }

    /// For `/metrics`, where that is shown.
    fn metrics(&self) -> String {
        String::new()
    }

    /// Says no before anything is read.
    fn refuse(&self, _parts: &Parts, _peer: &Peer) -> Option<Answer> {
        None
    }

    /// Verifies the certificate that a client presented (DER), whatever method it calls.
    fn verify_client(&self, _certificate: Vec<u8>) -> Pending<'_, Result<Option<ClientEvidence>, Failure>> {
        Box::pin(std::future::ready(Ok(None)))
    }

    /// Calls a method that [`serves`](Self::serves) named.
    fn call<'a>(
        &'a self,
        method: Method,
        message: Message<'a>,
        caller: Caller<'a>,
    ) -> Pending<'a, Result<Body, Failure>>;

    /// Answers a `GET` or `HEAD` of another path than the methods', `/health` and `/metrics`.
    fn page<'a>(&'a self, _parts: &'a Parts, _peer: &'a Peer) -> Option<Pending<'a, Answer>> {
        None
    }
}

/// What answers the requests of a listener.
pub(crate) trait Answers: Send + Sync + 'static {
    /// Answers one request.
    fn answer<'a>(&'a self, request: Request<Incoming>, peer: &'a Peer) -> Pending<'a, Answer>;

    /// Where its connections are counted.
    fn metrics(&self) -> &Arc<Metrics>;
}

/// Answers the requests of all connections of one listener with methods.
pub(crate) struct Http {
    pub(crate) methods: Arc<dyn Methods>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) body_limits: BTreeMap<String, usize>,
    /// Whether `/metrics` answers.
    pub(crate) show_metrics: bool,
    /// For the whole body.
    pub(crate) body_deadline: Duration,
    /// From the last byte of the body to the first of the answer.
    pub(crate) request_deadline: Duration,
    body_memory: Arc<Semaphore>,
    /// For requests that may have to wait for others.
    places: Arc<Semaphore>,
    /// For requests that never do.
    quick_places: Arc<Semaphore>,
}

/// Who is at the other end of a connection.
pub(crate) struct Peer {
    /// Where it is, for logs.
    pub(crate) address: Arc<str>,
    /// Its IP address, if it has one.
    pub(crate) ip: Option<IpAddr>,
    /// The certificate it presented (DER), if any.
    pub(crate) certificate: Option<Vec<u8>>,
    pub(crate) session: Session,
}

#[cfg(test)]
impl Peer {
    /// Nobody in particular.
    pub(crate) fn test() -> Self {
        Self { address: "nobody".into(), ip: None, certificate: None, session: Session::new(None) }
    }
}

/// Who calls a method.
pub(crate) struct Caller<'a> {
    /// The evidence in its certificate, verified.
    pub(crate) evidence: Option<ClientEvidence>,
    pub(crate) session: &'a Session,
}

/// A request that ends in an error body.
#[derive(Debug)]
pub(crate) struct Failure {
    status: StatusCode,
    text: String,
}

impl Failure {
    /// 400, which is what upstream answers to everything that goes wrong.
    pub(crate) fn bad(text: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, text: text.into() }
    }

    /// 503, in the same shape.
    pub(crate) fn busy(text: impl Into<String>) -> Self {
        Self { status: StatusCode::SERVICE_UNAVAILABLE, text: text.into() }
    }

    /// For names that are no method here.
    pub(crate) fn unknown(name: &str) -> Self {
        Self::bad(format!("Service not found: {}", bounded_reason(name)))
    }
}

impl Http {
    pub(crate) fn new(
        methods: Arc<dyn Methods>,
        metrics: Arc<Metrics>,
        body_limits: BTreeMap<String, usize>,
        show_metrics: bool,
        body_deadline: Duration,
        request_deadline: Duration,
        max_requests: usize,
    ) -> Self {
        let semaphore = |permits: usize| Arc::new(Semaphore::new(permits.min(Semaphore::MAX_PERMITS)));
        Self {
            methods,
            metrics,
            body_limits,
            show_metrics,
            body_deadline,
            request_deadline,
            body_memory: semaphore(BODY_UNITS),
            places: semaphore(max_requests),
            quick_places: semaphore(max_requests),
        }
    }

    async fn answer_peer(&self, request: Request<Incoming>, peer: &Peer) -> Answer {
        let (parts, body) = request.into_parts();
        let mut answer = match self.route(&parts, peer) {
            Route::Health => plain(StatusCode::OK, TEXT, self.methods.health()),
            Route::Metrics => plain(StatusCode::OK, TEXT, self.methods.metrics()),
            Route::Rpc(segment) => match self.methods.refuse(&parts, peer) {
                Some(refusal) => refusal,
                None => self.rpc(&parts, segment, body, peer).await,
            },
            Route::Page(page) => page.await,
            Route::None => not_found(&parts),
        };
        let headers = answer.headers_mut();
        headers.insert(APP_VERSION, VERSION);
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        answer
    }

    fn route<'p>(&'p self, parts: &'p Parts, peer: &'p Peer) -> Route<'p> {
        let reads = matches!(parts.method, Verb::GET | Verb::HEAD);
        match parts.uri.path() {
            "/health" if reads => Route::Health,
            "/metrics" if reads && self.show_metrics => Route::Metrics,
            path => match path.strip_prefix("/prpc/") {
                Some(segment)
                    if !segment.is_empty()
                        && !segment.contains('/')
                        && (reads || parts.method == Verb::POST) =>
                {
                    Route::Rpc(segment)
                }
                _ => match self.methods.page(parts, peer).filter(|_| reads) {
                    Some(page) => Route::Page(page),
                    None => Route::None,
                },
            },
        }
    }

    async fn rpc(&self, parts: &Parts, segment: &str, body: Incoming, peer: &Peer) -> Answer {
        let service = self.methods.service();
        let name = service.bare_name(segment);
        let method = service.method(segment).filter(|method| self.methods.serves(*method));
        let started = Instant::now();
        let (answer, encoding) = match self.admit(method) {
            Ok(place) => {
                let answer = self.call(parts, name, method, body, peer).await;
                drop(place);
                answer
            }
            Err(failure) => {
                let query = parts.uri.query().unwrap_or_default();
                (Err(failure), RequestForm::of_early_error(parts.method != Verb::POST, query))
            }
        };
        let answer = match answer {
            Ok(body) => success(encoding, body),
            Err(failure) => {
                debug!(method = bounded_reason(name), status = failure.status.as_u16(), error = failure.text);
                refusal(encoding, &failure)
            }
        };
        let label = method.map_or("unknown", Method::name);
        // Upstream counts every call of these names, served or not.
        let gated = ["GetAppKey", "GetKmsKey", "SignCert"].contains(&name);
        self.metrics.answered(label, gated, answer.status().as_u16(), started.elapsed());
        answer
    }

    /// A place for a request; who finds none is told so at once. `GetMeta`, which waits for nobody, has places of its
    /// own, so that it is answered when all others wait.
    fn admit(&self, method: Option<Method>) -> Result<OwnedSemaphorePermit, Failure> {
        let places = if method == Some(Method::GetMeta) { &self.quick_places } else { &self.places };
        Arc::clone(places).try_acquire_owned().map_err(|_| {
            self.metrics.requests_shed.fetch_add(1, Ordering::Relaxed);
            Failure::busy("too many requests; try again")
        })
    }

    /// The answer's bytes or why there are none, and the encoding of either.
    async fn call(
        &self,
        parts: &Parts,
        name: &str,
        method: Option<Method>,
        body: Incoming,
        peer: &Peer,
    ) -> (Result<Body, Failure>, Encoding) {
        let query = parts.uri.query().unwrap_or_default();
        let is_get = parts.method != Verb::POST;
        // Upstream forgets the content type in errors before the method runs; clients may rely on it.
        let early = RequestForm::of_early_error(is_get, query);
        let content_type = parts.headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let form = if is_get { RequestForm::of_get() } else { RequestForm::of_post(query, content_type) };

        let body = if is_get { Ok(Received::default()) } else { self.read_body(name, body).await };
        let body = match body {
            Ok(body) => body,
            Err(failure) => return (Err(failure), early),
        };
        let work = async {
            let evidence = match &peer.certificate {
                Some(certificate) => match self.methods.verify_client(certificate.clone()).await {
                    Ok(evidence) => evidence,
                    Err(failure) => return (Err(failure), early),
                },
                None => None,
            };
            let Some(method) = method else {
                return (Err(Failure::unknown(name)), form.response());
            };
            let message = Message { form, query, body: &body.bytes };
            let caller = Caller { evidence, session: &peer.session };
            (self.methods.call(method, message, caller).await, form.response())
        };
        match timeout(self.request_deadline, work).await {
            Ok(answer) => answer,
            Err(_) => {
                error!(method = bounded_reason(name), "no answer within {:?}", self.request_deadline);
                (Err(Failure::busy(format!("no answer within {:?}", self.request_deadline))), early)
            }
        }
    }

    async fn read_body(&self, name: &str, body: Incoming) -> Result<Received, Failure> {
        let limit = self.body_limits.get(name).copied().unwrap_or_else(|| default_body_limit(name));
        match timeout(self.body_deadline, receive(body, limit, &self.body_memory)).await {
            Ok(received) => received,
            Err(_) => Err(Failure {
                status: StatusCode::REQUEST_TIMEOUT,
                text: format!("failed to read data: no end within {:?}", self.body_deadline),
            }),
        }
    }
}

impl Answers for Http {
    fn answer<'a>(&'a self, request: Request<Incoming>, peer: &'a Peer) -> Pending<'a, Answer> {
        Box::pin(context::with_peer(Arc::clone(&peer.address), self.answer_peer(request, peer)))
    }

    fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }
}

/// Longest body of a method that the configuration does not limit.
fn default_body_limit(name: &str) -> usize {
    match name {
        // A document in hex is 24 KiB at most.
        "GetChallenge" | "GetAppKeySealed" => SEALED_BODY_LIMIT,
        _ => DEFAULT_BODY_LIMIT,
    }
}

enum Route<'p> {
    Health,
    Metrics,
    /// The path segment that names the method.
    Rpc(&'p str),
    Page(Pending<'p, Answer>),
    None,
}

/// Where the request message is, and how the answer is encoded.
#[derive(Clone, Copy)]
pub(crate) struct Message<'a> {
    form: RequestForm,
    query: &'a str,
    body: &'a [u8],
}

impl Message<'_> {
    /// The request.
    pub(crate) fn decode<M: WireMessage>(&self) -> Result<M, Failure> {
        let decoded = match self.form {
            RequestForm::Query => M::decode_query(self.query),
            RequestForm::Body(encoding) => M::decode_body(encoding, self.body),
        };
        decoded.map_err(|error| Failure::bad(bounded_reason(&chain(&error))))
    }

    /// The answer, encoded.
    pub(crate) fn answer<M: WireMessage>(&self, answer: Result<M, Failure>) -> Result<Body, Failure> {
        answer.map(|message| encode(self.form.response(), &message))
    }

    /// The empty answer.
    pub(crate) fn empty(&self) -> Result<Body, Failure> {
        Ok(Zeroizing::new(kms_protocol::wire::empty_body(self.form.response()).to_vec()))
    }
}

/// A body and the memory it was granted.
#[derive(Default)]
struct Received {
    bytes: Vec<u8>,
    _memory: Vec<OwnedSemaphorePermit>,
}

async fn receive(mut body: Incoming, limit: usize, memory: &Arc<Semaphore>) -> Result<Received, Failure> {
    let too_large = || Failure::bad("failed to read data: payload too large");
    if body.size_hint().lower() > limit as u64 {
        return Err(too_large());
    }
    let mut received = Received::default();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Failure::bad(format!("failed to read data: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        if received.bytes.len() + data.len() > limit {
            return Err(too_large());
        }
        while (received.bytes.len() + data.len()) / BODY_UNIT > received._memory.len() {
            let unit = Arc::clone(memory).try_acquire_owned();
            received._memory.push(unit.map_err(|_| Failure::busy("too many large requests; try again"))?);
        }
        received.bytes.extend_from_slice(&data);
    }
    Ok(received)
}

/// Encodes into a buffer that is wiped, and large enough not to be moved.
fn encode<M: WireMessage>(encoding: Encoding, message: &M) -> Body {
    let mut bytes = Zeroizing::new(Vec::with_capacity(ANSWER_CAPACITY));
    let written = match encoding {
        Encoding::Json => serde_json::to_writer(&mut *bytes, message).is_ok(),
        Encoding::Protobuf => message.encode(&mut *bytes).is_ok(),
    };
    debug_assert!(written, "messages always encode, and a vector has room");
    bytes
}

fn success(encoding: Encoding, body: Body) -> Answer {
    plain(StatusCode::OK, encoding.content_type(), Bytes::from_owner(Wiped(body)))
}

/// Lets a response own bytes that are wiped after the last use.
struct Wiped(Zeroizing<Vec<u8>>);

impl AsRef<[u8]> for Wiped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

fn refusal(encoding: Encoding, failure: &Failure) -> Answer {
    let body = ErrorBody::new(failure.text.as_str()).encode_as(encoding);
    let mut answer = plain(failure.status, encoding.content_type(), body);
    if failure.status == StatusCode::SERVICE_UNAVAILABLE {
        answer.headers_mut().insert(RETRY_AFTER, RETRY_SECONDS);
    }
    answer
}

/// A refusal before the request was read, in the encoding that such errors have.
pub(crate) fn refuse_early(parts: &Parts, status: StatusCode, text: String) -> Answer {
    let query = parts.uri.query().unwrap_or_default();
    let encoding = RequestForm::of_early_error(parts.method != Verb::POST, query);
    refusal(encoding, &Failure { status, text })
}

fn not_found(parts: &Parts) -> Answer {
    let accept = parts.headers.get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let wants_json = accept
        .split(',')
        .any(|item| item.split(';').next().is_some_and(|media_type| media_type.trim() == "application/json"));
    if wants_json {
        let body = "{\n  \"error\": {\n    \"code\": 404,\n    \"reason\": \"Not Found\",\n    \
                    \"description\": \"The requested resource could not be found.\"\n  }\n}";
        return plain(StatusCode::NOT_FOUND, "application/json", body);
    }
    let body = "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
                <title>404 Not Found</title>\n</head>\n<body>\n<h1>404: Not Found</h1>\n\
                <p>The requested resource could not be found.</p>\n</body>\n</html>\n";
    plain(StatusCode::NOT_FOUND, "text/html; charset=utf-8", body)
}

pub(crate) fn plain(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}
