//! The Nitro Security Module: the device of an enclave, or a stand-in behind a Unix socket.
//!
//! Both answer the same requests, and nothing in this project behaves differently for one or the other: a document of
//! the stand-in is worth nothing to a verifier that trusts the AWS root.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use attestation::{Pcr, PcrIndex};
use aws_nitro_enclaves_nsm_api::api::ErrorCode;
pub use aws_nitro_enclaves_nsm_api::api::{Request, Response};
use aws_nitro_enclaves_nsm_api::driver::{nsm_exit, nsm_init, nsm_process_request};
use serde_bytes::ByteBuf;
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use transport::{Endpoint, ParseEndpointError, frame};
use zeroize::Zeroizing;

/// The device file that the driver's library opens.
const DEVICE: &str = "/dev/nsm";
/// Longest request and response of the driver (`NSM_REQUEST_MAX_SIZE`, `NSM_RESPONSE_MAX_SIZE`).
const MAX_REQUEST: usize = 0x1000;
const MAX_RESPONSE: usize = 0x3000;
/// Deepest nesting in a response: a map in a map, and an array in that.
const MAX_DEPTH: usize = 4;
/// Most requests made for one document; only an internal error of the module is worth a second one.
const MAX_ATTEMPTS: u32 = 3;

/// What an NSM is asked for. Calls block, for as long as 120 s in the driver: use [`call`] or [`attest`] from async
/// code.
pub trait Nsm: Send + Sync {
    /// Has one request of the driver's protocol answered; the answer may be [`Response::Error`].
    ///
    /// # Errors
    /// [`NsmError`] when there is no answer.
    fn request(&self, request: Request) -> Result<Response, NsmError>;

    /// A signed attestation document that carries these fields, as COSE_Sign1 bytes.
    ///
    /// # Errors
    /// [`NsmError`].
    fn attest(&self, fields: &AttestFields) -> Result<Vec<u8>, NsmError> {
        match answer(self.request(request(fields))?)? {
            Response::Attestation { document } => Ok(document),
            _ => Err(NsmError::Response),
        }
    }

    /// Random bytes of the module, 256 at present and never none.
    ///
    /// # Errors
    /// [`NsmError`].
    fn random(&self) -> Result<Zeroizing<Vec<u8>>, NsmError> {
        match answer(self.request(Request::GetRandom)?)? {
            Response::GetRandom { random } if !random.is_empty() => Ok(Zeroizing::new(random)),
            _ => Err(NsmError::Response),
        }
    }

    /// A platform configuration register.
    ///
    /// # Errors
    /// [`NsmError`].
    fn describe_pcr(&self, index: PcrIndex) -> Result<Register, NsmError> {
        match answer(self.request(Request::DescribePCR { index: index.get().into() })?)? {
            Response::DescribePCR { lock, data } => Ok(Register { locked: lock, value: register(&data)? }),
            _ => Err(NsmError::Response),
        }
    }

    /// Extends a register: its new value is SHA-384 over the old one and `data`.
    ///
    /// # Errors
    /// [`NsmError`]; [`NsmError::is_locked_register`] for one that is locked.
    fn extend_pcr(&self, index: PcrIndex, data: Vec<u8>) -> Result<Pcr, NsmError> {
        match answer(self.request(Request::ExtendPCR { index: index.get().into(), data })?)? {
            Response::ExtendPCR { data } => register(&data),
            _ => Err(NsmError::Response),
        }
    }

    /// Locks a register until the enclave ends. Documents show locked registers only.
    ///
    /// # Errors
    /// [`NsmError`]; [`NsmError::is_locked_register`] for one that is locked already.
    fn lock_pcr(&self, index: PcrIndex) -> Result<(), NsmError> {
        match answer(self.request(Request::LockPCR { index: index.get().into() })?)? {
            Response::LockPCR => Ok(()),
            _ => Err(NsmError::Response),
        }
    }
}

/// A platform configuration register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Register {
    /// Whether it can still be extended; documents show locked registers only.
    pub locked: bool,
    /// Its value.
    pub value: Pcr,
}

