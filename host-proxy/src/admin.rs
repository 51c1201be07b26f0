//! Metrics and health, for the parent's own eyes: `GET /metrics` and `GET /healthz` on a socket of its own.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use transport::{Listener, Stream};

use crate::http::answer;
use crate::http::head::{self, Request};
use crate::metrics::CONTENT_TYPE;
use crate::proxy::Shared;
use crate::service::{say_and_close, within};

/// Requests at once.
const MAX_OPEN: usize = 16;
/// Time for a request head, and its size.
const HEAD_TIME: Duration = Duration::from_secs(5);
const HEAD_BYTES: usize = 4096;

/// Serves until `stop`.
pub(crate) async fn serve(listener: Listener, shared: Arc<Shared>, stop: CancellationToken) {
    let mut open = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            Some(_ended) = open.join_next(), if !open.is_empty() => continue,
            accepted = listener.accept(), if open.len() < MAX_OPEN => accepted,
        };
        match accepted {
            Ok((stream, _peer)) => {
                open.spawn(answer_one(stream, Arc::clone(&shared)));
            }
            // Whatever is missing, it is no reason to spin.
            Err(_) => sleep(Duration::from_millis(10)).await,
        }
    }
}

async fn answer_one(mut stream: Stream, shared: Arc<Shared>) {
    let answer = match within(HEAD_TIME, read_request(&mut stream)).await {
        Some(Some(Request::Origin { method, path })) => respond(&method, &path, &shared),
        Some(Some(_)) => answer::document(400, "text/plain", "this is not the proxy\n"),
        Some(None) => answer::document(400, "text/plain", "not an HTTP request\n"),
        None => answer::document(408, "text/plain", "no request in time\n"),
    };
    say_and_close(stream, &answer).await;
}

fn respond(method: &str, path: &str, shared: &Shared) -> Vec<u8> {
    match (method, path) {
        ("GET", "/metrics") => answer::document(200, CONTENT_TYPE, &shared.tell.metrics.render()),
        ("GET", "/healthz") => {
            let max = shared.limits().max_connections;
            let body = format!(
                "{{\"status\":\"ok\",\"connections\":{},\"max_connections\":{max}}}\n",
                shared.open()
            );
            answer::document(200, "application/json", &body)
        }
        ("GET", _) => answer::document(404, "text/plain", "expected /metrics or /healthz\n"),
        _ => answer::document(405, "text/plain", "expected GET\n"),
    }
}

async fn read_request(stream: &mut Stream) -> Option<Request> {
    let mut bytes = Vec::new();
    loop {
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
        if let Some(head) = head::parse(&bytes, HEAD_BYTES).ok()? {
            return Some(head.request);
        }
    }
}
