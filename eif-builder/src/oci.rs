//! Container images on disk: OCI layout folders and `docker save` archives.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use aws_lc_rs::digest::{Context, SHA256};
use serde::Deserialize;
use tempfile::NamedTempFile;
#[cfg(feature = "command")]
use tempfile::TempDir;

use crate::error::{Error, IoContext};
use crate::format::Arch;
use crate::layer::{self, Lost};
use crate::scratch::Scratch;
use crate::tree::{Limits, Tree};

/// Largest manifest, index or configuration, in bytes; registries refuse more than 4 MiB.
pub const MAX_DOCUMENT_LEN: u64 = 4 << 20;
/// Most layers of an image; container engines stop at 127.
const MAX_LAYERS: usize = 512;
/// How deep indexes may point to indexes.
const MAX_INDEX_DEPTH: usize = 4;
/// Most members of a `docker save` archive.
const MAX_MEMBERS: usize = 10_000;

/// What an image says about running it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RunConfig {
    /// USER.
    #[serde(deserialize_with = "null_is_default")]
    pub user: String,
    /// ENV, `NAME=value`.
    #[serde(deserialize_with = "null_is_default")]
    pub env: Vec<String>,
    /// ENTRYPOINT.
    #[serde(deserialize_with = "null_is_default")]
    pub entrypoint: Vec<String>,
    /// CMD.
    #[serde(deserialize_with = "null_is_default")]
    pub cmd: Vec<String>,
    /// WORKDIR.
    #[serde(deserialize_with = "null_is_default")]
    pub working_dir: String,
}

/// Engines write `null` for an empty list.
fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[derive(Debug, Deserialize)]
struct ConfigDocument {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    config: Option<RunConfig>,
    rootfs: RootFs,
}

#[derive(Debug, Deserialize)]
struct RootFs {
    diff_ids: Vec<String>,
}

/// A reference by content.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Kind of content.
    #[serde(default)]
    pub media_type: String,
    /// `sha256:` and 64 hex digits.
    pub digest: String,
    /// Length in bytes.
    pub size: u64,
    #[serde(default)]
    platform: Option<Platform>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

#[cfg(feature = "command")]
impl Descriptor {
    /// A reference to a document that was downloaded.
    pub(crate) fn new(digest: String, size: u64) -> Self {
        Self { media_type: String::new(), digest, size, platform: None, annotations: BTreeMap::new() }
    }
}

/// An index or a manifest: an index has manifests, a manifest a config and layers.
#[derive(Debug, Deserialize)]
pub(crate) struct Manifest {
    #[serde(default)]
    manifests: Vec<Descriptor>,
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
}

#[cfg(feature = "command")]
impl Manifest {
    pub(crate) fn parse(bytes: &[u8], name: &str) -> Result<Self, Error> {
        parse(bytes, name)
    }

    /// For an index, the manifest of the platform.
    pub(crate) fn platform_manifest(&self, arch: Arch, name: &str) -> Result<Option<Descriptor>, Error> {
        if self.config.is_some() {
            return Ok(None);
        }
        choose(&self.manifests, None, arch).map(Some).map_err(|reason| Error::input(name, reason))
    }

    /// Configuration and layers.
    pub(crate) fn blobs(&self) -> impl Iterator<Item = &Descriptor> {
        self.config.iter().chain(&self.layers)
    }
}

/// An image whose documents were read; layers stay where they are until [`ContainerImage::unpack`].
#[derive(Debug)]
pub struct ContainerImage {
    /// What it says about running it.
    pub run: RunConfig,
    /// Digest of the manifest, when the source has one.
    pub manifest: Option<String>,
    /// Digest of the configuration: the image id.
    pub config: String,
    layers: Vec<Layer>,
    /// Temporary copies that have to stay as long as the layers are needed.
    kept: Option<Kept>,
}

#[derive(Debug)]
#[expect(dead_code, reason = "held for what happens when they are dropped")]
enum Kept {
    Archive(Scratch<NamedTempFile>),
    #[cfg(feature = "command")]
    Folder(Scratch<TempDir>),
}

/// A layer: where its bytes are and what they must be.
#[derive(Debug, Clone)]
struct Layer {
    file: PathBuf,
    offset: u64,
    len: u64,
    /// Digest of the bytes as stored.
    digest: Option<String>,
    /// Digest of the unpacked bytes.
    diff_id: String,
}

