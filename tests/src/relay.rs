//! A relay that keeps every byte that passes.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;

/// Stands between an enclave and its parent, as one who records vsock would.
#[derive(Debug)]
pub struct Recorder {
    socket: PathBuf,
    bytes: Arc<Mutex<Vec<u8>>>,
}

impl Recorder {
    /// Listens on a Unix socket and passes connections on to another, in both directions.
    ///
    /// # Panics
    /// When it cannot listen.
    #[must_use]
    pub fn start(socket: &Path, to: &Path) -> Self {
        let listener = UnixListener::bind(socket).expect("a socket in a directory of ours");
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let (kept, to) = (Arc::clone(&bytes), to.to_owned());
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                // Without the other end the connection ends, as on vsock.
                let Ok(far) = UnixStream::connect(&to) else { continue };
                let clone = |stream: &UnixStream| stream.try_clone().expect("a descriptor more");
                pass(clone(&near), clone(&far), Arc::clone(&kept));
                pass(far, near, Arc::clone(&kept));
            }
        });
        Self { socket: socket.to_owned(), bytes }
    }

    /// The endpoint to connect to.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("unix:{}", self.socket.display())
    }

    /// What passed so far, in both directions.
    ///
    /// # Panics
    /// Never: no holder of the lock panics.
    #[must_use]
    pub fn recording(&self) -> Vec<u8> {
        self.bytes.lock().expect("no holder of this lock panics").clone()
    }
}

fn pass(mut from: UnixStream, mut to: UnixStream, kept: Arc<Mutex<Vec<u8>>>) {
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(len @ 1..) = from.read(&mut buffer) {
            // Kept before it is passed on: whoever has it can be sure that it is in the recording.
            kept.lock().expect("no holder of this lock panics").extend_from_slice(&buffer[..len]);
            if to.write_all(&buffer[..len]).is_err() {
                break;
            }
        }
        let _closed = to.shutdown(Shutdown::Write);
    });
}
