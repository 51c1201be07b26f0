//! Fetches OS images: the right variant, whole, and with its digest shown.

use std::fs::{self, File};
use std::io::{self, Read, Write as _};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use flate2::read::GzDecoder;
use reqwest::Url;
use sha2::{Digest as _, Sha256};
use tokio::time::timeout;

use crate::Error;
use crate::project::OsImage;

/// Largest archive, and largest image unpacked. Images of 0.6.0 are some 300 MiB and 2 GiB.
const LONGEST_ARCHIVE: u64 = 8 << 30;
const LONGEST_IMAGE: u64 = 32 << 30;
/// A server that sends nothing for so long is gone.
const SILENCE: Duration = Duration::from_secs(60);
const CONNECT: Duration = Duration::from_secs(20);
const REDIRECTS: usize = 5;
/// What ends the name of an archive for Confidential VMs.
const UKI_ARCHIVE: &str = "-uki.tar.gz";

/// Where an image comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The image's name, and that of its directory.
    pub image: String,
    /// Address of its archive.
    pub url: Url,
    /// Whether the address is one of a project's releases, which the name alone leads to.
    pub is_release: bool,
}

impl Source {
    /// The archive of an image by its name, `dstack-cloud-0.6.0`, `dstack-0.6.1`, or by its address.
    ///
    /// Source of the addresses: `pull` of dstack-cloud, old and new.
    ///
    /// # Errors
    ///
    /// [`Error::OsImage`] when it is neither.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let wrong = |problem: &str| Error::OsImage { image: text.to_owned(), problem: problem.to_owned() };
        if text.contains("://") {
            let url = Url::parse(text).map_err(|error| wrong(&error.to_string()))?;
            let name = url.path_segments().and_then(|mut it| it.next_back()).unwrap_or_default();
            let image = name.strip_suffix(UKI_ARCHIVE).or_else(|| name.strip_suffix(".tar.gz"));
            let image = image.filter(|it| is_name(it)).ok_or_else(|| wrong("is no address of a .tar.gz"))?;
            let image = image.to_owned();
            return Ok(Self { image, url, is_release: false });
        }
        let version = text.find(|it: char| it.is_ascii_digit()).map(|at| &text[at..]);
        let version = version.filter(|_| is_name(text) && text.starts_with("dstack-"));
        let version =
            version.ok_or_else(|| wrong("is no name such as dstack-cloud-0.6.0, and no address"))?;
        let mut numbers = version.split(['.', '-']).map(|it| it.parse::<u32>().unwrap_or(0));
        let number = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        let (project, tag) = match (text.starts_with("dstack-cloud-"), number >= (0, 6)) {
            (true, _) => ("Phala-Network/meta-dstack-cloud", format!("v{version}")),
            (false, false) => ("Dstack-TEE/meta-dstack", format!("v{version}")),
            (false, true) => ("Dstack-TEE/dstack", format!("guest-os-v{version}")),
        };
        let url = format!("https://github.com/{project}/releases/download/{tag}/{text}{UKI_ARCHIVE}");
        let url = Url::parse(&url).map_err(|error| wrong(&error.to_string()))?;
        Ok(Self { image: text.to_owned(), url, is_release: true })
    }
}

fn is_name(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    !text.is_empty() && text.len() <= 100 && !text.starts_with('.') && text.bytes().all(plain)
}

/// An image that was fetched.
#[derive(Debug)]
pub struct Pulled {
    /// Where it is.
    pub directory: PathBuf,
    /// SHA-256 of the archive.
    pub archive_sha256: [u8; 32],
    /// Hash of the image by its own files, hex.
    pub os_image_hash: String,
}

/// Fetches an image into a directory below `images`, whole or not at all.
///
/// # Errors
///
/// [`Error::OsImage`] when there is no such archive, it is not the one of `sha256`, or its content is not that of an image
/// for Confidential VMs.
pub async fn pull(
    source: &Source,
    sha256: Option<[u8; 32]>,
    images: &Path,
    progress: impl FnMut(u64, Option<u64>),
) -> Result<Pulled, Error> {
    let fail = |problem: String| Error::OsImage { image: source.image.clone(), problem };
    let directory = images.join(&source.image);
    if directory.exists() {
        return Err(fail(format!("{} is there already", directory.display())));
    }
    fs::create_dir_all(images).map_err(Error::file("create", images))?;
    let mut archive = tempfile::tempfile_in(images).map_err(Error::file("write to", images))?;
    let actual = download(source, &mut archive, &fail, progress).await?;
    if let Some(expected) = sha256.filter(|expected| *expected != actual) {
        let what = format!("{}.tar.gz", source.image);
        return Err(Error::Digest { what, actual: hex::encode(actual), expected: hex::encode(expected) });
    }
    let (image, images) = (source.image.clone(), images.to_owned());
    let unpacked = tokio::task::spawn_blocking(move || unpack(archive, &image, &images));
    let os_image_hash = unpacked.await.map_err(|error| fail(error.to_string()))??;
    Ok(Pulled { directory, archive_sha256: actual, os_image_hash })
}

