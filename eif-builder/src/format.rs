//! The enclave image format on the byte level: constants, the two headers, and what they may say.
//!
//! A file is a 548-byte header followed by sections (12-byte header and payload) back to back, everything
//! big-endian. Nothing here does I/O.

use std::fmt;

use crate::problem::{Problem, Report};

/// Length of the file header in bytes.
pub const HEADER_LEN: usize = 548;
/// Length of a section header in bytes.
pub const SECTION_HEADER_LEN: usize = 12;
/// The header part covered by the CRC: everything in front of the CRC field.
pub const CRC_OFFSET: usize = 544;
/// Slots in the two header tables.
pub const MAX_SECTIONS: usize = 32;
/// Version written; versions 2 to 4 are read.
pub const VERSION: u16 = 4;
/// Largest signature section the platform's specification allows, in bytes.
pub const MAX_SIGNATURE_LEN: u64 = 32_768;
/// Largest metadata section read into memory. The reference tool accepts 4 KiB of custom metadata, but its
/// `DockerInfo` is a whole `docker inspect` document.
pub const MAX_METADATA_LEN: u64 = 4 << 20;
/// Largest kernel command line read into memory; Linux itself stops at 2 KiB (x86_64) or 4 KiB (aarch64).
pub const MAX_CMDLINE_LEN: u64 = 64 << 10;

const MAGIC: [u8; 4] = *b".eif";
const FLAG_AARCH64: u16 = 1;
const OFFSETS_AT: usize = 0x1c;
const SIZES_AT: usize = 0x11c;
const DEFAULT_MEM: u64 = 1 << 30;
const DEFAULT_CPUS: u64 = 2;

/// Processor architecture of an image, bit 0 of the header flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Arch {
    /// 64-bit x86; the kernel is a bzImage.
    X86_64,
    /// 64-bit Arm (Graviton); the kernel is an uncompressed `Image`.
    Aarch64,
}

impl Arch {
    /// The name that the AWS tools, OCI labels aside, use.
    pub fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// The name that container images use.
    pub fn oci_name(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Aarch64 => "arm64",
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The flags word of the file header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeaderFlags(pub u16);

impl HeaderFlags {
    /// The architecture that bit 0 names.
    pub fn arch(self) -> Arch {
        if self.0 & FLAG_AARCH64 == 0 { Arch::X86_64 } else { Arch::Aarch64 }
    }

    /// Whether the classic formula for PCR0 applies.
    ///
    /// Images with other bits set (0x0040, 0x0100, 0x0200 were seen in 2026) are measured in a way that is not
    /// public; a PCR0 computed for one of them would be a guess.
    pub fn has_known_measurement(self) -> bool {
        self.0 & !FLAG_AARCH64 == 0
    }
}

impl From<Arch> for HeaderFlags {
    fn from(arch: Arch) -> Self {
        match arch {
            Arch::X86_64 => Self(0),
            Arch::Aarch64 => Self(FLAG_AARCH64),
        }
    }
}

/// What a section holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SectionKind {
    /// The kernel: measured into PCR0 and PCR1.
    Kernel,
    /// The kernel command line, without terminator: measured into PCR0 and PCR1.
    Cmdline,
    /// One initramfs segment: the first into PCR0 and PCR1, later ones into PCR0 and PCR2.
    Ramdisk,
    /// Signature and certificate: the certificate is measured into PCR8.
    Signature,
    /// JSON that nobody measures.
    Metadata,
}

impl SectionKind {
    /// The number stored in the section header.
    pub fn code(self) -> u16 {
        match self {
            Self::Kernel => 1,
            Self::Cmdline => 2,
            Self::Ramdisk => 3,
            Self::Signature => 4,
            Self::Metadata => 5,
        }
    }

