//! PCR0, PCR1, PCR2 and PCR8 while the bytes stream past.
//!
//! ```text
//! extend(content) = SHA384( 0x00 × 48 ‖ SHA384(content) )
//! PCR0 = extend( kernel ‖ cmdline ‖ ramdisk0 ‖ ramdisk1 ‖ … )
//! PCR1 = extend( kernel ‖ cmdline ‖ ramdisk0 )
//! PCR2 = extend( ramdisk1 ‖ ramdisk2 ‖ … )
//! PCR8 = extend( DER of the signing certificate )
//! ```
//!
//! Two threads hash: one for PCR0, out of whose state PCR1 branches off where the second ramdisk starts, and one
//! for PCR2. They share the chunks, which come from a fixed pool: memory does not grow with the image.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use attestation::{OsImageHash, Pcr, os_image_hash};
use aws_lc_rs::digest::{Context, SHA384, digest};

use crate::error::Error;

/// Bytes per chunk.
const CHUNK_LEN: usize = 512 << 10;
/// Chunks in the pool.
const POOL: usize = 12;

/// Which registers a payload enters, beside PCR0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Region {
    /// Kernel, command line and first ramdisk: PCR1.
    Boot,
    /// Later ramdisks: PCR2.
    App,
}

/// The registers that an image determines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registers {
    /// The whole image.
    pub pcr0: Pcr,
    /// Kernel, command line and first ramdisk.
    pub pcr1: Pcr,
    /// Later ramdisks.
    pub pcr2: Pcr,
    /// The signing certificate, when there is one.
    pub pcr8: Option<Pcr>,
}

impl Registers {
    /// SHA-256 over PCR0 ‖ PCR1 ‖ PCR2: the name of the image in the KMS contracts.
    pub fn os_image_hash(&self) -> OsImageHash {
        os_image_hash(&self.pcr0, &self.pcr1, &self.pcr2)
    }
}

/// Extends an untouched register with `content`.
pub fn extend(content: &[u8]) -> Pcr {
    extend_digest(digest(&SHA384, content).as_ref())
}

fn extend_digest(content_digest: &[u8]) -> Pcr {
    let mut context = Context::new(&SHA384);
    context.update(&[0; 48]);
    context.update(content_digest);
    let mut pcr = [0; 48];
    pcr.copy_from_slice(context.finish().as_ref());
    Pcr::from(pcr)
}

/// A buffer from the pool.
#[derive(Debug)]
pub(crate) struct Chunk {
    buffer: Vec<u8>,
    len: usize,
}

impl Chunk {
    /// Reads until the chunk is full or the reader ends; returns how much was read.
    ///
    /// # Errors
    /// What the reader says.
    pub(crate) fn fill(&mut self, reader: &mut impl Read) -> io::Result<usize> {
        let before = self.len;
        while self.len < self.buffer.len() {
            match reader.read(&mut self.buffer[self.len..]) {
                Ok(0) => break,
                Ok(read) => self.len += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(self.len - before)
    }

    /// Appends as much of `bytes` as fits; returns how much that was.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.buffer.len() - self.len);
        self.buffer[self.len..][..taken].copy_from_slice(&bytes[..taken]);
        self.len += taken;
        taken
    }

    /// The filled part.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.buffer[..self.len]
    }

    /// Whether nothing more fits.
    pub(crate) fn is_full(&self) -> bool {
        self.len == self.buffer.len()
    }
}

/// A chunk on its way to several readers; the last of them puts it back into the pool.
struct Shared {
    chunk: Arc<Chunk>,
    region: Region,
}

/// Computes the registers of one image on two threads.
#[derive(Debug)]
pub(crate) struct Measurer {
    pool: Receiver<Vec<u8>>,
    give_back: Sender<Vec<u8>>,
    allocated: usize,
    all: Worker<(Pcr, Pcr)>,
    app: Worker<Pcr>,
}

#[derive(Debug)]
struct Worker<T> {
    input: Sender<Shared>,
    thread: JoinHandle<T>,
}

impl Measurer {
    /// Starts the threads.
    pub(crate) fn start() -> Self {
        let (give_back, pool) = channel();
        // The channels need no bound of their own: the pool bounds what can be in them.
        let (all_input, all_chunks) = channel();
        let (app_input, app_chunks) = channel();
        let (all_back, app_back) = (give_back.clone(), give_back.clone());
        let all = std::thread::spawn(move || measure_all_and_boot(&all_chunks, &all_back));
        let app = std::thread::spawn(move || measure_app(&app_chunks, &app_back));
        Self {
            pool,
            give_back,
            allocated: 0,
            all: Worker { input: all_input, thread: all },
            app: Worker { input: app_input, thread: app },
        }
    }

