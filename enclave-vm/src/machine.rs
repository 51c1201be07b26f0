//! What machine an image gets, and whether that can be.

use std::fmt::{self, Display, Formatter};
use std::time::Duration;

/// MiB.
const MIB: u64 = 1 << 20;
/// Less than this is refused by the Nitro hypervisor too.
const MIN_MEMORY: Memory = Memory { mib: 64 };
/// More than any enclave on AWS.
const MAX_MEMORY: Memory = Memory { mib: 1 << 20 };
/// What an image gets when nothing is said, unless it needs more.
const USUAL_MEMORY: Memory = Memory { mib: 256 };
/// nitro-cli wants so many times the size of the image: file, copy in memory and unpacked content exist side by side.
const MEMORY_PER_IMAGE: u64 = 4;
/// More vCPUs than this have no use under emulation.
const MAX_CPUS: u8 = 32;
/// Length of the kernel's command line (`COMMAND_LINE_SIZE` on x86-64), its closing zero included.
const COMMAND_LINE_SIZE: usize = 2048;
/// What QEMU adds to the command line: a description of up to 24 virtio-mmio devices.
const COMMAND_LINE_RESERVE: usize = 24 * 40;

/// Which kind of virtual machine boots the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MachineKind {
    /// QEMU's microvm with our NSM, which signs. Runs the parts of an image.
    #[default]
    Microvm,
    /// QEMU's nitro-enclave with QEMU's own NSM: measures the image itself, signs nothing. Runs an image file.
    NitroEnclave,
}

impl Display for MachineKind {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Microvm => "microvm",
            Self::NitroEnclave => "nitro-enclave",
        })
    }
}

/// Who executes the guest's instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Accelerator {
    /// KVM where it can be used, else emulation.
    #[default]
    Auto,
    /// The processor itself, through /dev/kvm; fails where that is not there.
    Kvm,
    /// QEMU's emulation. Works everywhere.
    Tcg,
}

/// An amount of memory in MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Memory {
    mib: u64,
}

impl Memory {
    /// So many MiB.
    #[must_use]
    pub const fn from_mib(mib: u64) -> Self {
        Self { mib }
    }

    /// In MiB.
    #[must_use]
    pub const fn mib(self) -> u64 {
        self.mib
    }

    /// What an image of `image_len` bytes needs at least: four times its size, as `nitro-cli run-enclave` wants it,
    /// and 64 MiB in any case.
    #[must_use]
    pub fn needed_by(image_len: u64) -> Self {
        Self { mib: image_len.saturating_mul(MEMORY_PER_IMAGE).div_ceil(MIB) }.max(MIN_MEMORY)
    }

    /// What an image of `image_len` bytes gets when nothing is said.
    #[must_use]
    pub fn usual_for(image_len: u64) -> Self {
        Self::needed_by(image_len).max(USUAL_MEMORY)
    }
}

impl Display for Memory {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", self.mib)
    }
}

/// The CID that the guest sees itself under. Each enclave has a vsock of its own, so all may have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestCid(u32);

impl GuestCid {
    /// 0 to 3 mean hypervisor, loopback, host and parent; 2^32-1 means any.
    #[must_use]
    pub const fn new(cid: u32) -> Option<Self> {
        if cid > 3 && cid != u32::MAX { Some(Self(cid)) } else { None }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl Default for GuestCid {
    /// 16, the first that Nitro hands out.
    fn default() -> Self {
        Self(16)
    }
}

/// A machine, before it was compared with the image and this computer.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// Memory of the guest; [`Memory::usual_for`] the image when absent.
    pub memory: Option<Memory>,
    /// Number of vCPUs, 1 to 32.
    pub cpus: u8,
    /// Who executes.
    pub accelerator: Accelerator,
    /// The guest's CID.
    pub cid: GuestCid,
    /// Appended to the image's command line after what we add ourselves.
    pub append: Option<String>,
    /// How long the guest has until its init runs. Not watched where the image's command line silences the kernel.
    pub boot_timeout: Duration,
    /// How long it may run altogether.
    pub lifetime: Option<Duration>,
    /// What a line of the console contains when the application is ready. Without it, an enclave is ready when its
    /// init runs.
    pub ready_line: Option<String>,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            memory: None,
            cpus: 2,
            accelerator: Accelerator::default(),
            cid: GuestCid::default(),
            append: None,
            boot_timeout: Duration::from_secs(120),
            lifetime: None,
            ready_line: None,
        }
    }
}

