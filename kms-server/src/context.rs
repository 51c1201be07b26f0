//! Who is at the other end of the connection that a task serves. The audit log and the logs want to know; no method
//! does, so it is not handed through all of them.

use std::future::Future;
use std::sync::Arc;

use tracing::{Instrument as _, info_span};

tokio::task_local! {
    static PEER: Arc<str>;
}

/// Runs `serving` for a client at `peer`, whose address is in every log line of it.
pub(crate) async fn with_peer<F: Future>(peer: Arc<str>, serving: F) -> F::Output {
    let span = info_span!("request", peer = %peer);
    PEER.scope(peer, serving.instrument(span)).await
}

/// Address of the client that this task serves; `None` in tasks that serve nobody.
pub(crate) fn peer() -> Option<String> {
    PEER.try_with(|peer| peer.to_string()).ok()
}
