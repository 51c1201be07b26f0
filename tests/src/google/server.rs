//! HTTP around the state.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::thread::JoinHandle;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use super::state::Refusal;
use super::storage::Part;
use super::{Call, Fault, Shared};

/// The token callers must present.
pub(super) const TOKEN: &str = "a-token-for-the-stand-in";
const LARGEST: usize = 64 << 20;

type Answer = Response<Full<Bytes>>;

/// The connection is to be closed without an answer.
#[derive(Debug, thiserror::Error)]
#[error("no answer on purpose")]
struct NoAnswer;

pub(super) fn start(shared: Arc<Shared>, stopped: oneshot::Receiver<()>) -> (SocketAddr, JoinHandle<()>) {
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
    listener.set_nonblocking(true).expect("a socket can be made non-blocking");
    let address = listener.local_addr().expect("a listener has an address");
    let thread = std::thread::spawn(move || {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime starts");
        runtime.block_on(async {
            let listener = TcpListener::from_std(listener).expect("the listener is usable");
            tokio::select! {
                () = accept(listener, shared) => {}
                _ = stopped => {}
            }
        });
    });
    (address, thread)
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((stream, _)) = listener.accept().await {
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let service = service_fn(|request| serve(Arc::clone(&shared), request));
            // Ends with an error when no answer is wanted, and when a client goes away.
            let _ended = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn serve(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Answer, NoAnswer> {
    let (head, body) = request.into_parts();
    let body = Limited::new(body, LARGEST).collect().await.map_err(|_| NoAnswer)?.to_bytes();
    let query: Vec<(String, String)> =
        serde_urlencoded::from_str(head.uri.query().unwrap_or_default()).unwrap_or_default();
    let json = (!body.is_empty()).then(|| serde_json::from_slice::<Value>(&body).ok()).flatten();

    let fault = {
        let mut inner = shared.inner();
        let number = inner.calls.len();
        let line = format!("{} {}", head.method, head.uri.path());
        let without_id = query.iter().filter(|(name, _)| name != "requestId").cloned().collect();
        inner.calls.push(Call { line, query: without_id, body: json.clone() });
        let hit = inner.faults.iter().position(|(at, _)| *at == number);
        hit.map(|index| inner.faults.remove(index).1)
    };
    let fails = match fault {
        Some(Fault::Refused(status, reason, message)) => {
            return Ok(refuse((status, reason, message.to_owned())));
        }
        Some(Fault::Unanswered) => return Err(NoAnswer),
        Some(Fault::Hangs) => return hang(&shared).await,
        Some(Fault::OperationFails(code, message)) => Some((code, message)),
        Some(Fault::AnswerLost | Fault::HangsAfter) | None => None,
    };
    let authorised =
        head.headers.get(header::AUTHORIZATION).is_some_and(|it| it == &format!("Bearer {TOKEN}"));
    let answer = match authorised {
        false => refuse((401, "authError", "Invalid Credentials".to_owned())),
        true => route(&shared, &head, &query, &body, json.as_ref(), fails).unwrap_or_else(refuse),
    };
    match fault {
        Some(Fault::AnswerLost) => Err(NoAnswer),
        Some(Fault::HangsAfter) => hang(&shared).await,
        _ => Ok(answer),
    }
}

/// Says that a call hangs, and lets it.
async fn hang(shared: &Shared) -> Result<Answer, NoAnswer> {
    shared.inner().hanging += 1;
    shared.hung.notify_all();
    std::future::pending().await
}

fn route(
    shared: &Shared,
    head: &hyper::http::request::Parts,
    query: &[(String, String)],
    body: &[u8],
    json: Option<&Value>,
    fails: Option<(&'static str, &'static str)>,
) -> Result<Answer, Refusal> {
    let path = head.uri.path().trim_start_matches('/');
    let not_found = || (404, "notFound", format!("no such path: {path}"));
    if let Some(session) = path.strip_prefix("upload/session/") {
        let range =
            head.headers.get(header::CONTENT_RANGE).and_then(|it| it.to_str().ok()).unwrap_or_default();
        return shared.inner().state.take_part(session, range, body).map(part);
    }
    // gcloud puts a word before the path when it uploads in parts.
    if let Some(rest) = path.strip_prefix("resumable/").unwrap_or(path).strip_prefix("upload/storage/v1/") {
        return upload(shared, head, rest, query, body);
    }
    // No part of Google: what an image was made from, for who tries the stand-in by hand.
    if let Some(image) = path.strip_prefix("stand-in/images/") {
        let archive = shared.inner().state.archive(image).ok_or_else(not_found)?;
        return Ok(Response::new(Full::new(Bytes::from(archive))));
    }
    let (schemas, rest) = match path.strip_prefix("compute/v1/") {
        Some(rest) => (&shared.compute, rest),
        None => (&shared.storage, path.strip_prefix("storage/v1/").ok_or_else(not_found)?),
    };
    let segments: Vec<String> = rest.split('/').map(decode).collect();
    let matched = schemas.find(head.method.as_str(), &segments).ok_or_else(not_found)?;
    if !body.is_empty() && json.is_none() {
        return Err((400, "parseError", "Parse Error: the body is no JSON".to_owned()));
    }
    schemas.check(&matched, query, json).map_err(|message| (400, "invalid", message))?;
    let mut inner = shared.inner();
    match path.starts_with("compute/") {
        true => inner.state.compute(&matched, query, json, fails).map(|value| answer(200, &value)),
        false if query.iter().any(|(name, value)| name == "alt" && value == "media") => {
            let (bucket, object) = (matched.get("bucket"), matched.get("object"));
            let bytes = inner.state.object(bucket, object);
            let bytes =
                bytes.ok_or_else(|| (404, "notFound", format!("No such object: {bucket}/{object}")))?;
            Ok(Response::new(Full::new(Bytes::from(bytes))))
        }
        false => inner.state.storage(&matched, query, json).map(|value| match value {
            Some(value) => answer(200, &value),
            None => plain(StatusCode::NO_CONTENT),
        }),
    }
}

/// An upload in one request, or the beginning of one in parts.
fn upload(
    shared: &Shared,
    head: &hyper::http::request::Parts,
    rest: &str,
    query: &[(String, String)],
    body: &[u8],
) -> Result<Answer, Refusal> {
    let parameter = |name: &str| query.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
    let text = |name| head.headers.get(name).and_then(|it| it.to_str().ok()).unwrap_or_default();
    let required = || (400, "required", "an upload needs a bucket and a name".to_owned());
    let bucket = rest.strip_prefix("b/").and_then(|it| it.strip_suffix("/o")).ok_or_else(required)?;
    // The kind of upload is no parameter of the method.
    let others: Vec<_> = query.iter().filter(|(name, _)| name != "uploadType").cloned().collect();
    let check = |metadata: &Value| {
        let method = ["b".to_owned(), bucket.to_owned(), "o".to_owned()];
        let matched = shared.storage.find(head.method.as_str(), &method).ok_or_else(required)?;
        shared
            .storage
            .check(&matched, &others, Some(metadata))
            .map_err(|message| (400, "invalid", message))?;
        let name = metadata["name"].as_str().map(str::to_owned).or_else(|| parameter("name"));
        name.ok_or_else(required)
    };
    match parameter("uploadType").as_deref() {
        Some("multipart") => {
            let (metadata, content) = super::storage::multipart(text(header::CONTENT_TYPE), body)
                .ok_or_else(|| (400, "badContent", "Malformed multipart body.".to_owned()))?;
            let name = check(&metadata)?;
            shared.inner().state.store(bucket, &name, content).map(|object| answer(200, &object))
        }
        Some("resumable") => {
            let metadata = if body.is_empty() { Ok(json!({})) } else { serde_json::from_slice(body) };
            let metadata = metadata.map_err(|_| (400, "parseError", "Parse Error".to_owned()))?;
            let name = check(&metadata)?;
            let session = shared.inner().state.begin_upload(bucket, &name)?;
            let location = format!("http://{}/upload/session/{session}", text(header::HOST));
            let mut begun = plain(StatusCode::OK);
            let location = location.parse().expect("an address is a header value");
            begun.headers_mut().insert(header::LOCATION, location);
            Ok(begun)
        }
        _ => Err((501, "notImplemented", "other uploads are not part of this stand-in".to_owned())),
    }
}

fn part(part: Part) -> Answer {
    match part {
        Part::Complete(object) => answer(200, &object),
        Part::Stored(stored) => {
            let mut more = plain(StatusCode::PERMANENT_REDIRECT);
            // Google leaves the header out when it has nothing.
            if let Some(last) = stored.checked_sub(1) {
                let range = format!("bytes=0-{last}").parse().expect("a range is a header value");
                more.headers_mut().insert(header::RANGE, range);
            }
            more
        }
    }
}

fn refuse((status, reason, message): Refusal) -> Answer {
    answer(
        status,
        &json!({"error": {
            "code": status,
            "message": message,
            "errors": [{"domain": "global", "reason": reason, "message": message}],
        }}),
    )
}

fn answer(status: u16, value: &Value) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(value.to_string())));
    *answer.status_mut() = StatusCode::from_u16(status).expect("the statuses here are valid");
    let json = header::HeaderValue::from_static("application/json; charset=UTF-8");
    answer.headers_mut().insert(header::CONTENT_TYPE, json);
    answer
}

fn plain(status: StatusCode) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::new()));
    *answer.status_mut() = status;
    answer
}

/// Undoes percent encoding in a path segment.
fn decode(segment: &str) -> String {
    // A form decoder does the same, save for `+`, which a path keeps.
    let form = format!("x={}", segment.replace('+', "%2B"));
    let pairs: Vec<(String, String)> = serde_urlencoded::from_str(&form).unwrap_or_default();
    pairs.into_iter().next().map_or_else(|| segment.to_owned(), |(_, value)| value)
}
