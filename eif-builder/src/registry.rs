//! Container images from a registry, without a daemon.
//!
//! Blobs are downloaded into a temporary OCI layout, each checked against its digest, and unpacked from there.

use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use docker_credential::{CredentialRetrievalError, DockerCredential};
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference};
use tokio::io::AsyncWrite;

use crate::error::{Error, IoContext};
use crate::format::Arch;
use crate::oci::{ContainerImage, Descriptor, MAX_DOCUMENT_LEN, Manifest, blob_path, sha256};

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest wait for the next bytes.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest wait for a document.
const DOCUMENT_TIMEOUT: Duration = Duration::from_secs(120);
/// Longest wait for a layer; 64 GiB at 20 MB/s.
const LAYER_TIMEOUT: Duration = Duration::from_secs(3600);

const MEDIA_TYPES: [&str; 4] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

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
        let session = Session::new(reference)?;
        self.runtime.block_on(async {
            let (_, digest) = session.document(&session.reference).await?;
            Ok(format!("{}/{}@{digest}", session.reference.registry(), session.reference.repository()))
        })
    }

    /// Downloads an image into a temporary folder.
    ///
    /// # Errors
    /// See [`pull`].
    pub fn pull(&self, reference: &str, arch: Arch) -> Result<ContainerImage, Error> {
        let session = Session::new(reference)?;
        let folder = tempfile::tempdir().context("create", "a temporary folder")?;
        let blobs = folder.path().join("blobs/sha256");
        std::fs::create_dir_all(&blobs).context("create", &blobs)?;
        let descriptor = self.runtime.block_on(session.download(folder.path(), arch))?;
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
    client: Client,
    reference: Reference,
    auth: RegistryAuth,
}

impl Session {
    fn new(reference: &str) -> Result<Self, Error> {
        let parsed: Reference = reference.parse().map_err(|error| Error::input(reference, error))?;
        let registry = parsed.resolve_registry().to_owned();
        let host = registry.rsplit_once(':').map_or(registry.as_str(), |(host, _)| host);
        // As container engines do: a registry on this machine may speak plain HTTP. What it delivers is checked
        // against digests all the same.
        let protocol = if matches!(host, "localhost" | "127.0.0.1" | "[::1]") {
            ClientProtocol::HttpsExcept(vec![registry.clone()])
        } else {
            ClientProtocol::Https
        };
        let config = ClientConfig {
            protocol,
            connect_timeout: Some(CONNECT_TIMEOUT),
            read_timeout: Some(READ_TIMEOUT),
            ..ClientConfig::default()
        };
        let client = Client::try_from(config).map_err(|error| Error::Registry(error.to_string()))?;
        Ok(Self { client, auth: credentials(&registry)?, reference: parsed })
    }

    /// A manifest or index and its digest, compared with the one asked for.
    async fn document(&self, reference: &Reference) -> Result<(Vec<u8>, String), Error> {
        let request = self.client.pull_manifest_raw(reference, &self.auth, &MEDIA_TYPES);
        let (bytes, _) = in_time(DOCUMENT_TIMEOUT, reference, request).await?;
        if bytes.len() as u64 > MAX_DOCUMENT_LEN {
            let (actual, max) = (bytes.len() as u64, MAX_DOCUMENT_LEN);
            return Err(Error::Limit { object: reference.to_string(), unit: "bytes", actual, max });
        }
        let actual = format!("sha256:{}", sha256(&bytes));
        match reference.digest() {
            Some(expected) if expected != actual => {
                Err(Error::Digest { object: reference.to_string(), expected: expected.into(), actual })
            }
            _ => Ok((bytes.to_vec(), actual)),
        }
    }

    /// Downloads manifest, configuration and layers; returns the descriptor of the manifest.
    async fn download(&self, folder: &Path, arch: Arch) -> Result<Descriptor, Error> {
        let (mut bytes, mut digest) = self.document(&self.reference).await?;
        if let Some(chosen) = Manifest::parse(&bytes, &digest)?.platform_manifest(arch, &digest)? {
            (bytes, digest) = self.document(&self.reference.clone_with_digest(chosen.digest)).await?;
        }
        let manifest = Manifest::parse(&bytes, &digest)?;
        let path = blob_path(folder, &digest)?;
        std::fs::write(&path, &bytes).context("write", &path)?;
        for descriptor in manifest.blobs() {
            self.blob(folder, descriptor).await?;
        }
        Ok(Descriptor::new(digest, bytes.len() as u64))
    }

