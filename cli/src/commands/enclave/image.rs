//! From an enclave image to what the virtual machine boots.

use std::path::Path;

use attestation::OsImageHash;
use command_line::{Exit, Failure};
use eif_builder::{Arch, Image, SectionKind, Strict, extend};
use enclave_vm::{ImageParts, Registers, Spool};

/// A measured image.
pub(in crate::commands) struct Opened {
    /// Size of the file in bytes.
    pub(in crate::commands) len: u64,
    /// The kernel command line in it.
    pub(in crate::commands) command_line: String,
    /// What it leads to on hardware that measures it.
    pub(in crate::commands) registers: Registers,
    /// Name of the image in the KMS contracts.
    pub(in crate::commands) os_image_hash: OsImageHash,
    image: Image<std::io::BufReader<std::fs::File>>,
}

impl Opened {
    /// Reads and measures the whole image as a loader would, its signature included.
    pub(in crate::commands) fn open(path: &Path) -> Result<Self, Failure> {
        let mut image = Image::open(path, &mut Strict).map_err(failure)?;
        if image.header().flags.arch() != Arch::X86_64 {
            return Err(refused(format!("{}: an image for aarch64; only x86-64 runs here", path.display())));
        }
        let scan = image.scan(&mut Strict).map_err(failure)?;
        let measured = scan.registers.map_err(|finding| refused(format!("{}: {finding}", path.display())))?;
        let signature = image.signature().map_err(failure)?;
        if let Some(signature) = &signature {
            let checked = signature.verify(&measured.pcr0);
            checked.map_err(|reason| refused(format!("{}: signature: {reason}", path.display())))?;
        }
        let signer = signature.map(|signature| extend(signature.certificate_der()));
        let command_line = image.cmdline().map_err(failure)?.unwrap_or_default();
        let command_line = String::from_utf8(command_line)
            .map_err(|_| refused(format!("{}: the command line is not UTF-8", path.display())))?;
        Ok(Self {
            len: image.file_len(),
            // nitro-cli stores it without, other tools with a closing zero or line feed; the kernel is given neither.
            command_line: command_line.trim_end_matches(['\0', '\n']).to_owned(),
            os_image_hash: measured.os_image_hash(),
            registers: Registers::of_image([measured.pcr0, measured.pcr1, measured.pcr2], signer),
            image,
        })
    }

    /// Copies kernel and ramdisks to where the machine reads them.
    pub(in crate::commands) fn into_parts(mut self) -> Result<ImageParts, Failure> {
        let mut kernel = Spool::new("kernel").map_err(super::failure)?;
        let mut ramdisks = Spool::new("ramdisks").map_err(super::failure)?;
        for section in self.image.sections().to_vec() {
            let spool = match section.kind {
                SectionKind::Kernel => &mut kernel,
                SectionKind::Ramdisk => &mut ramdisks,
                SectionKind::Cmdline | SectionKind::Signature | SectionKind::Metadata => continue,
            };
            let mut payload = self.image.payload(section).map_err(failure)?;
            spool.append(&mut payload).map_err(super::failure)?;
        }
        Ok(ImageParts { kernel, ramdisks, command_line: self.command_line, image_len: self.len })
    }
}

/// An image that no loader takes is refused; one that cannot be read is a matter of this machine.
fn failure(error: eif_builder::Error) -> Failure {
    let exit = match &error {
        eif_builder::Error::Format(_) => Exit::Refused,
        _ => Exit::Internal,
    };
    Failure::new(exit, error)
}

fn refused(reason: String) -> Failure {
    Failure::new(Exit::Refused, reason)
}
