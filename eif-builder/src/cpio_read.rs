//! Reading ramdisks the way Linux unpacks them: several archives behind each other, packed or not.
//!
//! Of the packings that Linux knows, gzip and zstd are undone: with none at all, they are what builders of enclave
//! images write. The others are called by their name. They are measured like everything else.

use std::io::{self, BufRead, BufReader, Read};

use crate::cpio::{BLOCK, Entry, FileType, HEADER_LEN, MAGIC, MAX_NAME_LEN};

/// Most members of a ramdisk.
const MAX_ENTRIES: usize = 4 << 20;
/// Most bytes of an unpacked ramdisk: no enclave's memory holds more.
const MAX_UNPACKED: u64 = 256 << 30;

/// Reads all members of a ramdisk; `visit` may read the content.
///
/// # Errors
/// In words: what is not an archive, ends early, or is packed in a way that is not supported here.
pub fn read_ramdisk(
    ramdisk: impl Read,
    visit: &mut dyn FnMut(&Entry, &mut dyn Read) -> io::Result<()>,
) -> Result<(), String> {
    let mut stream = Counting { inner: BufReader::with_capacity(256 << 10, ramdisk), position: 0 };
    let mut entries = 0;
    while stream.skip_zeros().map_err(|error| error.to_string())? {
        let start = stream.inner.fill_buf().map_err(|error| error.to_string())?;
        match start {
            [b'0', b'7', ..] => read_archive(&mut stream, &mut entries, visit)?,
            [0x1f, 0x8b, ..] => {
                let unpacked = flate2::bufread::GzDecoder::new(&mut stream.inner);
                read_unpacked(unpacked, &mut entries, visit)?;
            }
            [0x28, 0xb5, 0x2f, 0xfd, ..] => {
                let unpacked = zstd::stream::read::Decoder::with_buffer(&mut stream.inner)
                    .map_err(|error| error.to_string())?
                    .single_frame();
                read_unpacked(unpacked, &mut entries, visit)?;
            }
            other => return Err(format!("{} at the start of an archive", name_of_packing(other))),
        }
    }
    Ok(())
}

fn read_unpacked(
    unpacked: impl Read,
    entries: &mut usize,
    visit: &mut dyn FnMut(&Entry, &mut dyn Read) -> io::Result<()>,
) -> Result<(), String> {
    let mut stream = Counting { inner: BufReader::new(unpacked.take(MAX_UNPACKED)), position: 0 };
    while stream.skip_zeros().map_err(|error| error.to_string())? {
        read_archive(&mut stream, entries, visit)?;
    }
    Ok(())
}

fn name_of_packing(start: &[u8]) -> &'static str {
    match start {
        [0xfd, b'7', b'z', b'X', b'Z', ..] => "xz, which is not supported here,",
        [b'B', b'Z', b'h', ..] => "bzip2, which is not supported here,",
        [0x5d, 0, 0, ..] => "lzma, which is not supported here,",
        [0x89, b'L', b'Z', b'O', ..] => "lzo, which is not supported here,",
        [0x02, 0x21, 0x4c, 0x18, ..] => "lz4, which is not supported here,",
        _ => "neither cpio nor a known packing",
    }
}

/// Reads one archive up to and including its trailer.
fn read_archive(
    stream: &mut Counting<impl BufRead>,
    entries: &mut usize,
    visit: &mut dyn FnMut(&Entry, &mut dyn Read) -> io::Result<()>,
) -> Result<(), String> {
    if !stream.position.is_multiple_of(4) {
        return Err(format!("an archive starts at {:#x}, Linux wants a multiple of 4", stream.position));
    }
    loop {
        let at = stream.position;
        let fail = |reason: String| format!("member at {at:#x}: {reason}");
        let (entry, links) = read_header(stream).map_err(fail)?;
        if entry.name == b"TRAILER!!!" {
            return Ok(());
        }
        *entries += 1;
        if *entries > MAX_ENTRIES {
            return Err(fail(format!("more than {MAX_ENTRIES} members")));
        }
        let Some(kind) = FileType::from_mode(entry.mode) else {
            return Err(fail(format!("mode {:o} names no file type", entry.mode)));
        };
        let entry = Entry {
            kind,
            mode: entry.mode & 0o7777,
            link_group: entry.link_group.filter(|_| links > 1),
            ..entry
        };
        let mut content = (&mut *stream).take(entry.len);
        visit(&entry, &mut content).map_err(|error| fail(error.to_string()))?;
        let left = content.limit();
        let skipped = io::copy(&mut content, &mut io::sink()).map_err(|error| fail(error.to_string()))?;
        if skipped != left {
            return Err(fail(format!("{:?} ends early", String::from_utf8_lossy(&entry.name))));
        }
        stream.skip_padding().map_err(|error| fail(error.to_string()))?;
    }
}

/// A member's header; the mode still has its type bits. Also the link count.
fn read_header(stream: &mut Counting<impl BufRead>) -> Result<(Entry, u32), String> {
    let mut header = [0; HEADER_LEN];
    stream.read_exact(&mut header).map_err(|error| error.to_string())?;
    if &header[..6] != MAGIC && &header[..6] != b"070702" {
        return Err(format!("magic {:?}", String::from_utf8_lossy(&header[..6])));
    }
    let mut fields = [0; 13];
    for (field, digits) in fields.iter_mut().zip(header[6..].chunks_exact(8)) {
        *field = std::str::from_utf8(digits)
            .ok()
            .filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()))
            .and_then(|digits| u32::from_str_radix(digits, 16).ok())
            .ok_or_else(|| format!("{:?} is not hexadecimal", String::from_utf8_lossy(digits)))?;
    }
    let [inode, mode, uid, gid, links, mtime, len, _, _, major, minor, name_len, _] = fields;
    let name_len = name_len as usize;
    if !(1..=MAX_NAME_LEN + 1).contains(&name_len) {
        return Err(format!("name of {name_len} bytes"));
    }
    let mut name = vec![0; name_len];
    stream.read_exact(&mut name).map_err(|error| error.to_string())?;
    if name.pop() != Some(0) {
        return Err("name without end".into());
    }
    stream.skip_padding().map_err(|error| error.to_string())?;
    let link_group = Some(crate::cpio::LinkGroup { inode: Some(inode), links });
    let kind = FileType::Regular;
    let len = u64::from(len);
    Ok((Entry { name, kind, mode, uid, gid, mtime, len, rdev: (major, minor), link_group }, links))
}

/// Counts what was read, for alignment and messages.
struct Counting<R> {
    inner: R,
    position: u64,
}

impl<R: BufRead> Counting<R> {
    /// Skips zero bytes; tells whether anything follows.
    fn skip_zeros(&mut self) -> io::Result<bool> {
        loop {
            let buffer = self.inner.fill_buf()?;
            if buffer.is_empty() {
                return Ok(false);
            }
            let zeros = buffer.iter().position(|byte| *byte != 0);
            let skip = zeros.unwrap_or(buffer.len());
            self.inner.consume(skip);
            self.position += skip as u64;
            if zeros.is_some() {
                return Ok(true);
            }
        }
    }

    fn skip_padding(&mut self) -> io::Result<()> {
        let padding = usize::try_from(self.position.next_multiple_of(4) - self.position).unwrap_or(0);
        self.read_exact(&mut [0; 4][..padding])
    }
}

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.position += read as u64;
        Ok(read)
    }
}

/// Whether Linux, too, would find a second archive behind one of this length.
pub(crate) fn is_aligned(len: u64) -> bool {
    const { assert!(BLOCK.is_multiple_of(4)) }
    len.is_multiple_of(4)
}
