//! Accepting: never waits for anything but the next connection, and never dies.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use tokio::io::AsyncWriteExt;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use transport::Listener;

use crate::config::{Kind, Service};
use crate::http::answer;
use crate::proxy::Shared;
use crate::service::serve;

/// Pause after the system ran out of something.
const EXHAUSTED: Duration = Duration::from_millis(10);
/// At most one log line about failed accepts in this time.
const QUIET: Duration = Duration::from_secs(1);

/// Accepts until `stop`, closes the listener, and returns when the last connection is over. `kill` ends those that are
/// left.
pub(crate) async fn accept_loop(
    listener: Listener,
    service: watch::Receiver<Arc<Service>>,
    shared: Arc<Shared>,
    stop: CancellationToken,
) {
    let mut open = JoinSet::new();
    let mut reserve = Reserve::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(_ended) = open.join_next(), if !open.is_empty() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                let service = Arc::clone(&service.borrow());
                open.spawn(serve(stream, peer, service, Arc::clone(&shared)));
            }
            Err(error) => {
                shared.tell.metrics.accept_failed();
                let service = Arc::clone(&service.borrow());
                reserve.log(&service, &error);
                if let transport::Error::Accept { source, .. } = &error
                    && is_exhaustion(source)
                {
                    reserve.turn_one_away(&listener, &service).await;
                    sleep(EXHAUSTED).await;
                }
            }
        }
    }
    drop(listener);
    let all_over = async { while open.join_next().await.is_some() {} };
    if shared.kill.run_until_cancelled(all_over).await.is_none() {
        open.shutdown().await;
    }
}

/// Whether the error means that the system is out of descriptors or memory, and not that this one connection broke.
pub(crate) fn is_exhaustion(error: &io::Error) -> bool {
    let exhausted = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    Errno::from_io_error(error).is_some_and(|errno| exhausted.contains(&errno))
}

/// A descriptor kept for the moment when there are no others: with it a waiting connection is accepted and told to
/// come back, instead of being left in the queue without a word.
struct Reserve {
    file: Option<File>,
    logged: Option<Instant>,
}

impl Reserve {
    fn new() -> Self {
        Self { file: File::open("/dev/null").ok(), logged: None }
    }

    async fn turn_one_away(&mut self, listener: &Listener, service: &Service) {
        drop(self.file.take());
        // The connection that could not be accepted is still waiting; if it left, there is nobody to tell.
        if let Ok(Ok((mut stream, _peer))) = timeout(EXHAUSTED, listener.accept()).await
            && let Kind::Egress(_) = service.kind
        {
            let answer = answer::refusal(503, "out-of-descriptors");
            let _told_or_gone = timeout(EXHAUSTED, stream.write_all(&answer)).await;
        }
        self.file = File::open("/dev/null").ok();
    }

    fn log(&mut self, service: &Service, error: &transport::Error) {
        if self.logged.is_some_and(|at| at.elapsed() < QUIET) {
            return;
        }
        self.logged = Some(Instant::now());
        let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
        warn!(service = &*service.name, %error, cause, "cannot accept");
    }
}
