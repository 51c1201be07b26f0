//! The module behind a socket: frames in, frames out.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};
use transport::{Listener, Stream, frame};

use crate::{Emulator, ErrorCode, MAX_REQUEST, MAX_RESPONSE};

/// Connections served at once; further ones wait to be accepted. The driver itself serialises requests.
const MAX_CONNECTIONS: usize = 64;
/// A connection that asks nothing for this long is closed. As long as the driver waits for the module.
const IDLE: Duration = Duration::from_secs(120);
/// How long the peer has to take an answer.
const WRITE: Duration = Duration::from_secs(10);
/// Pause after an accept that failed, which is how running out of descriptors shows.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves `emulator` on `listener` until `shutdown` is cancelled; open connections end with it.
///
/// A connection carries any number of requests, one after the other. Each is a frame of at most [`MAX_REQUEST`]
/// bytes and is answered by a frame of at most [`MAX_RESPONSE`] bytes. A longer request is answered with
/// `InputTooLarge`, unread, and the connection is closed.
pub async fn serve(emulator: Arc<Emulator>, listener: Listener, shutdown: CancellationToken) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let connections = TaskTracker::new();
    let accept = async {
        loop {
            // The semaphore is never closed, so a permit is always given.
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
                return;
            };
            match listener.accept().await {
                Ok((stream, peer)) => {
                    let emulator = Arc::clone(&emulator);
                    let shutdown = shutdown.clone();
                    connections.spawn(async move {
                        let _slot = slot;
                        let served = shutdown.run_until_cancelled(connection(emulator, stream)).await;
                        if let Some(Err(error)) = served {
                            debug!(%peer, %error, "connection ended");
                        }
                    });
                }
                Err(error) => {
                    warn!(%error, "cannot accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    shutdown.run_until_cancelled(accept).await;
    connections.close();
    connections.wait().await;
}

async fn connection(emulator: Arc<Emulator>, mut stream: Stream) -> Result<(), frame::Error> {
    loop {
        let request = match timeout(IDLE, frame::read_async(&mut stream, MAX_REQUEST)).await {
            Ok(Ok(Some(request))) => request,
            Ok(Ok(None)) | Err(_) => return Ok(()),
            Ok(Err(error @ frame::Error::TooLong { .. })) => {
                answer(&mut stream, &crate::emulator::encode_error(ErrorCode::InputTooLarge)).await?;
                return Err(error);
            }
            Ok(Err(error)) => return Err(error),
        };
        let module = Arc::clone(&emulator);
        // Signing, and above all renewing the chain, takes milliseconds of computing.
        let response = tokio::task::spawn_blocking(move || module.process(&request))
            .await
            .map_err(std::io::Error::other)?;
        answer(&mut stream, &response).await?;
    }
}

async fn answer(stream: &mut Stream, response: &[u8]) -> Result<(), frame::Error> {
    timeout(WRITE, frame::write_async(stream, response, MAX_RESPONSE)).await.map_err(std::io::Error::from)?
}
