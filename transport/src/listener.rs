//! [`Listener`]: bound sockets, and the life of a Unix socket's file.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use socket2::SockRef;
use tokio::net::{TcpListener, TcpSocket, UnixListener, UnixSocket, UnixStream};
use tokio::time::timeout;
use tokio_vsock::{VsockAddr, VsockListener};

use crate::stream::resolve;
use crate::{Endpoint, Error, Peer, Stream, TcpHost};

/// How long the owner of an existing socket file has to answer before it counts as busy, and so as alive.
const PROBE: Duration = Duration::from_secs(1);
/// How long the name of a `tcp:` endpoint may take to resolve.
const RESOLVE: Duration = Duration::from_secs(5);

/// What a caller may choose about a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BindOptions {
    /// Connections that may wait to be accepted. The system cuts it to `net.core.somaxconn`. On vsock a full queue is
    /// a reset for the next one, so the default is large.
    pub backlog: u32,
    /// Mode of a Unix socket's file; who may write to the file may connect.
    pub unix_mode: u32,
}

impl Default for BindOptions {
    /// 4096 waiting connections; a Unix socket only for its owner (0600).
    fn default() -> Self {
        Self { backlog: 4096, unix_mode: 0o600 }
    }
}

/// A bound socket of one of the three kinds. Dropping it closes it and removes the file of a Unix socket.
#[derive(Debug)]
pub struct Listener {
    kind: Kind,
    endpoint: Endpoint,
    /// Removes the file; after `kind` in drop order, when nobody can connect any more.
    _file: Option<SocketFile>,
}

#[derive(Debug)]
enum Kind {
    Vsock(VsockListener),
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    /// Binds and listens.
    ///
    /// A Unix socket's file has its mode before the first connection is possible. A file that is already there is
    /// replaced only when it is a socket that nobody answers on.
    ///
    /// # Errors
    /// [`Error::Bind`]; [`Error::SocketInUse`] and [`Error::NotASocket`] for a Unix path that is taken.
    pub async fn bind(endpoint: &Endpoint, options: BindOptions) -> Result<Self, Error> {
        let failed = |source| Error::Bind { endpoint: endpoint.clone(), source };
        match endpoint {
            Endpoint::Vsock { cid, port } => {
                let listener = VsockListener::bind(VsockAddr::new(cid.get(), port.get())).map_err(failed)?;
                let backlog = i32::try_from(options.backlog).unwrap_or(i32::MAX);
                SockRef::from(&listener).listen(backlog).map_err(failed)?;
                let endpoint = Endpoint::vsock(*cid, *port);
                Ok(Self { kind: Kind::Vsock(listener), endpoint, _file: None })
            }
            Endpoint::Unix { path } => {
                remove_stale(path, endpoint).await?;
                let (listener, file) = bind_unix(path, options).map_err(failed)?;
                Ok(Self { kind: Kind::Unix(listener), endpoint: endpoint.clone(), _file: Some(file) })
            }
            Endpoint::Tcp { host, port } => {
                let listener = bind_tcp(host, *port, options).await.map_err(failed)?;
                let local = listener.local_addr().map_err(failed)?;
                let endpoint = Endpoint::Tcp { host: TcpHost::Address(local.ip()), port: local.port() };
                Ok(Self { kind: Kind::Tcp(listener), endpoint, _file: None })
            }
        }
    }

    /// What is listened on: for TCP the address and port the system gave, so that port 0 becomes a real one.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Waits for the next connection; without a deadline, for a client may never come. What the client does next is
    /// the caller's to bound. Cancel safe.
    ///
    /// # Errors
    /// [`Error::Accept`]. The listener stays usable: after running out of descriptors (EMFILE, ENFILE) pause before
    /// the next call, or it fails at once again.
    pub async fn accept(&self) -> Result<(Stream, Peer), Error> {
        self.accept_any().await.map_err(|source| Error::Accept { endpoint: self.endpoint.clone(), source })
    }