/// A machine that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// Less than the image needs.
    #[error("memory of {given}: an image of {image_len} bytes needs at least {needed}")]
    MemoryTooSmall {
        /// Asked for.
        given: Memory,
        /// Least.
        needed: Memory,
        /// Size of the image.
        image_len: u64,
    },
    /// More than there is.
    #[error("memory of {given}: this machine has {available}")]
    MemoryTooLarge {
        /// Asked for.
        given: Memory,
        /// Most.
        available: Memory,
    },
    /// No, or too many, vCPUs.
    #[error("{given} vCPUs: expected 1 to {MAX_CPUS}")]
    Cpus {
        /// Asked for.
        given: u8,
    },
    /// The kernel would cut the command line off.
    #[error("command line of {len} bytes with what is appended: the kernel takes {max}")]
    CommandLine {
        /// Length.
        len: usize,
        /// Most.
        max: usize,
    },
    /// A zero byte or a line break.
    #[error("command line: a control character at byte {at}")]
    CommandLineCharacter {
        /// Where.
        at: usize,
    },
}

impl MachineError {
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::MemoryTooSmall { needed, .. } => Some(format!("use `--memory {}`", needed.mib)),
            _ => None,
        }
    }
}

impl MachineConfig {
    /// The memory for an image of `image_len` bytes on a computer with `available`.
    ///
    /// # Errors
    ///
    /// When it is too little for the image or more than there is, or when the number of vCPUs is out of range.
    pub fn check(&self, image_len: u64, available: Memory) -> Result<Memory, MachineError> {
        if self.cpus == 0 || self.cpus > MAX_CPUS {
            return Err(MachineError::Cpus { given: self.cpus });
        }
        let needed = Memory::needed_by(image_len);
        let given = self.memory.unwrap_or_else(|| Memory::usual_for(image_len));
        if given < needed {
            return Err(MachineError::MemoryTooSmall { given, needed, image_len });
        }
        let available = available.min(MAX_MEMORY);
        if given > available {
            return Err(MachineError::MemoryTooLarge { given, available });
        }
        Ok(given)
    }

    /// The words for the guest that are not part of the image: where its parent is, how to restart so that QEMU
    /// notices, and what the caller appends. The kernel's check of its timer takes an emulated processor that had to
    /// wait for a real one for a broken one, and panics; so it is left out.
    pub(crate) fn appended(&self) -> String {
        let ours = "reboot=t no_timer_check keyferry.parent_cid=2";
        match &self.append {
            Some(append) => format!("{ours} {append}"),
            None => ours.to_owned(),
        }
    }

    /// The whole command line for an image that has `own`.
    pub(crate) fn command_line(&self, own: &str) -> Result<String, MachineError> {
        let line = format!("{own} {}", self.appended()).trim_start().to_owned();
        if let Some(at) = line.bytes().position(|byte| byte < b' ' || byte == 0x7f) {
            return Err(MachineError::CommandLineCharacter { at });
        }
        let max = COMMAND_LINE_SIZE - 1 - COMMAND_LINE_RESERVE;
        if line.len() > max {
            return Err(MachineError::CommandLine { len: line.len(), max });
        }
        Ok(line)
    }
}

/// Whether a kernel with this command line says on its console that it starts init.
pub(crate) fn kernel_speaks(command_line: &str) -> bool {
    !command_line.split_ascii_whitespace().any(|word| word == "quiet" || word.starts_with("loglevel="))
}

