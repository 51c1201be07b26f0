//! Packing ramdisks so that the same bytes come out on every machine.

use std::io::{self, Write};

use miniz_oxide::deflate::core::{CompressorOxide, create_comp_flags_from_zip_params};
use miniz_oxide::deflate::stream::deflate;
use miniz_oxide::{DataFormat, MZFlush, MZStatus};

use crate::error::{Error, IoContext};

/// How a ramdisk is packed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Compression {
    /// Not at all, as nitro-cli does since 1.3.2.
    #[default]
    None,
    /// gzip: no time, no name, "unknown" operating system.
    Gzip,
    /// zstd without checksum.
    Zstd,
}

/// RFC 1952: deflate, no flags, no time, slowest, unknown system.
const GZIP_HEADER: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 2, 255];
/// Fixed, since the level decides the bytes.
const GZIP_LEVEL: u8 = 9;
const ZSTD_LEVEL: i32 = 12;

/// Packs what is written to it.
pub(crate) enum Compressor<W: Write> {
    None(W),
    Gzip(Box<Gzip<W>>),
    Zstd(zstd::Encoder<'static, W>),
}

impl<W: Write> Compressor<W> {
    pub(crate) fn new(output: W, compression: Compression) -> Result<Self, Error> {
        Ok(match compression {
            Compression::None => Self::None(output),
            Compression::Gzip => Self::Gzip(Box::new(Gzip::new(output).context("compress", "the ramdisk")?)),
            Compression::Zstd => {
                Self::Zstd(zstd::Encoder::new(output, ZSTD_LEVEL).context("compress", "the ramdisk")?)
            }
        })
    }

    pub(crate) fn finish(self) -> io::Result<()> {
        match self {
            Self::None(_) => Ok(()),
            Self::Gzip(gzip) => (*gzip).finish(),
            Self::Zstd(zstd) => zstd.finish().map(drop),
        }
    }
}

impl<W: Write> Write for Compressor<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::None(output) => output.write(bytes),
            Self::Gzip(gzip) => gzip.feed(bytes, MZFlush::None).map(|()| bytes.len()),
            Self::Zstd(zstd) => zstd.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// gzip by miniz_oxide itself: the faster back ends of flate2 choose their hash function by what the processor
/// can do, and with it the output.
pub(crate) struct Gzip<W> {
    output: W,
    state: Box<CompressorOxide>,
    buffer: Vec<u8>,
    crc: crc32fast::Hasher,
    len: u32,
}

impl<W: Write> Gzip<W> {
    fn new(mut output: W) -> io::Result<Self> {
        output.write_all(&GZIP_HEADER)?;
        let flags =
            create_comp_flags_from_zip_params(i32::from(GZIP_LEVEL), DataFormat::Raw.to_window_bits(), 0);
        Ok(Self {
            output,
            state: Box::new(CompressorOxide::new(flags)),
            buffer: vec![0; 64 << 10],
            crc: crc32fast::Hasher::new(),
            len: 0,
        })
    }

    fn feed(&mut self, mut bytes: &[u8], flush: MZFlush) -> io::Result<()> {
        self.crc.update(bytes);
        #[expect(clippy::cast_possible_truncation, reason = "gzip stores the length modulo 2^32")]
        let len = bytes.len() as u32;
        self.len = self.len.wrapping_add(len);
        loop {
            let result = deflate(&mut self.state, bytes, &mut self.buffer, flush);
            self.output.write_all(&self.buffer[..result.bytes_written])?;
            bytes = &bytes[result.bytes_consumed..];
            match result.status {
                Ok(MZStatus::StreamEnd) => return Ok(()),
                Ok(_) if flush == MZFlush::None && bytes.is_empty() => return Ok(()),
                Ok(_) => {}
                Err(error) => return Err(io::Error::other(format!("deflate: {error:?}"))),
            }
        }
    }

    fn finish(mut self) -> io::Result<()> {
        self.feed(&[], MZFlush::Finish)?;
        self.output.write_all(&self.crc.clone().finalize().to_le_bytes())?;
        self.output.write_all(&self.len.to_le_bytes())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn pack(input: &[u8], compression: Compression, piece: usize) -> Vec<u8> {
        let mut output = Vec::new();
        let mut compressor = Compressor::new(&mut output, compression).unwrap();
        for bytes in input.chunks(piece) {
            compressor.write_all(bytes).unwrap();
        }
        compressor.finish().unwrap();
        output
    }

    #[test]
    fn packed_bytes_do_not_depend_on_how_they_were_written_and_unpack() {
        let input: Vec<u8> = (0_u32..300_000).map(|i| (i.wrapping_mul(i) >> 7).to_le_bytes()[0]).collect();
        for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
            let whole = pack(&input, compression, input.len());
            assert_eq!(pack(&input, compression, 777), whole, "{compression:?}");
            let mut unpacked = Vec::new();
            crate::layer::decompressed(whole.as_slice()).unwrap().read_to_end(&mut unpacked).unwrap();
            assert_eq!(unpacked, input, "{compression:?}");
        }
    }

    #[test]
    fn gzip_tells_nothing_about_the_machine() {
        let packed = pack(b"hello", Compression::Gzip, 5);
        assert_eq!(
            hex::encode(&packed),
            "1f8b0800000000000".to_owned() + "2ffcb48cdc9c9070086a6103605000000"
        );
    }
}