/// What the caller wants to have signed, with the module's limits: 512, 512 and 1024 bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttestFields {
    /// Bound data; 64 bytes of report data in the dstack protocol.
    pub user_data: Option<Vec<u8>>,
    /// A verifier's challenge.
    pub nonce: Option<Vec<u8>>,
    /// A public key of the enclave.
    pub public_key: Option<Vec<u8>>,
}

/// Which NSM to ask.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NsmSource {
    /// `/dev/nsm`.
    #[default]
    Device,
    /// A process that speaks the driver's protocol in frames over a Unix socket.
    Socket(PathBuf),
}

impl NsmSource {
    /// Opens it.
    ///
    /// # Errors
    /// [`NsmError::Open`] when there is no device.
    pub fn open(&self) -> Result<Arc<dyn Nsm>, NsmError> {
        Ok(match self {
            Self::Device => Arc::new(NsmDevice::open()?),
            Self::Socket(path) => Arc::new(NsmSocket { path: path.clone() }),
        })
    }
}

impl FromStr for NsmSource {
    type Err = ParseNsmError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == DEVICE {
            return Ok(Self::Device);
        }
        match text.parse::<Endpoint>()? {
            Endpoint::Unix { path } => Ok(Self::Socket(path)),
            Endpoint::Vsock { .. } | Endpoint::Tcp { .. } => Err(ParseNsmError::Kind),
        }
    }
}

/// Why a text names no NSM.
#[derive(Debug, thiserror::Error)]
pub enum ParseNsmError {
    /// Not an endpoint at all.
    #[error("neither {DEVICE} nor unix:PATH")]
    Endpoint(#[from] ParseEndpointError),
    /// An endpoint that is not on this machine.
    #[error("an NSM is {DEVICE} or unix:PATH, never behind a network")]
    Kind,
}

/// Why there is no document.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NsmError {
    /// The device or the socket could not be opened.
    #[error("cannot open the NSM at {at}")]
    Open {
        /// Device file or endpoint.
        at: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The exchange over the socket failed.
    #[error("asking the NSM at {at}")]
    Exchange {
        /// The endpoint.
        at: String,
        /// What failed.
        source: frame::Error,
    },
    /// The request could not be encoded.
    #[error("cannot encode the request to the NSM")]
    Encode,
    /// The response is not one of the driver's protocol, or answers another request.
    #[error("the NSM's response is not an answer to the request")]
    Response,
    /// The module answered with an error code.
    #[error("the NSM answered {code}")]
    Code {
        /// The driver's name of the code.
        code: &'static str,
    },
    /// The module did not answer in time.
    #[error("no answer from the NSM within {after:?}")]
    TimedOut {
        /// The deadline that passed.
        after: Duration,
    },
    /// The thread that asked the module ended unexpectedly.
    #[error("the NSM call did not finish")]
    Aborted,
}

impl NsmError {
    /// Whether the module refused because a register is locked.
    pub fn is_locked_register(&self) -> bool {
        matches!(self, Self::Code { code: "ReadOnlyIndex" })
    }

    fn is_transient(&self) -> bool {
        matches!(self, Self::Code { code: "InternalError" } | Self::Exchange { .. })
    }
}

/// Asks for a document away from the async threads, within `deadline` for all attempts together.
///
/// A dropped future leaves the call running on its thread; the module cannot be interrupted.
///
/// # Errors
/// [`NsmError`]; internal errors of the module and a broken exchange are tried again, at most three times.
pub async fn attest(
    nsm: &Arc<dyn Nsm>,
    fields: AttestFields,
    deadline: Duration,
) -> Result<Vec<u8>, NsmError> {
    call(nsm, deadline, move |nsm| {
        let mut attempt = 1;
        loop {
            match nsm.attest(&fields) {
                Err(error) if error.is_transient() && attempt < MAX_ATTEMPTS => attempt += 1,
                result => return result,
            }
        }
    })
    .await
}

/// Makes calls to a module away from the async threads, within `deadline` for all of them together.
///
/// A dropped future leaves the calls running on their thread; the module cannot be interrupted.
///
/// # Errors
/// Those of `calls`, and [`NsmError::TimedOut`].
pub async fn call<T: Send + 'static>(
    nsm: &Arc<dyn Nsm>,
    deadline: Duration,
    calls: impl FnOnce(&dyn Nsm) -> Result<T, NsmError> + Send + 'static,
) -> Result<T, NsmError> {
    let nsm = Arc::clone(nsm);
    match timeout(deadline, spawn_blocking(move || calls(&*nsm))).await {
        Ok(Ok(result)) => result,
        Ok(Err(_join)) => Err(NsmError::Aborted),
        Err(_elapsed) => Err(NsmError::TimedOut { after: deadline }),
    }
}