impl ContainerImage {
    /// Reads an OCI layout folder. `reference` picks a manifest by name or digest; without one there must be
    /// exactly one image for `arch`.
    ///
    /// # Errors
    /// When documents are missing, malformed or not what their digests say, or no image matches.
    pub fn from_layout(folder: &Path, reference: Option<&str>, arch: Arch) -> Result<Self, Error> {
        let index = read_limited(&folder.join("index.json"))?;
        let index: Manifest = parse(&index, "index.json")?;
        let chosen = choose(&index.manifests, reference, arch)
            .map_err(|reason| Error::input(folder.display(), reason))?;
        Self::from_blobs(folder, chosen, arch, 0)
    }

    /// Follows a descriptor in `folder/blobs` to an image.
    pub(crate) fn from_blobs(
        folder: &Path,
        descriptor: Descriptor,
        arch: Arch,
        depth: usize,
    ) -> Result<Self, Error> {
        let bytes = read_blob(folder, &descriptor)?;
        let document: Manifest = parse(&bytes, &descriptor.digest)?;
        let Some(config) = document.config else {
            if depth == MAX_INDEX_DEPTH {
                return Err(Error::input(folder.display(), "indexes point to indexes without end"));
            }
            let chosen = choose(&document.manifests, None, arch)
                .map_err(|reason| Error::input(&descriptor.digest, reason))?;
            return Self::from_blobs(folder, chosen, arch, depth + 1);
        };
        let config_bytes = read_blob(folder, &config)?;
        let layers = document
            .layers
            .into_iter()
            .map(|layer| {
                let file = blob_path(folder, &layer.digest)?;
                Ok((file, 0, layer.size, Some(layer.digest)))
            })
            .collect::<Result<Vec<_>, Error>>()?;
        Self::assemble(&config_bytes, config.digest, Some(descriptor.digest), layers, arch)
    }

    /// Reads a `docker save` archive, packed or not. `reference` picks one of several images by its tag.
    ///
    /// # Errors
    /// When the archive is broken, has no `manifest.json`, or no image matches.
    pub fn from_archive(path: &Path, reference: Option<&str>, arch: Arch) -> Result<Self, Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Saved {
            config: String,
            #[serde(default)]
            repo_tags: Option<Vec<String>>,
            layers: Vec<String>,
        }
        let members = Members::read(path)?;
        let manifest = members.document("manifest.json")?;
        let images: Vec<Saved> = parse(&manifest, "manifest.json")?;
        let tags = |image: &Saved| image.repo_tags.clone().unwrap_or_default();
        let mut matching = images
            .iter()
            .filter(|image| reference.is_none_or(|name| tags(image).iter().any(|tag| tag == name)));
        let image = match (matching.next(), matching.next()) {
            (Some(image), None) => image,
            (None, _) => {
                return Err(Error::input(
                    path.display(),
                    format!("no image {}", reference.unwrap_or("at all")),
                ));
            }
            (Some(_), Some(_)) => {
                let names = images.iter().flat_map(tags).collect::<Vec<_>>().join(", ");
                return Err(Error::input(
                    path.display(),
                    format!("several images ({names}); name one behind a colon or `@`"),
                ));
            }
        };
        let config = members.document(&image.config)?;
        let digest = format!("sha256:{}", sha256(&config));
        let layers = image
            .layers
            .iter()
            .map(|name| {
                let (offset, len) = members.find(name)?;
                Ok((members.file.clone(), offset, len, None))
            })
            .collect::<Result<Vec<_>, Error>>()?;
        let mut image = Self::assemble(&config, digest, None, layers, arch)?;
        image.kept = members.unpacked.map(Kept::Archive);
        Ok(image)
    }

    fn assemble(
        config: &[u8],
        digest: String,
        manifest: Option<String>,
        layers: Vec<(PathBuf, u64, u64, Option<String>)>,
        arch: Arch,
    ) -> Result<Self, Error> {
        let document: ConfigDocument = parse(config, &digest)?;
        if document.os != "linux" || document.architecture != arch.oci_name() {
            let reason = format!(
                "is for {}/{}, the image is for linux/{}",
                document.os,
                document.architecture,
                arch.oci_name()
            );
            return Err(Error::input(&digest, reason));
        }
        let diff_ids = document.rootfs.diff_ids;
        if layers.len() > MAX_LAYERS || layers.len() != diff_ids.len() {
            let reason =
                format!("{} layers, {} layer digests; at most {MAX_LAYERS}", layers.len(), diff_ids.len());
            return Err(Error::input(&digest, reason));
        }
        let layers = layers
            .into_iter()
            .zip(diff_ids)
            .map(|((file, offset, len, digest), diff_id)| Layer { file, offset, len, digest, diff_id })
            .collect();
        Ok(Self { run: document.config.unwrap_or_default(), manifest, config: digest, layers, kept: None })
    }

    /// Deletes `folder` together with the image.
    #[cfg(feature = "command")]
    pub(crate) fn keep_folder(&mut self, folder: Scratch<TempDir>) {
        self.kept = Some(Kept::Folder(folder));
    }

    /// Applies the layers in order and checks that each is what its digests say.
    ///
    /// # Errors
    /// When a layer is not what it should be, or has something that must not be in an image.
    pub fn unpack(&self, limits: Limits, lost: &mut Lost) -> Result<Tree, Error> {
        let mut tree = Tree::new(limits)?;
        for layer in &self.layers {
            layer.apply(&mut tree, lost)?;
        }
        Ok(tree)
    }
}

