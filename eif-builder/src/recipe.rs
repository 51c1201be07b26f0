//! The parts of an image in their canonical order, ready to be written or only measured.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

use crate::assemble::{Assembled, Assembler, Payload};
use crate::compress::{Compression, Compressor};
use crate::error::{Error, IoContext};
use crate::format::{Arch, MAX_CMDLINE_LEN, SectionKind};
use crate::measure::extend;
use crate::metadata::Metadata;
use crate::scratch::Scratch;
use crate::sign::Signer;

/// Writes the uncompressed bytes of a ramdisk. Called once per assembly; must write the same bytes every time.
pub type Fill = Box<dyn Fn(&mut dyn Write) -> Result<(), Error>>;

/// Where a ramdisk comes from.
pub enum Ramdisk {
    /// A file, taken as it is.
    File(PathBuf),
    /// An archive made on the fly.
    Archive {
        /// What it is, for error messages and provenance.
        label: String,
        /// How it is packed.
        compression: Compression,
        /// Writes it.
        fill: Fill,
    },
}

impl std::fmt::Debug for Ramdisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.label())
    }
}

impl Ramdisk {
    /// What it is, for error messages and provenance.
    pub fn label(&self) -> String {
        match self {
            Self::File(path) => path.display().to_string(),
            Self::Archive { label, .. } => label.clone(),
        }
    }
}

/// Everything that goes into an image.
#[derive(Debug)]
pub struct Recipe {
    /// Architecture.
    pub arch: Arch,
    /// Kernel file: a bzImage for x86_64, an uncompressed `Image` for aarch64.
    pub kernel: PathBuf,
    /// Kernel command line, stored and measured byte for byte.
    pub cmdline: Vec<u8>,
    /// The metadata section, which is not measured.
    pub metadata: Metadata,
    /// Ramdisks; the first is measured into PCR1, the others into PCR2.
    pub ramdisks: Vec<Ramdisk>,
    /// Signs PCR0.
    pub signer: Option<Signer>,
    /// Lets empty ramdisks pass, which no loader accepts: for reproducing files of other tools.
    pub allow_empty_ramdisk: bool,
}

impl Recipe {
    /// Writes the image to `output`. The file appears under its name only when it is complete.
    ///
    /// # Errors
    /// When an input cannot be read or does not fit the format, or when writing fails.
    pub fn write(&self, output: &Path) -> Result<Assembled, Error> {
        let file = Scratch::beside(output)?;
        let (assembled, _) = self.assemble(Assembler::writing(self.arch, file.as_file())?)?;
        file.publish(output)?;
        Ok(assembled)
    }

    /// Measures what [`Recipe::write`] would write, without writing.
    ///
    /// # Errors
    /// When an input cannot be read or does not fit the format.
    pub fn measure(&self) -> Result<Assembled, Error> {
        self.assemble(Assembler::measuring(self.arch)).map(|(assembled, _)| assembled)
    }

    fn assemble<W: Write + Seek>(
        &self,
        mut assembler: Assembler<W>,
    ) -> Result<(Assembled, Option<W>), Error> {
        if self.cmdline.len() as u64 > MAX_CMDLINE_LEN {
            return Err(Error::Limit {
                object: "the kernel command line".into(),
                unit: "bytes",
                actual: self.cmdline.len() as u64,
                max: MAX_CMDLINE_LEN,
            });
        }
        assembler.section(SectionKind::Kernel, |payload| copy_file(&self.kernel, payload))?;
        assembler.bytes(SectionKind::Cmdline, &self.cmdline)?;
        assembler.bytes(SectionKind::Metadata, &self.metadata.encode())?;
        for ramdisk in &self.ramdisks {
            let len = assembler.section(SectionKind::Ramdisk, |payload| ramdisk.pour(payload))?;
            if len == 0 && !self.allow_empty_ramdisk {
                return Err(Error::input(ramdisk.label(), "an empty ramdisk, loaders refuse the image"));
            }
        }
        let (mut assembled, output) = assembler.finish(self.signer.as_ref())?;
        if let Some(signer) = &self.signer {
            assembled.registers.pcr8 = Some(extend(signer.certificate_der()));
        }
        Ok((assembled, output))
    }
}

impl Ramdisk {
    fn pour<W: Write>(&self, payload: &mut Payload<'_, W>) -> Result<(), Error> {
        match self {
            Self::File(path) => copy_file(path, payload),
            Self::Archive { compression, fill, .. } => {
                let mut compressor = Compressor::new(payload, *compression)?;
                fill(&mut compressor)?;
                compressor.finish().context("compress", "the ramdisk")
            }
        }
    }
}

fn copy_file<W: Write>(path: &Path, payload: &mut Payload<'_, W>) -> Result<(), Error> {
    let mut file = File::open(path).context("open", path)?;
    if file.metadata().context("read", path)?.is_dir() {
        return Err(Error::NotAFile { path: path.to_owned() });
    }
    payload.copy_from(&mut file, &path.display().to_string()).map(drop)
}

/// Checks that a kernel is of the kind that the loader for `arch` can start. An ELF `vmlinux` on x86_64 starts
/// and never prints a line.
///
/// # Errors
/// What the file is not.
pub fn check_kernel(path: &Path, arch: Arch) -> Result<(), Error> {
    let mut start = Vec::new();
    let file = File::open(path).context("open", path)?;
    io::BufReader::new(file).take(1024).read_to_end(&mut start).context("read", path)?;
    match arch {
        // Linux boot protocol, Documentation/arch/x86/boot.rst: "HdrS" at 0x202.
        Arch::X86_64 if start.get(0x202..0x206) != Some(b"HdrS") => {
            Err(Error::input(path.display(), "no bzImage (no boot header at 0x202), which x86_64 needs"))
        }
        // Documentation/arch/arm64/booting.rst: magic "ARM\x64" at 56, text_offset at 8.
        Arch::Aarch64 if start.get(56..60) != Some(b"ARM\x64") => {
            Err(Error::input(path.display(), "no uncompressed arm64 Image (no magic at byte 56)"))
        }
        Arch::Aarch64 if start.get(8..16) == Some(&[0; 8]) => Err(Error::input(
            path.display(),
            "text_offset (bytes 8 to 15) is 0, for which the AWS loader puts the kernel at address 0; write \
             0000200000000000 there",
        )),
        _ => Ok(()),
    }
}
