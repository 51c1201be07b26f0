//! Fetches an OS image: downloads its archive, goes on where a download was cut, unpacks it and checks that it is the variant
//! that boots.
//!
//! ```text
//! NAME or URL ──▶ .NAME.tar.gz.part ──sha256──▶ .NAME.unpacked ──variant, own hashes──▶ NAME
//! ```
//!
//! Nothing is where images are looked for before it was checked.

mod download;
mod unpack;

use std::path::{Path, PathBuf};
use std::str::FromStr;

use command_line::Exit;
use reqwest::Url;

use crate::project::{OsImage, check_guest_image, sha256_of};

pub use download::Progress;

/// Where the releases of each generation are.
const GITHUB: &str = "https://github.com/";

/// Which machines an image boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// One bootable disk, for a Confidential VM of a cloud.
    Uki,
    /// Kernel, initramfs and root file system, for a VMM on bare metal.
    BareMetal,
}

impl Variant {
    fn suffix(self) -> &'static str {
        match self {
            Self::Uki => "-uki.tar.gz",
            Self::BareMetal => ".tar.gz",
        }
    }
}

/// An image to fetch: the name of a release, or an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// `dstack-cloud-0.6.0`, `dstack-0.6.0`.
    Release(String),
    /// An archive anywhere.
    Address(Url),
}

impl FromStr for Source {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        if text.starts_with("http://") || text.starts_with("https://") {
            return match text.parse::<Url>() {
                Ok(url) if image_name(&url).is_some() => Ok(Self::Address(url)),
                _ => Err(Error::Name { name: text.to_owned(), problem: "does not end in NAME.tar.gz" }),
            };
        }
        let release = Self::Release(text.to_owned());
        release.url(Variant::Uki, None).map(|_| release)
    }
}

/// The image's name by an archive's address.
fn image_name(url: &Url) -> Option<String> {
    let file = url.path_segments()?.next_back()?;
    let name = file.strip_suffix("-uki.tar.gz").or_else(|| file.strip_suffix(".tar.gz"))?;
    is_name(name).then(|| name.to_owned())
}

/// It becomes the name of a directory.
fn is_name(name: &str) -> bool {
    let first = name.bytes().next();
    first.is_some_and(|it| it.is_ascii_alphanumeric())
        && name.bytes().all(|it| it.is_ascii_alphanumeric() || b"-_.".contains(&it))
}

impl Source {
    /// Name of the image.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Release(name) => name.clone(),
            Self::Address(url) => image_name(url).unwrap_or_default(),
        }
    }

    /// Where its archive is. `mirror` stands for GitHub's address.
    ///
    /// # Errors
    ///
    /// [`Error::Name`] for a release that cannot be one.
    pub fn url(&self, variant: Variant, mirror: Option<&Url>) -> Result<Url, Error> {
        let name = match self {
            Self::Address(url) => return Ok(url.clone()),
            Self::Release(name) => name,
        };
        let wrong = |problem| Error::Name { name: name.clone(), problem };
        if !is_name(name) {
            return Err(wrong("has characters that no release has"));
        }
        let at = name
            .match_indices('-')
            .find(|(at, _)| name[at + 1..].starts_with(|it: char| it.is_ascii_digit()));
        let version =
            at.map(|(at, _)| &name[at + 1..]).ok_or_else(|| wrong("has no version, as in dstack-0.6.0"))?;
        let mut numbers = version.split(['.', '-']).map_while(|it| it.parse::<u32>().ok());
        let number = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        // Source: `pull` of both dstack-cloud programs.
        let (repository, tag) = if name.starts_with("dstack-cloud") {
            ("Phala-Network/meta-dstack-cloud", format!("v{version}"))
        } else if number < (0, 6) {
            ("Dstack-TEE/meta-dstack", format!("v{version}"))
        } else {
            ("Dstack-TEE/dstack", format!("guest-os-v{version}"))
        };
        let base = mirror.map_or(GITHUB, Url::as_str).trim_end_matches('/');
        let url = format!("{base}/{repository}/releases/download/{tag}/{name}{}", variant.suffix());
        url.parse().map_err(|_| wrong("makes no address"))
    }
}

