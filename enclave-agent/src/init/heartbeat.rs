//! The boot heartbeat: one byte to the parent and back, which tells nitro-cli that the enclave runs.
//!
//! The byte proves nothing to either side, so a parent that does not answer is reported and the boot goes on. AWS's own
//! init stops then.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{sleep, timeout};
use transport::VsockPort;

use super::cmdline::Parent;

/// The parent's port (aws-nitro-enclaves-sdk-bootstrap, `init.c`).
const PORT: VsockPort = VsockPort::new(9000);
/// The byte that goes both ways.
const BEAT: u8 = 0xb7;
/// For one connection, and for the byte on it.
const DEADLINE: Duration = Duration::from_secs(3);
/// A parent may still be busy starting us.
const ATTEMPTS: u32 = 3;
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(500);

/// Why the parent's answer is missing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum HeartbeatError {
    /// There is no such address.
    #[error("address of the heartbeat")]
    Address(#[from] transport::ParseEndpointError),
    /// Nobody listens.
    #[error(transparent)]
    Connect(#[from] transport::Error),
    /// The connection broke.
    #[error("heartbeat")]
    Exchange(#[from] io::Error),
    /// No byte came back.
    #[error("heartbeat: no answer within {DEADLINE:?}")]
    TimedOut,
    /// Another byte came back.
    #[error("heartbeat: the parent answered {actual:#04x}, expected {BEAT:#04x}")]
    OtherByte {
        /// The byte.
        actual: u8,
    },
}

/// Sends the heartbeat, up to three times; under 20 s in all.
pub(super) async fn send(parent: &Parent) -> Result<(), HeartbeatError> {
    let mut attempt = 1;
    loop {
        match beat(parent).await {
            Err(_) if attempt < ATTEMPTS => attempt += 1,
            result => return result,
        }
        sleep(PAUSE).await;
    }
}

async fn beat(parent: &Parent) -> Result<(), HeartbeatError> {
    let mut stream = parent.port(PORT)?.connect(DEADLINE).await?;
    let mut byte = [BEAT];
    let exchange = async {
        stream.write_all(&byte).await?;
        stream.read_exact(&mut byte).await
    };
    timeout(DEADLINE, exchange).await.map_err(|_elapsed| HeartbeatError::TimedOut)??;
    let [actual] = byte;
    if actual == BEAT { Ok(()) } else { Err(HeartbeatError::OtherByte { actual }) }
}

#[cfg(test)]
mod tests {
    use transport::{BindOptions, Listener, Stream};

    use super::*;

    /// A parent whose heartbeat port treats every connection like this.
    async fn parent(treat: impl AsyncFn(&mut Stream) + Send + 'static) -> (tempfile::TempDir, Parent) {
        let directory = tempfile::tempdir().unwrap();
        let parent = Parent::Unix(directory.path().join("p"));
        let listener = Listener::bind(&parent.port(PORT).unwrap(), BindOptions::default()).await.unwrap();
        tokio::task::spawn_local(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                treat(&mut stream).await;
            }
        });
        (directory, parent)
    }

    async fn answered_with(answer: u8) -> Result<(), HeartbeatError> {
        let local = tokio::task::LocalSet::new();
        local
            .run_until(async {
                let (_directory, parent) = parent(async move |stream: &mut Stream| {
                    assert_eq!(stream.read_u8().await.unwrap(), BEAT);
                    stream.write_all(&[answer]).await.unwrap();
                })
                .await;
                send(&parent).await
            })
            .await
    }

    #[tokio::test]
    async fn the_same_byte_is_the_answer_and_another_is_none() {
        answered_with(BEAT).await.unwrap();
        assert!(matches!(answered_with(0).await, Err(HeartbeatError::OtherByte { actual: 0 })));
    }

    #[tokio::test(start_paused = true)]
    async fn a_parent_that_says_nothing_or_is_absent_is_given_up() {
        let local = tokio::task::LocalSet::new();
        let silent = local.run_until(async {
            let (_directory, parent) = parent(async |_: &mut Stream| std::future::pending().await).await;
            send(&parent).await
        });
        assert!(matches!(silent.await, Err(HeartbeatError::TimedOut)));
        let absent = Parent::Unix("/nonexistent/p".into());
        assert!(matches!(send(&absent).await, Err(HeartbeatError::Connect(_))));
    }
}