    /// The kind for a stored number; 0 and everything above 5 are refused by the platform.
    pub fn from_code(code: u16) -> Option<Self> {
        Some(match code {
            1 => Self::Kernel,
            2 => Self::Cmdline,
            3 => Self::Ramdisk,
            4 => Self::Signature,
            5 => Self::Metadata,
            _ => return None,
        })
    }

    /// Whether the payload enters PCR0.
    pub fn is_measured(self) -> bool {
        matches!(self, Self::Kernel | Self::Cmdline | Self::Ramdisk)
    }

    /// Lowercase name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Cmdline => "cmdline",
            Self::Ramdisk => "ramdisk",
            Self::Signature => "signature",
            Self::Metadata => "metadata",
        }
    }
}

impl fmt::Display for SectionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The file header, as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Format version.
    pub version: u16,
    /// Architecture and unknown bits.
    pub flags: HeaderFlags,
    /// Memory the image asks for, in bytes; nobody reads it.
    pub default_mem: u64,
    /// Processors the image asks for; nobody reads it.
    pub default_cpus: u64,
    /// The reserved word at 0x18.
    pub reserved: u16,
    /// Number of sections claimed.
    pub num_sections: u16,
    /// Absolute offsets of the section headers.
    pub offsets: [u64; MAX_SECTIONS],
    /// Payload lengths, without the section headers.
    pub sizes: [u64; MAX_SECTIONS],
    /// The unused word at 0x21c.
    pub unused: u32,
    /// CRC-32/ISO-HDLC over the 544 bytes in front of it and everything behind it.
    pub crc: u32,
}

impl Header {
    /// A version 4 header for `arch` without sections and with the values the reference writer uses for the
    /// fields that nobody reads.
    pub fn new(arch: Arch) -> Self {
        Self {
            version: VERSION,
            flags: arch.into(),
            default_mem: DEFAULT_MEM,
            default_cpus: DEFAULT_CPUS,
            reserved: 0,
            num_sections: 0,
            offsets: [0; MAX_SECTIONS],
            sizes: [0; MAX_SECTIONS],
            unused: 0,
            crc: 0,
        }
    }