async fn download(
    source: &Source,
    archive: &mut File,
    fail: &(dyn Fn(String) -> Error + Sync),
    mut progress: impl FnMut(u64, Option<u64>),
) -> Result<[u8; 32], Error> {
    let client = reqwest::Client::builder()
        .connect_timeout(CONNECT)
        .read_timeout(SILENCE)
        .redirect(reqwest::redirect::Policy::limited(REDIRECTS))
        .https_only(source.url.scheme() == "https")
        .user_agent(concat!("keyferry/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(|error| fail(error.to_string()))?;
    let shown = &source.url;
    let answer = timeout(SILENCE, client.get(source.url.clone()).send()).await;
    let answer = answer.map_err(|_| fail(format!("{shown}: no answer within {} s", SILENCE.as_secs())))?;
    let mut answer = answer.map_err(|error| fail(format!("{shown}: {}", chain(&error))))?;
    if !answer.status().is_success() {
        return Err(fail(format!("{shown}: answered {}", answer.status())));
    }
    let total = answer.content_length();
    let (mut hash, mut length) = (Sha256::new(), 0_u64);
    loop {
        let chunk = answer.chunk().await.map_err(|error| fail(format!("{shown}: {}", chain(&error))))?;
        let Some(chunk) = chunk else { break };
        length += chunk.len() as u64;
        if length > LONGEST_ARCHIVE {
            return Err(fail(format!("{shown}: longer than {LONGEST_ARCHIVE} bytes")));
        }
        hash.update(&chunk);
        archive.write_all(&chunk).map_err(|error| fail(error.to_string()))?;
        progress(length, total);
    }
    Ok(hash.finalize().into())
}

/// Unpacks beside the place where the image goes, looks at it as a deployment will, and moves it there.
fn unpack(mut archive: File, image: &str, images: &Path) -> Result<String, Error> {
    let fail = |problem: String| Error::OsImage { image: image.to_owned(), problem };
    io::Seek::rewind(&mut archive).map_err(|error| fail(error.to_string()))?;
    let staging = tempfile::Builder::new().prefix(".pull-").tempdir_in(images);
    let staging = staging.map_err(Error::file("write to", images))?;
    let place = staging.path().join(image);
    fs::create_dir(&place).map_err(Error::file("create", &place))?;
    let mut left = LONGEST_IMAGE;
    let mut reader = tar::Archive::new(GzDecoder::new(archive));
    let entries = reader.entries().map_err(|error| fail(format!("the archive cannot be read: {error}")))?;
    for entry in entries {
        let mut entry = entry.map_err(|error| fail(format!("the archive cannot be read: {error}")))?;
        if entry.header().entry_type().is_dir() {
            continue;
        }
        let path = entry.path().map_err(|error| fail(error.to_string()))?.into_owned();
        let name = file_name(&path, image).filter(|_| entry.header().entry_type().is_file());
        let name =
            name.ok_or_else(|| fail(format!("the archive holds {}, expected files only", path.display())))?;
        let target = place.join(name);
        let mut file = File::create_new(&target).map_err(Error::file("create", &target))?;
        let copied = io::copy(&mut (&mut entry).take(left + 1), &mut file);
        let copied = copied.map_err(|error| fail(format!("the archive cannot be read: {error}")))?;
        left = left.checked_sub(copied).ok_or_else(|| fail(format!("longer than {LONGEST_IMAGE} bytes")))?;
    }
    if !place.join("disk.raw").exists() {
        return Err(fail(format!(
            "the archive has no disk.raw: it is the variant for bare metal; the one for Confidential VMs ends in {UKI_ARCHIVE}"
        )));
    }
    let hash = OsImage::find(image, &[staging.path().to_owned()])?.hash().to_owned();
    let target = images.join(image);
    fs::rename(&place, &target).map_err(Error::file("create", &target))?;
    Ok(hash)
}

/// The name of a file at the archive's root, or in a folder there with the image's name.
fn file_name<'a>(path: &'a Path, image: &str) -> Option<&'a str> {
    let mut names = path.components().filter(|it| *it != Component::CurDir).map(|it| match it {
        Component::Normal(name) => name.to_str(),
        _ => None,
    });
    let first = names.next()??;
    let name = match (names.next(), names.next()) {
        (None, _) => first,
        (Some(Some(second)), None) if first == image || first.strip_suffix("-uki") == Some(image) => second,
        _ => return None,
    };
    is_name(name).then_some(name)
}

