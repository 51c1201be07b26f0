//! Writes a container image of a few files as an OCI layout folder, without an engine: one layer, no clock, no user
//! names, so the same files give the same digest anywhere.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use flate2::{Compression, GzBuilder};
use serde_json::json;

use crate::error::{Error, IoContext};
use crate::format::Arch;
use crate::oci::sha256;

/// What goes into an image, and how it runs.
#[derive(Debug, Clone, Default)]
pub struct PackedImage {
    /// Files by absolute path; the folders above them are made.
    pub files: BTreeMap<String, PackedFile>,
    /// Empty folders by absolute path, with their mode and owner.
    pub folders: BTreeMap<String, (u32, u32)>,
    /// ENTRYPOINT.
    pub entrypoint: Vec<String>,
    /// CMD.
    pub cmd: Vec<String>,
    /// ENV, `NAME=value`.
    pub env: Vec<String>,
    /// USER, as numbers: there is no user database in the image.
    pub user: String,
    /// EXPOSE, such as `8000/tcp`.
    pub ports: Vec<String>,
    /// VOLUME.
    pub volumes: Vec<String>,
    /// LABEL.
    pub labels: BTreeMap<String, String>,
}

/// A file of an image.
#[derive(Debug, Clone)]
pub struct PackedFile {
    /// Its contents.
    pub contents: Vec<u8>,
    /// Its permissions.
    pub mode: u32,
}

/// Digests of what was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packed {
    /// Of the manifest, by which the image is named: `sha256:` and 64 digits.
    pub digest: String,
    /// Bytes of the layer, compressed.
    pub layer_len: u64,
}

/// Writes the image into `folder`, which must not exist, under the reference `tag`.
///
/// # Errors
///
/// When a path is not absolute and plain, or something cannot be written.
pub fn write_layout(folder: &Path, image: &PackedImage, tag: &str, arch: Arch) -> Result<Packed, Error> {
    let tar = layer(image)?;
    let diff_id = format!("sha256:{}", sha256(&tar));
    let mut gzip = GzBuilder::new().mtime(0).write(Vec::new(), Compression::best());
    gzip.write_all(&tar).context("compress", "the layer")?;
    let layer = gzip.finish().context("compress", "the layer")?;

    fs::create_dir(folder).context("create", folder)?;
    fs::create_dir_all(folder.join("blobs/sha256")).context("create", folder)?;
    let config = document(&config(image, &diff_id, arch));
    let manifest = document(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob(folder, "application/vnd.oci.image.config.v1+json", &config)?,
        "layers": [blob(folder, "application/vnd.oci.image.layer.v1.tar+gzip", &layer)?],
    }));
    let mut described = blob(folder, "application/vnd.oci.image.manifest.v1+json", &manifest)?;
    described["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
    described["platform"] = json!({ "architecture": arch.oci_name(), "os": "linux" });
    let index = document(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [described],
    }));
    write(&folder.join("index.json"), &index)?;
    write(&folder.join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    Ok(Packed { digest: format!("sha256:{}", sha256(&manifest)), layer_len: layer.len() as u64 })
}

fn config(image: &PackedImage, diff_id: &str, arch: Arch) -> serde_json::Value {
    let PackedImage { files: _, folders: _, entrypoint, cmd, env, user, ports, volumes, labels } = image;
    let set =
        |names: &[String]| names.iter().map(|name| (name.clone(), json!({}))).collect::<BTreeMap<_, _>>();
    json!({
        "architecture": arch.oci_name(),
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        "config": {
            "User": user,
            "ExposedPorts": set(ports),
            "Env": env,
            "Entrypoint": entrypoint,
            "Cmd": cmd,
            "Volumes": set(volumes),
            "WorkingDir": "/",
            "Labels": labels,
        },
        "rootfs": { "type": "layers", "diff_ids": [diff_id] },
        "history": [{ "created": "1970-01-01T00:00:00Z", "created_by": "keyferry" }],
    })
}