    async fn blob(&self, folder: &Path, descriptor: &Descriptor) -> Result<(), Error> {
        let path = blob_path(folder, &descriptor.digest)?;
        if path.exists() {
            return Ok(()); // layers may repeat
        }
        let file = std::fs::File::create_new(&path).context("create", &path)?;
        let writer = Limited { file, left: descriptor.size };
        let wire = oci_client::manifest::OciDescriptor {
            digest: descriptor.digest.clone(),
            size: i64::try_from(descriptor.size).unwrap_or(i64::MAX),
            ..Default::default()
        };
        in_time(LAYER_TIMEOUT, &self.reference, self.client.pull_blob(&self.reference, &wire, writer)).await
    }
}

async fn in_time<T>(
    limit: Duration,
    reference: &Reference,
    request: impl Future<Output = oci_client::errors::Result<T>>,
) -> Result<T, Error> {
    match tokio::time::timeout(limit, request).await {
        Err(_) => Err(Error::Timeout { object: reference.registry().into(), seconds: limit.as_secs() }),
        Ok(Err(error)) => Err(Error::Registry(format!("{reference}: {}", chain(&error)))),
        Ok(Ok(value)) => Ok(value),
    }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}

/// What the usual docker configuration has for a registry.
fn credentials(registry: &str) -> Result<RegistryAuth, Error> {
    // Docker Hub's entry is filed under its first address.
    let server = if registry == "index.docker.io" { "https://index.docker.io/v1/" } else { registry };
    match docker_credential::get_credential(server) {
        Ok(DockerCredential::UsernamePassword(user, password)) => Ok(RegistryAuth::Basic(user, password)),
        Ok(DockerCredential::IdentityToken(token)) => Ok(RegistryAuth::Bearer(token)),
        Err(
            CredentialRetrievalError::ConfigNotFound
            | CredentialRetrievalError::NoCredentialConfigured
            | CredentialRetrievalError::ConfigReadError,
        ) => Ok(RegistryAuth::Anonymous),
        Err(error) => Err(Error::Registry(format!("credentials for {registry}: {error}"))),
    }
}

/// Takes no more than was announced. Written from one task, a block at a time.
struct Limited {
    file: std::fs::File,
    left: u64,
}

impl AsyncWrite for Limited {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        let Some(left) = self.left.checked_sub(bytes.len() as u64) else {
            let error = std::io::Error::other("the registry sends more bytes than the manifest announces");
            return std::task::Poll::Ready(Err(error));
        };
        self.left = left;
        std::task::Poll::Ready(self.file.write_all(bytes).map(|()| bytes.len()))
    }

    fn poll_flush(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn poll_shutdown(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::task::Poll::Ready(Ok(()))
    }
}

async fn fetch_kms_ca(url: &str) -> Result<String, Error> {
    #[derive(serde::Deserialize)]
    struct Meta {
        ca_cert: String,
    }
    let failed = |error: reqwest::Error| Error::Registry(format!("{url}: {}", chain(&error)));
    let client = reqwest::Client::builder()
        .tls_danger_accept_invalid_certs(true)
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(READ_TIMEOUT)
        .build()
        .map_err(failed)?;
    let address = format!("{}/prpc/GetMeta?json", url.trim_end_matches('/'));
    let mut response = client
        .post(address)
        .body("{}")
        .send()
        .await
        .and_then(reqwest::Response::error_for_status)
        .map_err(failed)?;
    let mut body = Vec::new();
    while let Some(bytes) = response.chunk().await.map_err(failed)? {
        body.extend_from_slice(&bytes);
        if body.len() as u64 > MAX_DOCUMENT_LEN {
            let (actual, max) = (body.len() as u64, MAX_DOCUMENT_LEN);
            return Err(Error::Limit { object: url.into(), unit: "bytes", actual, max });
        }
    }
    let meta: Meta = serde_json::from_slice(&body).map_err(|error| Error::input(url, error))?;
    Ok(meta.ca_cert)
}