/// The module of the enclave this process runs in.
#[derive(Debug)]
pub struct NsmDevice {
    fd: i32,
}

impl NsmDevice {
    /// Opens `/dev/nsm`.
    ///
    /// # Errors
    /// [`NsmError::Open`].
    pub fn open() -> Result<Self, NsmError> {
        let failed = |source| NsmError::Open { at: DEVICE.to_owned(), source };
        // The driver's library keeps the reason to itself, so ask for it first.
        std::fs::OpenOptions::new().read(true).write(true).open(DEVICE).map_err(failed)?;
        match nsm_init() {
            fd if fd >= 0 => Ok(Self { fd }),
            _ => Err(failed(io::ErrorKind::Other.into())),
        }
    }
}

impl Nsm for NsmDevice {
    fn request(&self, request: Request) -> Result<Response, NsmError> {
        Ok(nsm_process_request(self.fd, request))
    }
}

impl Drop for NsmDevice {
    fn drop(&mut self) {
        nsm_exit(self.fd);
    }
}

/// A stand-in for the module: frames of the driver's CBOR over a Unix socket, one connection a request.
#[derive(Debug)]
struct NsmSocket {
    path: PathBuf,
}

/// The driver gives the module as long.
const SOCKET_TIMEOUT: Duration = Duration::from_secs(120);

impl Nsm for NsmSocket {
    fn request(&self, request: Request) -> Result<Response, NsmError> {
        ask_with(&request, |request| exchange(&self.path, request))
    }
}

/// Encodes the request, has it answered, decodes the answer.
pub(crate) fn ask_with(
    request: &Request,
    exchange: impl FnOnce(&[u8]) -> Result<Vec<u8>, NsmError>,
) -> Result<Response, NsmError> {
    let mut encoded = Vec::new();
    ciborium::into_writer(request, &mut encoded).map_err(|_| NsmError::Encode)?;
    decode(&exchange(&encoded)?)
}

fn exchange(path: &Path, request: &[u8]) -> Result<Vec<u8>, NsmError> {
    let at = || format!("unix:{}", path.display());
    let failed = |source| NsmError::Exchange { at: at(), source };
    let open = || {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(SOCKET_TIMEOUT))?;
        stream.set_write_timeout(Some(SOCKET_TIMEOUT))?;
        Ok(stream)
    };
    let mut stream = open().map_err(|source| NsmError::Open { at: at(), source })?;
    frame::write(&mut stream, request, MAX_REQUEST).map_err(|error| match error {
        // The device answers so when a request is longer than it takes.
        frame::Error::TooLong { .. } => NsmError::Code { code: "InputTooLarge" },
        error => failed(error),
    })?;
    frame::read(&mut stream, MAX_RESPONSE)
        .map_err(failed)?
        .ok_or_else(|| failed(io::Error::from(io::ErrorKind::UnexpectedEof).into()))
}

/// Not with serde_cbor, which the driver's library uses on its own device: whoever holds the socket writes this.
fn decode(response: &[u8]) -> Result<Response, NsmError> {
    let mut rest = response;
    let decoded = ciborium::de::from_reader_with_recursion_limit(&mut rest, MAX_DEPTH)
        .map_err(|_| NsmError::Response)?;
    if rest.is_empty() { Ok(decoded) } else { Err(NsmError::Response) }
}

pub(crate) fn request(fields: &AttestFields) -> Request {
    let AttestFields { user_data, nonce, public_key } = fields;
    let bytes = |field: &Option<Vec<u8>>| field.clone().map(ByteBuf::from);
    Request::Attestation { user_data: bytes(user_data), nonce: bytes(nonce), public_key: bytes(public_key) }
}

/// An answer that is no error.
fn answer(response: Response) -> Result<Response, NsmError> {
    match response {
        Response::Error(code) => Err(NsmError::Code { code: code_name(&code) }),
        response => Ok(response),
    }
}

