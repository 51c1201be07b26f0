//! Reading an enclave image in one pass: where its sections are, its checksum, its measurements.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use crate::error::{Error, IoContext};
use crate::format::{
    CRC_OFFSET, HEADER_LEN, Header, MAX_CMDLINE_LEN, MAX_METADATA_LEN, MAX_SIGNATURE_LEN, SECTION_HEADER_LEN,
    SectionHeader, SectionKind,
};
use crate::measure::{Measurer, Region, Registers};
use crate::problem::{Finding, Problem, Report};

/// A section and its place in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Section {
    /// Slot in the header tables.
    pub slot: usize,
    /// What it holds.
    pub kind: SectionKind,
    /// Offset of the section header; the payload starts 12 bytes later.
    pub offset: u64,
    /// Payload length in bytes.
    pub size: u64,
}

impl Section {
    /// Offset of the first payload byte.
    pub fn payload_offset(&self) -> u64 {
        self.offset + SECTION_HEADER_LEN as u64
    }

    /// Offset behind the last payload byte.
    pub fn end(&self) -> u64 {
        self.payload_offset() + self.size
    }
}

/// An image whose headers were read. Payloads stay in the file until they are asked for.
#[derive(Debug)]
pub struct Image<R> {
    reader: R,
    header_bytes: [u8; HEADER_LEN],
    header: Header,
    file_len: u64,
    sections: Vec<Section>,
    unmeasurable: Option<Finding>,
}

/// What one pass over a whole image tells.
#[derive(Debug, Clone)]
pub struct Scan {
    /// The registers, unless the image cannot be measured; then the reason.
    pub registers: Result<Registers, Finding>,
    /// CRC of the content.
    pub crc: u32,
}

impl Image<BufReader<File>> {
    /// Opens the image at `path`.
    ///
    /// # Errors
    /// When the file cannot be read, or with the first problem that `report` refuses.
    pub fn open(path: &Path, report: &mut impl Report) -> Result<Self, Error> {
        let file = File::open(path).context("open", path)?;
        if !file.metadata().context("read", path)?.is_file() {
            return Err(Error::NotAFile { path: path.to_owned() });
        }
        Self::read(BufReader::with_capacity(HEADER_LEN, file), report)
    }
}

impl<R: Read + Seek> Image<R> {
    /// Reads the header and all section headers.
    ///
    /// With [`Strict`](crate::Strict), everything that a loader would refuse is refused here, the checksum
    /// apart, which [`Image::scan`] checks.
    ///
    /// # Errors
    /// When reading fails, or with the first problem that `report` refuses. A file that does not start like an
    /// enclave image is refused in any case.
    pub fn read(mut reader: R, report: &mut impl Report) -> Result<Self, Error> {
        let file_len = reader.seek(SeekFrom::End(0)).context("measure", "the image")?;
        if file_len < HEADER_LEN as u64 {
            return Err(refusal(0, Problem::TooShort { len: file_len }));
        }
        let header_bytes: [u8; HEADER_LEN] = read_at(&mut reader, 0)?;
        let header = Header::decode(&header_bytes).map_err(|problem| refusal(0, problem))?;
        let slots = header.check(file_len, report)?;
        let mut image =
            Self { reader, header_bytes, header, file_len, sections: Vec::new(), unmeasurable: None };
        if !image.header.flags.has_known_measurement() {
            image.refuse_to_measure(0x06, Problem::UnknownFlags { found: image.header.flags.0 });
        }
        for slot in 0..slots {
            image.read_section_header(slot, report)?;
        }
        image.check_composition(report)?;
        Ok(image)
    }

