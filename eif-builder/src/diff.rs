//! What differs between two images, and which registers that moves.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read, Seek};

use aws_lc_rs::digest::{Context, SHA256};
use serde_json::{Value, json};

use crate::cpio::{Entry, FileType};
use crate::cpio_read::read_ramdisk;
use crate::error::{Error, IoContext};
use crate::format::SectionKind;
use crate::image::Image;
use crate::measure::{Registers, extend};
use crate::problem::Strict;

/// One image, digested: sections and, where they can be unpacked, the files of its ramdisks.
#[derive(Debug)]
pub struct Snapshot {
    registers: Registers,
    /// Section name → digest of its payload.
    sections: BTreeMap<String, String>,
    /// (ramdisk, path) → what is there. Later members of a ramdisk replace earlier ones, as they do in Linux.
    files: BTreeMap<(usize, Vec<u8>), FileFacts>,
    /// What could not be looked into.
    pub notes: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct FileFacts {
    kind: FileType,
    mode: u32,
    owner: (u32, u32),
    rdev: (u32, u32),
    content: [u8; 32],
    len: u64,
}

impl Snapshot {
    /// Reads everything once for the registers and once for the contents.
    ///
    /// # Errors
    /// When the image cannot be read, or a loader would refuse it.
    pub fn of<R: Read + Seek>(image: &mut Image<R>) -> Result<Self, Error> {
        let mut registers = image.scan(&mut Strict)?.registers.map_err(Error::Format)?;
        registers.pcr8 = image.signature()?.map(|signature| extend(signature.certificate_der()));
        let mut snapshot =
            Self { registers, sections: BTreeMap::new(), files: BTreeMap::new(), notes: Vec::new() };
        let mut ramdisks = 0;
        for section in image.sections().to_vec() {
            let mut digest = Digest::new(image.payload(section)?);
            let name = match section.kind {
                SectionKind::Ramdisk => {
                    snapshot.read_files(ramdisks, &mut digest);
                    ramdisks += 1;
                    format!("ramdisk {}", ramdisks - 1)
                }
                kind => kind.name().to_owned(),
            };
            snapshot.sections.insert(name, hex::encode(digest.finish().context("read", "the image")?));
        }
        Ok(snapshot)
    }

    fn read_files(&mut self, ramdisk: usize, payload: &mut impl Read) {
        let files = &mut self.files;
        let result = read_ramdisk(payload, &mut |entry, content| {
            let facts = FileFacts::of(entry, content)?;
            files.insert((ramdisk, crate::cpio::trimmed(&entry.name).to_vec()), facts);
            Ok(())
        });
        if let Err(reason) = result {
            self.notes.push(format!("ramdisk {ramdisk}: {reason}; its files are not compared further"));
        }
    }
}

impl FileFacts {
    fn of(entry: &Entry, content: &mut dyn Read) -> io::Result<Self> {
        let mut digest = Digest::new(content);
        let content = digest.finish()?;
        let Entry { kind, mode, uid, gid, rdev, len, .. } = *entry;
        Ok(Self { kind, mode, owner: (uid, gid), rdev, content, len })
    }