fn register(data: &[u8]) -> Result<Pcr, NsmError> {
    <[u8; Pcr::LEN]>::try_from(data).map(Pcr::new).map_err(|_| NsmError::Response)
}

fn code_name(code: &ErrorCode) -> &'static str {
    match code {
        ErrorCode::Success => "Success",
        ErrorCode::InvalidArgument => "InvalidArgument",
        ErrorCode::InvalidIndex => "InvalidIndex",
        ErrorCode::InvalidResponse => "InvalidResponse",
        ErrorCode::ReadOnlyIndex => "ReadOnlyIndex",
        ErrorCode::InvalidOperation => "InvalidOperation",
        ErrorCode::BufferTooSmall => "BufferTooSmall",
        ErrorCode::InputTooLarge => "InputTooLarge",
        ErrorCode::InternalError => "InternalError",
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    /// A module behind a socket that gives these responses, one a connection, and returns the requests.
    fn scripted(
        responses: Vec<Vec<u8>>,
    ) -> (tempfile::TempDir, NsmSocket, std::thread::JoinHandle<Vec<Vec<u8>>>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nsm");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || {
            let answer = |response: Vec<u8>| {
                let (mut stream, _) = listener.accept().unwrap();
                let request = frame::read(&mut stream, MAX_REQUEST).unwrap().unwrap();
                frame::write(&mut stream, &response, usize::MAX).unwrap();
                request
            };
            responses.into_iter().map(answer).collect()
        });
        (dir, NsmSocket { path }, thread)
    }

    fn encoded(response: &Response) -> Vec<u8> {
        let mut out = Vec::new();
        ciborium::into_writer(response, &mut out).unwrap();
        out
    }

    #[test]
    fn the_request_is_the_drivers() {
        let (_dir, nsm, thread) = scripted(vec![encoded(&Response::Attestation { document: vec![1, 2, 3] })]);
        let fields = AttestFields { user_data: Some(vec![0xaa; 64]), ..AttestFields::default() };
        assert_eq!(nsm.attest(&fields).unwrap(), [1, 2, 3]);
        // reference/kms-protocol.md §13.6
        let expected = format!(
            "a16b4174746573746174696f6ea369757365725f646174615840{}656e6f6e6365f66a7075626c69635f6b6579f6",
            "aa".repeat(64)
        );
        assert_eq!(hex::encode(&thread.join().unwrap()[0]), expected);
    }

    #[test]
    fn an_error_code_keeps_its_name() {
        for name in ["InvalidArgument", "BufferTooSmall", "InputTooLarge", "InvalidOperation"] {
            let (_dir, nsm, _thread) = scripted(vec![encoded_error(name)]);
            let error = nsm.attest(&AttestFields::default()).unwrap_err();
            assert_eq!(error.to_string(), format!("the NSM answered {name}"));
        }
    }

    fn encoded_error(name: &str) -> Vec<u8> {
        let mut out = vec![0xa1, 0x65];
        out.extend(b"Error");
        out.push(0x60 | u8::try_from(name.len()).unwrap());
        out.extend(name.as_bytes());
        out
    }

    #[test]
    fn hostile_responses_are_refused() {
        let good = encoded(&Response::Attestation { document: vec![7; 40] });
        let mut trailing = good.clone();
        trailing.push(0);
        let other = encoded(&Response::LockPCR);
        // A byte string of 2^62 bytes, a bomb of nested arrays, an endless chain of tags.
        let huge = b"\xa1\x6bAttestation\xa1\x68document\x5b\x40\0\0\0\0\0\0\0".to_vec();
        let bomb = vec![0x9f; 0x2000];
        let tags = vec![0xc1; 0x2000];
        for response in [trailing, other, huge, bomb, tags, vec![], b"\xff".to_vec()] {
            let head: Vec<u8> = response.iter().copied().take(8).collect();
            let (_dir, nsm, _thread) = scripted(vec![response]);
            let error = nsm.attest(&AttestFields::default()).unwrap_err();
            assert!(matches!(error, NsmError::Response), "{head:02x?}: {error}");
        }
        for len in 0..good.len() {
            assert!(decode(&good[..len]).is_err(), "accepted a prefix of {len} bytes");
        }
    }

    #[test]
    fn a_long_response_is_refused_unread() {
        let (_dir, nsm, _thread) = scripted(vec![vec![0; MAX_RESPONSE + 1]]);
        let error = nsm.attest(&AttestFields::default()).unwrap_err();
        assert!(matches!(error, NsmError::Exchange { source: frame::Error::TooLong { .. }, .. }), "{error}");
    }

    #[test]
    fn a_long_request_never_leaves() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nsm");
        let _listener = UnixListener::bind(&path).unwrap();
        let fields = AttestFields { nonce: Some(vec![0; 0x1000]), ..AttestFields::default() };
        let error = NsmSocket { path }.attest(&fields).unwrap_err();
        assert!(matches!(error, NsmError::Code { code: "InputTooLarge" }), "{error}");
    }

    /// Fails with this code a number of times, then succeeds.
    struct Flaky {
        left: AtomicU32,
        code: &'static str,
    }

    impl Nsm for Flaky {
        fn request(&self, _request: Request) -> Result<Response, NsmError> {
            match self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)) {
                Ok(_) => Err(NsmError::Code { code: self.code }),
                Err(_) => Ok(Response::Attestation { document: vec![1] }),
            }
        }
    }

    #[tokio::test]
    async fn only_an_internal_error_is_tried_again_and_not_for_ever() {
        for (failures, code, succeeds) in
            [(2, "InternalError", true), (3, "InternalError", false), (1, "InvalidArgument", false)]
        {
            let nsm: Arc<dyn Nsm> = Arc::new(Flaky { left: AtomicU32::new(failures), code });
            let result = attest(&nsm, AttestFields::default(), Duration::from_secs(5)).await;
            assert_eq!(result.is_ok(), succeeds, "{failures} times {code}");
        }
    }

    /// Does not answer until told to.
    struct Stuck(std::sync::Mutex<std::sync::mpsc::Receiver<()>>);

    impl Nsm for Stuck {
        fn request(&self, _request: Request) -> Result<Response, NsmError> {
            let _told = self.0.lock().unwrap().recv();
            Err(NsmError::Response)
        }
    }

    #[tokio::test]
    async fn a_stuck_module_meets_the_deadline() {
        let (release, wait) = std::sync::mpsc::channel();
        let nsm: Arc<dyn Nsm> = Arc::new(Stuck(std::sync::Mutex::new(wait)));
        let error = attest(&nsm, AttestFields::default(), Duration::from_millis(10)).await.unwrap_err();
        assert!(matches!(error, NsmError::TimedOut { .. }), "{error}");
        drop(release);
    }

    /// The emulator without a socket.
    struct Emulated(nsm_emulator::Emulator);

    impl Nsm for Emulated {
        fn request(&self, request: Request) -> Result<Response, NsmError> {
            ask_with(&request, |request| Ok(self.0.process(request)))
        }
    }

    #[test]
    fn a_register_is_extended_until_it_is_locked() {
        let nsm = Emulated(nsm_emulator::Emulator::new(nsm_emulator::Config::default()).unwrap());
        let index = PcrIndex::new(16).unwrap();
        assert_eq!(nsm.describe_pcr(index).unwrap(), Register { locked: false, value: Pcr::ZERO });
        let value = nsm.extend_pcr(index, b"event".to_vec()).unwrap();
        assert_ne!(value, Pcr::ZERO);
        nsm.lock_pcr(index).unwrap();
        assert_eq!(nsm.describe_pcr(index).unwrap(), Register { locked: true, value });
        assert!(nsm.extend_pcr(index, b"more".to_vec()).unwrap_err().is_locked_register());
        assert!(nsm.lock_pcr(index).unwrap_err().is_locked_register());
        assert_eq!(nsm.random().unwrap().len(), 256);
    }

    #[test]
    fn an_nsm_is_the_device_or_a_unix_socket() {
        assert_eq!("/dev/nsm".parse::<NsmSource>().unwrap(), NsmSource::Device);
        assert_eq!("unix:/x".parse::<NsmSource>().unwrap(), NsmSource::Socket("/x".into()));
        for wrong in ["vsock:3:1", "tcp:a:1", "/dev/nsm0", ""] {
            assert!(wrong.parse::<NsmSource>().is_err(), "{wrong}");
        }
    }
}