    async fn accept_any(&self) -> io::Result<(Stream, Peer)> {
        match &self.kind {
            Kind::Vsock(listener) => {
                let (stream, address) = listener.accept().await?;
                Ok((Stream::accepted_vsock(stream), address.into()))
            }
            Kind::Unix(listener) => {
                let (stream, _unnamed) = listener.accept().await?;
                let peer = Peer::of_unix(&stream)?;
                Ok((stream.into(), peer))
            }
            Kind::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                Ok((Stream::accepted_tcp(stream)?, Peer::Tcp(address)))
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.kind {
            Kind::Vsock(listener) => listener.as_fd(),
            Kind::Unix(listener) => listener.as_fd(),
            Kind::Tcp(listener) => listener.as_fd(),
        }
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

async fn bind_tcp(host: &TcpHost, port: u16, options: BindOptions) -> io::Result<TcpListener> {
    let addresses = timeout(RESOLVE, resolve(host, port)).await.map_err(io::Error::from)??;
    let mut last = io::Error::new(io::ErrorKind::AddrNotAvailable, "the name has no address");
    for address in addresses {
        let listen = || {
            let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
            socket.set_reuseaddr(true)?;
            socket.bind(address)?;
            socket.listen(options.backlog)
        };
        match listen() {
            Ok(listener) => return Ok(listener),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Between bind and listen the file has its final mode and refuses connections, so there is no moment in which a
/// stranger could slip in.
fn bind_unix(path: &Path, options: BindOptions) -> io::Result<(UnixListener, SocketFile)> {
    let socket = UnixSocket::new_stream()?;
    socket.bind(path)?;
    let file = SocketFile::made_at(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(options.unix_mode))?;
    Ok((socket.listen(options.backlog)?, file))
}

/// Removes the socket a dead process left behind, and nothing else.
async fn remove_stale(path: &Path, endpoint: &Endpoint) -> Result<(), Error> {
    let failed = |source| Error::Bind { endpoint: endpoint.clone(), source };
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(Error::NotASocket { path: path.to_owned() });
    }
    match timeout(PROBE, UnixStream::connect(path)).await {
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
            _removed => Ok(()),
        },
        Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // A full queue (EAGAIN) or no answer: somebody holds it.
        Ok(Err(error)) if error.kind() != io::ErrorKind::WouldBlock => Err(failed(error)),
        _alive => Err(Error::SocketInUse { path: path.to_owned() }),
    }
}

/// The file of a Unix socket; dropped, it removes the file if that is still the one it made.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    fn made_at(path: &Path) -> io::Result<Self> {
        let metadata = fs::symlink_metadata(path)?;
        // Absolute, so that a later change of the working directory does not lead to another file.
        Ok(Self { path: std::path::absolute(path)?, device: metadata.dev(), inode: metadata.ino() })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| metadata.dev() == self.device && metadata.ino() == self.inode);
        if ours {
            // A file that cannot be removed now is found stale by the next listener.
            drop(fs::remove_file(&self.path));
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(5);

    async fn echo_once(listener: &Listener) -> Peer {
        let (mut stream, peer) = listener.accept().await.unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.unwrap();
        stream.write_all(&all).await.unwrap();
        peer
    }

    /// Writes, closes its write side, and reads what comes back: works only if half-close is passed on.
    async fn ask(endpoint: &Endpoint) -> Vec<u8> {
        let mut stream = endpoint.connect(DEADLINE).await.unwrap();
        stream.write_all(b"ping").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.unwrap();
        all
    }

    #[tokio::test]
    async fn tcp_there_and_back_with_half_close() {
        for text in ["tcp:127.0.0.1:0", "tcp:localhost:0"] {
            let listener = Listener::bind(&text.parse().unwrap(), BindOptions::default()).await.unwrap();
            let (peer, answer) = tokio::join!(echo_once(&listener), ask(listener.endpoint()));
            assert_eq!(answer, b"ping");
            assert!(matches!(peer, Peer::Tcp(address) if address.ip().is_loopback()), "{peer}");
        }
    }

    #[tokio::test]
    async fn unix_there_and_back_with_half_close() {
        let dir = tempfile::tempdir().unwrap();
        let endpoint = Endpoint::unix(dir.path().join("s")).unwrap();
        let listener = Listener::bind(&endpoint, BindOptions::default()).await.unwrap();
        let (peer, answer) = tokio::join!(echo_once(&listener), ask(&endpoint));
        assert_eq!(answer, b"ping");
        let pid = i32::try_from(std::process::id()).unwrap();
        assert!(matches!(peer, Peer::Unix { pid: Some(p), .. } if p == pid), "{peer}");
    }

    #[tokio::test]
    async fn nagle_is_off_on_both_ends() {
        let listener =
            Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap(), BindOptions::default()).await.unwrap();
        let (accepted, connected) = tokio::join!(listener.accept(), listener.endpoint().connect(DEADLINE));
        let (accepted, connected) = (accepted.unwrap().0, connected.unwrap());
        for stream in [&accepted, &connected] {
            assert!(SockRef::from(stream).tcp_nodelay().unwrap());
        }
    }

    #[tokio::test]
    async fn the_socket_file_has_its_mode_and_goes_with_the_listener() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let endpoint = Endpoint::unix(&path).unwrap();
        let options = BindOptions { unix_mode: 0o620, ..BindOptions::default() };
        let listener = Listener::bind(&endpoint, options).await.unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o620);
        drop(listener);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let endpoint = Endpoint::unix(&path).unwrap();
        let listener = Listener::bind(&endpoint, BindOptions::default()).await.unwrap();
        let (_, answer) = tokio::join!(echo_once(&listener), ask(&endpoint));
        assert_eq!(answer, b"ping");
    }

