//! The archive Compute Engine makes an image from: one file `disk.raw` in a gzipped GNU tar.

use std::io::{self, Read, Write};

use flate2::Compression;
use flate2::write::GzEncoder;
use sha2::{Digest as _, Sha256};

/// What went into an archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Archive {
    /// SHA-256 of the disk itself.
    pub disk_sha256: [u8; 32],
}

/// Writes the archive of a disk of `size` bytes. The same disk gives the same bytes.
///
/// # Errors
///
/// When reading or writing fails, or the disk ends before `size`.
pub fn archive(disk: impl Read, size: u64, output: impl Write) -> io::Result<Archive> {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    let mut hashed = Hashed { inner: disk.take(size), hash: Sha256::new(), read: 0 };
    let mut builder = tar::Builder::new(GzEncoder::new(output, Compression::fast()));
    builder.append_data(&mut header, "disk.raw", &mut hashed)?;
    builder.into_inner()?.finish()?.flush()?;
    if hashed.read != size {
        let problem = format!("the disk ended after {} of {size} bytes", hashed.read);
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, problem));
    }
    Ok(Archive { disk_sha256: hashed.hash.finalize().into() })
}

struct Hashed<R> {
    inner: R,
    hash: Sha256,
    read: u64,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hash.update(&buffer[..count]);
        self.read += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_file_with_fixed_metadata_in_a_gnu_archive() {
        let disk = vec![3; 10_000];
        let mut output = Vec::new();
        let made = archive(disk.as_slice(), 10_000, &mut output).unwrap();
        assert_eq!(made.disk_sha256, <[u8; 32]>::from(Sha256::digest(&disk)));

        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(output.as_slice()));
        let mut entries = archive.entries().unwrap();
        let mut entry = entries.next().unwrap().unwrap();
        assert!(entry.header().as_gnu().is_some());
        assert_eq!(entry.path().unwrap().to_str(), Some("disk.raw"));
        assert_eq!((entry.header().mtime().unwrap(), entry.header().mode().unwrap()), (0, 0o644));
        let mut read = Vec::new();
        entry.read_to_end(&mut read).unwrap();
        assert!(read == disk);
        assert!(entries.next().is_none());
    }

    #[test]
    fn a_disk_shorter_than_announced_is_an_error() {
        let error = archive([0_u8; 5].as_slice(), 6, Vec::new()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