    fn read_section_header(&mut self, slot: usize, report: &mut impl Report) -> Result<(), Error> {
        let (offset, in_table) = (self.header.offsets[slot], self.header.sizes[slot]);
        let room =
            offset.checked_add(SECTION_HEADER_LEN as u64).and_then(|start| self.file_len.checked_sub(start));
        let previous_end = self.sections.last().map_or(HEADER_LEN as u64, Section::end);
        let Some(room) = room.filter(|_| offset >= previous_end) else {
            let problem = Problem::Placement { slot, expected: previous_end, found: offset };
            self.refuse_to_measure(offset, problem);
            return Ok(()); // reported with the header
        };
        let stored = SectionHeader::decode(&read_at(&mut self.reader, offset)?);
        let kind = SectionKind::from_code(stored.code);
        if kind.is_none() {
            report.problem(offset, Problem::SectionType { slot, found: stored.code })?;
        }
        if stored.flags != 0 {
            report.problem(offset + 2, Problem::SectionFlags { slot, found: stored.flags })?;
        }
        let mut size = in_table;
        if stored.size != in_table {
            let problem = Problem::SizeMismatch { slot, in_section: stored.size, in_table };
            report.problem(offset + 4, problem.clone())?;
            if kind.is_none_or(SectionKind::is_measured) {
                self.refuse_to_measure(offset + 4, problem);
            } else if stored.size <= room {
                // A file re-signed by the reference tool keeps the old length in the file header.
                size = stored.size;
            }
        }
        if size > room {
            self.refuse_to_measure(offset, Problem::PastEnd { slot, offset, size, file_len: self.file_len });
            size = room;
        }
        if let Some(kind) = kind {
            self.sections.push(Section { slot, kind, offset, size });
        }
        Ok(())
    }

    /// Checks which sections there are, how many and in which order.
    fn check_composition(&mut self, report: &mut impl Report) -> Result<(), Error> {
        let version = self.header.version;
        let mut seen = [0_usize; 6];
        for section in &self.sections {
            let Section { slot, kind, offset, size } = *section;
            let count = &mut seen[usize::from(kind.code())];
            *count += 1;
            if *count > 1 && kind != SectionKind::Ramdisk {
                report.problem(offset, Problem::Duplicate { slot, kind })?;
            }
            let since = match kind {
                SectionKind::Signature => 3,
                SectionKind::Metadata => 4,
                _ => 0,
            };
            if version < since {
                report.problem(offset, Problem::TooNew { slot, kind, version })?;
            }
            if kind == SectionKind::Ramdisk && seen[1] == 0 {
                report.problem(offset, Problem::RamdiskBeforeKernel { slot })?;
            }
            if kind == SectionKind::Ramdisk && size == 0 {
                report.problem(offset, Problem::EmptyRamdisk { slot })?;
            }
            if let Some(max) = size_limit(kind).filter(|&max| size > max) {
                report.problem(offset + 4, Problem::TooLarge { slot, kind, size, max })?;
            }
        }
        for kind in [SectionKind::Kernel, SectionKind::Cmdline, SectionKind::Ramdisk, SectionKind::Metadata] {
            let needed = kind != SectionKind::Metadata || version >= 4;
            if needed && seen[usize::from(kind.code())] == 0 {
                report.problem(0x1a, Problem::Missing { kind, version })?;
            }
        }
        Ok(())
    }

    fn refuse_to_measure(&mut self, offset: u64, problem: Problem) {
        self.unmeasurable.get_or_insert(Finding { offset, problem });
    }

    /// The file header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The sections in file order.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// Length of the file in bytes.
    pub fn file_len(&self) -> u64 {
        self.file_len
    }

    /// The only section of this kind, if there is one (the first, if there are several).
    pub fn section(&self, kind: SectionKind) -> Option<Section> {
        self.sections.iter().copied().find(|section| section.kind == kind)
    }

    /// The ramdisks in file order.
    pub fn ramdisks(&self) -> Vec<Section> {
        self.sections.iter().copied().filter(|section| section.kind == SectionKind::Ramdisk).collect()
    }

