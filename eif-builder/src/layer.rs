//! Applying container image layers to a [`Tree`].
//!
//! A layer is a tar stream that anyone may have written. Nothing in it reaches the host's file system: names are
//! resolved inside of the tree, `..` in a name is refused, links are followed inside of the tree only where a
//! container engine would follow them, and every length is bounded before it is believed.

use std::collections::BTreeSet;
use std::io::{self, BufReader, Read};

use tar::{Archive, EntryType, PaxExtensions};

use crate::cpio;
use crate::error::Error;
use crate::tree::{Inode, Kind, Tree, components};

/// Largest extended header (long names, PAX records), in bytes. Names end at 4 KiB; extended attributes may be
/// 64 KiB each.
const MAX_EXTENDED_LEN: u64 = 1 << 20;
/// Most different attribute names kept for the report.
const MAX_REPORTED: usize = 1000;

/// Why a sparse file is refused.
const SPARSE: &str =
    "a sparse file, which container engines do not write; unpack and pack it again without --sparse";

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const AUFS_METADATA: &[u8] = b".wh..wh.";

/// What a ramdisk cannot hold and was therefore left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lost {
    /// Files with file capabilities, which change what the program may do.
    pub capabilities: BTreeSet<String>,
    /// Other extended attributes, as `path: name`.
    pub attributes: BTreeSet<String>,
    /// Sockets.
    pub sockets: BTreeSet<String>,
}

/// Wraps a possibly compressed stream: gzip, zstd or plain, told by its first bytes.
///
/// # Errors
/// When the first bytes cannot be read or a decoder cannot be made.
pub fn decompressed<'a>(stream: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut stream = BufReader::with_capacity(256 << 10, stream);
    let start = io::BufRead::fill_buf(&mut stream)?;
    Ok(match start {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(stream)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(stream)?;
            // 128 MiB is what `zstd --ultra --long=27` needs, and the most that image tools write.
            decoder.window_log_max(27)?;
            Box::new(decoder)
        }
        _ => Box::new(stream),
    })
}

/// Applies one uncompressed layer on top of `tree`; `label` names it in errors.
///
/// # Errors
/// With the layer, the entry and the reason: names that leave the root, links that lead nowhere, entry types
/// that have no meaning in an image, more than the tree's limits.
pub fn apply(tree: &mut Tree, layer: impl Read, label: &str, lost: &mut Lost) -> Result<(), Error> {
    tree.begin_layer();
    let mut archive = Archive::new(layer);
    let mut extended = Extended::default();
    // Raw entries: the long-name records are read here, with a limit.
    for entry in archive.entries().map_err(|error| broken(label, &error))?.raw(true) {
        let mut entry = entry.map_err(|error| broken(label, &error))?;
        let kind = entry.header().entry_type();
        match kind {
            EntryType::GNULongName => extended.name = Some(read_name(&mut entry, label)?),
            EntryType::GNULongLink => extended.link = Some(read_name(&mut entry, label)?),
            EntryType::XHeader => extended.read_pax(&mut entry, label)?,
            // Comments of the archiver, such as git's commit id.
            EntryType::XGlobalHeader => {}
            _ => {
                let member = Member::from_entry(&entry, std::mem::take(&mut extended))
                    .map_err(|(name, reason)| refused(label, &name, reason))?;
                let content = &mut entry;
                member.apply(tree, kind, content, label, lost)?;
            }
        }
    }
    Ok(())
}

/// Records in front of an entry that override its header.
#[derive(Debug, Default)]
struct Extended {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<u64>,
    attributes: Vec<String>,
    is_sparse: bool,
}

impl Extended {
    fn read_pax(&mut self, entry: &mut impl SizedEntry, label: &str) -> Result<(), Error> {
        let records = read_extended(entry, label)?;
        for record in PaxExtensions::new(&records) {
            let record = record.map_err(|error| broken(label, &error))?;
            let (key, value) = (record.key_bytes(), record.value_bytes());
            match key {
                b"path" => self.name = Some(value.to_vec()),
                b"linkpath" => self.link = Some(value.to_vec()),
                b"size" => self.size = Some(number(value, label, "size")?),
                b"uid" => self.uid = Some(number(value, label, "uid")?),
                b"gid" => self.gid = Some(number(value, label, "gid")?),
                // Times before the epoch exist in old layers; the kernel ignores all of them.
                b"mtime" => self.mtime = number(value, label, "mtime").ok(),
                // No engine writes them, and three formats exist. The name in the entry behind it is made up.
                b"GNU.sparse.name" => return Err(sparse(label, value)),
                _ if key.starts_with(b"GNU.sparse.") => self.is_sparse = true,
                _ => {
                    if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                        self.attributes.push(cpio::display(name));
                    }
                }
            }
        }
        Ok(())
    }
}