    /// What changed from `self` to `after`, in words.
    fn changes(&self, after: &Self) -> Vec<String> {
        let mut changes = Vec::new();
        if self.kind != after.kind {
            changes.push(format!("type {:?} → {:?}", self.kind, after.kind));
        }
        if self.mode != after.mode {
            changes.push(format!("mode {:04o} → {:04o}", self.mode, after.mode));
        }
        if self.owner != after.owner {
            let ((uid, gid), (new_uid, new_gid)) = (self.owner, after.owner);
            changes.push(format!("owner {uid}:{gid} → {new_uid}:{new_gid}"));
        }
        if self.rdev != after.rdev {
            changes.push("device number".to_owned());
        }
        if self.content != after.content {
            changes.push(format!("content ({} → {} bytes)", self.len, after.len));
        }
        changes
    }
}

/// What changed from one image to another.
#[derive(Debug)]
pub struct Difference {
    sections: Vec<String>,
    registers: Vec<(&'static str, bool)>,
    files: Vec<FileChange>,
}

#[derive(Debug)]
struct FileChange {
    ramdisk: usize,
    path: String,
    change: Change,
}

#[derive(Debug)]
enum Change {
    Added,
    Removed,
    Changed(Vec<String>),
}

impl Difference {
    /// Compares two images.
    pub fn between(before: &Snapshot, after: &Snapshot) -> Self {
        let names = before.sections.keys().chain(after.sections.keys());
        let mut sections: Vec<String> =
            names.filter(|name| before.sections.get(*name) != after.sections.get(*name)).cloned().collect();
        sections.sort();
        sections.dedup();
        let (a, b) = (&before.registers, &after.registers);
        let registers = vec![
            ("PCR0", a.pcr0 != b.pcr0),
            ("PCR1", a.pcr1 != b.pcr1),
            ("PCR2", a.pcr2 != b.pcr2),
            ("PCR8", a.pcr8 != b.pcr8),
        ];
        let mut files = Vec::new();
        for (key, old) in &before.files {
            match after.files.get(key) {
                None => files.push(FileChange::new(key, Change::Removed)),
                Some(new) if new != old => {
                    files.push(FileChange::new(key, Change::Changed(old.changes(new))))
                }
                Some(_) => {}
            }
        }
        for key in after.files.keys().filter(|key| !before.files.contains_key(key)) {
            files.push(FileChange::new(key, Change::Added));
        }
        files.sort_by(|a, b| (a.ramdisk, &a.path).cmp(&(b.ramdisk, &b.path)));
        Self { sections, registers, files }
    }

    /// For programs.
    pub fn to_json(&self) -> Value {
        let registers: serde_json::Map<String, Value> = self
            .registers
            .iter()
            .map(|(name, moved)| ((*name).to_owned(), json!({ "Moved": moved })))
            .collect();
        let files: Vec<Value> = self
            .files
            .iter()
            .map(|file| {
                let (change, details) = match &file.change {
                    Change::Added => ("added", Vec::new()),
                    Change::Removed => ("removed", Vec::new()),
                    Change::Changed(details) => ("changed", details.clone()),
                };
                json!({ "Ramdisk": file.ramdisk, "Path": file.path, "Change": change, "Details": details })
            })
            .collect();
        json!({ "Sections": self.sections, "Registers": registers, "Files": files })
    }
}

impl FileChange {
    fn new((ramdisk, path): &(usize, Vec<u8>), change: Change) -> Self {
        Self { ramdisk: *ramdisk, path: String::from_utf8_lossy(path).into_owned(), change }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.sections.is_empty() {
            writeln!(f, "the sections are the same")?;
        }
        for section in &self.sections {
            writeln!(f, "section {section} differs")?;
        }
        for FileChange { ramdisk, path, change } in &self.files {
            let path = path.escape_debug();
            match change {
                Change::Added => writeln!(f, "+ ramdisk {ramdisk}: {path}")?,
                Change::Removed => writeln!(f, "- ramdisk {ramdisk}: {path}")?,
                Change::Changed(details) => {
                    writeln!(f, "~ ramdisk {ramdisk}: {path}: {}", details.join(", "))?
                }
            }
        }
        for (name, moved) in &self.registers {
            writeln!(f, "{name} {}", if *moved { "moves" } else { "stays" })?;
        }
        Ok(())
    }
}

/// Digests what is read through it, and at the end what was left.
struct Digest<R> {
    inner: R,
    context: Context,
}

impl<R: Read> Digest<R> {
    fn new(inner: R) -> Self {
        Self { inner, context: Context::new(&SHA256) }
    }

    fn finish(&mut self) -> io::Result<[u8; 32]> {
        io::copy(self, &mut io::sink())?;
        let mut digest = [0; 32];
        digest.copy_from_slice(self.context.clone().finish().as_ref());
        Ok(digest)
    }
}

impl<R: Read> Read for Digest<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.context.update(&buffer[..read]);
        Ok(read)
    }
}
