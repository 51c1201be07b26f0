//! Fixed forwards, in either direction.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use rustix::net::getsockname;
use tokio::io::AsyncWriteExt;
use tokio::time::{Instant, timeout_at};
use transport::{Endpoint, Stream, TcpHost};

use super::egress::{connect_failure, resolve_allowed};
use super::proxy_header;
use crate::config::Forward;
use crate::dial::dial;
use crate::limits::TunnelLimits;
use crate::policy::Asker;
use crate::policy::target::HostName;
use crate::proxy::Shared;
use crate::pump::{self, pump};
use crate::record::Record;

pub(crate) async fn serve(
    client: Stream,
    forward: &Forward,
    limits: &TunnelLimits,
    asker: Asker,
    shared: &Arc<Shared>,
    record: &mut Record,
) {
    record.target = Some(forward.target.to_string());
    let Some(target) = Box::pin(open(&client, forward, limits, asker, shared, record)).await else {
        // There is no way to say why in somebody else's protocol; a reset at least is no clean end.
        pump::reset(client);
        return;
    };
    let options = pump::Options::from(limits);
    record.end = pump(client, target, Vec::new(), options, &mut record.traffic).await.name();
}

async fn open(
    client: &Stream,
    forward: &Forward,
    limits: &TunnelLimits,
    asker: Asker,
    shared: &Arc<Shared>,
    record: &mut Record,
) -> Option<Stream> {
    let deadline = Instant::now() + limits.connect;
    let mut target = match connect(forward, limits, asker, shared, deadline, record).await {
        Ok(target) => target,
        Err((reason, detail)) => {
            record.fail(reason, detail);
            return None;
        }
    };
    if forward.proxy_protocol {
        let local = getsockname(client).ok().and_then(|address| SocketAddr::try_from(address).ok());
        let header = proxy_header::encode(record.peer(), local);
        match timeout_at(deadline, target.write_all(&header)).await {
            Ok(Ok(())) => {}
            _ => {
                record.fail("target-reset", "the target did not take the PROXY header");
                return None;
            }
        }
    }
    Some(target)
}

async fn connect(
    forward: &Forward,
    limits: &TunnelLimits,
    asker: Asker,
    shared: &Arc<Shared>,
    deadline: Instant,
    record: &mut Record,
) -> Result<Stream, (&'static str, String)> {
    let failed = |error: io::Error| (connect_failure(&error).1, error.to_string());
    let addresses = match &forward.target {
        // The configuration names the address: that is the rule.
        Endpoint::Tcp { host: TcpHost::Address(address), port } => vec![SocketAddr::new(*address, *port)],
        Endpoint::Tcp { host: TcpHost::Name(name), port } => {
            let name: HostName = name.parse().map_err(|error| ("name-not-resolved", format!("{error}")))?;
            resolve_allowed(&name, *port, &forward.rules, asker, shared, deadline).await?
        }
        other => {
            return other.connect(limits.connect).await.map_err(|error| match error {
                transport::Error::TimedOut { .. } => ("connect-timeout", error.to_string()),
                transport::Error::Connect { source, .. } => failed(source),
                other => ("connect-failed", other.to_string()),
            });
        }
    };
    let (stream, address) = dial(&addresses, deadline).await.map_err(failed)?;
    record.address = Some(address);
    Ok(stream)
}