/// Why an image could not be fetched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The name cannot be one.
    #[error("image {name}: {problem}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// An archive from anywhere must be named by its hash.
    #[error("{url}: an archive from an address needs its SHA-256")]
    NoDigest {
        /// The address.
        url: String,
    },
    /// The server has no such archive.
    #[error("{url}: status {status}")]
    Status {
        /// The address.
        url: String,
        /// The server's answer.
        status: u16,
    },
    /// The server does not answer, or stopped in the middle.
    #[error("{url}: {problem}")]
    Unreachable {
        /// The address.
        url: String,
        /// The reason.
        problem: String,
    },
    /// The archive is larger than any image.
    #[error("{what}: {actual} bytes, at most {limit} are taken")]
    TooLarge {
        /// Which file.
        what: String,
        /// Its size.
        actual: u64,
        /// The limit.
        limit: u64,
    },
    /// The archive is another one.
    #[error("{url}: SHA-256 is {actual}, expected {expected}")]
    Digest {
        /// The address.
        url: String,
        /// Of what came.
        actual: String,
        /// Of what was wanted.
        expected: String,
    },
    /// The archive holds something no image has.
    #[error("{name}: {problem}")]
    Archive {
        /// Name of the image.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// The archive is the other variant.
    #[error("{name}: this is the variant {found}, expected the one {expected}")]
    Variant {
        /// Name of the image.
        name: String,
        /// What it is.
        found: &'static str,
        /// What was wanted.
        expected: &'static str,
    },
    /// Another process fetches the same image.
    #[error("{}: another process is fetching this image", path.display())]
    Locked {
        /// The file both write.
        path: PathBuf,
    },
}

impl Error {
    /// The next step, when one is known.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Name { .. } => {
                Some("name a release, dstack-cloud-0.6.0, or an address of a .tar.gz".into())
            }
            Self::NoDigest { .. } => Some("give --sha256 with the hash its publisher names".into()),
            Self::Status { status: 404, .. } => Some(
                "there is no such release, or not of this variant: --bare-metal fetches the other".into(),
            ),
            Self::Status { .. } | Self::Unreachable { .. } => {
                Some("run the same command again: it goes on where it was cut".into())
            }
            Self::Digest { .. } => {
                Some("the download was removed; compare the hash with the publisher's".into())
            }
            Self::Variant { expected: UKI, .. } => {
                Some("a Confidential VM boots the archive NAME-uki.tar.gz".into())
            }
            Self::Variant { .. } => {
                Some("a VMM boots the archive NAME.tar.gz, which --bare-metal fetches".into())
            }
            Self::TooLarge { .. } | Self::Archive { .. } | Self::Locked { .. } => None,
        }
    }

    /// How a command ends with it.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Name { .. } | Self::NoDigest { .. } | Self::Locked { .. } => Exit::Usage,
            Self::Unreachable { .. } => Exit::NoAnswer,
            _ => Exit::Refused,
        }
    }
}

const UKI: &str = "with one bootable disk";
const BARE_METAL: &str = "with a kernel and a root file system";

/// What was fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// The image's directory.
    pub directory: PathBuf,
    /// SHA-256 of the archive, hex; absent when the image was there already.
    pub archive: Option<String>,
    /// The hash the image's own files give it, hex.
    pub hash: String,
}

/// What to fetch, and into which directory of images.
#[derive(Clone, Debug)]
pub struct Order {
    /// The image.
    pub source: Source,
    /// Which kind.
    pub variant: Variant,
    /// The hash its archive must have.
    pub sha256: Option<[u8; 32]>,
    /// Instead of GitHub.
    pub mirror: Option<Url>,
    /// The directory of images.
    pub into: PathBuf,
}