/// The program that a kernel with this command line runs first out of the ramdisk.
pub(crate) fn init_of(command_line: &str) -> String {
    let mut words = command_line.split_ascii_whitespace();
    words
        .rfind(|word| word.starts_with("rdinit="))
        .map_or("/init", |word| &word["rdinit=".len()..])
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLENTY: Memory = Memory::from_mib(64 * 1024);

    fn with_memory(mib: u64) -> MachineConfig {
        MachineConfig { memory: Some(Memory::from_mib(mib)), ..MachineConfig::default() }
    }

    #[test]
    fn memory_follows_the_size_of_the_image() {
        let config = MachineConfig::default();
        assert_eq!(config.check(5_000_000, PLENTY).unwrap().mib(), 256);
        assert_eq!(config.check(100 * MIB, PLENTY).unwrap().mib(), 400);
        assert_eq!(config.check(100 * MIB + 1, PLENTY).unwrap().mib(), 401);
        assert_eq!(with_memory(64).check(16 * MIB, PLENTY).unwrap().mib(), 64);
    }

    #[test]
    fn too_little_memory_is_refused_with_what_would_do() {
        let error = with_memory(64).check(16 * MIB + 1, PLENTY).unwrap_err();
        assert_eq!(error.to_string(), "memory of 64 MiB: an image of 16777217 bytes needs at least 65 MiB");
        assert_eq!(error.hint().unwrap(), "use `--memory 65`");
        assert!(with_memory(63).check(0, PLENTY).is_err());
        assert!(MachineConfig::default().check(u64::MAX, PLENTY).is_err());
    }

    #[test]
    fn more_memory_than_there_is_is_refused() {
        let error = with_memory(2049).check(0, Memory::from_mib(2048)).unwrap_err();
        assert_eq!(error.to_string(), "memory of 2049 MiB: this machine has 2048 MiB");
    }

    #[test]
    fn vcpus_are_bounded() {
        for cpus in [0, 33] {
            let config = MachineConfig { cpus, ..MachineConfig::default() };
            assert_eq!(config.check(0, PLENTY), Err(MachineError::Cpus { given: cpus }));
        }
    }

    #[test]
    fn a_command_line_keeps_the_images_own_words_in_front() {
        let config = MachineConfig { append: Some("debug".into()), ..MachineConfig::default() };
        let line = config.command_line("console=ttyS0 reboot=k").unwrap();
        assert_eq!(line, "console=ttyS0 reboot=k reboot=t no_timer_check keyferry.parent_cid=2 debug");
        assert_eq!(
            MachineConfig::default().command_line("").unwrap(),
            "reboot=t no_timer_check keyferry.parent_cid=2"
        );
    }

    #[test]
    fn a_command_line_that_the_kernel_would_cut_or_split_is_refused() {
        let config = MachineConfig::default();
        assert!(matches!(
            config.command_line(&"a".repeat(2000)),
            Err(MachineError::CommandLine { max: 1087, .. })
        ));
        assert_eq!(config.command_line("a\nb"), Err(MachineError::CommandLineCharacter { at: 1 }));
        assert_eq!(config.command_line("a\0b"), Err(MachineError::CommandLineCharacter { at: 1 }));
    }

    #[test]
    fn reserved_cids_are_no_guests() {
        for reserved in [0, 1, 2, 3, u32::MAX] {
            assert_eq!(GuestCid::new(reserved), None);
        }
        assert_eq!(GuestCid::new(4).unwrap().get(), 4);
    }

    #[test]
    fn a_silenced_kernel_is_recognised() {
        assert!(kernel_speaks("console=ttyS0 quietly"));
        assert!(!kernel_speaks("console=ttyS0 quiet"));
        assert!(!kernel_speaks("loglevel=3"));
    }

    #[test]
    fn the_last_word_on_init_counts() {
        assert_eq!(init_of("console=ttyS0 init=/sbin/init"), "/init");
        assert_eq!(init_of("rdinit=/a rdinit=/b x"), "/b");
    }
}
