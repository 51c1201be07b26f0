//! The keys as a descriptor that the app inherits.

use std::io::{self, Seek, Write};
use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use super::Error;
use crate::Keys;

/// A file without a name that holds `app_keys.json`, sealed: nobody who has the descriptor can change what it holds.
///
/// It is inherited by programs started from now on, so make it just before starting the one that is to have it, and
/// drop it right after. Its offset is at the start and shared by all copies; a program that does not start reading at
/// zero opens `/proc/self/fd/N` instead.
///
/// # Errors
/// [`Error::Descriptor`], [`Error::Encode`].
pub fn descriptor(keys: &Keys) -> Result<OwnedFd, Error> {
    let json = keys.to_json().map_err(Error::Encode)?;
    sealed_memory(&json).map_err(Error::Descriptor)
}

fn sealed_memory(content: &[u8]) -> io::Result<OwnedFd> {
    // Without MFD_CLOEXEC: it is made to be inherited.
    let fd = memfd_create("app_keys.json", MemfdFlags::ALLOW_SEALING)?;
    let mut file = std::fs::File::from(fd);
    file.write_all(content)?;
    file.rewind()?;
    fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::AsRawFd;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn the_content_can_be_read_and_not_changed() {
        let mut file = File::from(sealed_memory(b"keys").unwrap());
        let mut content = String::new();
        file.read_to_string(&mut content).unwrap();
        assert_eq!(content, "keys");
        file.rewind().unwrap();
        assert_eq!(file.write(b"x").unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(file.set_len(0).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn a_program_inherits_it() {
        let fd = sealed_memory(b"keys").unwrap();
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let output = Command::new("cat").arg(path).stdin(Stdio::null()).output().unwrap();
        assert_eq!(output.stdout, b"keys");
    }
}
