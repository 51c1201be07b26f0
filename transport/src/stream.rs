//! [`Stream`]: a connected socket, and [`Peer`]: who is at its other end.

use std::fmt;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_vsock::{VsockAddr, VsockStream};

use crate::{Endpoint, Error, TcpHost, VsockCid, VsockPort};

/// Pause before a Unix listener whose queue is full is tried again; the kernel offers no event to wait on.
const FULL_QUEUE_PAUSE: Duration = Duration::from_millis(5);

/// A connected socket of one of the three kinds.
///
/// Shutting down the write side sends the end of the stream and leaves the read side open. TCP sockets have Nagle's
/// algorithm off. Dropping the stream closes it.
#[derive(Debug)]
pub struct Stream(Kind);

#[derive(Debug)]
enum Kind {
    Vsock(VsockStream),
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Endpoint {
    /// Connects, with `deadline` for everything: the look-up of the name and every address it has. Cancel safe.
    ///
    /// An address that does not answer leaves the other addresses of the same name their share of the time.
    ///
    /// # Errors
    /// [`Error::NotConnectable`], [`Error::Resolve`], [`Error::Connect`] or [`Error::TimedOut`].
    pub async fn connect(&self, deadline: Duration) -> Result<Stream, Error> {
        match timeout(deadline, self.connect_unbounded(deadline)).await {
            Ok(result) => result,
            Err(_elapsed) => Err(Error::TimedOut { endpoint: self.clone(), after: deadline }),
        }
    }

    async fn connect_unbounded(&self, deadline: Duration) -> Result<Stream, Error> {
        let failed = |source: io::Error| {
            if source.kind() == io::ErrorKind::TimedOut {
                Error::TimedOut { endpoint: self.clone(), after: deadline }
            } else {
                Error::Connect { endpoint: self.clone(), source }
            }
        };
        match self {
            Self::Vsock { cid: VsockCid::ANY, .. } => Err(Error::NotConnectable { endpoint: self.clone() }),
            Self::Vsock { cid, port } => {
                let stream = VsockStream::connect(VsockAddr::new(cid.get(), port.get())).await;
                Ok(Stream(Kind::Vsock(stream.map_err(failed)?)))
            }
            Self::Unix { path } => loop {
                match UnixStream::connect(path).await {
                    Ok(stream) => return Ok(stream.into()),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(FULL_QUEUE_PAUSE).await,
                    Err(error) => return Err(failed(error)),
                }
            },
            Self::Tcp { host, port } => {
                let addresses = resolve(host, *port)
                    .await
                    .map_err(|source| Error::Resolve { endpoint: self.clone(), source })?;
                Stream::connect_any(&addresses, deadline).await.map_err(failed)
            }
        }
    }
}

impl Stream {
    /// Connects to the first of these addresses that answers, in their order; for callers that resolved a name
    /// themselves and must connect to the very addresses they judged. Cancel safe.
    ///
    /// # Errors
    /// The last address's error; [`io::ErrorKind::TimedOut`] when none answered in time.
    pub async fn connect_any(addresses: &[SocketAddr], deadline: Duration) -> io::Result<Self> {
        let end = Instant::now() + deadline;
        let mut last = io::Error::new(io::ErrorKind::AddrNotAvailable, "the name has no address");
        for (done, address) in addresses.iter().enumerate() {
            let left = u32::try_from(addresses.len() - done).unwrap_or(u32::MAX);
            let share = end.saturating_duration_since(Instant::now()) / left;
            last = match timeout_at(Instant::now() + share, connect_tcp(*address)).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => error,
                Err(_elapsed) => io::ErrorKind::TimedOut.into(),
            };
        }
        Err(last)
    }