    /// An empty chunk; waits for the hashing threads when all are in use.
    ///
    /// # Errors
    /// When a hashing thread has ended, which is a bug.
    pub(crate) fn chunk(&mut self) -> Result<Chunk, Error> {
        let buffer = match self.pool.try_recv() {
            Ok(buffer) => buffer,
            Err(_) if self.allocated < POOL => {
                self.allocated += 1;
                vec![0; CHUNK_LEN]
            }
            Err(_) => self.wait_for_chunk()?,
        };
        Ok(Chunk { buffer, len: 0 })
    }

    fn wait_for_chunk(&self) -> Result<Vec<u8>, Error> {
        loop {
            // This side holds a sender too, so a dead worker shows as silence, not as a closed channel.
            match self.pool.recv_timeout(std::time::Duration::from_secs(1)) {
                Ok(buffer) => return Ok(buffer),
                Err(_) if self.all.thread.is_finished() || self.app.thread.is_finished() => {
                    return Err(Error::Worker);
                }
                Err(_) => {}
            }
        }
    }

    /// Hands a filled chunk to the registers that `region` names; without one it only goes back to the pool.
    ///
    /// # Errors
    /// When a hashing thread has ended, which is a bug.
    pub(crate) fn push(&self, chunk: Chunk, region: Option<Region>) -> Result<(), Error> {
        self.push_and_then(chunk, region, |_| Ok(()))
    }

    /// As [`Measurer::push`]; `also` sees the chunk while the threads hash it.
    ///
    /// # Errors
    /// What `also` says, or when a hashing thread has ended, which is a bug.
    pub(crate) fn push_and_then(
        &self,
        chunk: Chunk,
        region: Option<Region>,
        also: impl FnOnce(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let chunk = Arc::new(chunk);
        if let Some(region) = region {
            let shared = || Shared { chunk: Arc::clone(&chunk), region };
            self.all.input.send(shared()).map_err(|_| Error::Worker)?;
            if region == Region::App {
                self.app.input.send(shared()).map_err(|_| Error::Worker)?;
            }
        }
        let result = also(chunk.bytes());
        release(chunk, &self.give_back);
        result
    }

    /// Waits for the threads and closes the registers.
    ///
    /// # Errors
    /// When a hashing thread has ended early, which is a bug.
    pub(crate) fn finish(self) -> Result<Registers, Error> {
        let Self { all, app, .. } = self;
        drop((all.input, app.input));
        let (pcr0, pcr1) = all.thread.join().map_err(|_| Error::Worker)?;
        let pcr2 = app.thread.join().map_err(|_| Error::Worker)?;
        Ok(Registers { pcr0, pcr1, pcr2, pcr8: None })
    }
}

/// PCR0 and PCR1. They share a state until the first byte that only PCR0 takes.
fn measure_all_and_boot(chunks: &Receiver<Shared>, give_back: &Sender<Vec<u8>>) -> (Pcr, Pcr) {
    let mut all = Context::new(&SHA384);
    let mut boot: Option<Context> = None;
    for Shared { chunk, region } in chunks {
        match (region, &mut boot) {
            (Region::App, None) => boot = Some(all.clone()),
            // A file in an unusual order: boot parts behind the second ramdisk.
            (Region::Boot, Some(boot)) => boot.update(chunk.bytes()),
            (Region::App, Some(_)) | (Region::Boot, None) => {}
        }
        all.update(chunk.bytes());
        release(chunk, give_back);
    }
    let boot = boot.unwrap_or_else(|| all.clone());
    (extend_digest(all.finish().as_ref()), extend_digest(boot.finish().as_ref()))
}

fn measure_app(chunks: &Receiver<Shared>, give_back: &Sender<Vec<u8>>) -> Pcr {
    let mut app = Context::new(&SHA384);
    for Shared { chunk, .. } in chunks {
        app.update(chunk.bytes());
        release(chunk, give_back);
    }
    extend_digest(app.finish().as_ref())
}

fn release(chunk: Arc<Chunk>, give_back: &Sender<Vec<u8>>) {
    if let Some(chunk) = Arc::into_inner(chunk) {
        // Nobody is left to take it when the measurer is being dropped.
        let _ = give_back.send(chunk.buffer);
    }
}
