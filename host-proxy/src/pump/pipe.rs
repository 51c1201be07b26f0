//! A small pool of pipes for splice(2). A direction holds one only while bytes are in it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::io::Interest;
use transport::Stream;

/// Wanted size of a pipe; at most what `/proc/sys/fs/pipe-max-size` allows an ordinary user, and its default.
pub(crate) const PIPE_SIZE: usize = 1 << 20;
/// Most pipes at once. An ordinary user has 16,384 pages in pipes (pipe(7), `pipe-user-pages-soft`); past that a
/// new pipe has one page. 32 pipes of 1 MiB are half of it.
const MAX_PIPES: usize = 32;
/// Below this a pipe costs more than it saves.
const MIN_SIZE: usize = 128 << 10;

static MADE: AtomicUsize = AtomicUsize::new(0);
static FREE: Mutex<Vec<Pipe>> = Mutex::new(Vec::new());

/// A pipe and the bytes in it. Dropped with bytes inside it is closed, empty it goes back to the pool.
#[derive(Debug)]
pub(crate) struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

/// A pipe taken from the pool.
#[derive(Debug)]
pub(crate) struct Lease {
    pipe: Option<Pipe>,
    held: usize,
}

impl Lease {
    /// A pipe, unless too many are in use or the system gives none of a useful size: then bytes are copied.
    pub(crate) fn take() -> Option<Self> {
        let free = FREE.lock().ok()?.pop();
        let pipe = match free {
            Some(pipe) => pipe,
            None => Pipe::new()?,
        };
        Some(Self { pipe: Some(pipe), held: 0 })
    }

    /// Bytes in the pipe.
    pub(crate) fn held(&self) -> usize {
        self.held
    }

    /// Moves up to `limit` bytes from the socket into the empty pipe; 0 is the end of the stream.
    pub(crate) fn fill(&mut self, from: &Stream, limit: usize) -> io::Result<usize> {
        let Some(pipe) = &self.pipe else { return Err(io::ErrorKind::BrokenPipe.into()) };
        let moved =
            from.try_io(Interest::READABLE, || Ok(splice(from, None, &pipe.write, None, limit, FLAGS)?))?;
        self.held += moved;
        Ok(moved)
    }

    /// Moves what the pipe holds into the socket, as far as the socket takes it.
    pub(crate) fn drain(&mut self, to: &Stream) -> io::Result<usize> {
        let Some(pipe) = &self.pipe else { return Err(io::ErrorKind::BrokenPipe.into()) };
        let moved =
            to.try_io(Interest::WRITABLE, || Ok(splice(&pipe.read, None, to, None, self.held, FLAGS)?))?;
        self.held -= moved;
        Ok(moved)
    }
}

/// No `MORE`: it acts as a cork on TCP, with stalls of 200 ms.
const FLAGS: SpliceFlags = SpliceFlags::NONBLOCK.union(SpliceFlags::MOVE);

impl Drop for Lease {
    fn drop(&mut self) {
        let Some(pipe) = self.pipe.take() else { return };
        match FREE.lock() {
            Ok(mut free) if self.held == 0 => free.push(pipe),
            _ => {
                MADE.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
}

impl Pipe {
    fn new() -> Option<Self> {
        if MADE.fetch_add(1, Ordering::Relaxed) < MAX_PIPES {
            let made = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK);
            if let Ok((read, write)) = made
                && fcntl_setpipe_size(&write, PIPE_SIZE).is_ok_and(|size| size >= MIN_SIZE)
            {
                return Some(Self { read, write });
            }
        }
        MADE.fetch_sub(1, Ordering::Relaxed);
        None
    }
}
