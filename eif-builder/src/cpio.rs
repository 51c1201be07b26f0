//! Ramdisks: cpio archives in the "newc" format, written so that Linux unpacks what was meant.
//!
//! Field values are those of AWS's tool chain (linuxkit), so that its archives can be rebuilt byte for byte:
//! inode numbers from 721, device 3:1, two links for directories, padding to 512. What Linux does not forgive is
//! refused here: see [`Writer::entry`].

use std::io::{self, Read, Write};

use crate::error::{Error, IoContext};

/// First inode number.
const FIRST_INODE: u32 = 721;
/// Archives are padded to a multiple of this. Linux wants 4: an unaligned second archive is lost with nothing
/// but a line on the console.
pub const BLOCK: u64 = 512;
/// Linux drops names that do not fit a page, terminator included (`init/initramfs.c`, `PATH_MAX`).
pub const MAX_NAME_LEN: usize = 4095;
/// Sizes are eight hex digits.
pub const MAX_FILE_LEN: u64 = u32::MAX as u64;
/// The modification time of every file we make: linuxkit's, 2017-04-18T16:30:00Z. A constant, so that neither
/// clocks nor checkouts reach the measurement; the kernel ignores it.
pub const MTIME: u32 = 1_492_533_000;

const TRAILER: &[u8] = b"TRAILER!!!";
pub(crate) const MAGIC: &[u8] = b"070701";
pub(crate) const HEADER_LEN: usize = 110;

/// File type bits of a mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileType {
    /// Directory.
    Directory,
    /// Regular file.
    Regular,
    /// Symbolic link; the target is the content.
    Symlink,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
    /// Named pipe.
    Fifo,
    /// Unix socket: read, never written.
    Socket,
}

impl FileType {
    /// The bits above the permissions.
    pub fn bits(self) -> u32 {
        match self {
            Self::Fifo => 0o010_000,
            Self::CharDevice => 0o020_000,
            Self::Directory => 0o040_000,
            Self::BlockDevice => 0o060_000,
            Self::Regular => 0o100_000,
            Self::Symlink => 0o120_000,
            Self::Socket => 0o140_000,
        }
    }

    /// The type that a mode names.
    pub fn from_mode(mode: u32) -> Option<Self> {
        [
            Self::Fifo,
            Self::CharDevice,
            Self::Directory,
            Self::BlockDevice,
            Self::Regular,
            Self::Symlink,
            Self::Socket,
        ]
        .into_iter()
        .find(|kind| kind.bits() == mode & 0o170_000)
    }
}

/// One member of an archive, its content apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Path without a leading slash.
    pub name: Vec<u8>,
    /// File type.
    pub kind: FileType,
    /// Permissions, with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since the epoch.
    pub mtime: u32,
    /// Content length in bytes; for a symbolic link that of its target.
    pub len: u64,
    /// Device number (major, minor) of a device node.
    pub rdev: (u32, u32),
    /// Set for files with several names: the name of the group. Only the first member carries the content.
    pub link_group: Option<LinkGroup>,
}

/// Names of one file: all members share an inode number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkGroup {
    /// The inode number that [`Writer::entry`] returned for the first member; `None` on the first.
    pub inode: Option<u32>,
    /// How many names the file has.
    pub links: u32,
}

impl Entry {
    /// A member owned by root with the constant time and no content.
    pub fn new(name: impl Into<Vec<u8>>, kind: FileType, mode: u32) -> Self {
        Self {
            name: name.into(),
            kind,
            mode,
            uid: 0,
            gid: 0,
            mtime: MTIME,
            len: 0,
            rdev: (0, 0),
            link_group: None,
        }
    }
}

/// Writes one archive.
#[derive(Debug)]
pub struct Writer<W> {
    output: W,
    position: u64,
    next_inode: u32,
    directories: std::collections::HashSet<Vec<u8>>,
    checks_parents: bool,
}

impl<W: Write> Writer<W> {
    /// Starts an archive at the current end of `output`.
    pub fn new(output: W) -> Self {
        let directories = std::collections::HashSet::new();
        Self { output, position: 0, next_inode: FIRST_INODE, directories, checks_parents: true }
    }

    /// Lets members pass whose directory is missing: only for rebuilding archives of other tools.
    pub fn without_parent_check(self) -> Self {
        Self { checks_parents: false, ..self }
    }

