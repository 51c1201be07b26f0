//! What can be wrong with an enclave image, and who decides what happens then.

use std::fmt;

use crate::Error;

/// One deviation from the format. Where it lies is told beside it, see [`Finding`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// Shorter than a header.
    #[error("file is {len} bytes, an enclave image has at least 548")]
    TooShort {
        /// Length of the file.
        len: u64,
    },
    /// Not an enclave image.
    #[error("magic is {}, expected 2e656966", hex::encode(found))]
    Magic {
        /// The first four bytes.
        found: [u8; 4],
    },
    /// A version that was never public.
    #[error("version is {found}, expected 2 to 4")]
    Version {
        /// Stored version.
        found: u16,
    },
    /// Header flags other than the architecture.
    #[error(
        "header flags are {found:#06x}: unknown measurement scheme, only 0 (x86_64) and 1 (aarch64) are known"
    )]
    UnknownFlags {
        /// Stored flags.
        found: u16,
    },
    /// Too few or too many sections.
    #[error("section count is {found}, expected 2 to 32")]
    SectionCount {
        /// Stored count.
        found: u16,
    },
    /// A section that does not start where the one before it ends.
    #[error("section {slot} is placed at {found:#x}, expected {expected:#x}: {}", gap_or_overlap(*expected, *found))]
    Placement {
        /// Slot in the header tables.
        slot: usize,
        /// End of the section before.
        expected: u64,
        /// Stored offset.
        found: u64,
    },
    /// A section that leaves the file.
    #[error("section {slot} claims {size} bytes at {offset:#x}, the file has {file_len}")]
    PastEnd {
        /// Slot in the header tables.
        slot: usize,
        /// Stored offset.
        offset: u64,
        /// Stored size.
        size: u64,
        /// Length of the file.
        file_len: u64,
    },
    /// Bytes that belong to no section, or sections that end early.
    #[error("the last section ends at {expected:#x}, the file at {actual:#x}")]
    Trailing {
        /// End of the last section.
        expected: u64,
        /// Length of the file.
        actual: u64,
    },
    /// A table slot behind the last section that is not zero.
    #[error("unused table slot {slot} is {found:#x}, expected 0")]
    UnusedSlot {
        /// Slot in the header tables.
        slot: usize,
        /// Stored value.
        found: u64,
    },
    /// A section type that the platform refuses.
    #[error("section {slot} has type {found}, expected 1 to 5")]
    SectionType {
        /// Slot in the header tables.
        slot: usize,
        /// Stored type.
        found: u16,
    },
    /// Section flags that are not zero.
    #[error("section {slot} has flags {found:#06x}, expected 0")]
    SectionFlags {
        /// Slot in the header tables.
        slot: usize,
        /// Stored flags.
        found: u16,
    },
    /// The two places that store a section's size disagree.
    #[error("section {slot} says it has {in_section} bytes, the file header says {in_table}")]
    SizeMismatch {
        /// Slot in the header tables.
        slot: usize,
        /// Size in the section header.
        in_section: u64,
        /// Size in the file header.
        in_table: u64,
    },
    /// A section that may exist only once.
    #[error("section {slot} is a second {kind}")]
    Duplicate {
        /// Slot in the header tables.
        slot: usize,
        /// What it holds.
        kind: crate::SectionKind,
    },
    /// A section that has to exist.
    #[error("there is no {kind} section, version {version} needs one")]
    Missing {
        /// What is missing.
        kind: crate::SectionKind,
        /// Stored version.
        version: u16,
    },
    /// A section kind that this version does not know.
    #[error("section {slot} is a {kind}, which version {version} does not know")]
    TooNew {
        /// Slot in the header tables.
        slot: usize,
        /// What it holds.
        kind: crate::SectionKind,
        /// Stored version.
        version: u16,
    },
    /// A ramdisk in front of the kernel.
    #[error("section {slot} is a ramdisk in front of the kernel")]
    RamdiskBeforeKernel {
        /// Slot in the header tables.
        slot: usize,
    },
    /// A ramdisk without bytes; QEMU refuses the whole file.
    #[error("section {slot} is an empty ramdisk, loaders refuse it")]
    EmptyRamdisk {
        /// Slot in the header tables.
        slot: usize,
    },
    /// A section that is too large for what it holds.
    #[error("section {slot}, the {kind}, has {size} bytes, at most {max} are allowed")]
    TooLarge {
        /// Slot in the header tables.
        slot: usize,
        /// What it holds.
        kind: crate::SectionKind,
        /// Stored size.
        size: u64,
        /// The limit.
        max: u64,
    },
    /// The stored checksum is not the file's.
    #[error("CRC is {stored:08x}, the content has {computed:08x}")]
    Crc {
        /// Stored CRC.
        stored: u32,
        /// CRC of the content.
        computed: u32,
    },
    /// The signature section cannot be decoded, or does not sign this image.
    #[error("signature: {0}")]
    Signature(String),
    /// The metadata section is not the JSON that the tools expect.
    #[error("metadata: {0}")]
    Metadata(String),
    /// A ramdisk cannot be unpacked.
    #[error("ramdisk {index}: {reason}")]
    Ramdisk {
        /// Ramdisk number in file order.
        index: usize,
        /// What is wrong.
        reason: String,
    },
}

fn gap_or_overlap(expected: u64, found: u64) -> String {
    if found > expected {
        format!("a gap of {} bytes", found - expected)
    } else {
        format!("an overlap of {} bytes", expected - found)
    }
}

/// A [`Problem`] and the byte offset at which the file shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Byte offset in the file.
    pub offset: u64,
    /// What is wrong there.
    pub problem: Problem,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "offset {:#x}: {}", self.offset, self.problem)
    }
}

/// Decides whether a problem ends the reading.
pub trait Report {
    /// Takes note of a problem.
    ///
    /// # Errors
    /// The problem itself, when it must not be passed over.
    fn problem(&mut self, offset: u64, problem: Problem) -> Result<(), Error>;
}

/// Refuses at the first problem, as loaders do.
#[derive(Debug, Default)]
pub struct Strict;

impl Report for Strict {
    fn problem(&mut self, offset: u64, problem: Problem) -> Result<(), Error> {
        Err(Error::Format(Finding { offset, problem }))
    }
}

/// Keeps a list and goes on. The list is bounded: a file has 32 slots and each is looked at a few times.
#[derive(Debug, Default)]
pub struct Lenient {
    /// What was found, in the order of discovery.
    pub findings: Vec<Finding>,
}

impl Report for Lenient {
    fn problem(&mut self, offset: u64, problem: Problem) -> Result<(), Error> {
        self.findings.push(Finding { offset, problem });
        Ok(())
    }
}