    /// Takes the fields out of the bytes. Only the magic is checked here; see [`Header::check`].
    ///
    /// # Errors
    /// When the first four bytes are not `.eif`.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, Problem> {
        let magic = [bytes[0], bytes[1], bytes[2], bytes[3]];
        if magic != MAGIC {
            return Err(Problem::Magic { found: magic });
        }
        let mut header = Self::new(Arch::X86_64);
        header.version = be16(bytes, 0x04);
        header.flags = HeaderFlags(be16(bytes, 0x06));
        header.default_mem = be64(bytes, 0x08);
        header.default_cpus = be64(bytes, 0x10);
        header.reserved = be16(bytes, 0x18);
        header.num_sections = be16(bytes, 0x1a);
        for slot in 0..MAX_SECTIONS {
            header.offsets[slot] = be64(bytes, OFFSETS_AT + 8 * slot);
            header.sizes[slot] = be64(bytes, SIZES_AT + 8 * slot);
        }
        header.unused = be32(bytes, 0x21c);
        header.crc = be32(bytes, CRC_OFFSET);
        Ok(header)
    }

    /// The 548 bytes of this header.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let Self {
            version,
            flags,
            default_mem,
            default_cpus,
            reserved,
            num_sections,
            offsets,
            sizes,
            unused,
            crc,
        } = self;
        let mut bytes = [0; HEADER_LEN];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[0x04..0x06].copy_from_slice(&version.to_be_bytes());
        bytes[0x06..0x08].copy_from_slice(&flags.0.to_be_bytes());
        bytes[0x08..0x10].copy_from_slice(&default_mem.to_be_bytes());
        bytes[0x10..0x18].copy_from_slice(&default_cpus.to_be_bytes());
        bytes[0x18..0x1a].copy_from_slice(&reserved.to_be_bytes());
        bytes[0x1a..0x1c].copy_from_slice(&num_sections.to_be_bytes());
        for slot in 0..MAX_SECTIONS {
            bytes[OFFSETS_AT + 8 * slot..][..8].copy_from_slice(&offsets[slot].to_be_bytes());
            bytes[SIZES_AT + 8 * slot..][..8].copy_from_slice(&sizes[slot].to_be_bytes());
        }
        bytes[0x21c..0x220].copy_from_slice(&unused.to_be_bytes());
        bytes[CRC_OFFSET..].copy_from_slice(&crc.to_be_bytes());
        bytes
    }

    /// Checks everything that the header and the file's length decide alone, and returns the number of table
    /// slots that can be followed (at most 32, whatever the header claims).
    ///
    /// # Errors
    /// The first problem, when `report` refuses it.
    pub fn check(&self, file_len: u64, report: &mut impl Report) -> Result<usize, crate::Error> {
        if !(2..=VERSION).contains(&self.version) {
            report.problem(0x04, Problem::Version { found: self.version })?;
        }
        if !self.flags.has_known_measurement() {
            report.problem(0x06, Problem::UnknownFlags { found: self.flags.0 })?;
        }
        let claimed = usize::from(self.num_sections);
        if !(2..=MAX_SECTIONS).contains(&claimed) {
            report.problem(0x1a, Problem::SectionCount { found: self.num_sections })?;
        }
        let count = claimed.min(MAX_SECTIONS);
        let mut expected = HEADER_LEN as u64;
        for slot in 0..count {
            expected = self.check_slot(slot, expected, file_len, report)?;
        }
        if expected != file_len {
            report.problem(expected, Problem::Trailing { expected, actual: file_len })?;
        }
        for slot in count..MAX_SECTIONS {
            for (table, at) in [(&self.offsets, OFFSETS_AT), (&self.sizes, SIZES_AT)] {
                if table[slot] != 0 {
                    let at = (at + 8 * slot) as u64;
                    report.problem(at, Problem::UnusedSlot { slot, found: table[slot] })?;
                }
            }
        }
        Ok(count)
    }

    /// Checks one slot of the tables against the end of the section in front of it; returns its own end.
    fn check_slot(
        &self,
        slot: usize,
        expected: u64,
        file_len: u64,
        report: &mut impl Report,
    ) -> Result<u64, crate::Error> {
        let (offset, size) = (self.offsets[slot], self.sizes[slot]);
        if offset != expected {
            let at = (OFFSETS_AT + 8 * slot) as u64;
            report.problem(at, Problem::Placement { slot, expected, found: offset })?;
        }
        let end = offset.checked_add(SECTION_HEADER_LEN as u64).and_then(|start| start.checked_add(size));
        match end {
            Some(end) if end <= file_len => Ok(end),
            _ => {
                let at = (SIZES_AT + 8 * slot) as u64;
                report.problem(at, Problem::PastEnd { slot, offset, size, file_len })?;
                Ok(end.unwrap_or(file_len))
            }
        }
    }
}

/// The header in front of each payload, as stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SectionHeader {
    /// Section type number.
    pub code: u16,
    /// Always 0 in images that boot.
    pub flags: u16,
    /// Payload length in bytes.
    pub size: u64,
}

impl SectionHeader {
    /// Takes the fields out of the bytes.
    pub fn decode(bytes: &[u8; SECTION_HEADER_LEN]) -> Self {
        Self { code: be16(bytes, 0), flags: be16(bytes, 2), size: be64(bytes, 4) }
    }

    /// The 12 bytes of this header.
    pub fn encode(&self) -> [u8; SECTION_HEADER_LEN] {
        let mut bytes = [0; SECTION_HEADER_LEN];
        bytes[..2].copy_from_slice(&self.code.to_be_bytes());
        bytes[2..4].copy_from_slice(&self.flags.to_be_bytes());
        bytes[4..].copy_from_slice(&self.size.to_be_bytes());
        bytes
    }
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from(be16(bytes, at)) << 16 | u32::from(be16(bytes, at + 2))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}