    /// Reads every byte once: checks the checksum and computes PCR0, PCR1 and PCR2 (PCR8 comes from the
    /// signature section, see [`Image::signature`]).
    ///
    /// # Errors
    /// When reading fails, or when `report` refuses a wrong checksum.
    pub fn scan(&mut self, report: &mut impl Report) -> Result<Scan, Error> {
        let mut crc = crc32fast::Hasher::new();
        crc.update(&self.header_bytes[..CRC_OFFSET]);
        self.reader.seek(SeekFrom::Start(HEADER_LEN as u64)).context("read", "the image")?;
        let mut measurer = Measurer::start();
        let mut at = HEADER_LEN as u64;
        let mut ramdisks = 0;
        for section in self.sections.clone() {
            // The section header, and in files that only the lenient reader accepts a gap in front of it.
            self.feed(section.payload_offset() - at, None, &mut measurer, &mut crc)?;
            let region = region_of(section.kind, &mut ramdisks);
            self.feed(section.size, region, &mut measurer, &mut crc)?;
            at = section.end();
        }
        self.feed(self.file_len - at, None, &mut measurer, &mut crc)?;
        let registers = measurer.finish()?;
        let computed = crc.finalize();
        if computed != self.header.crc {
            report.problem(CRC_OFFSET as u64, Problem::Crc { stored: self.header.crc, computed })?;
        }
        let registers = match &self.unmeasurable {
            Some(finding) => Err(finding.clone()),
            None => Ok(registers),
        };
        Ok(Scan { registers, crc: computed })
    }

    /// Reads `len` bytes at the current position into the checksum and, with a region, into the registers.
    fn feed(
        &mut self,
        mut len: u64,
        region: Option<Region>,
        measurer: &mut Measurer,
        crc: &mut crc32fast::Hasher,
    ) -> Result<(), Error> {
        while len > 0 {
            let mut chunk = measurer.chunk()?;
            let filled = chunk.fill(&mut (&mut self.reader).take(len)).context("read", "the image")?;
            if filled == 0 {
                let source = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
                return Err(source).context("read", "the image");
            }
            crc.update(chunk.bytes());
            len -= filled as u64;
            measurer.push(chunk, region)?;
        }
        Ok(())
    }

    /// A reader over one payload.
    ///
    /// # Errors
    /// When the file cannot be positioned.
    pub fn payload(&mut self, section: Section) -> Result<std::io::Take<&mut R>, Error> {
        self.reader.seek(SeekFrom::Start(section.payload_offset())).context("read", "the image")?;
        Ok((&mut self.reader).take(section.size))
    }

    /// One payload in memory; only for kinds with a limit.
    ///
    /// # Errors
    /// When the section is larger than its kind allows, or cannot be read.
    pub fn small_payload(&mut self, section: Section) -> Result<Vec<u8>, Error> {
        let Section { slot, kind, offset, size } = section;
        let max = size_limit(kind).unwrap_or(0);
        if size > max {
            return Err(refusal(offset + 4, Problem::TooLarge { slot, kind, size, max }));
        }
        let mut bytes = Vec::new();
        self.payload(section)?.read_to_end(&mut bytes).context("read", "the image")?;
        Ok(bytes)
    }

    /// The kernel command line as stored, if there is one.
    ///
    /// # Errors
    /// See [`Image::small_payload`].
    pub fn cmdline(&mut self) -> Result<Option<Vec<u8>>, Error> {
        self.section(SectionKind::Cmdline).map(|section| self.small_payload(section)).transpose()
    }
}

/// Which registers a section of this kind enters; counts the ramdisks.
pub(crate) fn region_of(kind: SectionKind, ramdisks: &mut usize) -> Option<Region> {
    match kind {
        SectionKind::Kernel | SectionKind::Cmdline => Some(Region::Boot),
        SectionKind::Ramdisk => {
            *ramdisks += 1;
            Some(if *ramdisks == 1 { Region::Boot } else { Region::App })
        }
        SectionKind::Signature | SectionKind::Metadata => None,
    }
}

fn size_limit(kind: SectionKind) -> Option<u64> {
    match kind {
        SectionKind::Kernel | SectionKind::Ramdisk => None,
        SectionKind::Cmdline => Some(MAX_CMDLINE_LEN),
        SectionKind::Signature => Some(MAX_SIGNATURE_LEN),
        SectionKind::Metadata => Some(MAX_METADATA_LEN),
    }
}

pub(crate) fn refusal(offset: u64, problem: Problem) -> Error {
    Error::Format(Finding { offset, problem })
}

fn read_at<const N: usize>(reader: &mut (impl Read + Seek), offset: u64) -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    reader
        .seek(SeekFrom::Start(offset))
        .and_then(|_| reader.read_exact(&mut bytes))
        .context("read", "the image")?;
    Ok(bytes)
}
