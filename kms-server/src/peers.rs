//! How many connections one peer may hold, so that it cannot take all of them.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Counts connections by address.
#[derive(Debug)]
pub(crate) struct Peers {
    limit: usize,
    /// Only those with connections, so no longer than connections are many.
    open: Mutex<HashMap<IpAddr, usize>>,
}

/// One connection of a peer; dropped, there is room for another.
#[derive(Debug)]
pub(crate) struct Place {
    peers: Arc<Peers>,
    peer: IpAddr,
}

impl Peers {
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit, open: Mutex::default() }
    }

    /// A place for a connection from `address`; `None` when it has enough.
    pub(crate) fn admit(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let peer = owner(address);
        let mut open = self.open();
        let count = open.entry(peer).or_default();
        if *count >= self.limit {
            return None;
        }
        *count += 1;
        Some(Place { peers: Arc::clone(self), peer })
    }

    fn open(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.peers.open();
        if let Some(count) = open.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.peer);
            }
        }
    }
}

/// Who has an address: with IPv6 whoever has the /64 network around it (RFC 6177), with IPv4 in IPv6 the IPv4 address.
fn owner(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let network = u128::from(address) & !u128::from(u64::MAX);
            IpAddr::V6(Ipv6Addr::from(network))
        }
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_peer_does_not_take_the_places_of_others() {
        let peers = Arc::new(Peers::new(2));
        let admit = |address: &str| peers.admit(address.parse().unwrap());
        let places = [admit("192.0.2.1"), admit("::ffff:192.0.2.1")];
        assert!(places.iter().all(Option::is_some));
        assert!(admit("192.0.2.1").is_none());
        let other = admit("192.0.2.2");
        assert!(other.is_some());
        drop(places);
        assert!(admit("192.0.2.1").is_some());
        drop(other);
        assert!(peers.open().is_empty(), "nobody is remembered");
    }

    #[test]
    fn a_network_of_ipv6_is_one_peer() {
        let peers = Arc::new(Peers::new(1));
        let _place = peers.admit("2001:db8::1".parse().unwrap()).unwrap();
        assert!(peers.admit("2001:db8::ffff:1".parse().unwrap()).is_none());
        assert!(peers.admit("2001:db8:0:1::1".parse().unwrap()).is_some());
    }
}
