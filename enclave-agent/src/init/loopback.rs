//! The loopback interface: the only one that an enclave has, and down when the kernel starts.

use std::io;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with};

/// Linux numbers interfaces from 1, and the first of every network namespace is its loopback.
const INDEX: i32 = 1;
/// `RTM_NEWLINK`, rtnetlink(7).
const NEW_LINK: u16 = 16;
/// `NLM_F_REQUEST | NLM_F_ACK`, netlink(7).
const REQUEST_AND_ACK: u16 = 1 | 4;
/// `NLMSG_ERROR`: also the type of an acknowledgement, whose error is 0.
const ERROR: u16 = 2;
/// `IFF_UP`, netdevice(7).
const UP: u32 = 1;
/// The kernel answers within the call; this only keeps a broken one from holding up the boot.
const DEADLINE: Duration = Duration::from_secs(5);

/// Takes it up. The kernel gives it 127.0.0.1 and ::1 by itself.
pub(super) fn up() -> io::Result<()> {
    // NETLINK_ROUTE is protocol 0, the default.
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    sendto(&socket, &request(), SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    let deadline = Timespec::try_from(DEADLINE).map_err(|_| io::ErrorKind::InvalidInput)?;
    if poll(&mut [PollFd::new(&socket, PollFlags::IN)], Some(&deadline))? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let mut answer = [0; 512];
    let (len, _) = recv(&socket, &mut answer, RecvFlags::empty())?;
    acknowledged(answer.get(..len).unwrap_or_default())
}

/// `struct nlmsghdr` and `struct ifinfomsg`.
fn request() -> [u8; 32] {
    let mut message = [0; 32];
    message[0..4].copy_from_slice(&32_u32.to_ne_bytes());
    message[4..6].copy_from_slice(&NEW_LINK.to_ne_bytes());
    message[6..8].copy_from_slice(&REQUEST_AND_ACK.to_ne_bytes());
    message[20..24].copy_from_slice(&INDEX.to_ne_bytes());
    message[24..28].copy_from_slice(&UP.to_ne_bytes());
    message[28..32].copy_from_slice(&UP.to_ne_bytes());
    message
}

/// `struct nlmsghdr` and the start of `struct nlmsgerr`.
fn acknowledged(answer: &[u8]) -> io::Result<()> {
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes);
    let error = answer.get(16..20).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    match (kind, error) {
        (Some(ERROR), Some(0)) => Ok(()),
        (Some(ERROR), Some(error)) => Err(io::Error::from_raw_os_error(error.saturating_neg())),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "not an acknowledgement")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(kind: u16, error: i32) -> Vec<u8> {
        let mut message = vec![0; 36];
        message[4..6].copy_from_slice(&kind.to_ne_bytes());
        message[16..20].copy_from_slice(&error.to_ne_bytes());
        message
    }

    #[test]
    fn an_acknowledgement_is_an_error_of_zero() {
        acknowledged(&answer(ERROR, 0)).unwrap();
        let error = acknowledged(&answer(ERROR, -1)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(1), "EPERM");
        assert!(acknowledged(&answer(NEW_LINK, 0)).is_err());
        for len in 0..20 {
            assert!(acknowledged(&answer(ERROR, 0)[..len]).is_err(), "{len} bytes");
        }
    }

    /// The kernel reads the message as meant: without the right it refuses for that reason, with it the interface is
    /// up already.
    #[test]
    fn the_kernel_understands_the_request() {
        match up() {
            Ok(()) => {}
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}"),
        }
    }
}