/// An entry with everything that headers in front of it said.
#[derive(Debug)]
struct Member {
    name: Vec<u8>,
    link: Vec<u8>,
    len: u64,
    inode: Inode,
    rdev: (u32, u32),
    attributes: Vec<String>,
}

impl Member {
    fn from_entry<R: Read>(entry: &tar::Entry<'_, R>, extended: Extended) -> Result<Self, (String, String)> {
        let header = entry.header();
        let Extended { name, link, size, uid, gid, mtime, attributes, is_sparse } = extended;
        let name = name.unwrap_or_else(|| header.path_bytes().into_owned());
        if is_sparse || header.entry_type() == EntryType::GNUSparse {
            return Err((cpio::display(&name), SPARSE.to_owned()));
        }
        let shown = cpio::display(&name);
        let refuse = |reason: String| (shown.clone(), reason);
        let link = link
            .unwrap_or_else(|| header.link_name_bytes().map(|link| link.into_owned()).unwrap_or_default());
        let len = header.entry_size().map_err(|error| refuse(error.to_string()))?;
        if size.is_some_and(|size| size != len) {
            return Err(refuse(format!(
                "two sizes, {len} and {}; a ramdisk ends at 4 GiB",
                size.unwrap_or(0)
            )));
        }
        let narrow = |what: &str, value: io::Result<u64>| {
            let value = value.map_err(|error| refuse(format!("{what}: {error}")))?;
            u32::try_from(value).map_err(|_| refuse(format!("{what} {value} does not fit 32 bits")))
        };
        let inode = Inode {
            kind: Kind::Directory,
            mode: header.mode().map_err(|error| refuse(error.to_string()))? & 0o7777,
            uid: narrow("uid", uid.map_or_else(|| header.uid(), Ok))?,
            gid: narrow("gid", gid.map_or_else(|| header.gid(), Ok))?,
            mtime: mtime
                .or_else(|| header.mtime().ok())
                .and_then(|time| u32::try_from(time).ok())
                .unwrap_or(0),
        };
        let device = |value: io::Result<Option<u32>>| value.ok().flatten().unwrap_or(0);
        let rdev = (device(header.device_major()), device(header.device_minor()));
        Ok(Self { name, link, len, inode, rdev, attributes })
    }

    fn apply(
        self,
        tree: &mut Tree,
        kind: EntryType,
        content: &mut impl Read,
        label: &str,
        lost: &mut Lost,
    ) -> Result<(), Error> {
        let Self { name, link, len, mut inode, rdev, attributes } = self;
        let refuse = |reason: String| refused(label, &cpio::display(&name), reason);
        let Some(path) = safe_path(tree, &name).map_err(refuse)? else { return Ok(()) };
        if whiteout(tree, &path).map_err(refuse)? {
            return Ok(());
        }
        report_attributes(&path, attributes, lost);
        let has_content = matches!(kind, EntryType::Regular | EntryType::Continuous);
        if len > 0 && !has_content && kind != EntryType::Link {
            return Err(refuse(format!("{len} bytes of content in an entry without content")));
        }
        inode.kind = match kind {
            EntryType::Regular | EntryType::Continuous if name.ends_with(b"/") => Kind::Directory,
            EntryType::Regular | EntryType::Continuous => {
                if len > cpio::MAX_FILE_LEN {
                    return Err(refuse(format!("{len} bytes, a ramdisk holds files up to 4 GiB")));
                }
                Kind::File(tree.spool(content, len).map_err(|error| wrap(label, &name, error))?)
            }
            EntryType::Directory => Kind::Directory,
            EntryType::Symlink => {
                if link.is_empty() || link.len() > cpio::MAX_NAME_LEN || link.contains(&0) {
                    return Err(refuse(format!("a link target of {} bytes", link.len())));
                }
                Kind::Symlink(link)
            }
            EntryType::Link => {
                let target = safe_path(tree, &link).map_err(refuse)?;
                let target = target.ok_or_else(|| refuse("hard link to the root".into()))?;
                return tree.link(&path, &target).map_err(refuse);
            }
            // Overlay's own whiteout, which some exporters leave in.
            EntryType::Char if rdev == (0, 0) => {
                tree.white_out(&path);
                return Ok(());
            }
            EntryType::Char => Kind::CharDevice(rdev.0, rdev.1),
            EntryType::Block => Kind::BlockDevice(rdev.0, rdev.1),
            EntryType::Fifo => Kind::Fifo,
            other => {
                return Err(refuse(format!(
                    "tar entry type {:?} has no place in an image",
                    other.as_byte() as char
                )));
            }
        };
        tree.insert(&path, inode).map_err(refuse)
    }
}

