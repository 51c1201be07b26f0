//! The CONNECT proxy.
//!
//! ```text
//! head ──▶ rule ──▶ name resolved, every address judged ──▶ connected ──▶ 200 ──▶ [ClientHello checked] ──▶ tunnel
//!   └ 400 405 408 431  └ 403           └ 403 502 504             └ 502 504
//! ```

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, timeout_at};
use transport::Stream;

use super::say_and_close;
use crate::config::Egress;
use crate::dial::{dial, is_own_address};
use crate::http::answer;
use crate::http::head::{self, Head, Request};
use crate::limits::{Key, Permit, TunnelLimits};
use crate::policy::target::{Host, HostName};
use crate::policy::{Admission, Asker, Refusal, RuleSet};
use crate::proxy::Shared;
use crate::pump::{self, pump};
use crate::record::Record;
use crate::tls;

/// Read at a time while the head is not complete.
const CHUNK: usize = 2048;

pub(crate) async fn serve(
    stream: Stream,
    egress: &Egress,
    limits: &TunnelLimits,
    asker: Asker,
    shared: &Arc<Shared>,
    record: &mut Record,
) {
    // On the heap and gone before the tunnel: a tunnel lives long and should be small.
    let opened = Box::pin(open(stream, egress, limits, asker, shared, record)).await;
    let Some(Tunnel { client, target, early, rule }) = opened else { return };
    let options = pump::Options::from(limits);
    record.end = pump(client, target, early, options, &mut record.traffic).await.name();
    drop(rule);
}

struct Tunnel {
    client: Stream,
    target: Stream,
    early: Vec<u8>,
    rule: Option<Permit>,
}

async fn open(
    mut client: Stream,
    egress: &Egress,
    limits: &TunnelLimits,
    asker: Asker,
    shared: &Arc<Shared>,
    record: &mut Record,
) -> Option<Tunnel> {
    match negotiate(&mut client, egress, limits, asker, shared, record).await {
        Ok(mut ready) => {
            let answered = match ready.answer {
                Some(answer) => client.write_all(answer).await,
                None => Ok(()),
            };
            if let Err(error) = answered {
                record.fail("client-reset", error);
                return None;
            }
            if let Some(name) = ready.check_sni.take()
                && let Err((end, detail)) = check_sni(&mut client, &mut ready.early, &name, limits).await
            {
                record.fail(end, detail);
                return None;
            }
            Some(Tunnel { client, target: ready.target, early: ready.early, rule: ready.rule })
        }
        Err(no) => {
            record.end = no.reason;
            record.detail = no.detail;
            if no.status != 0 {
                say_and_close(client, &answer::refusal(no.status, no.reason)).await;
            }
            None
        }
    }
}

struct Ready {
    target: Stream,
    early: Vec<u8>,
    rule: Option<Permit>,
    answer: Option<&'static [u8]>,
    check_sni: Option<HostName>,
}

/// Why there is no tunnel: the answer's status (0 for none, when nobody is left to read it), the stable word for the
/// answer and the log, and the rest for the log alone.
struct No {
    status: u16,
    reason: &'static str,
    detail: Option<String>,
}

impl No {
    fn new(status: u16, reason: &'static str, detail: impl ToString) -> Self {
        Self { status, reason, detail: Some(detail.to_string()) }
    }
}

impl From<Refusal> for No {
    fn from(refusal: Refusal) -> Self {
        Self::new(403, refusal.name(), refusal)
    }
}

async fn negotiate(
    client: &mut Stream,
    egress: &Egress,
    limits: &TunnelLimits,
    asker: Asker,
    shared: &Arc<Shared>,
    record: &mut Record,
) -> Result<Ready, No> {
    let (head, bytes) = read_head(client, limits).await?;
    let (target, plain) = match head.request {
        Request::Connect(target) => (target, false),
        Request::Absolute(target) if egress.plain_http => (target, true),
        Request::Absolute(target) => {
            record.target = Some(target.to_string());
            return Err(No::new(
                405,
                "plain-http-not-allowed",
                "a plain HTTP request; only CONNECT is served",
            ));
        }
        Request::Origin { .. } => {
            return Err(No::new(400, "not-a-proxy-request", "a request without a host"));
        }
    };
    record.target = Some(target.to_string());
    let admission = egress.rules.admit(&target, asker, is_own_address)?;
    let (Admission::Name { entry, .. } | Admission::Address { entry, .. }) = admission;
    let entry = &egress.rules.entries()[entry];
    record.rule = Some(Arc::clone(&entry.name));
    let rule = match entry.max_connections {
        Some(max) => {
            let entered = shared.counts.enter(Key::Rule(Arc::clone(&entry.name)), max);
            Some(entered.map_err(|limit| No::new(503, limit, format!("{max} connections already")))?)
        }
        None => None,
    };
    let deadline = Instant::now() + limits.connect;
    let addresses = match admission {
        Admission::Address { address, .. } => vec![SocketAddr::new(address, target.port)],
        Admission::Name { name, .. } => {
            resolve_judged(name, target.port, &egress.rules, asker, shared, deadline).await?
        }
    };
    let (mut upstream, address) =
        dial(&addresses, deadline).await.map_err(|error| not_connected(&error, &addresses))?;
    record.address = Some(address);
    let check_sni = match (&target.host, entry.check_sni) {
        (Host::Name(name), true) => Some(name.clone()),
        _ => None,
    };
    if plain {
        let request = super::plain_http::rewrite(&bytes, head.len, &target)
            .ok_or_else(|| No::new(400, "bad-request-line", "the request cannot be rewritten"))?;
        let sent = timeout_at(deadline, upstream.write_all(&request)).await;
        if !matches!(sent, Ok(Ok(()))) {
            return Err(No::new(502, "target-reset", "the target did not take the request"));
        }
        return Ok(Ready { target: upstream, early: Vec::new(), rule, answer: None, check_sni: None });
    }
    let early = bytes[head.len..].to_vec();
    Ok(Ready { target: upstream, early, rule, answer: Some(answer::ESTABLISHED), check_sni })
}

