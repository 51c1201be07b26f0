//! The parts of an enclave image, where QEMU can read them, and the registers they lead to.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::PathBuf;
use std::sync::Arc;

use attestation::{Pcr, PcrIndex};
use aws_lc_rs::digest::{Context, SHA384};
use nsm_emulator::Emulator;

use crate::Error;
use crate::machine::MachineKind;

/// What is booted, and on which machine.
pub enum BootImage {
    /// The parts of an image on a microvm, with this NSM.
    Parts {
        /// Kernel, command line, ramdisks.
        parts: ImageParts,
        /// Answers the guest. Its registers are to be those of the image: see [`Registers`].
        nsm: Arc<Emulator>,
    },
    /// An image file on QEMU's nitro-enclave machine, which takes it apart and measures it itself.
    File {
        /// The enclave image.
        path: PathBuf,
        /// Its size in bytes.
        len: u64,
        /// The kernel command line in it.
        command_line: String,
        /// IAM role of the parent, for PCR3.
        parent_role: Option<String>,
        /// Instance id of the parent, for PCR4.
        parent_instance: Option<String>,
    },
}

impl BootImage {
    /// The machine that boots it.
    #[must_use]
    pub fn machine(&self) -> MachineKind {
        match self {
            Self::Parts { .. } => MachineKind::Microvm,
            Self::File { .. } => MachineKind::NitroEnclave,
        }
    }

    /// Size of the image in bytes.
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Parts { parts, .. } => parts.image_len,
            Self::File { len, .. } => *len,
        }
    }

    /// The command line in the image.
    pub(crate) fn command_line(&self) -> &str {
        match self {
            Self::Parts { parts, .. } => &parts.command_line,
            Self::File { command_line, .. } => command_line,
        }
    }
}

/// Kernel, command line and ramdisks of an image.
#[derive(Debug)]
pub struct ImageParts {
    /// The kernel, a bzImage.
    pub kernel: Spool,
    /// All ramdisks, one behind the other as the hypervisor puts them.
    pub ramdisks: Spool,
    /// The kernel command line as measured.
    pub command_line: String,
    /// Size of the image in bytes, which decides how much memory the machine needs.
    pub image_len: u64,
}

/// Bytes on their way to QEMU: a file without a name, so that nothing of it is left whatever happens to us.
#[derive(Debug)]
pub struct Spool {
    file: File,
    part: &'static str,
}

impl Spool {
    /// An empty one for the part called `part` in messages.
    ///
    /// # Errors
    ///
    /// When the directory for temporary files cannot be written to.
    pub fn new(part: &'static str) -> Result<Self, Error> {
        let file = tempfile::tempfile().map_err(|source| Error::Spool { part, source })?;
        Ok(Self { file, part })
    }

    /// Appends what `reader` gives; returns how many bytes that were.
    ///
    /// # Errors
    ///
    /// When reading or writing fails.
    pub fn append(&mut self, reader: &mut impl Read) -> Result<u64, Error> {
        io::copy(reader, &mut self.file).map_err(|source| Error::Spool { part: self.part, source })
    }

    /// The file, for a process that opens it through its descriptor.
    pub(crate) fn into_file(mut self) -> Result<File, Error> {
        self.file.rewind().map_err(|source| Error::Spool { part: self.part, source })?;
        Ok(self.file)
    }
}

/// The registers that the NSM of an enclave starts with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registers {
    image: [Pcr; 3],
    signer: Option<Pcr>,
    role: Option<Pcr>,
    instance: Option<Pcr>,
}

impl Registers {
    /// Of an image with these PCR0, PCR1 and PCR2, and PCR8 when it is signed.
    #[must_use]
    pub fn of_image(image: [Pcr; 3], signer: Option<Pcr>) -> Self {
        Self { image, signer, role: None, instance: None }
    }

    /// PCR3: started from a parent with the IAM role of this ARN.
    #[must_use]
    pub fn with_parent_role(mut self, arn: &str) -> Self {
        self.role = Some(extend(arn.as_bytes()));
        self
    }

    /// PCR4: started from the parent instance of this id (`i-…`).
    #[must_use]
    pub fn with_parent_instance(mut self, id: &str) -> Self {
        self.instance = Some(extend(id.as_bytes()));
        self
    }

    /// What an enclave started with the debug flag shows: zeros where the image would be, the rest unchanged.
    #[must_use]
    pub fn in_debug_mode(mut self) -> Self {
        self.image = [Pcr::ZERO; 3];
        self
    }

    /// The registers that are not simply zero because nothing was ever put there.
    #[must_use]
    pub fn to_map(&self) -> BTreeMap<PcrIndex, Pcr> {
        let Self { image: [pcr0, pcr1, pcr2], signer, role, instance } = self;
        let mut map = BTreeMap::from([
            (PcrIndex::IMAGE, *pcr0),
            (PcrIndex::KERNEL, *pcr1),
            (PcrIndex::APPLICATION, *pcr2),
        ]);
        map.extend(role.map(|pcr| (PcrIndex::ROLE, pcr)));
        map.extend(instance.map(|pcr| (PcrIndex::INSTANCE, pcr)));
        map.extend(signer.map(|pcr| (PcrIndex::SIGNER, pcr)));
        map
    }

    /// The start values in the form that the emulated NSM takes.
    #[must_use]
    pub fn for_emulator(&self) -> BTreeMap<u8, nsm_emulator::PcrValue> {
        self.to_map().into_iter().map(|(index, pcr)| (index.get(), *pcr.as_bytes())).collect()
    }
}

/// An untouched register extended with the text itself, not with its hash, as AWS does it for PCR3 and PCR4.
fn extend(text: &[u8]) -> Pcr {
    let mut context = Context::new(&SHA384);
    context.update(Pcr::ZERO.as_bytes());
    context.update(text);
    let mut value = [0; Pcr::LEN];
    value.copy_from_slice(context.finish().as_ref());
    Pcr::new(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers() -> Registers {
        Registers::of_image([1, 2, 3].map(|byte| Pcr::new([byte; 48])), Some(Pcr::new([8; 48])))
            .with_parent_role("arn:aws:iam::123456789012:role/parent")
            .with_parent_instance("i-1234567890abcdef0")
    }

    #[test]
    fn debug_mode_hides_the_image_and_nothing_else() {
        let (plain, debug) = (registers().to_map(), registers().in_debug_mode().to_map());
        for (index, pcr) in &plain {
            if index.get() < 3 {
                assert!(debug[index].is_zero());
            } else {
                assert_eq!(debug[index], *pcr);
            }
        }
        assert_eq!(plain.keys().map(|index| index.get()).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 8]);
    }

    #[test]
    fn the_parents_instance_is_extended_as_text() {
        // sha384sum of 48 zero bytes and the ASCII text.
        let expected = "08f996b5d43e047a9eb51e7f548bfee7e164fd7dc8f65541f2ac09d6545ac812719327281c401a67a10fcba87ae79ce0";
        assert_eq!(registers().to_map()[&PcrIndex::INSTANCE].to_string(), expected);
    }

    #[test]
    fn a_spool_keeps_the_order() {
        let mut spool = Spool::new("ramdisks").unwrap();
        assert_eq!(spool.append(&mut b"first".as_slice()).unwrap(), 5);
        assert_eq!(spool.append(&mut b"second".as_slice()).unwrap(), 6);
        let mut text = String::new();
        spool.into_file().unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "firstsecond");
    }
}