fn layer(image: &PackedImage) -> Result<Vec<u8>, Error> {
    // In the order of paths a folder comes before what is in it.
    let mut entries: BTreeMap<String, Entry<'_>> = BTreeMap::new();
    for path in image.files.keys().chain(image.folders.keys()) {
        check(path)?;
        for (at, _) in path.match_indices('/').filter(|(at, _)| *at > 0) {
            entries.entry(path[1..at].to_owned()).or_insert(Entry::Folder(0o755, 0));
        }
    }
    for (path, (mode, owner)) in &image.folders {
        entries.insert(path[1..].to_owned(), Entry::Folder(*mode, *owner));
    }
    for (path, file) in &image.files {
        entries.insert(path[1..].to_owned(), Entry::File(file));
    }
    let mut archive = tar::Builder::new(Vec::new());
    for (path, entry) in &entries {
        let mut header = tar::Header::new_ustar();
        header.set_mtime(0);
        header.set_gid(0);
        let (path, contents) = match entry {
            Entry::Folder(mode, owner) => {
                header.set_entry_type(tar::EntryType::Directory);
                header.set_mode(*mode);
                header.set_uid(u64::from(*owner));
                header.set_gid(u64::from(*owner));
                (format!("{path}/"), &[][..])
            }
            Entry::File(file) => {
                header.set_entry_type(tar::EntryType::Regular);
                header.set_mode(file.mode);
                header.set_uid(0);
                (path.clone(), file.contents.as_slice())
            }
        };
        header.set_size(contents.len() as u64);
        archive.append_data(&mut header, &path, contents).context("pack", path.as_str())?;
    }
    archive.into_inner().context("pack", "the layer")
}

enum Entry<'a> {
    Folder(u32, u32),
    File(&'a PackedFile),
}

fn check(path: &str) -> Result<(), Error> {
    let plain = path
        .strip_prefix('/')
        .is_some_and(|rest| !rest.is_empty() && rest.split('/').all(|part| !matches!(part, "" | "." | "..")));
    if plain { Ok(()) } else { Err(Error::input(path, "not an absolute path without \".\" and \"..\"")) }
}

fn document(value: &serde_json::Value) -> Vec<u8> {
    // A value with text keys always encodes.
    serde_json::to_vec(value).unwrap_or_default()
}

/// Writes a blob and describes it.
fn blob(folder: &Path, media_type: &str, bytes: &[u8]) -> Result<serde_json::Value, Error> {
    let hex = sha256(bytes);
    write(&folder.join("blobs/sha256").join(&hex), bytes)?;
    Ok(json!({ "mediaType": media_type, "digest": format!("sha256:{hex}"), "size": bytes.len() }))
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    File::create_new(path).and_then(|mut file| file.write_all(bytes)).context("write", path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::Lost;
    use crate::oci::ContainerImage;
    use crate::tree::Limits;

    fn image() -> PackedImage {
        let file = |text: &str, mode| PackedFile { contents: text.as_bytes().to_vec(), mode };
        PackedImage {
            files: [
                ("/usr/bin/tool".into(), file("program", 0o755)),
                ("/etc/tool.toml".into(), file("", 0o644)),
            ]
            .into(),
            folders: [("/var/lib/tool".into(), (0o700, 1000))].into(),
            entrypoint: vec!["/usr/bin/tool".into()],
            cmd: vec!["serve".into()],
            user: "1000:1000".into(),
            ports: vec!["8000/tcp".into()],
            ..PackedImage::default()
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let folder = directory.path().join("layout");
        write_layout(&folder, &image(), "tool:1", Arch::X86_64).unwrap();
        let read = ContainerImage::from_layout(&folder, Some("tool:1"), Arch::X86_64).unwrap();
        let tree = read.unpack(Limits::default(), &mut Lost::default()).unwrap();
        let paths: Vec<_> =
            tree.iter().map(|(path, _)| String::from_utf8_lossy(path).trim_matches('/').to_owned()).collect();
        for path in ["etc/tool.toml", "usr/bin/tool", "var/lib/tool"] {
            assert!(paths.iter().any(|known| known == path), "{path} in {paths:?}");
        }
    }

    #[test]
    fn the_same_files_give_the_same_bytes() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, image: &PackedImage| {
            write_layout(&directory.path().join(name), image, "tool:1", Arch::X86_64).unwrap().digest
        };
        let first = write("a", &image());
        assert_eq!(write("b", &image()), first);
        let mut other = image();
        other.files.get_mut("/usr/bin/tool").unwrap().mode = 0o644;
        assert_ne!(write("c", &other), first);
    }

    #[test]
    fn paths_that_lead_elsewhere_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        for path in ["", "/", "usr/bin/tool", "/../etc/passwd", "/usr//tool", "/usr/./tool", "/usr/"] {
            let file = PackedFile { contents: Vec::new(), mode: 0o644 };
            let image = PackedImage { files: [(path.to_owned(), file)].into(), ..PackedImage::default() };
            let folder = directory.path().join("layout");
            assert!(write_layout(&folder, &image, "x", Arch::X86_64).is_err(), "{path:?}");
            assert!(!folder.exists());
        }
    }
}