/// The place in the tree for a name out of an archive; `None` for the root itself.
fn safe_path(tree: &Tree, name: &[u8]) -> Result<Option<Vec<u8>>, String> {
    if name.contains(&0) {
        return Err("a zero byte in a name".into());
    }
    if name.len() > cpio::MAX_NAME_LEN {
        return Err(format!("a name of {} bytes, at most {} are possible", name.len(), cpio::MAX_NAME_LEN));
    }
    if components(name).any(|part| part == b"..") {
        return Err("a name with `..` in it".into());
    }
    let clean = components(name).collect::<Vec<_>>().join(&b'/');
    if clean.is_empty() {
        return Ok(None);
    }
    let path = tree.resolve_parents(&clean)?;
    Ok(if path.is_empty() { None } else { Some(path) })
}

/// Carries out whiteouts; tells whether the name was one.
fn whiteout(tree: &mut Tree, path: &[u8]) -> Result<bool, String> {
    let cut = path.iter().rposition(|byte| *byte == b'/');
    let (directory, name) = (&path[..cut.unwrap_or(0)], &path[cut.map_or(0, |slash| slash + 1)..]);
    if name == OPAQUE {
        tree.clear_lower(directory);
        return Ok(true);
    }
    if name.starts_with(AUFS_METADATA) {
        return Ok(true);
    }
    let Some(hidden) = name.strip_prefix(WHITEOUT) else { return Ok(false) };
    if matches!(hidden, b"" | b"." | b"..") {
        return Err("a whiteout without a name".into());
    }
    let slash: &[u8] = if directory.is_empty() { b"" } else { b"/" };
    tree.white_out(&[directory, slash, hidden].concat());
    Ok(true)
}

fn report_attributes(path: &[u8], attributes: Vec<String>, lost: &mut Lost) {
    for attribute in attributes {
        let path = cpio::display(path);
        if attribute == "security.capability" {
            if lost.capabilities.len() < MAX_REPORTED {
                lost.capabilities.insert(path);
            }
        } else if lost.attributes.len() < MAX_REPORTED {
            lost.attributes.insert(format!("{path}: {attribute}"));
        }
    }
}

/// The two things needed of an entry that carries an extended header.
trait SizedEntry: Read {
    fn stored_len(&self) -> u64;
}

impl<R: Read> SizedEntry for tar::Entry<'_, R> {
    fn stored_len(&self) -> u64 {
        self.size()
    }
}

fn read_extended(entry: &mut impl SizedEntry, label: &str) -> Result<Vec<u8>, Error> {
    let len = entry.stored_len();
    if len > MAX_EXTENDED_LEN {
        return Err(Error::Limit {
            object: format!("an extended header in layer {label}"),
            unit: "bytes",
            actual: len,
            max: MAX_EXTENDED_LEN,
        });
    }
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes).map_err(|error| broken(label, &error))?;
    Ok(bytes)
}

/// A GNU long name; it ends at its first zero byte.
fn read_name(entry: &mut impl SizedEntry, label: &str) -> Result<Vec<u8>, Error> {
    let mut name = read_extended(entry, label)?;
    name.truncate(name.iter().position(|byte| *byte == 0).unwrap_or(name.len()));
    Ok(name)
}

/// A decimal number, a fraction after it ignored.
fn number(value: &[u8], label: &str, what: &str) -> Result<u64, Error> {
    let whole = value.split(|byte| *byte == b'.').next().unwrap_or_default();
    std::str::from_utf8(whole)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| refused(label, "(extended header)", format!("{what} is {:?}", cpio::display(value))))
}

fn sparse(label: &str, name: &[u8]) -> Error {
    refused(label, &cpio::display(name), SPARSE)
}

fn refused(label: &str, entry: &str, reason: impl Into<String>) -> Error {
    Error::Layer { layer: label.to_owned(), entry: entry.to_owned(), reason: reason.into() }
}

fn broken(label: &str, error: &io::Error) -> Error {
    refused(label, "(archive)", error.to_string())
}

/// Keeps limits as they are; everything else gets the entry's name.
fn wrap(label: &str, name: &[u8], error: Error) -> Error {
    match error {
        Error::Io { source, .. } => refused(label, &cpio::display(name), source.to_string()),
        other => other,
    }
}