    pub(crate) fn accepted_tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self(Kind::Tcp(stream)))
    }

    pub(crate) fn accepted_vsock(stream: VsockStream) -> Self {
        Self(Kind::Vsock(stream))
    }

    /// Who is at the other end.
    ///
    /// # Errors
    /// The system's, as when the connection is already reset.
    pub fn peer(&self) -> io::Result<Peer> {
        match &self.0 {
            Kind::Vsock(stream) => stream.peer_addr().map(Peer::from),
            Kind::Unix(stream) => Peer::of_unix(stream),
            Kind::Tcp(stream) => stream.peer_addr().map(Peer::Tcp),
        }
    }

    /// Says what a close without a proper end looks like to the peer of a TCP connection: with `true` a reset, also when
    /// this process dies. Unix and vsock sockets know no such thing, and nothing is done.
    ///
    /// # Errors
    /// The system's.
    pub fn set_reset_on_close(&self, on: bool) -> io::Result<()> {
        match &self.0 {
            // With a linger time of zero, close(2) sends a reset and drops what was not delivered.
            Kind::Tcp(stream) => SockRef::from(stream).set_linger(on.then_some(Duration::ZERO)),
            Kind::Vsock(_) | Kind::Unix(_) => Ok(()),
        }
    }

    /// Whether this is a vsock connection.
    pub fn is_vsock(&self) -> bool {
        matches!(self.0, Kind::Vsock(_))
    }

    /// Whether [`ready`](Self::ready) and [`try_io`](Self::try_io) work: on TCP and Unix sockets they do. On vsock
    /// they do not; splicing saves nothing there, for the kernel has no splice on a vsock socket and copies anyway.
    pub fn supports_try_io(&self) -> bool {
        !self.is_vsock()
    }

    /// Waits until the socket is ready for `interest`. Cancel safe.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] on vsock, see [`supports_try_io`](Self::supports_try_io).
    pub async fn ready(&self, interest: Interest) -> io::Result<tokio::io::Ready> {
        match &self.0 {
            Kind::Vsock(_) => Err(io::ErrorKind::Unsupported.into()),
            Kind::Unix(stream) => stream.ready(interest).await,
            Kind::Tcp(stream) => stream.ready(interest).await,
        }
    }

    /// Runs a system call on the raw descriptor, such as splice(2), and clears the readiness when it would block.
    ///
    /// # Errors
    /// What `f` returns; [`io::ErrorKind::WouldBlock`] when the socket is not ready;
    /// [`io::ErrorKind::Unsupported`] on vsock.
    pub fn try_io<R>(&self, interest: Interest, f: impl FnOnce() -> io::Result<R>) -> io::Result<R> {
        match &self.0 {
            Kind::Vsock(_) => Err(io::ErrorKind::Unsupported.into()),
            Kind::Unix(stream) => stream.try_io(interest, f),
            Kind::Tcp(stream) => stream.try_io(interest, f),
        }
    }

    /// Polls for readability or writability, for those who pump in a `poll` function.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] on vsock.
    pub fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &self.0 {
            Kind::Vsock(_) => Poll::Ready(Err(io::ErrorKind::Unsupported.into())),
            Kind::Unix(stream) => stream.poll_read_ready(cx),
            Kind::Tcp(stream) => stream.poll_read_ready(cx),
        }
    }

    /// As [`poll_read_ready`](Self::poll_read_ready), for writing.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] on vsock.
    pub fn poll_write_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &self.0 {
            Kind::Vsock(_) => Poll::Ready(Err(io::ErrorKind::Unsupported.into())),
            Kind::Unix(stream) => stream.poll_write_ready(cx),
            Kind::Tcp(stream) => stream.poll_write_ready(cx),
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "the callers hold the deadline")]
async fn connect_tcp(address: SocketAddr) -> io::Result<Stream> {
    Stream::accepted_tcp(TcpStream::connect(address).await?)
}

/// All addresses of a host; a literal address without asking anybody.
pub(crate) async fn resolve(host: &TcpHost, port: u16) -> io::Result<Vec<SocketAddr>> {
    match host {
        TcpHost::Address(address) => Ok(vec![SocketAddr::new(*address, port)]),
        TcpHost::Name(name) => Ok(tokio::net::lookup_host((name.as_str(), port)).await?.collect()),
    }
}

impl From<UnixStream> for Stream {
    fn from(stream: UnixStream) -> Self {
        Self(Kind::Unix(stream))
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            Kind::Vsock(stream) => Pin::new(stream).poll_read(cx, buf),
            Kind::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
            Kind::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().0 {
            Kind::Vsock(stream) => Pin::new(stream).poll_write(cx, buf),
            Kind::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
            Kind::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().0 {
            Kind::Vsock(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Kind::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Kind::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.0 {
            Kind::Vsock(stream) => stream.is_write_vectored(),
            Kind::Unix(stream) => stream.is_write_vectored(),
            Kind::Tcp(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            Kind::Vsock(stream) => Pin::new(stream).poll_flush(cx),
            Kind::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Kind::Tcp(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            Kind::Vsock(stream) => Pin::new(stream).poll_shutdown(cx),
            Kind::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Kind::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Kind::Vsock(stream) => stream.as_fd(),
            Kind::Unix(stream) => stream.as_fd(),
            Kind::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

/// The other end of a connection, as the kernel reports it; for logs, and for rules on a vsock peer's context id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// A vsock peer. The context id is given by the hypervisor; the port is the peer's choice.
    Vsock {
        /// Context id.
        cid: VsockCid,
        /// Source port.
        port: VsockPort,
    },
    /// A process on this machine; its ids as they were when it connected.
    Unix {
        /// Process id, when the kernel gives it.
        pid: Option<i32>,
        /// User id.
        uid: u32,
    },
    /// A TCP peer's address and source port.
    Tcp(SocketAddr),
}

impl Peer {
    pub(crate) fn of_unix(stream: &UnixStream) -> io::Result<Self> {
        let credentials = stream.peer_cred()?;
        Ok(Self::Unix { pid: credentials.pid(), uid: credentials.uid() })
    }
}

impl From<VsockAddr> for Peer {
    fn from(address: VsockAddr) -> Self {
        Self::Vsock { cid: VsockCid::new(address.cid()), port: VsockPort::new(address.port()) }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
            Self::Unix { pid: Some(pid), uid } => write!(f, "unix:pid={pid},uid={uid}"),
            Self::Unix { pid: None, uid } => write!(f, "unix:uid={uid}"),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}