impl Layer {
    fn apply(&self, tree: &mut Tree, lost: &mut Lost) -> Result<(), Error> {
        let mut file = File::open(&self.file).context("open", &self.file)?;
        file.seek(SeekFrom::Start(self.offset)).context("read", &self.file)?;
        let mut stored = Hashing::new(file.take(self.len));
        {
            let mut unpacked = Hashing::new(layer::decompressed(&mut stored).context("read", &self.diff_id)?);
            layer::apply(tree, &mut unpacked, &self.diff_id, lost)?;
            // The end-of-archive marker may be followed by padding that belongs to the digest.
            let actual = unpacked.finish().context("read", &self.diff_id)?;
            check_digest("the unpacked layer", &self.diff_id, &actual)?;
        }
        match &self.digest {
            Some(digest) => check_digest("the layer", digest, &stored.finish().context("read", digest)?),
            None => Ok(()),
        }
    }
}

/// The manifest for this reference and platform.
fn choose(manifests: &[Descriptor], reference: Option<&str>, arch: Arch) -> Result<Descriptor, String> {
    const NAME: &str = "org.opencontainers.image.ref.name";
    let is_named = |descriptor: &&Descriptor| {
        reference.is_none_or(|name| {
            descriptor.digest == name || descriptor.annotations.get(NAME).is_some_and(|tag| tag == name)
        })
    };
    let fits = |descriptor: &&Descriptor| {
        descriptor
            .platform
            .as_ref()
            .is_none_or(|platform| platform.os == "linux" && platform.architecture == arch.oci_name())
    };
    let mut matching = manifests.iter().filter(is_named).filter(fits);
    match (matching.next(), matching.next()) {
        (Some(descriptor), None) => Ok(descriptor.clone()),
        (None, _) => Err(format!("no image {} for linux/{}", reference.unwrap_or("at all"), arch.oci_name())),
        (Some(_), Some(_)) => Err("several images; name one by its tag or digest".into()),
    }
}

/// The path of a blob. The digest becomes a file name, so it is checked first.
pub(crate) fn blob_path(folder: &Path, digest: &str) -> Result<PathBuf, Error> {
    let hex = digest
        .strip_prefix("sha256:")
        .filter(|hex| hex.len() == 64 && hex.bytes().all(|c| c.is_ascii_hexdigit()));
    match hex {
        Some(hex) => Ok(folder.join("blobs/sha256").join(hex)),
        None => Err(Error::input(format!("digest {digest:?}"), "expected sha256: and 64 hex digits")),
    }
}

fn read_blob(folder: &Path, descriptor: &Descriptor) -> Result<Vec<u8>, Error> {
    let path = blob_path(folder, &descriptor.digest)?;
    let bytes = read_limited(&path)?;
    check_digest("the document", &descriptor.digest, &sha256(&bytes))?;
    Ok(bytes)
}

fn read_limited(path: &Path) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_DOCUMENT_LEN + 1).read_to_end(&mut bytes))
        .context("read", path)?;
    if bytes.len() as u64 > MAX_DOCUMENT_LEN {
        let object = path.display().to_string();
        return Err(Error::Limit {
            object,
            unit: "bytes",
            actual: bytes.len() as u64,
            max: MAX_DOCUMENT_LEN,
        });
    }
    Ok(bytes)
}

fn parse<T: for<'de> Deserialize<'de>>(bytes: &[u8], name: &str) -> Result<T, Error> {
    serde_json::from_slice(bytes).map_err(|error| Error::input(name, error))
}