/// Reads up to the end of the head, and perhaps some bytes of what follows.
async fn read_head(client: &mut Stream, limits: &TunnelLimits) -> Result<(Head, Vec<u8>), No> {
    let deadline = Instant::now() + limits.head;
    let mut bytes = Vec::with_capacity(CHUNK);
    loop {
        let before = bytes.len();
        bytes.reserve(CHUNK);
        let read = timeout_at(deadline, client.read_buf(&mut bytes)).await;
        match read {
            Err(_elapsed) => {
                let detail = format!("{before} bytes of a request head within {:?}", limits.head);
                return Err(No::new(408, "head-timeout", detail));
            }
            // Somebody looked whether the port is open.
            Ok(Ok(0)) if before == 0 => return Err(No { status: 0, reason: "probe", detail: None }),
            Ok(Ok(0)) => {
                return Err(No::new(
                    0,
                    "head-cut",
                    format!("{before} bytes of a request head, then the end"),
                ));
            }
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(No::new(0, "client-reset", error)),
        }
        match head::parse(&bytes, limits.max_head_bytes) {
            Ok(Some(head)) => return Ok((head, bytes)),
            Ok(None) => {}
            Err(error) => return Err(No::new(error.status(), error.name(), error)),
        }
    }
}

/// The addresses of a name that may be dialled.
pub(super) async fn resolve_allowed(
    name: &HostName,
    port: u16,
    rules: &RuleSet,
    asker: Asker,
    shared: &Shared,
    deadline: Instant,
) -> Result<Vec<SocketAddr>, (&'static str, String)> {
    let resolver = shared.resolver();
    let found = match timeout_at(deadline, resolver.resolve(name)).await {
        Ok(Ok(found)) => found,
        Ok(Err(error)) => return Err(("name-not-resolved", error.to_string())),
        Err(_elapsed) => return Err(("resolve-timeout", format!("no answer about {name} in time"))),
    };
    let judge = |address: IpAddr| rules.judge_resolved(address, port, asker, is_own_address);
    let mut refused = None;
    let mut allowed = Vec::with_capacity(found.len());
    for address in found {
        match judge(address) {
            Ok(()) => allowed.push(SocketAddr::new(crate::policy::address::canonical(address), port)),
            Err(refusal) => refused = Some(refusal),
        }
    }
    match (allowed.is_empty(), refused) {
        (false, _) => Ok(allowed),
        (true, Some(refusal)) => Err((refusal.name(), refusal.to_string())),
        (true, None) => Err(("name-not-resolved", format!("{name} has no address"))),
    }
}

async fn resolve_judged(
    name: &HostName,
    port: u16,
    rules: &RuleSet,
    asker: Asker,
    shared: &Shared,
    deadline: Instant,
) -> Result<Vec<SocketAddr>, No> {
    let allowed = resolve_allowed(name, port, rules, asker, shared, deadline).await;
    allowed.map_err(|(reason, detail)| {
        let status = match reason {
            "name-not-resolved" => 502,
            "resolve-timeout" => 504,
            _ => 403,
        };
        No::new(status, reason, detail)
    })
}

/// Reads the ClientHello behind the head and compares its server name.
async fn check_sni(
    client: &mut Stream,
    early: &mut Vec<u8>,
    expected: &HostName,
    limits: &TunnelLimits,
) -> Result<(), (&'static str, String)> {
    let deadline = Instant::now() + limits.head;
    loop {
        match tls::server_name(early) {
            Ok(tls::Hello::Incomplete) => {}
            Ok(tls::Hello::Named(name)) if name == *expected => return Ok(()),
            Ok(tls::Hello::Named(name)) => {
                return Err(("sni-differs", format!("the ClientHello names {name}")));
            }
            Ok(tls::Hello::Unnamed) => {
                return Err(("sni-missing", "the ClientHello names no server".to_owned()));
            }
            Err(error) => return Err(("not-tls", error.to_string())),
        }
        early.reserve(CHUNK);
        match timeout_at(deadline, client.read_buf(early)).await {
            Err(_elapsed) => {
                return Err(("hello-timeout", format!("no ClientHello within {:?}", limits.head)));
            }
            Ok(Ok(0)) => return Err(("hello-cut", "the end before a whole ClientHello".to_owned())),
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(("client-reset", error.to_string())),
        }
    }
}

fn not_connected(error: &io::Error, addresses: &[SocketAddr]) -> No {
    let tried = addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let (status, reason) = connect_failure(error);
    No::new(status, reason, format!("{tried}: {error}"))
}

/// The status and the stable word for a connection that did not come about.
pub(super) fn connect_failure(error: &io::Error) -> (u16, &'static str) {
    match error.kind() {
        io::ErrorKind::TimedOut => (504, "connect-timeout"),
        io::ErrorKind::ConnectionRefused => (502, "connect-refused"),
        _ if crate::accept::is_exhaustion(error) => (503, "out-of-descriptors"),
        _ => (502, "connect-failed"),
    }
}
