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
