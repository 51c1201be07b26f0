//! A file tree in memory, contents on disk: what becomes a ramdisk.
//!
//! Paths are byte strings without leading or trailing slash, kept sorted by byte value, so that neither a
//! directory's order on disk nor a hash map's reaches the image. Links are never followed on the host: layers are
//! applied to this tree, not to a file system.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use crate::cpio::{self, FileType, LinkGroup};
use crate::error::{Error, IoContext};

/// Limits on what a source may bring; each bounds memory or disk.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Paths in the tree.
    pub entries: u64,
    /// Bytes of unpacked file contents.
    pub content: u64,
}

impl Default for Limits {
    fn default() -> Self {
        // Four million files is ten times a large distribution; 64 GiB does not fit any enclave's ramdisk.
        Self { entries: 4 << 20, content: 64 << 30 }
    }
}

/// Where file contents wait until the ramdisk is written.
#[derive(Debug)]
enum Spool {
    Disk(File),
    Memory(Vec<u8>),
}

/// The bytes of a regular file.
#[derive(Debug, Clone)]
pub enum Content {
    /// In memory: generated files.
    Bytes(Vec<u8>),
    /// A file of the host, and its length when it was looked at.
    Host(PathBuf, u64),
    /// A range of the spool.
    Spooled {
        /// Where it starts.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
}

impl Content {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Host(_, len) | Self::Spooled { len, .. } => *len,
        }
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What a path leads to.
#[derive(Debug, Clone)]
pub enum Kind {
    /// Directory.
    Directory,
    /// Regular file.
    File(Content),
    /// Symbolic link and its target.
    Symlink(Vec<u8>),
    /// Character device (major, minor).
    CharDevice(u32, u32),
    /// Block device (major, minor).
    BlockDevice(u32, u32),
    /// Named pipe.
    Fifo,
}

/// A file, whatever its names.
#[derive(Debug, Clone)]
pub struct Inode {
    /// Type and content.
    pub kind: Kind,
    /// Permissions with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since the epoch in the source; used only where AWS's tool chain is reproduced.
    pub mtime: u32,
}

impl Inode {
    /// A file of root's with the constant time.
    pub fn new(kind: Kind, mode: u32) -> Self {
        Self { kind, mode, uid: 0, gid: 0, mtime: cpio::MTIME }
    }

    fn is_directory(&self) -> bool {
        matches!(self.kind, Kind::Directory)
    }
}

#[derive(Debug, Clone, Copy)]
struct Name {
    inode: usize,
    /// The layer that brought it: a whiteout only hides what lower layers brought.
    layer: u32,
}

/// A file tree.
#[derive(Debug)]
pub struct Tree {
    names: BTreeMap<Vec<u8>, Name>,
    inodes: Vec<Inode>,
    spool: Spool,
    spooled: u64,
    limits: Limits,
    layer: u32,
    /// What whiteouts of this layer have cleared already: doing it again would only cost time.
    cleared: HashSet<Vec<u8>>,
}

/// Symbolic links followed on the way to a parent directory; Linux's own limit.
const MAX_LINK_HOPS: usize = 40;

impl Tree {
    /// An empty tree that spools to an unnamed file in the temporary directory.
    ///
    /// # Errors
    /// When that file cannot be made.
    pub fn new(limits: Limits) -> Result<Self, Error> {
        let file = tempfile::tempfile().context("create", "a temporary file")?;
        Ok(Self::with_spool(Spool::Disk(file), limits))
    }

    /// An empty tree that spools to memory, for small inputs.
    pub fn in_memory(limits: Limits) -> Self {
        Self::with_spool(Spool::Memory(Vec::new()), limits)
    }

    fn with_spool(spool: Spool, limits: Limits) -> Self {
        Self {
            names: BTreeMap::new(),
            inodes: Vec::new(),
            spool,
            spooled: 0,
            limits,
            layer: 0,
            cleared: HashSet::new(),
        }
    }

    /// Number of paths.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there are no paths.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Everything added from here on belongs to a new layer.
    pub fn begin_layer(&mut self) {
        self.layer += 1;
        self.cleared.clear();
    }

