//! Writing an enclave image in one pass, or only measuring what would be written.

use std::io::{self, Read, Seek, SeekFrom, Write};

use crate::error::{Error, IoContext};
use crate::format::{
    Arch, CRC_OFFSET, HEADER_LEN, Header, MAX_SECTIONS, MAX_SIGNATURE_LEN, SECTION_HEADER_LEN, SectionHeader,
    SectionKind,
};
use crate::image::region_of;
use crate::measure::{Chunk, Measurer, Region, Registers, extend};
use crate::sign::Signer;

/// Takes the sections one after the other, in the canonical order kernel, command line, metadata, ramdisks;
/// writes, checksums and measures each byte as it comes by.
///
/// Sizes need not be known beforehand: headers are patched behind the payloads, and the checksum is combined
/// from those of the parts.
#[derive(Debug)]
pub struct Assembler<W> {
    output: Option<W>,
    measurer: Measurer,
    header: Header,
    body_crc: crc32fast::Hasher,
    position: u64,
    ramdisks: usize,
}

/// What was assembled.
#[derive(Debug, Clone)]
pub struct Assembled {
    /// PCR0, PCR1, PCR2, and PCR8 when it was signed.
    pub registers: Registers,
    /// Length of the image in bytes.
    pub len: u64,
    /// Stored CRC.
    pub crc: u32,
}

impl Assembler<io::Cursor<Vec<u8>>> {
    /// Measures without writing anything.
    pub fn measuring(arch: Arch) -> Self {
        Self::with_output(arch, None)
    }
}

impl<W: Write + Seek> Assembler<W> {
    /// Writes to `output`, which should be empty and positioned at its start.
    ///
    /// # Errors
    /// When the place for the header cannot be written.
    pub fn writing(arch: Arch, mut output: W) -> Result<Self, Error> {
        output.write_all(&[0; HEADER_LEN]).context("write", "the image")?;
        Ok(Self::with_output(arch, Some(output)))
    }

    /// As [`Assembler::writing`], with version, flags and defaults of an existing image. A version 2 image becomes
    /// version 3, the first that can be signed.
    ///
    /// # Errors
    /// When the place for the header cannot be written.
    pub fn rewriting(original: &Header, mut output: W) -> Result<Self, Error> {
        output.write_all(&[0; HEADER_LEN]).context("write", "the image")?;
        let header = Header {
            version: original.version.max(3),
            flags: original.flags,
            default_mem: original.default_mem,
            default_cpus: original.default_cpus,
            reserved: original.reserved,
            ..Header::new(original.flags.arch())
        };
        Ok(Self::with_header(header, Some(output)))
    }

    fn with_output(arch: Arch, output: Option<W>) -> Self {
        Self::with_header(Header::new(arch), output)
    }

    fn with_header(header: Header, output: Option<W>) -> Self {
        Self {
            output,
            measurer: Measurer::start(),
            header,
            body_crc: crc32fast::Hasher::new(),
            position: HEADER_LEN as u64,
            ramdisks: 0,
        }
    }

