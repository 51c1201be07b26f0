//! A small HTTP server for stand-ins: it answers what a function says, or breaks off where it says so.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::thread::JoinHandle;

use futures_util::stream::{self, StreamExt as _};
use http_body_util::{BodyExt, Limited, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::service::service_fn;
use hyper::{HeaderMap, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

const LARGEST: usize = 64 << 20;

/// A request.
#[derive(Debug)]
pub struct Question {
    /// `POST /prpc/Status`.
    pub line: String,
    /// The query, decoded.
    pub query: Vec<(String, String)>,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

impl Question {
    /// A header's text, or an empty one.
    #[must_use]
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|it| it.to_str().ok()).unwrap_or_default()
    }

    /// A parameter of the query.
    #[must_use]
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// What is answered.
#[derive(Debug)]
pub struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// So much of the body is sent, and the connection is closed.
    cut: Option<usize>,
    /// Nothing is sent, and the connection stays open.
    hangs: bool,
}

impl Answer {
    /// Bytes.
    #[must_use]
    pub fn bytes(status: u16, body: Vec<u8>) -> Self {
        Self { status, headers: Vec::new(), body, cut: None, hangs: false }
    }

    /// JSON.
    #[must_use]
    pub fn json(status: u16, value: &Value) -> Self {
        Self::bytes(status, value.to_string().into_bytes()).with("content-type", "application/json")
    }

    /// One that never comes.
    #[must_use]
    pub fn never() -> Self {
        Self { hangs: true, ..Self::bytes(200, Vec::new()) }
    }

    /// With a header.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// Broken off after so many bytes.
    #[must_use]
    pub fn cut_after(mut self, bytes: usize) -> Self {
        self.cut = Some(bytes);
        self
    }
}

/// The connection is closed on purpose.
#[derive(Debug, thiserror::Error)]
#[error("broken off on purpose")]
struct BrokenOff;

/// A server on a port of its own. It ends when dropped.
pub struct Server {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts it. `None` for an answer closes the connection without one.
    ///
    /// # Panics
    /// When it cannot listen.
    pub fn start(answer: impl Fn(&Question) -> Option<Answer> + Send + Sync + 'static) -> Self {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
        listener.set_nonblocking(true).expect("a socket can be made non-blocking");
        let address = listener.local_addr().expect("a listener has an address");
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime starts");
            runtime.block_on(async {
                let listener = TcpListener::from_std(listener).expect("the listener is usable");
                tokio::select! {
                    _never = accept(listener, Arc::new(answer)) => {}
                    _ = stopped => {}
                }
            });
        });
        Self { address, stop: Some(stop), thread: Some(thread) }
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its address as a URL, without a slash at the end.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // Fails only when the server has ended already.
            let _ended = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

type Answering = dyn Fn(&Question) -> Option<Answer> + Send + Sync;

async fn accept(listener: TcpListener, answer: Arc<Answering>) -> Result<Infallible, std::io::Error> {
    loop {
        let (stream, _) = listener.accept().await?;
        let answer = Arc::clone(&answer);
        tokio::spawn(async move {
            let service = service_fn(|request| serve(Arc::clone(&answer), request));
            // Ends with an error when it is broken off, and when a client goes away.
            let _ended = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

type Body = http_body_util::combinators::BoxBody<Bytes, BrokenOff>;

async fn serve(answer: Arc<Answering>, request: Request<Incoming>) -> Result<Response<Body>, BrokenOff> {
    let (head, body) = request.into_parts();
    let body = Limited::new(body, LARGEST).collect().await.map_err(|_| BrokenOff)?.to_bytes();
    let question = Question {
        line: format!("{} {}", head.method, head.uri.path()),
        query: serde_urlencoded::from_str(head.uri.query().unwrap_or_default()).unwrap_or_default(),
        headers: head.headers,
        body,
    };
    let answer = answer(&question).ok_or(BrokenOff)?;
    if answer.hangs {
        return std::future::pending().await;
    }
    let length = answer.body.len();
    let sent = answer.body[..answer.cut.unwrap_or(length).min(length)].to_vec();
    let whole = stream::iter([Ok(Frame::data(Bytes::from(sent)))]);
    let end = stream::iter(answer.cut).then(|_| async {
        // What was said before must be on its way: it is sent when there is nothing more to say for the moment.
        tokio::task::yield_now().await;
        Err(BrokenOff)
    });
    let mut response = Response::new(BodyExt::boxed(StreamBody::new(whole.chain(end))));
    *response.status_mut() = StatusCode::from_u16(answer.status).expect("the statuses here are valid");
    response.headers_mut().insert(header::CONTENT_LENGTH, length.into());
    for (name, value) in answer.headers {
        response.headers_mut().insert(name, value.parse().expect("the headers here are valid"));
    }
    Ok(response)
}
