//! PROXY protocol version 2: tells a target who the client of a forward is
//! (<https://www.haproxy.org/download/3.2/doc/proxy-protocol.txt>, section 2.2).

use std::net::SocketAddr;

use transport::Peer;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const PROXY: u8 = 0x21;
const UNSPEC: u8 = 0x00;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;
/// First of the type numbers for private use; the value is the vsock context id and port, big endian.
pub const TLV_VSOCK_PEER: u8 = 0xe0;

/// The header for a connection from `peer` that was accepted on `local`.
///
/// A TCP client is told as TCP over IPv4 or IPv6. A vsock client has no address family there: it is told as
/// unspecified with a private field of type [`TLV_VSOCK_PEER`]. A Unix client is unspecified.
pub fn encode(peer: Peer, local: Option<SocketAddr>) -> Vec<u8> {
    let (family, body) = match (peer, local) {
        (Peer::Tcp(SocketAddr::V4(from)), Some(SocketAddr::V4(to))) => {
            let addresses = [from.ip().octets(), to.ip().octets()].concat();
            (TCP_OVER_IPV4, with_ports(addresses, from.port(), to.port()))
        }
        (Peer::Tcp(SocketAddr::V6(from)), Some(SocketAddr::V6(to))) => {
            let addresses = [from.ip().octets(), to.ip().octets()].concat();
            (TCP_OVER_IPV6, with_ports(addresses, from.port(), to.port()))
        }
        (Peer::Vsock { cid, port }, _) => {
            let value = [cid.get().to_be_bytes(), port.get().to_be_bytes()].concat();
            (UNSPEC, [&[TLV_VSOCK_PEER, 0, 8][..], &value].concat())
        }
        _ => (UNSPEC, Vec::new()),
    };
    // At most 36 bytes of addresses.
    let len = u16::try_from(body.len()).unwrap_or_default().to_be_bytes();
    [&SIGNATURE[..], &[PROXY, family], &len, &body].concat()
}

fn with_ports(mut addresses: Vec<u8>, from: u16, to: u16) -> Vec<u8> {
    addresses.extend(from.to_be_bytes());
    addresses.extend(to.to_be_bytes());
    addresses
}

#[cfg(test)]
mod tests {
    use transport::{VsockCid, VsockPort};

    use super::*;

    #[test]
    fn headers_have_the_documented_bytes() {
        let peer = Peer::Tcp("192.0.2.1:4660".parse().unwrap());
        let local: SocketAddr = "198.51.100.2:443".parse().unwrap();
        let header = encode(peer, Some(local));
        let expected = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\x02\x01\xc6\x33\x64\x02\x12\x34\x01\xbb";
        assert_eq!(header, expected);
        let peer = Peer::Tcp("[2001:db8::1]:1".parse().unwrap());
        let header = encode(peer, Some("[2001:db8::2]:2".parse().unwrap()));
        assert_eq!(header.len(), 16 + 36);
        assert_eq!(&header[12..16], b"\x21\x21\0\x24");
        let peer = Peer::Vsock { cid: VsockCid::new(16), port: VsockPort::new(5) };
        assert_eq!(&encode(peer, None)[12..], b"\x21\0\0\x0b\xe0\0\x08\0\0\0\x10\0\0\0\x05");
    }
}