    /// Adds a section; `fill` writes its payload. Returns the payload's length.
    ///
    /// # Errors
    /// What `fill` says, when the 32 slots are used up, or when writing fails.
    pub fn section(
        &mut self,
        kind: SectionKind,
        fill: impl FnOnce(&mut Payload<'_, W>) -> Result<(), Error>,
    ) -> Result<u64, Error> {
        let slot = usize::from(self.header.num_sections);
        if slot == MAX_SECTIONS {
            return Err(Error::Limit {
                object: "the image".into(),
                unit: "sections",
                actual: slot as u64 + 1,
                max: MAX_SECTIONS as u64,
            });
        }
        if let Some(output) = &mut self.output {
            output.write_all(&[0; SECTION_HEADER_LEN]).context("write", "the image")?;
        }
        let region = region_of(kind, &mut self.ramdisks);
        let mut payload = Payload {
            output: self.output.as_mut(),
            measurer: &mut self.measurer,
            region,
            chunk: None,
            crc: crc32fast::Hasher::new(),
            len: 0,
        };
        fill(&mut payload)?;
        payload.flush_chunk()?;
        let (size, payload_crc) = (payload.len, payload.crc);

        let section_header = SectionHeader { code: kind.code(), flags: 0, size }.encode();
        self.body_crc.update(&section_header);
        self.body_crc.combine(&payload_crc);
        self.patch(self.position, &section_header)?;
        self.header.offsets[slot] = self.position;
        self.header.sizes[slot] = size;
        self.header.num_sections += 1;
        self.position += SECTION_HEADER_LEN as u64 + size;
        Ok(size)
    }

    /// Adds a section from bytes in memory.
    ///
    /// # Errors
    /// See [`Assembler::section`].
    pub fn bytes(&mut self, kind: SectionKind, bytes: &[u8]) -> Result<u64, Error> {
        self.section(kind, |payload| payload.write_all(bytes).context("write", "the image"))
    }

    /// Closes the registers, signs PCR0 when there is a signer, and writes the headers.
    ///
    /// # Errors
    /// When writing fails, or when the signature does not fit its section.
    pub fn finish(mut self, signer: Option<&Signer>) -> Result<(Assembled, Option<W>), Error> {
        let measurer = std::mem::replace(&mut self.measurer, Measurer::start());
        let mut registers = measurer.finish()?;
        if let Some(signer) = signer {
            let section = signer.section(&registers.pcr0)?;
            if section.len() as u64 > MAX_SIGNATURE_LEN {
                return Err(Error::Limit {
                    object: "the signature section".into(),
                    unit: "bytes",
                    actual: section.len() as u64,
                    max: MAX_SIGNATURE_LEN,
                });
            }
            self.bytes(SectionKind::Signature, &section)?;
            registers.pcr8 = Some(extend(signer.certificate_der()));
        }
        let mut crc = crc32fast::Hasher::new();
        crc.update(&self.header.encode()[..CRC_OFFSET]);
        crc.combine(&self.body_crc);
        self.header.crc = crc.finalize();
        let header = self.header.encode();
        self.patch(0, &header)?;
        let assembled = Assembled { registers, len: self.position, crc: self.header.crc };
        Ok((assembled, self.output))
    }

    /// Overwrites bytes in front of the end of the output.
    fn patch(&mut self, at: u64, bytes: &[u8]) -> Result<(), Error> {
        let Some(output) = &mut self.output else { return Ok(()) };
        output
            .seek(SeekFrom::Start(at))
            .and_then(|_| output.write_all(bytes))
            .and_then(|()| output.seek(SeekFrom::End(0)))
            .map(drop)
            .context("write", "the image")
    }
}

/// The payload of the section being assembled.
#[derive(Debug)]
pub struct Payload<'a, W> {
    output: Option<&'a mut W>,
    measurer: &'a mut Measurer,
    region: Option<Region>,
    chunk: Option<Chunk>,
    crc: crc32fast::Hasher,
    len: u64,
}

impl<W: Write> Payload<'_, W> {
    /// Appends everything that `reader` has, without a buffer in between.
    ///
    /// # Errors
    /// When `reader` or the output fails; `object` names the reader.
    pub fn copy_from(&mut self, reader: &mut impl Read, object: &str) -> Result<u64, Error> {
        let mut copied = 0;
        loop {
            let mut chunk = self.take_chunk()?;
            let filled = chunk.fill(reader).context("read", object)?;
            copied += filled as u64;
            let more = chunk.is_full();
            self.chunk = Some(chunk);
            if !more {
                return Ok(copied);
            }
            self.flush_chunk()?;
        }
    }

    /// Bytes written so far.
    pub fn position(&self) -> u64 {
        self.len + self.chunk.as_ref().map_or(0, |chunk| chunk.bytes().len() as u64)
    }

    fn take_chunk(&mut self) -> Result<Chunk, Error> {
        self.chunk.take().map_or_else(|| self.measurer.chunk(), Ok)
    }

    fn flush_chunk(&mut self) -> Result<(), Error> {
        let Some(chunk) = self.chunk.take() else { return Ok(()) };
        self.len += chunk.bytes().len() as u64;
        let Self { output, measurer, region, crc, .. } = self;
        measurer.push_and_then(chunk, *region, |bytes| {
            crc.update(bytes);
            match output {
                Some(output) => output.write_all(bytes).context("write", "the image"),
                None => Ok(()),
            }
        })
    }
}

impl<W: Write> Write for Payload<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut chunk = self.take_chunk().map_err(io::Error::other)?;
        let taken = chunk.append(bytes);
        let full = chunk.is_full();
        self.chunk = Some(chunk);
        if full {
            self.flush_chunk().map_err(io::Error::other)?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