    /// The file at `path`; links are not followed.
    pub fn get(&self, path: &[u8]) -> Option<&Inode> {
        self.names.get(path).map(|name| &self.inodes[name.inode])
    }

    /// All paths in byte order.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &Inode)> {
        self.names.iter().map(|(path, name)| (path.as_slice(), &self.inodes[name.inode]))
    }

    /// All paths in the order in which a walk through sorted directories meets them, with a number for the file that
    /// all of its names share. Unlike in byte order, `a/b` comes before `a.b`.
    pub(crate) fn walk(&self) -> Vec<(&[u8], usize, &Inode)> {
        let mut paths: Vec<_> = self
            .names
            .iter()
            .map(|(path, name)| (path.as_slice(), name.inode, &self.inodes[name.inode]))
            .collect();
        paths.sort_by(|(a, ..), (b, ..)| components(a).cmp(components(b)));
        paths
    }

    /// Copies content to the spool.
    ///
    /// # Errors
    /// When reading or writing fails, or when the tree holds more than its limit.
    pub fn spool(&mut self, reader: &mut dyn Read, expected: u64) -> Result<Content, Error> {
        let actual = self.spooled.saturating_add(expected);
        if actual > self.limits.content {
            let max = self.limits.content;
            return Err(Error::Limit {
                object: "the file tree".into(),
                unit: "bytes of content",
                actual,
                max,
            });
        }
        let offset = self.spooled;
        let reader = &mut reader.take(expected);
        let len = match &mut self.spool {
            Spool::Memory(bytes) => io::copy(reader, bytes),
            Spool::Disk(file) => io::copy(reader, file),
        }
        .context("unpack", "a file")?;
        self.spooled += len;
        if len != expected {
            let source = io::Error::from(io::ErrorKind::UnexpectedEof);
            return Err(source).context("unpack", "a file");
        }
        Ok(Content::Spooled { offset, len })
    }

    /// Puts a file at `path`, replacing what is there. A directory over a directory only changes its metadata;
    /// missing parents become directories of root's with mode 0755.
    ///
    /// # Errors
    /// A reason in words, when a parent is not a directory or the tree is full.
    pub fn insert(&mut self, path: &[u8], inode: Inode) -> Result<(), String> {
        self.make_parents(path)?;
        let replaced = self.names.get(path).copied();
        if let Some(name) = replaced {
            if inode.is_directory() && self.inodes[name.inode].is_directory() {
                self.inodes[name.inode] = inode;
                self.names.insert(path.to_vec(), Name { inode: name.inode, layer: self.layer });
                return Ok(());
            }
            self.remove(path);
        }
        self.inodes.push(inode);
        self.name(path, self.inodes.len() - 1)
    }

    /// Gives the file at `target` a second name.
    ///
    /// # Errors
    /// A reason in words, when there is no such file or it is a directory.
    pub fn link(&mut self, path: &[u8], target: &[u8]) -> Result<(), String> {
        let Some(name) = self.names.get(target).copied() else {
            return Err(format!("hard link to {:?}, which does not exist", cpio::display(target)));
        };
        if self.inodes[name.inode].is_directory() {
            return Err(format!("hard link to {:?}, which is a directory", cpio::display(target)));
        }
        if path == target {
            return Ok(());
        }
        self.make_parents(path)?;
        self.remove(path);
        self.name(path, name.inode)
    }

    fn name(&mut self, path: &[u8], inode: usize) -> Result<(), String> {
        if self.names.len() as u64 >= self.limits.entries {
            return Err(format!("more than {} files", self.limits.entries));
        }
        self.names.insert(path.to_vec(), Name { inode, layer: self.layer });
        Ok(())
    }

    fn make_parents(&mut self, path: &[u8]) -> Result<(), String> {
        if self.has_real_parent(path) {
            return Ok(());
        }
        for (cut, _) in path.iter().enumerate().filter(|(_, byte)| **byte == b'/') {
            match self.get(&path[..cut]) {
                Some(parent) if parent.is_directory() => {}
                Some(_) => return Err(format!("{:?} is not a directory", cpio::display(&path[..cut]))),
                None => {
                    self.inodes.push(Inode::new(Kind::Directory, 0o755));
                    self.name(&path[..cut], self.inodes.len() - 1)?;
                }
            }
        }
        Ok(())
    }

