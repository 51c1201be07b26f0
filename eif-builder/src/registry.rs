//! Container images from a registry, without a daemon.
//!
//! Blobs are downloaded into a temporary OCI layout and unpacked from there, each checked against its digest.

use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use oci_spec::distribution::Reference;

use crate::credentials::Credentials;
use crate::distribution::{READ_TIMEOUT, Repository, bounded, client, failed};
use crate::error::{Error, IoContext};
use crate::format::Arch;
use crate::oci::{ContainerImage, Descriptor, MAX_DOCUMENT_LEN, Manifest, blob_path, sha256};
use crate::scratch::Scratch;

/// Longest wait for a document.
const DOCUMENT_TIMEOUT: Duration = Duration::from_secs(120);
/// Longest wait for a layer; 64 GiB at 20 MB/s.
const LAYER_TIMEOUT: Duration = Duration::from_secs(3600);

/// Downloads an image into a temporary folder.
///
/// # Errors
/// When the registry does not answer in time, refuses, or delivers something else than it announced.
pub fn pull(reference: &str, arch: Arch) -> Result<ContainerImage, Error> {
    Registry::new()?.pull(reference, arch)
}

/// A client for registries.
pub struct Registry {
    runtime: tokio::runtime::Runtime,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").finish_non_exhaustive()
    }
}

impl Registry {
    /// Prepares a client; nothing is sent yet.
    ///
    /// # Errors
    /// When the operating system refuses what an event loop needs.
    pub fn new() -> Result<Self, Error> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("start", "the network event loop")?;
        Ok(Self { runtime })
    }

    /// The reference with the digest that it stands for now.
    ///
    /// # Errors
    /// See [`pull`].
    pub fn pin(&self, reference: &str) -> Result<String, Error> {
        self.runtime.block_on(async {
            let mut session = Session::open(reference).await?;
            let (_, digest) = session.named_document().await?;
            Ok(format!("{}/{}@{digest}", session.reference.registry(), session.reference.repository()))
        })
    }

    /// Downloads an image into a temporary folder.
    ///
    /// # Errors
    /// See [`pull`].
    pub fn pull(&self, reference: &str, arch: Arch) -> Result<ContainerImage, Error> {
        let folder = Scratch::folder()?;
        let blobs = folder.path().join("blobs/sha256");
        std::fs::create_dir_all(&blobs).context("create", &blobs)?;
        let descriptor = self
            .runtime
            .block_on(async { Session::open(reference).await?.download(folder.path(), arch).await })?;
        let mut image = ContainerImage::from_blobs(folder.path(), descriptor, arch, 0)?;
        image.keep_folder(folder);
        Ok(image)
    }

    /// The root CA that a KMS names as its own.
    ///
    /// The KMS's certificate cannot be checked here: it is signed by the very CA that is asked for. What comes
    /// back is pinned in the lock file and has to be compared by a person once.
    ///
    /// # Errors
    /// When the KMS does not answer in time, or not with a certificate.
    pub fn fetch_kms_ca(&self, url: &str) -> Result<String, Error> {
        self.runtime.block_on(fetch_kms_ca(url))
    }
}

/// One image in one registry.
struct Session {
    repository: Repository,
    reference: Reference,
}

impl Session {
    async fn open(reference: &str) -> Result<Self, Error> {
        let parsed: Reference = reference.parse().map_err(|error| Error::input(reference, error))?;
        let registry = parsed.resolve_registry();
        let credentials = Credentials::for_registry(registry)?;
        let repository = Repository::open(registry, parsed.repository(), credentials).await?;
        Ok(Self { repository, reference: parsed })
    }

    /// The manifest or index that the reference names, and its digest. A digest in the reference must be met.
    async fn named_document(&mut self) -> Result<(Vec<u8>, String), Error> {
        match self.reference.digest().map(str::to_owned) {
            Some(digest) => self.pinned_document(&digest).await,
            None => {
                let tag = self.reference.tag().unwrap_or("latest").to_owned();
                let bytes = self.document(&tag).await?;
                let digest = format!("sha256:{}", sha256(&bytes));
                Ok((bytes, digest))
            }
        }
    }

    async fn pinned_document(&mut self, expected: &str) -> Result<(Vec<u8>, String), Error> {
        let bytes = self.document(expected).await?;
        let actual = format!("sha256:{}", sha256(&bytes));
        if actual != expected {
            let object = self.reference.to_string();
            return Err(Error::Digest { object, expected: expected.to_owned(), actual });
        }
        Ok((bytes, actual))
    }

    async fn document(&mut self, reference: &str) -> Result<Vec<u8>, Error> {
        let registry = self.reference.registry().to_owned();
        in_time(DOCUMENT_TIMEOUT, &registry, self.repository.document(reference)).await
    }

    /// Downloads manifest, configuration and layers; returns the descriptor of the manifest.
    async fn download(&mut self, folder: &Path, arch: Arch) -> Result<Descriptor, Error> {
        let (mut bytes, mut digest) = self.named_document().await?;
        if let Some(chosen) = Manifest::parse(&bytes, &digest)?.platform_manifest(arch, &digest)? {
            (bytes, digest) = self.pinned_document(&chosen.digest).await?;
        }
        let manifest = Manifest::parse(&bytes, &digest)?;
        let path = blob_path(folder, &digest)?;
        std::fs::write(&path, &bytes).context("write", &path)?;
        for descriptor in manifest.blobs() {
            self.blob(folder, descriptor).await?;
        }
        Ok(Descriptor::new(digest, bytes.len() as u64))
    }

    /// Downloads one blob. Its digest is checked where it is read, its length here: the disk is finite.
    async fn blob(&mut self, folder: &Path, descriptor: &Descriptor) -> Result<(), Error> {
        let Descriptor { digest, size, .. } = descriptor;
        let path = blob_path(folder, digest)?;
        if path.exists() {
            return Ok(()); // layers may repeat
        }
        let mut file = std::fs::File::create_new(&path).context("create", &path)?;
        let mut received = 0;
        let take = |bytes: &[u8]| {
            received += bytes.len() as u64;
            if received > *size {
                let (object, unit) = (format!("blob {digest}"), "bytes");
                return Err(Error::Limit { object, unit, actual: received, max: *size });
            }
            file.write_all(bytes).context("write", &path)
        };
        in_time(LAYER_TIMEOUT, self.reference.registry(), self.repository.blob(digest, take)).await?;
        if received < *size {
            return Err(Error::Registry(format!(
                "blob {digest} has {received} bytes, the manifest says {size}"
            )));
        }
        Ok(())
    }
}

async fn in_time<T>(
    limit: Duration,
    registry: &str,
    request: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let late = || Error::Timeout { object: registry.to_owned(), seconds: limit.as_secs() };
    tokio::time::timeout(limit, request).await.map_err(|_| late())?
}

async fn fetch_kms_ca(url: &str) -> Result<String, Error> {
    #[derive(serde::Deserialize)]
    struct Meta {
        ca_cert: String,
    }
    let client = client()
        .tls_danger_accept_invalid_certs(true)
        .timeout(READ_TIMEOUT)
        .build()
        .map_err(|error| failed(url, &error))?;
    let address = format!("{}/prpc/GetMeta?json", url.trim_end_matches('/'));
    let response = client
        .post(address)
        .body("{}")
        .send()
        .await
        .and_then(reqwest::Response::error_for_status)
        .map_err(|error| failed(url, &error))?;
    let body = bounded(response, MAX_DOCUMENT_LEN, url).await?;
    let meta: Meta = serde_json::from_slice(&body).map_err(|error| Error::input(url, error))?;
    Ok(meta.ca_cert)
}
