//! From an archive to a directory: plain files only, one level deep, bounded.

use std::fs::File;
use std::io::{self, BufReader, Seek as _, Write as _};
use std::path::{Component, Path};

use flate2::read::GzDecoder;

use super::Error;

/// The largest root file system is a few GB; more is a bomb.
const LARGEST: u64 = 24 << 30;
/// An image has about ten files.
const MOST_FILES: usize = 200;
const PIECE: usize = 64 << 10;

/// Unpacks `archive` into the new directory `to`; what an earlier try left there is removed first.
pub(super) fn unpack(archive: &Path, to: &Path, name: &str) -> Result<(), crate::Error> {
    if to.exists() {
        std::fs::remove_dir_all(to).map_err(crate::Error::file("remove", to))?;
    }
    std::fs::create_dir(to).map_err(crate::Error::file("create", to))?;
    let file = File::open(archive).map_err(crate::Error::file("open", archive))?;
    match files(BufReader::new(file), to, name) {
        Ok(()) => Ok(()),
        Err(error) => {
            std::fs::remove_dir_all(to).map_err(crate::Error::file("remove", to))?;
            Err(error.into())
        }
    }
}

fn files(archive: impl io::Read, to: &Path, name: &str) -> Result<(), Error> {
    let fail = |problem: String| Error::Archive { name: name.to_owned(), problem };
    let broken = |error: io::Error| fail(format!("the archive cannot be read: {error}"));
    let mut archive = tar::Archive::new(GzDecoder::new(archive));
    let (mut total, mut count) = (0_u64, 0);
    for entry in archive.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        let path = entry.path().map_err(broken)?.into_owned();
        let kind = entry.header().entry_type();
        let parts: Vec<&str> = path
            .components()
            .filter(|part| !matches!(part, Component::CurDir))
            .map(|part| match part {
                Component::Normal(part) => part.to_str().unwrap_or_default(),
                _ => "",
            })
            .collect();
        if kind.is_dir() {
            continue;
        }
        // `NAME/FILE`, or `FILE`.
        let file = match parts.as_slice() {
            [file] | [_, file] if !parts.contains(&"") => *file,
            _ => return Err(fail(format!("{} is not a file of an image", path.display()))),
        };
        if !(kind.is_file() || kind.is_gnu_sparse()) {
            return Err(fail(format!("{file} is neither a file nor a directory")));
        }
        count += 1;
        if count > MOST_FILES {
            return Err(fail(format!("more than {MOST_FILES} files")));
        }
        total = total.saturating_add(entry.size());
        if total > LARGEST {
            return Err(Error::TooLarge { what: format!("{name}, unpacked"), actual: total, limit: LARGEST });
        }
        write(&mut entry, &to.join(file)).map_err(|error| fail(format!("{file}: {error}")))?;
    }
    Ok(())
}

/// Writes a file that is not there yet; blocks of zeros stay holes.
fn write(from: &mut impl io::Read, path: &Path) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    let (mut piece, mut size) = (vec![0; PIECE], 0_u64);
    loop {
        let mut filled = 0;
        while filled < PIECE {
            match from.read(&mut piece[filled..])? {
                0 => break,
                read => filled += read,
            }
        }
        if filled == 0 {
            break;
        }
        match piece[..filled].iter().all(|byte| *byte == 0) {
            true => drop(file.seek_relative(i64::try_from(filled).unwrap_or_default())?),
            false => file.write_all(&piece[..filled])?,
        }
        size += filled as u64;
    }
    file.set_len(size)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    fn archive(entries: &[(&str, tar::EntryType, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        for (path, kind, bytes) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            // The crate itself refuses paths that lead elsewhere, so they are written into the header as they are.
            header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_cksum();
            builder.append(&header, *bytes).unwrap();
        }
        builder.into_inner().unwrap().finish().unwrap()
    }

    fn unpacked(bytes: &[u8]) -> Result<tempfile::TempDir, String> {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("a.tar.gz"), directory.path().join("out"));
        std::fs::write(&from, bytes).unwrap();
        match unpack(&from, &to, "image") {
            Ok(()) => Ok(directory),
            Err(error) => {
                assert!(!to.exists(), "what was refused stayed");
                Err(error.to_string())
            }
        }
    }

    #[test]
    fn files_come_out_whole_with_or_without_a_directory_around_them() {
        let disk = [&[7; 100_000][..], &[0; 300_000][..]].concat();
        for prefix in ["", "dstack-0.6.0/", "./", "./dstack-0.6.0/"] {
            let name = format!("{prefix}disk.raw");
            let bytes = archive(&[
                ("dstack-0.6.0/", tar::EntryType::Directory, b""),
                (&name, tar::EntryType::Regular, &disk),
            ]);
            let directory = unpacked(&bytes).unwrap();
            assert!(std::fs::read(directory.path().join("out/disk.raw")).unwrap() == disk, "{prefix}");
        }
    }

    #[test]
    fn what_no_image_has_is_refused() {
        let regular = tar::EntryType::Regular;
        for (path, kind, problem) in [
            ("../x", regular, "../x is not a file of an image"),
            ("/etc/x", regular, "/etc/x is not a file of an image"),
            ("a/b/c", regular, "a/b/c is not a file of an image"),
            ("link", tar::EntryType::Symlink, "link is neither a file nor a directory"),
            ("dev", tar::EntryType::Char, "dev is neither a file nor a directory"),
        ] {
            let error = unpacked(&archive(&[(path, kind, b"")])).unwrap_err();
            assert!(error.contains(problem), "{path}: {error}");
        }
        let twice = archive(&[("a", regular, b"1"), ("a", regular, b"2")]);
        assert!(unpacked(&twice).unwrap_err().contains("File exists"));
    }

    #[test]
    fn every_truncation_is_rejected() {
        let bytes = archive(&[("disk.raw", tar::EntryType::Regular, &[9; 3000])]);
        // The last eight bytes are gzip's check of the zeros that end an archive; without them the files are whole.
        for length in (0..bytes.len() - 20).step_by(7) {
            assert!(unpacked(&bytes[..length]).is_err(), "accepted a prefix of {length} bytes");
        }
    }
}