    /// Whether the directory of `path` is in the tree. Then so are all above it, and none of them is a link:
    /// every path in the tree has directories for parents.
    fn has_real_parent(&self, path: &[u8]) -> bool {
        match path.iter().rposition(|byte| *byte == b'/') {
            None => true,
            Some(cut) => self.get(&path[..cut]).is_some_and(Inode::is_directory),
        }
    }

    /// Removes a path and everything below it.
    pub fn remove(&mut self, path: &[u8]) {
        self.names.remove(path);
        for below in self.below(path, u32::MAX) {
            self.names.remove(&below);
        }
    }

    /// Hides what lower layers have at `path` and below; what the current layer put there stays.
    pub fn white_out(&mut self, path: &[u8]) {
        self.clear_lower(path);
        if self.names.get(path).is_some_and(|name| name.layer < self.layer)
            && self.below(path, u32::MAX).is_empty()
        {
            self.names.remove(path);
        }
    }

    /// Hides what lower layers have below the directory `path` (the whole tree for an empty path).
    pub fn clear_lower(&mut self, path: &[u8]) {
        if !self.cleared.insert(path.to_vec()) {
            return;
        }
        // Deepest first, so that a directory goes only when nothing of the current layer is left in it.
        for below in self.below(path, self.layer).into_iter().rev() {
            let is_needed = self.below_any(&below);
            if !is_needed {
                self.names.remove(&below);
            }
        }
    }

    /// Paths below `path` that layers before `layer` brought, in byte order.
    fn below(&self, path: &[u8], layer: u32) -> Vec<Vec<u8>> {
        let prefix = directory_prefix(path);
        self.names
            .range(prefix.clone()..)
            .take_while(|(name, _)| name.starts_with(&prefix))
            .filter(|(_, name)| name.layer < layer)
            .map(|(path, _)| path.clone())
            .collect()
    }

    fn below_any(&self, path: &[u8]) -> bool {
        let prefix = directory_prefix(path);
        self.names.range(prefix.clone()..).next().is_some_and(|(name, _)| name.starts_with(&prefix))
    }

    /// Where `path` really lies, its parents' symbolic links followed inside of this tree: an absolute target
    /// starts at the tree's root, and `..` stops there. The last component is taken as it is.
    ///
    /// # Errors
    /// A reason in words, when links go in circles.
    pub fn resolve_parents(&self, path: &[u8]) -> Result<Vec<u8>, String> {
        let is_plain = !path.is_empty() && path.split(|byte| *byte == b'/').all(is_plain_component);
        if is_plain && self.has_real_parent(path) {
            return Ok(path.to_vec());
        }
        let mut todo: Vec<Vec<u8>> = components(path).rev().map(<[u8]>::to_vec).collect();
        let mut resolved: Vec<u8> = Vec::new();
        let mut hops = 0;
        while let Some(component) = todo.pop() {
            if component == b".." {
                let cut = resolved.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
                resolved.truncate(cut);
                continue;
            }
            let parent = resolved.len();
            if parent > 0 {
                resolved.push(b'/');
            }
            resolved.extend_from_slice(&component);
            if todo.is_empty() {
                break;
            }
            if resolved.len() > cpio::MAX_NAME_LEN {
                return Err(format!("a path of more than {} bytes", cpio::MAX_NAME_LEN));
            }
            if let Some(Inode { kind: Kind::Symlink(target), .. }) = self.get(&resolved) {
                hops += 1;
                if hops > MAX_LINK_HOPS {
                    return Err(format!("more than {MAX_LINK_HOPS} symbolic links on the way"));
                }
                todo.extend(components(target).rev().map(<[u8]>::to_vec));
                resolved.truncate(if target.starts_with(b"/") { 0 } else { parent });
            }
        }
        Ok(resolved)
    }

    /// The path at which a program would find the file: all links followed, `None` when nothing is there.
    pub fn resolve(&self, path: &[u8]) -> Option<Vec<u8>> {
        let mut path = self.resolve_parents(path).ok()?;
        for _ in 0..MAX_LINK_HOPS {
            match &self.get(&path)?.kind {
                Kind::Symlink(target) if target.starts_with(b"/") => {
                    path = self.resolve_parents(target).ok()?
                }
                Kind::Symlink(target) => {
                    let cut = path.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
                    let joined = [&path[..cut], target].concat();
                    path = self.resolve_parents(&joined).ok()?;
                }
                _ => return Some(path),
            }
        }
        None
    }

