//! Applications from the host's file system: one static binary, or a directory.

use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use crate::cpio;
use crate::error::{Error, IoContext};
use crate::format::Arch;
use crate::layer::Lost;
use crate::tree::{Content, Inode, Kind, Limits, Tree};

/// How deep directories may nest.
const MAX_DEPTH: usize = 256;

/// A tree that holds a static binary under `name`, mode 0755.
///
/// # Errors
/// When the file is no static executable for `arch`.
pub fn from_binary(path: &Path, name: &str, arch: Arch) -> Result<Tree, Error> {
    check_static(path, arch)?;
    let len = fs::metadata(path).context("read", path)?.len();
    let mut tree = Tree::in_memory(Limits::default());
    tree.insert(name.as_bytes(), Inode::new(Kind::File(Content::Host(path.to_owned(), len)), 0o755))
        .map_err(|reason| Error::input(path.display(), reason))?;
    Ok(tree)
}

/// A tree with everything below `root`.
///
/// What depends on who checked the files out is made uniform: the owner is root, directories are 0755 (1777 when
/// sticky), files 0755 when their owner may execute them and 0644 otherwise, times are constant. Setuid and setgid
/// of files are kept.
///
/// # Errors
/// When something below `root` cannot be read, or has no place in a ramdisk.
pub fn from_directory(root: &Path, lost: &mut Lost) -> Result<Tree, Error> {
    if !fs::metadata(root).context("read", root)?.is_dir() {
        return Err(Error::input(root.display(), "not a directory"));
    }
    let mut walk = Walk { tree: Tree::in_memory(Limits::default()), first_names: HashMap::new(), lost };
    walk.directory(root, &[], 0)?;
    Ok(walk.tree)
}

struct Walk<'a> {
    tree: Tree,
    /// (device, inode) of files with several names → the first name.
    first_names: HashMap<(u64, u64), Vec<u8>>,
    lost: &'a mut Lost,
}

impl Walk<'_> {
    fn directory(&mut self, host: &Path, inside: &[u8], depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(Error::input(host.display(), format!("more than {MAX_DEPTH} directories deep")));
        }
        let mut names = fs::read_dir(host)
            .and_then(|entries| {
                entries.map(|entry| entry.map(|entry| entry.file_name())).collect::<Result<Vec<_>, _>>()
            })
            .context("read", host)?;
        // Hard links: the first name carries the content, so the order must not be the disk's.
        names.sort();
        for name in names {
            let host = host.join(&name);
            let slash: &[u8] = if inside.is_empty() { b"" } else { b"/" };
            let inside = [inside, slash, name.as_bytes()].concat();
            self.file(&host, &inside, depth)?;
        }
        Ok(())
    }

    fn file(&mut self, host: &Path, inside: &[u8], depth: usize) -> Result<(), Error> {
        let metadata = fs::symlink_metadata(host).context("read", host)?;
        let refuse = |reason: String| Error::input(host.display(), reason);
        let kind = metadata.file_type();
        if kind.is_socket() {
            self.lost.sockets.insert(cpio::display(inside));
            return Ok(());
        }
        if kind.is_file() && metadata.nlink() > 1 {
            let key = (metadata.dev(), metadata.ino());
            if let Some(first) = self.first_names.get(&key) {
                return self.tree.link(inside, first).map_err(refuse);
            }
            self.first_names.insert(key, inside.to_vec());
        }
        let inode = Inode::new(self.kind(host, &metadata)?, uniform_mode(&metadata));
        self.tree.insert(inside, inode).map_err(refuse)?;
        if kind.is_file() && has_capabilities(host) {
            self.lost.capabilities.insert(cpio::display(inside));
        }
        if kind.is_dir() {
            self.directory(host, inside, depth + 1)?;
        }
        Ok(())
    }

    fn kind(&self, host: &Path, metadata: &Metadata) -> Result<Kind, Error> {
        let kind = metadata.file_type();
        let device = || {
            let rdev = metadata.rdev();
            let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
            // glibc's layout of dev_t (sys/sysmacros.h).
            let major = rdev >> 8 & 0xfff | rdev >> 32 & 0xffff_f000;
            let minor = rdev & 0xff | rdev >> 12 & 0xffff_ff00;
            (narrow(major), narrow(minor))
        };
        Ok(if kind.is_dir() {
            Kind::Directory
        } else if kind.is_symlink() {
            Kind::Symlink(fs::read_link(host).context("read", host)?.into_os_string().into_vec())
        } else if kind.is_char_device() {
            let (major, minor) = device();
            Kind::CharDevice(major, minor)
        } else if kind.is_block_device() {
            let (major, minor) = device();
            Kind::BlockDevice(major, minor)
        } else if kind.is_fifo() {
            Kind::Fifo
        } else {
            Kind::File(Content::Host(host.to_owned(), metadata.len()))
        })
    }
}

/// What is left of a mode when the umask and the version control system have no say.
fn uniform_mode(metadata: &Metadata) -> u32 {
    let (kind, mode) = (metadata.file_type(), metadata.mode());
    if kind.is_dir() {
        if mode & 0o1000 == 0 { 0o755 } else { 0o1777 }
    } else if kind.is_symlink() {
        0o777
    } else if mode & 0o100 != 0 {
        mode & 0o6000 | 0o755
    } else {
        0o644
    }
}

fn has_capabilities(host: &Path) -> bool {
    // A file system without attributes has none.
    matches!(xattr::get(host, "security.capability"), Ok(Some(_)))
}

/// Checks that a file is a statically linked executable for `arch`: in an image with nothing else in it, a
/// dynamic one fails with "no such file", and one for another machine with "exec format error".
///
/// # Errors
/// What the file is not.
pub fn check_static(path: &Path, arch: Arch) -> Result<(), Error> {
    const PT_INTERP: u32 = 3;
    let refuse = |reason: &str| Err(Error::input(path.display(), reason));
    let mut start = Vec::new();
    File::open(path).and_then(|file| file.take(64 << 10).read_to_end(&mut start)).context("read", path)?;
    if start.get(..6) != Some(b"\x7fELF\x02\x01") {
        return refuse("not a 64-bit ELF executable");
    }
    let half = |at: usize| start.get(at..at + 2).map_or(0, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]));
    let machine = match arch {
        Arch::X86_64 => 62,
        Arch::Aarch64 => 183,
    };
    if half(18) != machine {
        let reason = format!("is for ELF machine {}, {arch} is {machine}", half(18));
        return refuse(&reason);
    }
    let Some(table) = start.get(32..40).and_then(|bytes| <[u8; 8]>::try_from(bytes).ok()) else {
        return refuse("ends inside of its ELF header");
    };
    let (size, count) = (usize::from(half(54)), usize::from(half(56)));
    for index in 0..count {
        let at =
            usize::try_from(u64::from_le_bytes(table)).ok().and_then(|table| table.checked_add(index * size));
        let kind = at.and_then(|at| start.get(at..at.checked_add(4)?)).map(|b| [b[0], b[1], b[2], b[3]]);
        match kind.map(u32::from_le_bytes) {
            None => return refuse("its program headers are not at the start of the file"),
            Some(PT_INTERP) => {
                return refuse("is dynamically linked; an image of one binary needs a static one");
            }
            Some(_) => {}
        }
    }
    Ok(())
}