fn chain(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_to_their_releases() {
        for (name, url) in [
            (
                "dstack-cloud-0.6.0",
                "https://github.com/Phala-Network/meta-dstack-cloud/releases/download/v0.6.0/dstack-cloud-0.6.0-uki.tar.gz",
            ),
            (
                "dstack-cloud-nvidia-0.6.0",
                "https://github.com/Phala-Network/meta-dstack-cloud/releases/download/v0.6.0/dstack-cloud-nvidia-0.6.0-uki.tar.gz",
            ),
            (
                "dstack-0.5.4",
                "https://github.com/Dstack-TEE/meta-dstack/releases/download/v0.5.4/dstack-0.5.4-uki.tar.gz",
            ),
            (
                "dstack-dev-0.6.1-rc1",
                "https://github.com/Dstack-TEE/dstack/releases/download/guest-os-v0.6.1-rc1/dstack-dev-0.6.1-rc1-uki.tar.gz",
            ),
        ] {
            let source = Source::parse(name).unwrap();
            assert_eq!((source.image.as_str(), source.url.as_str(), source.is_release), (name, url, true));
        }
        let source = Source::parse("https://example.com/a/dstack-0.6.0-uki.tar.gz?x=1").unwrap();
        assert_eq!((source.image.as_str(), source.is_release), ("dstack-0.6.0", false));
        for text in
            ["", "ubuntu", "dstack-", "../dstack-0.6.0", "https://example.com/", "https://example.com/a.zip"]
        {
            assert!(Source::parse(text).is_err(), "{text:?}");
        }
    }

    fn archive(files: &[(&str, &[u8])]) -> File {
        let mut builder = tar::Builder::new(flate2::write::GzEncoder::new(
            tempfile::tempfile().unwrap(),
            flate2::Compression::fast(),
        ));
        for (name, bytes) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            // The safe way refuses the paths that a hostile archive has.
            let field = &mut header.as_gnu_mut().unwrap().name;
            field[..name.len()].copy_from_slice(name.as_bytes());
            header.set_cksum();
            builder.append(&header, *bytes).unwrap();
        }
        builder.into_inner().unwrap().finish().unwrap()
    }

    fn unpacked(files: &[(&str, &[u8])]) -> (tempfile::TempDir, Result<String, Error>) {
        let images = tempfile::tempdir().unwrap();
        let result = unpack(archive(files), "dstack-0.6.0", images.path());
        (images, result)
    }

    #[test]
    fn an_image_is_there_whole_or_not_at_all() {
        let hash = "ab".repeat(32);
        for prefix in ["", "./", "dstack-0.6.0/", "./dstack-0.6.0-uki/"] {
            let names = ["disk.raw", "auth_hash.txt"].map(|name| format!("{prefix}{name}"));
            let (images, result) = unpacked(&[(&names[0], b"disk"), (&names[1], hash.as_bytes())]);
            assert_eq!(result.unwrap(), hash, "{prefix}");
            assert_eq!(fs::read(images.path().join("dstack-0.6.0/disk.raw")).unwrap(), b"disk");
            assert_eq!(fs::read_dir(images.path()).unwrap().count(), 1, "nothing else is left");
        }
        for (what, files, problem) in [
            (
                "bare metal",
                &[("bzImage", &b"k"[..]), ("metadata.json", b"{}")][..],
                "the variant for bare metal",
            ),
            ("no hash", &[("disk.raw", b"d")], "neither digest.txt nor auth_hash.txt"),
            (
                "a wrong digest",
                &[
                    ("disk.raw", b"d"),
                    ("digest.txt", hash.as_bytes()),
                    ("sha256sum.txt", b"x"),
                    ("measurement.gcp.cbor", b"x"),
                ],
                "digest.txt says",
            ),
            ("a way out", &[("../evil", b"x")], "expected files only"),
            ("an absolute path", &[("/etc/evil", b"x")], "expected files only"),
            ("a deep path", &[("a/b/disk.raw", b"x")], "expected files only"),
            ("a file twice", &[("disk.raw", b"x"), ("./disk.raw", b"y")], "cannot create"),
        ] {
            let (images, result) = unpacked(files);
            let error = result.expect_err(what).to_string();
            assert!(error.contains(problem), "{what}: {error}");
            assert_eq!(fs::read_dir(images.path()).unwrap().count(), 0, "{what}");
        }
    }

    #[test]
    fn a_cut_archive_is_no_image() {
        let mut whole = Vec::new();
        let mut file = archive(&[("disk.raw", &[7; 5000]), ("auth_hash.txt", "ab".repeat(32).as_bytes())]);
        io::Seek::rewind(&mut file).unwrap();
        file.read_to_end(&mut whole).unwrap();
        for length in 0..whole.len() - 8 {
            let images = tempfile::tempdir().unwrap();
            let mut cut = tempfile::tempfile().unwrap();
            cut.write_all(&whole[..length]).unwrap();
            assert!(unpack(cut, "dstack-0.6.0", images.path()).is_err(), "{length} of {}", whole.len());
        }
    }
}