fn check_digest(object: &str, expected: &str, actual_hex: &str) -> Result<(), Error> {
    let actual = format!("sha256:{actual_hex}");
    if actual == expected {
        return Ok(());
    }
    Err(Error::Digest { object: object.into(), expected: expected.into(), actual })
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex::encode(aws_lc_rs::digest::digest(&SHA256, bytes))
}

/// Digests what is read through it.
pub(crate) struct Hashing<R> {
    inner: R,
    context: Context,
}

impl<R: Read> Hashing<R> {
    pub(crate) fn new(inner: R) -> Self {
        Self { inner, context: Context::new(&SHA256) }
    }

    /// Reads to the end and gives the digest in hex.
    pub(crate) fn finish(mut self) -> io::Result<String> {
        io::copy(&mut self, &mut io::sink())?;
        Ok(hex::encode(self.context.finish()))
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.context.update(&buffer[..read]);
        Ok(read)
    }
}

/// The members of an archive, found without unpacking it to disk (a packed archive is unpacked once).
struct Members {
    file: PathBuf,
    unpacked: Option<Scratch<NamedTempFile>>,
    ranges: BTreeMap<String, Place>,
}

enum Place {
    At(u64, u64),
    Link(String),
}

impl Members {
    fn read(path: &Path) -> Result<Self, Error> {
        let (file, unpacked) = plain_archive(path)?;
        let mut archive = tar::Archive::new(io::BufReader::new(File::open(&file).context("open", &file)?));
        let mut ranges = BTreeMap::new();
        for entry in archive.entries_with_seek().context("read", path)? {
            let entry = entry.context("read", path)?;
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            let place = match entry.link_name_bytes() {
                Some(target) => Place::Link(join(&name, &String::from_utf8_lossy(&target))),
                None => Place::At(entry.raw_file_position(), entry.size()),
            };
            ranges.insert(name, place);
            if ranges.len() > MAX_MEMBERS {
                let object = path.display().to_string();
                let (actual, max) = (ranges.len() as u64, MAX_MEMBERS as u64);
                return Err(Error::Limit { object, unit: "members", actual, max });
            }
        }
        Ok(Self { file, unpacked, ranges })
    }

    /// Where a member lies. Old archives store equal layers once and link to them.
    fn find(&self, name: &str) -> Result<(u64, u64), Error> {
        let mut name = name.to_owned();
        for _ in 0..8 {
            match self.ranges.get(&name) {
                Some(Place::At(offset, len)) => return Ok((*offset, *len)),
                Some(Place::Link(target)) => name.clone_from(target),
                None => break,
            }
        }
        Err(Error::input(
            self.file.display(),
            format!("no member {name:?}; is this the output of `docker save`?"),
        ))
    }

    fn document(&self, name: &str) -> Result<Vec<u8>, Error> {
        let (offset, len) = self.find(name)?;
        if len > MAX_DOCUMENT_LEN {
            return Err(Error::Limit {
                object: name.into(),
                unit: "bytes",
                actual: len,
                max: MAX_DOCUMENT_LEN,
            });
        }
        let mut bytes = Vec::new();
        let mut file = File::open(&self.file).context("open", &self.file)?;
        file.seek(SeekFrom::Start(offset))
            .and_then(|_| file.take(len).read_to_end(&mut bytes))
            .context("read", &self.file)?;
        Ok(bytes)
    }
}

/// The archive itself, or an unpacked temporary copy of a packed one.
fn plain_archive(path: &Path) -> Result<(PathBuf, Option<Scratch<NamedTempFile>>), Error> {
    let mut file = File::open(path).context("open", path)?;
    let mut start = Vec::new();
    (&mut file).take(4).read_to_end(&mut start).context("read", path)?;
    if !matches!(start.as_slice(), [0x1f, 0x8b, ..] | [0x28, 0xb5, 0x2f, 0xfd]) {
        return Ok((path.to_owned(), None));
    }
    file.rewind().context("read", path)?;
    let copy = Scratch::file()?;
    let max = Limits::default().content;
    let mut unpacked = layer::decompressed(file).context("read", path)?.take(max);
    io::copy(&mut unpacked, &mut copy.as_file()).context("unpack", path)?;
    if unpacked.limit() == 0 {
        let object = path.display().to_string();
        return Err(Error::Limit { object, unit: "unpacked bytes", actual: max, max });
    }
    Ok((copy.path().to_owned(), Some(copy)))
}

/// `target` as seen from the folder of `name`.
fn join(name: &str, target: &str) -> String {
    let mut parts: Vec<&str> = name.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}
