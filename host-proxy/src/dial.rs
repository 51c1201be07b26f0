//! Connections to judged addresses, with a head start for the first (RFC 8305, "happy eyeballs").

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use transport::Stream;

/// Head start of an address before the next one is tried as well (RFC 8305 §5).
const HEAD_START: Duration = Duration::from_millis(250);
/// Most addresses of one name that are tried.
const MAX_ADDRESSES: usize = 16;

/// Connects to the first of these addresses that answers, and says which one. Cancel safe.
///
/// # Errors
/// The last address's error; [`io::ErrorKind::TimedOut`] when the deadline passed.
pub(crate) async fn dial(addresses: &[SocketAddr], deadline: Instant) -> io::Result<(Stream, SocketAddr)> {
    if let [address] = addresses {
        return Ok((connect(*address, deadline).await?, *address));
    }
    let mut waiting = interleave(addresses).into_iter();
    let mut tries = JoinSet::new();
    let mut last = io::Error::new(io::ErrorKind::AddrNotAvailable, "the name has no address");
    let mut next_start = Instant::now();
    loop {
        tokio::select! {
            () = sleep_until(next_start), if waiting.len() > 0 => {
                if let Some(address) = waiting.next() {
                    tries.spawn(async move { (connect(address, deadline).await, address) });
                }
                next_start = Instant::now() + HEAD_START;
            }
            Some(joined) = tries.join_next() => match joined.map_err(io::Error::other)? {
                (Ok(stream), address) => return Ok((stream, address)),
                (Err(error), _) => {
                    last = error;
                    // A refusal is an answer: no reason to wait before the next address.
                    next_start = Instant::now();
                }
            },
            else => return Err(last),
        }
    }
}

/// `connect_any` holds the deadline; a second timer around it would cost a wake-up of the driver for each connection.
async fn connect(address: SocketAddr, deadline: Instant) -> io::Result<Stream> {
    Stream::connect_any(&[address], deadline.saturating_duration_since(Instant::now())).await
}

/// Alternates the families, so that one broken family costs one head start (RFC 8305 §4).
fn interleave(addresses: &[SocketAddr]) -> Vec<SocketAddr> {
    let (mut six, mut four): (Vec<SocketAddr>, Vec<SocketAddr>) =
        addresses.iter().rev().copied().partition(SocketAddr::is_ipv6);
    let mut out = Vec::with_capacity(addresses.len());
    while out.len() < addresses.len().min(MAX_ADDRESSES) {
        out.extend(six.pop());
        out.extend(four.pop());
    }
    out.truncate(MAX_ADDRESSES);
    out
}

/// Whether packets to this address stay on this machine. The kernel's routing table knows: towards an own address it
/// chooses that very address as the source. Connecting a datagram socket sends nothing.
pub(crate) fn is_own_address(address: IpAddr) -> bool {
    let (any, port): (IpAddr, u16) = match address {
        IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED.into(), 9),
        IpAddr::V6(_) => (Ipv6Addr::UNSPECIFIED.into(), 9),
    };
    let local = || {
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect((address, port))?;
        socket.local_addr()
    };
    // No route means not reachable, and so not ours.
    local().is_ok_and(|local| local.ip() == address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_alternate() {
        let text = |list: &[SocketAddr]| list.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        let addresses: Vec<SocketAddr> = ["192.0.2.1:1", "192.0.2.2:1", "[2001:db8::1]:1", "192.0.2.3:1"]
            .map(|a| a.parse().unwrap())
            .into();
        assert_eq!(text(&interleave(&addresses)), "[2001:db8::1]:1 192.0.2.1:1 192.0.2.2:1 192.0.2.3:1");
    }

    #[test]
    fn the_loopback_is_this_machine() {
        assert!(is_own_address("127.0.0.1".parse().unwrap()));
        assert!(!is_own_address("192.0.2.1".parse().unwrap()));
    }

    #[tokio::test]
    async fn an_address_that_refuses_does_not_hold_up_the_next() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let open = listener.local_addr().unwrap();
        // Bound and not listening: connections are refused.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        let closed = socket.local_addr().unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        let (_stream, address) = dial(&[closed, open], deadline).await.unwrap();
        assert_eq!(address, open);
    }
}
