//! The kernel's randomness, seeded by the NSM.
//!
//! An enclave has no devices whose timing nobody else sees, and its parent starts it. What the kernel gathered by
//! itself is kept and mixed with 256 bytes of the module's generator, which count in full; only then keys are made.

use std::fs::File;
use std::io;

use rustix::ioctl::{Setter, ioctl};

/// What the pool takes at a time, and what the module answers with.
const LEN: usize = 256;
/// `RNDADDENTROPY`, random(4): `_IOW('R', 0x03, int[2])`.
const ADD_ENTROPY: rustix::ioctl::Opcode = rustix::ioctl::opcode::write::<[i32; 2]>(b'R', 0x03);

/// `struct rand_pool_info`, with room for its data.
#[repr(C)]
struct PoolInfo {
    entropy_bits: i32,
    len: i32,
    data: [u8; LEN],
}

/// Mixes `random` into the kernel's pool and counts all of it as unknown to anybody else. More than 256 bytes are cut
/// off: the pool holds no more.
///
/// # Errors
/// The system's; without CAP_SYS_ADMIN it is EPERM.
pub(super) fn add(random: &[u8]) -> io::Result<()> {
    let len = random.len().min(LEN);
    let mut data = [0; LEN];
    data[..len].copy_from_slice(&random[..len]);
    let len = i32::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
    let pool = PoolInfo { entropy_bits: len * 8, len, data };
    let device = File::options().write(true).open("/dev/random")?;
    // JUSTIFICATION: no crate offers this request; without it the module's bytes are mixed in but not counted.
    // SAFETY: RNDADDENTROPY reads the two integers and then as many bytes as the second says, which is at most the
    // length of `data`, which follows them without padding; it keeps no pointer.
    #[expect(unsafe_code, reason = "an ioctl without a safe wrapper, see above")]
    let added = unsafe { ioctl(&device, Setter::<ADD_ENTROPY, PoolInfo>::new(pool)) };
    added.map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structure_is_the_kernels() {
        assert_eq!(ADD_ENTROPY, 0x4008_5203);
        assert_eq!(size_of::<PoolInfo>(), 8 + LEN);
    }

    #[test]
    fn the_kernel_takes_it_from_those_who_may() {
        for random in [&[7; LEN][..], &[7; 16], &[7; LEN + 1]] {
            match add(random) {
                Ok(()) => {}
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}"),
            }
        }
    }
}