    /// A reader over the content of a regular file.
    ///
    /// # Errors
    /// When a file of the host cannot be opened.
    pub fn open(&self, content: &Content) -> Result<Box<dyn Read + '_>, Error> {
        Ok(match (content, &self.spool) {
            (Content::Bytes(bytes), _) => Box::new(io::Cursor::new(bytes.clone())),
            (Content::Host(path, _), _) => Box::new(File::open(path).context("open", path)?),
            (Content::Spooled { offset, len }, Spool::Disk(file)) => {
                Box::new(SpoolReader { file, offset: *offset, left: *len })
            }
            (Content::Spooled { offset, len }, Spool::Memory(bytes)) => {
                let start = usize::try_from(*offset).unwrap_or(usize::MAX).min(bytes.len());
                Box::new((&bytes[start..]).take(*len))
            }
        })
    }

    /// Appends the whole tree to an archive, every path behind `prefix` (empty, or ending in a slash).
    ///
    /// # Errors
    /// See [`cpio::Writer::entry`].
    pub fn write_to(&self, archive: &mut cpio::Writer<impl io::Write>, prefix: &str) -> Result<(), Error> {
        let mut links: HashMap<usize, u32> = HashMap::new();
        for name in self.names.values() {
            *links.entry(name.inode).or_default() += 1;
        }
        let mut written: HashMap<usize, u32> = HashMap::new();
        for (path, name) in &self.names {
            let inode = &self.inodes[name.inode];
            let mut entry = inode.entry([prefix.as_bytes(), path].concat());
            let links = links[&name.inode];
            if links > 1 {
                let first = written.get(&name.inode).copied();
                entry.link_group = Some(LinkGroup { inode: first, links });
                if first.is_some() {
                    entry.len = 0; // Linux links to the first member
                }
            }
            let number = match &inode.kind {
                Kind::File(content) if entry.len > 0 => archive.entry(&entry, &mut *self.open(content)?)?,
                Kind::Symlink(target) if entry.len > 0 => archive.entry(&entry, &mut target.as_slice())?,
                _ => archive.entry(&entry, &mut io::empty())?,
            };
            written.entry(name.inode).or_insert(number);
        }
        Ok(())
    }
}

impl Inode {
    /// The archive member for this file; the time is the constant one.
    pub(crate) fn entry(&self, name: Vec<u8>) -> cpio::Entry {
        let (kind, len, rdev) = match &self.kind {
            Kind::Directory => (FileType::Directory, 0, (0, 0)),
            Kind::File(content) => (FileType::Regular, content.len(), (0, 0)),
            Kind::Symlink(target) => (FileType::Symlink, target.len() as u64, (0, 0)),
            Kind::CharDevice(major, minor) => (FileType::CharDevice, 0, (*major, *minor)),
            Kind::BlockDevice(major, minor) => (FileType::BlockDevice, 0, (*major, *minor)),
            Kind::Fifo => (FileType::Fifo, 0, (0, 0)),
        };
        let Self { mode, uid, gid, .. } = *self;
        cpio::Entry { name, kind, mode, uid, gid, mtime: cpio::MTIME, len, rdev, link_group: None }
    }
}

/// The names in a path, without empty ones and `.`.
pub(crate) fn components(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".")
}

fn is_plain_component(part: &[u8]) -> bool {
    !matches!(part, b"" | b"." | b"..")
}

fn directory_prefix(path: &[u8]) -> Vec<u8> {
    if path.is_empty() { Vec::new() } else { [path, b"/"].concat() }
}

/// Reads a range of the spool without moving its position.
struct SpoolReader<'a> {
    file: &'a File,
    offset: u64,
    left: u64,
}

impl Read for SpoolReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.file.read_at(&mut buffer[..wanted], self.offset)?;
        self.offset += read as u64;
        self.left -= read as u64;
        Ok(read)
    }
}
