//! The enclave's boot heartbeat.
//!
//! The init of an enclave image connects to port 9000 of its parent, sends the byte 0xB7, waits for the same byte and
//! goes on booting; without an answer it stops (aws-nitro-enclaves-sdk-bootstrap, `init.c`).

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use transport::{Endpoint, Peer, Stream};

use super::within;
use crate::limits::TunnelLimits;
use crate::proxy::Shared;
use crate::record::Record;

/// The vsock port of the parent.
pub const PORT: u32 = 9000;
/// The byte that goes both ways.
pub const BEAT: u8 = 0xb7;

pub(crate) async fn serve(
    mut stream: Stream,
    limits: &TunnelLimits,
    record: &mut Record,
    shared: &Arc<Shared>,
) {
    match within(limits.head, beat(&mut stream)).await {
        Some(Ok(())) => {
            record.end = "finished";
            record.traffic.up = 1;
            record.traffic.down = 1;
            shared.booted(record.peer());
        }
        Some(Err(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => record.end = "probe",
        Some(Err(error)) => record.fail("bad-heartbeat", error),
        None => record.fail("head-timeout", format!("no heartbeat within {:?}", limits.head)),
    }
}

async fn beat(stream: &mut Stream) -> std::io::Result<()> {
    let mut byte = [0];
    stream.read_exact(&mut byte).await?;
    if byte != [BEAT] {
        let detail = format!("the byte {:#04x}, expected {BEAT:#04x}", byte[0]);
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, detail));
    }
    stream.write_all(&byte).await?;
    stream.shutdown().await
}

/// Answers heartbeats on `listen` until one came, from the context id `cid` if that is given, and says from whom.
///
/// # Errors
/// When the address cannot be listened on. `Ok(None)` when no heartbeat came within `limit`.
pub async fn wait_for_boot(
    listen: &Endpoint,
    cid: Option<u32>,
    limit: Duration,
) -> Result<Option<Peer>, transport::Error> {
    let listener = transport::Listener::bind(listen, transport::BindOptions::default()).await?;
    let wait = async {
        loop {
            let (mut stream, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(_) => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    continue;
                }
            };
            let wanted = match (cid, peer) {
                (Some(wanted), Peer::Vsock { cid, .. }) => cid.get() == wanted,
                _ => cid.is_none(),
            };
            // One byte each way; whoever holds the line longer is no enclave that boots.
            let answered = within(Duration::from_secs(5), beat(&mut stream)).await;
            if wanted && matches!(answered, Some(Ok(()))) {
                return peer;
            }
        }
    };
    Ok(within(limit, wait).await)
}