    /// Appends a member and its content; returns its inode number.
    ///
    /// # Errors
    /// What Linux would pass over in silence: a parent directory that is not in the archive yet, a name or link
    /// target longer than 4095 bytes, a file of 4 GiB; further a socket, and content of another length than
    /// announced.
    pub fn entry(&mut self, entry: &Entry, content: &mut dyn Read) -> Result<u32, Error> {
        self.check(entry)?;
        let (inode, links) = match entry.link_group {
            Some(LinkGroup { inode: Some(inode), links }) => (inode, links),
            Some(LinkGroup { inode: None, links }) => (self.take_inode(), links),
            None if entry.kind == FileType::Directory => (self.take_inode(), 2),
            None => (self.take_inode(), 1),
        };
        let len = u32::try_from(entry.len).unwrap_or(u32::MAX); // checked above
        let mode = entry.mode & 0o7777 | entry.kind.bits();
        let fields =
            [inode, mode, entry.uid, entry.gid, links, entry.mtime, len, 3, 1, entry.rdev.0, entry.rdev.1];
        self.header(fields, &entry.name)?;
        let copied =
            io::copy(&mut content.take(entry.len + 1), &mut self.output).context("write", "the ramdisk")?;
        if copied != entry.len {
            return Err(Error::input(
                display(&entry.name),
                format!("changed while it was read: {copied} bytes, expected {}", entry.len),
            ));
        }
        self.position += copied;
        self.pad(4)?;
        if entry.kind == FileType::Directory {
            self.directories.insert(trimmed(&entry.name).to_vec());
        }
        Ok(inode)
    }

    /// Writes the trailer and pads to a multiple of 512; returns the length.
    ///
    /// # Errors
    /// When writing fails.
    pub fn finish(mut self) -> Result<(W, u64), Error> {
        let inode = self.take_inode();
        self.header([inode, 0, 0, 0, 1, 0, 0, 3, 1, 0, 0], TRAILER)?;
        self.pad(BLOCK)?;
        Ok((self.output, self.position))
    }

    fn take_inode(&mut self) -> u32 {
        self.next_inode += 1;
        self.next_inode - 1
    }

    fn check(&self, entry: &Entry) -> Result<(), Error> {
        let name = trimmed(&entry.name);
        let refuse = |reason: String| Err(Error::input(display(&entry.name), reason));
        if name.is_empty() || name.contains(&0) || name == TRAILER {
            return refuse("not a name that a ramdisk can hold".into());
        }
        if entry.name.len() > MAX_NAME_LEN {
            return refuse(format!(
                "name of {} bytes, Linux drops more than {MAX_NAME_LEN}",
                entry.name.len()
            ));
        }
        if let Some(cut) = name.iter().rposition(|byte| *byte == b'/').filter(|_| self.checks_parents)
            && !self.directories.contains(&name[..cut])
        {
            return refuse("its directory is not in the ramdisk in front of it, Linux would skip it".into());
        }
        match entry.kind {
            FileType::Socket => refuse("a socket, which a ramdisk cannot hold".into()),
            FileType::Symlink if entry.len == 0 || entry.len > MAX_NAME_LEN as u64 => {
                refuse(format!("link target of {} bytes, expected 1 to {MAX_NAME_LEN}", entry.len))
            }
            _ if entry.len > MAX_FILE_LEN => {
                refuse(format!("{} bytes, a ramdisk holds files up to {MAX_FILE_LEN}", entry.len))
            }
            _ => Ok(()),
        }
    }

    fn header(&mut self, fields: [u32; 11], name: &[u8]) -> Result<(), Error> {
        let mut header = Vec::with_capacity(HEADER_LEN + name.len() + 4);
        header.extend_from_slice(MAGIC);
        let name_len = u32::try_from(name.len() + 1).unwrap_or(u32::MAX); // at most 4096
        for field in fields.into_iter().chain([name_len, 0]) {
            for shift in (0..8).rev() {
                header.push(b"0123456789abcdef"[(field >> (4 * shift) & 0xf) as usize]);
            }
        }
        header.extend_from_slice(name);
        header.push(0);
        self.output.write_all(&header).context("write", "the ramdisk")?;
        self.position += header.len() as u64;
        self.pad(4)
    }

    fn pad(&mut self, multiple: u64) -> Result<(), Error> {
        let missing = self.position.next_multiple_of(multiple) - self.position;
        io::copy(&mut io::repeat(0).take(missing), &mut self.output).context("write", "the ramdisk")?;
        self.position += missing;
        Ok(())
    }
}

/// Directory names may carry a trailing slash, as they do in tar archives.
pub(crate) fn trimmed(name: &[u8]) -> &[u8] {
    name.strip_suffix(b"/").unwrap_or(name)
}

pub(crate) fn display(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}