/// Fetches an image. One that is there already is checked and left alone.
///
/// Cancel safe: a later call goes on with what came so far.
///
/// # Errors
///
/// [`crate::Error::Pull`], or a file that cannot be written.
pub async fn fetch(order: &Order, progress: &mut dyn Progress) -> Result<Fetched, crate::Error> {
    let name = order.source.name();
    let url = order.source.url(order.variant, order.mirror.as_ref())?;
    if matches!(order.source, Source::Address(_)) && order.sha256.is_none() {
        return Err(Error::NoDigest { url: url.to_string() }.into());
    }
    let directory = order.into.join(&name);
    if directory.is_dir() {
        let hash = checked(&directory, &name, order.variant).await?;
        return Ok(Fetched { directory, archive: None, hash });
    }
    std::fs::create_dir_all(&order.into).map_err(crate::Error::file("create", &order.into))?;
    let part = order.into.join(format!(".{name}{}.part", order.variant.suffix()));
    let part = download::download(&url, &part, progress).await?;
    let path = part.path().to_owned();
    let digest = on_a_thread(move || sha256_of(&path).map_err(crate::Error::file("read", &path))).await?;
    let archive = hex::encode(digest);
    if let Some(expected) = order.sha256.filter(|expected| *expected != digest) {
        part.remove()?;
        let expected = hex::encode(expected);
        return Err(Error::Digest { url: url.to_string(), actual: archive, expected }.into());
    }
    let staged = order.into.join(format!(".{name}.unpacked"));
    let (from, to, image) = (part.path().to_owned(), staged.clone(), name.clone());
    on_a_thread(move || unpack::unpack(&from, &to, &image)).await?;
    let hash = match checked(&staged, &name, order.variant).await {
        Ok(hash) => hash,
        Err(error) => {
            std::fs::remove_dir_all(&staged).map_err(crate::Error::file("remove", &staged))?;
            return Err(error);
        }
    };
    std::fs::rename(&staged, &directory).map_err(crate::Error::file("rename", &staged))?;
    part.remove()?;
    Ok(Fetched { directory, archive: Some(archive), hash })
}

/// The image's hash, after it was found to be of the right variant.
async fn checked(directory: &Path, name: &str, variant: Variant) -> Result<String, crate::Error> {
    let (directory, name) = (directory.to_owned(), name.to_owned());
    on_a_thread(move || {
        let has = |file: &str| directory.join(file).is_file();
        match (variant, has("disk.raw"), has("metadata.json")) {
            (Variant::Uki, false, true) => {
                Err(Error::Variant { name, found: BARE_METAL, expected: UKI }.into())
            }
            (Variant::BareMetal, true, false) => {
                Err(Error::Variant { name, found: UKI, expected: BARE_METAL }.into())
            }
            (Variant::Uki, ..) => {
                OsImage::of_disk(&name, &directory.join("disk.raw")).map(|image| image.hash().to_owned())
            }
            (Variant::BareMetal, ..) => check_guest_image(&directory, &name),
        }
    })
    .await
}

/// Reading and hashing gigabytes keeps no other work waiting.
async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, crate::Error> + Send + 'static,
) -> Result<T, crate::Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_where_its_generation_is_published() {
        for (name, variant, expected) in [
            (
                "dstack-cloud-0.6.0",
                Variant::Uki,
                "Phala-Network/meta-dstack-cloud/releases/download/v0.6.0/dstack-cloud-0.6.0-uki.tar.gz",
            ),
            (
                "dstack-cloud-nvidia-0.6.1",
                Variant::Uki,
                "Phala-Network/meta-dstack-cloud/releases/download/v0.6.1/dstack-cloud-nvidia-0.6.1-uki.tar.gz",
            ),
            (
                "dstack-0.5.5",
                Variant::BareMetal,
                "Dstack-TEE/meta-dstack/releases/download/v0.5.5/dstack-0.5.5.tar.gz",
            ),
            (
                "dstack-0.6.0-rc1",
                Variant::Uki,
                "Dstack-TEE/dstack/releases/download/guest-os-v0.6.0-rc1/dstack-0.6.0-rc1-uki.tar.gz",
            ),
        ] {
            let source: Source = name.parse().unwrap();
            assert_eq!(source.url(variant, None).unwrap().as_str(), format!("https://github.com/{expected}"));
            assert_eq!(source.name(), name);
        }
        let url = "https://x.example/a/mine-1.0-uki.tar.gz";
        assert_eq!(url.parse::<Source>().unwrap().name(), "mine-1.0");
    }

    #[test]
    fn a_name_that_leaves_the_directory_of_images_is_none() {
        for text in ["", "..", "../x-1.0", "a/b-1.0", "dstack", "dstack-x", ".dstack-1.0", "a b-1"] {
            assert!(matches!(text.parse::<Source>(), Err(Error::Name { .. })), "{text}");
        }
        for text in ["https://x/", "https://x/y.zip", "https://x/%2e%2e.tar.gz", "https://x/.tar.gz"] {
            assert!(matches!(text.parse::<Source>(), Err(Error::Name { .. })), "{text}");
        }
    }
}
