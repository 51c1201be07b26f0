//! What is done with a connection.

pub(crate) mod egress;
pub(crate) mod forward;
pub mod heartbeat;
mod plain_http;
pub mod proxy_header;
pub mod receive;

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, timeout, timeout_at};
use transport::{Peer, Stream};

use crate::config::{Kind, Service};
use crate::http::answer;
use crate::limits::{Key, Permit};
use crate::policy::Asker;
use crate::proxy::Shared;
use crate::record::Record;

/// Refusals that may be answered at once; past that connections are closed without a word.
const MAX_REFUSALS: u32 = 256;
/// How long a refused peer may take to read its answer.
const LAST_WORD: Duration = Duration::from_secs(1);
/// Most bytes that a refused peer may still send before it is cut off.
const MAX_DRAIN: usize = 64 << 10;

/// Serves one connection to its end.
pub(crate) async fn serve(stream: Stream, peer: Peer, service: Arc<Service>, shared: Arc<Shared>) {
    let mut record = Record::new(Arc::clone(&service.name), peer, Arc::clone(&shared.tell));
    let asker = asker(peer);
    let permits = match enter(&service, asker, &shared) {
        Ok(permits) => permits,
        Err(reason) => {
            record.end = reason;
            refuse_entry(stream, &service, &shared, reason).await;
            return;
        }
    };
    match &service.kind {
        Kind::Egress(egress) => {
            egress::serve(stream, egress, &service.tunnel, asker, &shared, &mut record).await
        }
        Kind::Forward(forward) => {
            forward::serve(stream, forward, &service.tunnel, asker, &shared, &mut record).await
        }
        Kind::Receive(receive) => {
            Box::pin(receive::serve(stream, receive, &service.tunnel, &mut record)).await
        }
        Kind::Heartbeat => Box::pin(heartbeat::serve(stream, &service.tunnel, &mut record, &shared)).await,
    }
    // Counted out before the record tells the end: who waits for the outcome finds the place free.
    drop(permits);
}

/// Who the rules see.
fn asker(peer: Peer) -> Asker {
    match peer {
        Peer::Vsock { cid, .. } => Asker::Cid(cid.get()),
        Peer::Unix { .. } | Peer::Tcp(_) => Asker::Anybody,
    }
}

/// Counts the connection in, unless a limit is reached or the service is not for this enclave.
fn enter(service: &Service, asker: Asker, shared: &Arc<Shared>) -> Result<[Option<Permit>; 3], &'static str> {
    let limits = shared.limits();
    let all = shared.counts.enter(Key::All, limits.max_connections)?;
    let cid = match asker {
        Asker::Cid(cid) => {
            if service.cids.as_ref().is_some_and(|cids| !cids.contains(&cid)) {
                return Err("cid-not-allowed");
            }
            Some(shared.counts.enter(Key::Cid(cid), limits.max_connections_per_cid)?)
        }
        Asker::Anybody if service.cids.is_some() => return Err("cid-not-allowed"),
        Asker::Anybody => None,
    };
    let own = match service.tunnel.max_connections {
        Some(max) => Some(shared.counts.enter(Key::Service(Arc::clone(&service.name)), max)?),
        None => None,
    };
    Ok([Some(all), cid, own])
}

/// Says no before a byte was read: in HTTP where HTTP is spoken, by a close elsewhere.
async fn refuse_entry(stream: Stream, service: &Service, shared: &Arc<Shared>, reason: &'static str) {
    let Kind::Egress(_) = service.kind else { return };
    let Ok(_place) = shared.counts.enter(Key::Refusals, MAX_REFUSALS) else { return };
    let status = if reason == "cid-not-allowed" { 403 } else { 503 };
    say_and_close(stream, &answer::refusal(status, reason)).await;
}

/// Writes the last word and lets the peer read it: closing with unread bytes would reset the connection and take
/// the answer with it.
pub(crate) async fn say_and_close(mut stream: Stream, last_word: &[u8]) {
    let end = Instant::now() + LAST_WORD;
    let said = timeout_at(end, async {
        stream.write_all(last_word).await?;
        stream.shutdown().await
    });
    if !matches!(said.await, Ok(Ok(()))) {
        return;
    }
    let mut left = MAX_DRAIN;
    let mut scratch = [0; 1024];
    // Ends with the peer's end, its error, its time or its allowance; all of them are the end of this connection.
    let _drained = timeout_at(end, async {
        while let Ok(n @ 1..) = stream.read(&mut scratch).await {
            left = left.saturating_sub(n);
            if left == 0 {
                break;
            }
        }
    })
    .await;
}

/// Runs `future` for at most `limit`.
pub(crate) async fn within<T>(limit: Duration, future: impl Future<Output = T>) -> Option<T> {
    timeout(limit, future).await.ok()
}
