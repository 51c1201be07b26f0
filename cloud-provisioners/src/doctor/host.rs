//! Files of the host, below one directory.

use std::io::{self, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use rustix::fs::{Access, OFlags, access};
use tokio::process::Command;

/// No file that is looked at is larger than this, save for the kernel's log.
const LARGEST: u64 = 4 << 20;
/// The kernel keeps 16 MiB at most; its records are read one by one.
const LARGEST_LOG: usize = 16 << 20;
/// One record of the kernel's log, with room.
const RECORD: usize = 16 << 10;

/// A process.
pub(super) struct Process {
    /// Its short name.
    pub(super) name: String,
    /// Its arguments.
    pub(super) arguments: Vec<String>,
}

/// The host.
pub(super) struct Host {
    root: PathBuf,
}

impl Host {
    pub(super) fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// Where an absolute path is.
    pub(super) fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    pub(super) fn exists(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    pub(super) fn writable(&self, path: &str) -> bool {
        access(self.path(path), Access::WRITE_OK).is_ok()
    }

    /// A text, at most [`LARGEST`] bytes of it.
    pub(super) fn text(&self, path: impl AsRef<Path>) -> io::Result<String> {
        let file = std::fs::File::open(self.path(path))?;
        let mut text = Vec::new();
        file.take(LARGEST).read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// The kernel's log as it is now.
    pub(super) fn kernel_log(&self) -> io::Result<String> {
        let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
        let mut log =
            std::fs::OpenOptions::new().read(true).custom_flags(flags).open(self.path("/dev/kmsg"))?;
        let mut text = Vec::new();
        let mut record = vec![0; RECORD];
        while text.len() < LARGEST_LOG {
            match log.read(&mut record) {
                Ok(0) => break,
                Ok(read) => text.extend_from_slice(&record[..read]),
                // The end of what was logged so far.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // A record was overwritten before it was read; the next read goes on after it.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                Err(error) => return Err(error),
            }
        }
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Every process.
    pub(super) fn processes(&self) -> Vec<Process> {
        let Ok(entries) = std::fs::read_dir(self.path("/proc")) else { return Vec::new() };
        let numbered = entries.flatten().filter(|entry| {
            entry.file_name().to_str().is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
        });
        numbered
            .filter_map(|entry| {
                let read = |name: &str| std::fs::read(entry.path().join(name)).ok();
                let name = String::from_utf8_lossy(&read("comm")?).trim().to_owned();
                let arguments = read("cmdline")?;
                let arguments = arguments.split(|byte| *byte == 0).filter(|it| !it.is_empty());
                let arguments = arguments.map(|it| String::from_utf8_lossy(it).into_owned()).collect();
                Some(Process { name, arguments })
            })
            .collect()
    }

    /// Where programs listen with TCP.
    pub(super) fn listeners(&self) -> Vec<(IpAddr, u16)> {
        ["/proc/net/tcp", "/proc/net/tcp6"]
            .iter()
            .filter_map(|path| self.text(path).ok())
            .flat_map(|table| table.lines().skip(1).filter_map(listener).collect::<Vec<_>>())
            .collect()
    }

    /// What a program of the host prints.
    pub(super) async fn output(&self, program: &str, arguments: &[&str]) -> io::Result<String> {
        let mut command = Command::new(self.path(program));
        command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
        let output = command.output().await?;
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            false => Err(io::Error::other(format!("{program}: {}", output.status))),
        }
    }
}

/// A line of `/proc/net/tcp` that is in the state LISTEN: `0: 0100007F:0D73 00000000:0000 0A …`.
fn listener(line: &str) -> Option<(IpAddr, u16)> {
    let mut words = line.split_whitespace().skip(1);
    let (local, _remote, state) = (words.next()?, words.next()?, words.next()?);
    let (address, port) = local.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok().filter(|_| state == "0A")?;
    // 32-bit words in the host's byte order.
    let words = hex::decode(address).ok()?;
    let bytes: Vec<u8> = words.chunks(4).flat_map(|word| word.iter().rev().copied()).collect();
    let address = match bytes.len() {
        4 => IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        _ => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?)),
    };
    Some((address, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_are_read_as_the_kernel_writes_them() {
        for (line, expected) in [
            ("   0: 0100007F:0D73 00000000:0000 0A 00000000:00000000", Some(("127.0.0.1", 3443))),
            ("   1: 00000000:2378 00000000:0000 0A 00000000:00000000", Some(("0.0.0.0", 9080))),
            ("   2: 0100007F:0D73 0100007F:8000 01 00000000:00000000", None),
            ("   0: 00000000000000000000000001000000:0016 0:0 0A", Some(("::1", 22))),
            ("   0: 0100:0016 0:0 0A", None),
            ("", None),
        ] {
            let expected = expected.map(|(address, port)| (address.parse().unwrap(), port));
            assert_eq!(listener(line), expected, "{line}");
        }
    }
}