    #[tokio::test]
    async fn a_living_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let endpoint = Endpoint::unix(dir.path().join("s")).unwrap();
        let first = Listener::bind(&endpoint, BindOptions::default()).await.unwrap();
        let error = Listener::bind(&endpoint, BindOptions::default()).await.unwrap_err();
        assert!(matches!(error, Error::SocketInUse { .. }), "{error}");
        // The probe of the second bind waits in the queue of the first.
        drop(first.accept().await.unwrap());
        let (_, answer) = tokio::join!(echo_once(&first), ask(&endpoint));
        assert_eq!(answer, b"ping");
    }

    #[tokio::test]
    async fn a_socket_with_a_full_queue_is_alive() {
        let dir = tempfile::tempdir().unwrap();
        let endpoint = Endpoint::unix(dir.path().join("s")).unwrap();
        let options = BindOptions { backlog: 1, ..BindOptions::default() };
        let _first = Listener::bind(&endpoint, options).await.unwrap();
        let mut waiting = Vec::new();
        while let Ok(stream) = UnixStream::connect(endpoint.unix_path().unwrap()).await {
            waiting.push(stream);
        }
        let error = Listener::bind(&endpoint, options).await.unwrap_err();
        assert!(matches!(error, Error::SocketInUse { .. }), "{error}");
        let error = endpoint.connect(Duration::from_millis(20)).await.unwrap_err();
        assert!(error.is_timeout(), "{error}");
    }

    #[tokio::test]
    async fn a_file_that_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        fs::write(&path, "precious").unwrap();
        let target = Endpoint::unix(&path).unwrap();
        let error = Listener::bind(&target, BindOptions::default()).await.unwrap_err();
        assert!(matches!(error, Error::NotASocket { .. }), "{error}");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let target = Endpoint::unix(&link).unwrap();
        let error = Listener::bind(&target, BindOptions::default()).await.unwrap_err();
        assert!(matches!(error, Error::NotASocket { .. }), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[tokio::test]
    async fn a_successors_socket_file_survives_the_predecessor() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let endpoint = Endpoint::unix(&path).unwrap();
        let first = Listener::bind(&endpoint, BindOptions::default()).await.unwrap();
        fs::remove_file(&path).unwrap();
        let _second = Listener::bind(&endpoint, BindOptions::default()).await.unwrap();
        drop(first);
        assert!(path.exists());
    }

    #[tokio::test]
    async fn refused_and_missing_are_told_apart_from_silence() {
        let listener =
            Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap(), BindOptions::default()).await.unwrap();
        let endpoint = listener.endpoint().clone();
        drop(listener);
        let error = endpoint.connect(DEADLINE).await.unwrap_err();
        assert_eq!(error.io().map(io::Error::kind), Some(io::ErrorKind::ConnectionRefused));
        let dir = tempfile::tempdir().unwrap();
        let error = Endpoint::unix(dir.path().join("none")).unwrap().connect(DEADLINE).await.unwrap_err();
        assert_eq!(error.io().map(io::Error::kind), Some(io::ErrorKind::NotFound));
        let error = "vsock:any:1".parse::<Endpoint>().unwrap().connect(DEADLINE).await.unwrap_err();
        assert!(matches!(error, Error::NotConnectable { .. }), "{error}");
    }

    #[tokio::test]
    async fn the_first_address_that_answers_is_taken() {
        let good = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let addresses = [closed, good.local_addr().unwrap()];
        let stream = Stream::connect_any(&addresses, DEADLINE).await.unwrap();
        assert_eq!(stream.peer().unwrap(), Peer::Tcp(addresses[1]));
        let none = Stream::connect_any(&[], DEADLINE).await.unwrap_err();
        assert_eq!(none.kind(), io::ErrorKind::AddrNotAvailable);
    }
}
