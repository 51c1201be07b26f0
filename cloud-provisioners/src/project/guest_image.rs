//! The directory of a guest image for bare metal: kernel, initramfs and root file system, not one bootable disk.

use std::io::Read as _;
use std::path::Path;

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::Error;

/// Files are hashed in pieces of this size.
const PIECE: usize = 1 << 20;
/// Descriptions are small.
const LARGEST_TEXT: u64 = 1 << 20;

/// The digest of the guest image `name` in `directory`, after every file it names was found to be there and, where the
/// image lists hashes, to be the one that was released. Reads the whole image, so it belongs off the async threads.
///
/// # Errors
///
/// [`Error::OsImage`] says what is missing or changed.
pub fn check_guest_image(directory: &Path, name: &str) -> Result<String, Error> {
    let fail = |problem: String| Error::OsImage { image: name.to_owned(), problem };
    let read = |file: &str| text(&directory.join(file)).map_err(|error| fail(format!("{file}: {error}")));
    let metadata = read("metadata.json")?;
    let metadata: Value =
        serde_json::from_str(&metadata).map_err(|error| fail(format!("metadata.json: {error}")))?;
    for kind in ["bios", "kernel", "initrd", "rootfs"] {
        // Which of them an image has is its own affair; those it names must be there.
        if let Some(file) = metadata[kind].as_str()
            && !directory.join(file).is_file()
        {
            return Err(fail(format!("{file} is missing, which metadata.json names as {kind}")));
        }
    }
    let digest = read("digest.txt")?.trim().to_lowercase();
    if digest.len() != 64 || !digest.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(fail("digest.txt does not hold a SHA-256 hash in hex".into()));
    }
    if directory.join("sha256sum.txt").exists() {
        let list = read("sha256sum.txt")?;
        let actual = hex::encode(Sha256::digest(&list));
        if actual != digest {
            return Err(fail(format!("digest.txt says {digest}, sha256sum.txt hashes to {actual}")));
        }
        for line in list.lines() {
            let mut words = line.split_whitespace();
            let (Some(hash), Some(file)) = (words.next(), words.next()) else { continue };
            let file = file.trim_start_matches('*');
            let actual =
                sha256_of(&directory.join(file)).map_err(|error| fail(format!("{file}: {error}")))?;
            if hex::encode(actual) != hash {
                return Err(fail(format!("{file} is not the file sha256sum.txt lists")));
            }
        }
    }
    Ok(digest)
}

fn text(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    std::fs::File::open(path)?.take(LARGEST_TEXT).read_to_string(&mut text)?;
    Ok(text)
}

/// SHA-256 of a file, read in pieces.
///
/// # Errors
///
/// When it cannot be read.
pub(crate) fn sha256_of(path: &Path) -> std::io::Result<[u8; 32]> {
    let mut file = std::fs::File::open(path)?;
    let (mut hash, mut piece) = (Sha256::new(), vec![0; PIECE]);
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(hash.finalize().into()),
            read => hash.update(&piece[..read]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(change: impl Fn(&Path)) -> Result<String, String> {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        std::fs::write(at("metadata.json"), r#"{"bios":"ovmf.fd","kernel":"bzImage","cmdline":"x"}"#)
            .unwrap();
        std::fs::write(at("ovmf.fd"), "bios").unwrap();
        std::fs::write(at("bzImage"), "kernel").unwrap();
        let list = format!("{}  bzImage\n", hex::encode(Sha256::digest("kernel")));
        std::fs::write(at("sha256sum.txt"), &list).unwrap();
        std::fs::write(at("digest.txt"), hex::encode(Sha256::digest(&list))).unwrap();
        change(directory.path());
        check_guest_image(directory.path(), "dstack-0.6.0").map_err(|error| error.to_string())
    }

    #[test]
    fn a_whole_image_has_a_digest_and_anything_else_is_said() {
        assert_eq!(image(|_| ()).unwrap().len(), 64);
        for (file, content, problem) in [
            ("metadata.json", None, "metadata.json: "),
            ("metadata.json", Some("{"), "metadata.json: EOF"),
            ("ovmf.fd", None, "ovmf.fd is missing, which metadata.json names as bios"),
            ("digest.txt", None, "digest.txt: "),
            ("digest.txt", Some("Not Found"), "digest.txt does not hold a SHA-256"),
            ("bzImage", Some("other"), "bzImage is not the file sha256sum.txt lists"),
            ("sha256sum.txt", Some("x"), "sha256sum.txt hashes to"),
        ] {
            let error = image(|directory| match content {
                Some(content) => std::fs::write(directory.join(file), content).unwrap(),
                None => std::fs::remove_file(directory.join(file)).unwrap(),
            });
            let error = error.unwrap_err();
            assert!(error.contains(problem), "{file}: {error}");
        }
    }
}
