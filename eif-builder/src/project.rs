//! The project file `keyferry.toml` and its lock file.
//!
//! Paths in a project are relative to its folder. The same project and lock file give the same hash on any
//! machine: everything that could change outside of them (a registry tag, the KMS's certificate) is pinned in the
//! lock file.

use std::path::{Path, PathBuf};

use kms_protocol::kms_file::KmsFile;
use serde::{Deserialize, Serialize};

use crate::agent_config::{AgentTable, KmsTable};
use crate::build::{Application, Build, CMDLINE_AARCH64, CMDLINE_X86_64, Layout, Overrides};
use crate::compress::Compression;
use crate::error::{Error, IoContext};
use crate::format::Arch;
use crate::metadata::{BuildMetadata, Metadata, kernel_from_config, rfc3339};
use crate::ramdisk::Init;

/// Name of the project file.
pub const PROJECT_FILE: &str = "keyferry.toml";
/// Name of the lock file beside it.
pub const LOCK_FILE: &str = "keyferry.lock";
/// What `eif-builder init` writes.
pub const TEMPLATE: &str = include_str!("project_template.toml");

/// `keyferry.toml`. Unknown keys are refused: a misspelt security option must not pass for a missing one.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProjectFile {
    /// Architecture.
    #[serde(default)]
    pub arch: ArchName,
    /// What runs.
    pub image: ImageTable,
    /// What boots.
    pub boot: BootTable,
    /// Where the keys come from; only with the agent as init.
    pub kms: Option<KmsTable>,
    /// What else the agent does; only with the agent as init.
    #[serde(default)]
    pub agent: AgentTable,
    /// Resources of the enclave. Not measured.
    #[serde(default)]
    pub run: RunTable,
}

/// Architecture, by name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub enum ArchName {
    /// 64-bit x86.
    #[default]
    #[serde(rename = "x86_64")]
    X86_64,
    /// 64-bit Arm.
    #[serde(rename = "aarch64")]
    Aarch64,
}

/// `[image]`: exactly one of the five sources, and how it is run.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ImageTable {
    /// Name for the metadata.
    pub name: Option<String>,
    /// Version for the metadata.
    pub version: Option<String>,
    /// A static binary.
    pub binary: Option<PathBuf>,
    /// A folder.
    pub directory: Option<PathBuf>,
    /// An OCI layout folder.
    pub oci_layout: Option<PathBuf>,
    /// The output of `docker save`.
    pub docker_archive: Option<PathBuf>,
    /// An image in a registry.
    pub registry: Option<String>,
    /// Which image of a layout or archive.
    pub reference: Option<String>,
    /// Instead of ENTRYPOINT.
    pub entrypoint: Option<Vec<String>>,
    /// Instead of CMD.
    pub cmd: Option<Vec<String>>,
    /// Added to ENV.
    pub env: Vec<String>,
    /// Instead of WORKDIR.
    pub workdir: Option<String>,
    /// Instead of USER.
    pub user: Option<String>,
    /// Lets file capabilities go.
    pub drop_capabilities: bool,
    /// How the ramdisk is packed.
    pub compression: CompressionName,
    /// What the ramdisk of a container image looks like.
    pub layout: LayoutName,
}

/// Layout, by name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LayoutName {
    /// Sorted.
    #[default]
    Sorted,
    /// As nitro-cli makes it.
    NitroCli,
}

impl From<LayoutName> for Layout {
    fn from(name: LayoutName) -> Self {
        match name {
            LayoutName::Sorted => Self::Sorted,
            LayoutName::NitroCli => Self::NitroCli,
        }
    }
}

/// Compression, by name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CompressionName {
    /// Not packed.
    #[default]
    None,
    /// gzip.
    Gzip,
    /// zstd.
    Zstd,
}

impl From<CompressionName> for Compression {
    fn from(name: CompressionName) -> Self {
        match name {
            CompressionName::None => Self::None,
            CompressionName::Gzip => Self::Gzip,
            CompressionName::Zstd => Self::Zstd,
        }
    }
}

/// `[boot]`: kernel and init.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootTable {
    /// Kernel file.
    pub kernel: PathBuf,
    /// Its configuration, for the metadata.
    pub kernel_config: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: Option<String>,
    /// What the kernel starts.
    pub init: InitName,
    /// The static agent, for `init = "agent"`.
    pub agent: Option<PathBuf>,
    /// The NSM driver for a kernel without it, for `init = "agent"`.
    pub nsm_ko: Option<PathBuf>,
    /// Folder with AWS's `init` and `nsm.ko`, for `init = "aws"`.
    pub blobs: Option<PathBuf>,
}

/// Init, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InitName {
    /// Keyferry's agent.
    Agent,
    /// AWS's init.
    Aws,
    /// The application is its own init.
    Application,
}

/// `[run]`: what the enclave is started with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunTable {
    /// Processors.
    pub cpus: u32,
    /// Memory in MiB; nitro-cli wants four times the image.
    pub memory_mib: u32,
}

impl Default for RunTable {
    fn default() -> Self {
        Self { cpus: 2, memory_mib: 512 }
    }
}

/// `keyferry.lock`: what was true outside when the project was locked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Lock {
    /// Digest that the registry reference stood for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<LockedImage>,
    /// The KMS's root CA.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kms_ca: Option<LockedCa>,
}

/// A registry reference and its digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedImage {
    /// As in the project.
    pub reference: String,
    /// The same with a digest.
    pub pinned: String,
}

/// A KMS and its root CA.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedCa {
    /// As in the project.
    pub url: String,
    /// PEM.
    pub certificate: String,
}

/// A project that was read.
#[derive(Debug)]
pub struct Project {
    /// Folder to which paths are relative.
    pub folder: PathBuf,
    /// The project file.
    pub file: ProjectFile,
    /// The lock file, empty when there is none.
    pub lock: Lock,
    /// What `[kms] file` names.
    pub kms_file: Option<KmsFile>,
}

impl Project {
    /// Reads a project file, or the one in a folder, and its lock file.
    ///
    /// # Errors
    /// When one of them cannot be read or parsed.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let path = if path.is_dir() { path.join(PROJECT_FILE) } else { path.to_owned() };
        let folder = path.parent().unwrap_or(Path::new("")).to_owned();
        let text = std::fs::read_to_string(&path).context("read", &path)?;
        let file = toml::from_str(&text).map_err(|error| Error::input(path.display(), error))?;
        let lock_path = path.with_file_name(LOCK_FILE);
        let lock = match std::fs::read_to_string(&lock_path) {
            Ok(text) => toml::from_str(&text).map_err(|error| Error::input(lock_path.display(), error))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Lock::default(),
            Err(error) => return Err(error).context("read", &lock_path),
        };
        let mut project = Self { folder, file, lock, kms_file: None };
        project.take_kms_file()?;
        Ok(project)
    }

    /// Architecture of the image.
    pub fn arch(&self) -> Arch {
        match self.file.arch {
            ArchName::X86_64 => Arch::X86_64,
            ArchName::Aarch64 => Arch::Aarch64,
        }
    }

    /// What the project says, resolved. `epoch` is SOURCE_DATE_EPOCH, for the metadata only.
    ///
    /// # Errors
    /// When something is missing, contradictory, or not pinned that has to be.
    pub fn build(&self, epoch: Option<i64>) -> Result<Build, Error> {
        let ImageTable { entrypoint, cmd, env, workdir, user, .. } = self.file.image.clone();
        let arch = self.arch();
        let default_cmdline = match arch {
            Arch::X86_64 => CMDLINE_X86_64,
            Arch::Aarch64 => CMDLINE_AARCH64,
        };
        Ok(Build {
            arch,
            kernel: self.path(&self.file.boot.kernel),
            cmdline: self.file.boot.cmdline.clone().unwrap_or_else(|| default_cmdline.into()),
            init: self.init()?,
            application: self.application()?,
            overrides: Overrides { entrypoint, cmd, env, workdir, user },
            compression: self.file.image.compression.into(),
            layout: self.file.image.layout.into(),
            metadata: self.metadata(epoch)?,
            signer: None,
            drop_capabilities: self.file.image.drop_capabilities,
        })
    }

    fn path(&self, path: &Path) -> PathBuf {
        self.folder.join(path)
    }

    fn application(&self) -> Result<Application, Error> {
        let ImageTable { binary, directory, oci_layout, docker_archive, registry, reference, .. } =
            &self.file.image;
        let sources = [
            binary.as_ref().map(|path| Application::Binary(self.path(path))),
            directory.as_ref().map(|path| Application::Directory(self.path(path))),
            oci_layout.as_ref().map(|path| Application::OciLayout(self.path(path), reference.clone())),
            docker_archive
                .as_ref()
                .map(|path| Application::DockerArchive(self.path(path), reference.clone())),
            registry.as_deref().map(|name| self.pinned(name)).transpose()?.map(Application::Registry),
        ];
        let mut sources = sources.into_iter().flatten();
        match (sources.next(), sources.next()) {
            (Some(source), None) => Ok(source),
            _ => Err(Error::input(
                "[image]",
                "needs exactly one of binary, directory, oci_layout, docker_archive and registry",
            )),
        }
    }

    /// A reference by digest: the project's own, or the locked one.
    fn pinned(&self, reference: &str) -> Result<String, Error> {
        if reference.contains("@sha256:") {
            return Ok(reference.to_owned());
        }
        match &self.lock.image {
            Some(locked) if locked.reference == reference => Ok(locked.pinned.clone()),
            _ => Err(Error::input(
                reference,
                format!(
                    "not pinned: a tag can move; run `eif-builder lock`, which writes its digest to {LOCK_FILE}"
                ),
            )),
        }
    }

    fn init(&self) -> Result<Init, Error> {
        let boot = &self.file.boot;
        if self.file.kms.is_some() && boot.init != InitName::Agent {
            return Err(Error::input("[kms]", "only the agent reads it; set init = \"agent\""));
        }
        match boot.init {
            InitName::Application => Ok(Init::Application),
            InitName::Aws => {
                let blobs = boot.blobs.as_deref().map_or_else(default_blobs, |path| self.path(path));
                Ok(aws_init(&blobs))
            }
            InitName::Agent => {
                let Some(binary) = &boot.agent else {
                    return Err(Error::input(
                        "[boot]",
                        "init = \"agent\" needs agent = \"path of a static enclave-agent\"",
                    ));
                };
                let nsm_ko = boot.nsm_ko.as_deref().map(|path| self.path(path));
                Ok(Init::Agent { binary: self.path(binary), nsm_ko, config: self.agent_config()? })
            }
        }
    }

    fn metadata(&self, epoch: Option<i64>) -> Result<Metadata, Error> {
        let boot = &self.file.boot;
        let (operating_system, kernel_version) = match &boot.kernel_config {
            Some(path) => {
                let path = self.path(path);
                kernel_from_config(&std::fs::read_to_string(&path).context("read", &path)?)?
            }
            None => ("OS".into(), "kernel".into()),
        };
        Ok(Metadata {
            image_name: self.file.image.name.clone().unwrap_or_else(|| "enclave".into()),
            image_version: self.file.image.version.clone().unwrap_or_else(|| "1.0".into()),
            build_metadata: BuildMetadata {
                build_time: rfc3339(epoch.unwrap_or(0))?,
                build_tool: env!("CARGO_PKG_NAME").into(),
                build_tool_version: env!("CARGO_PKG_VERSION").into(),
                operating_system,
                kernel_version,
            },
            docker_info: serde_json::Value::Null,
            custom_metadata: serde_json::Value::Null,
        })
    }
}

/// Where AWS's package puts its blobs.
fn default_blobs() -> PathBuf {
    PathBuf::from("/usr/share/nitro_enclaves/blobs")
}

/// AWS's init and, if it is there, the driver for kernels without one.
pub fn aws_init(blobs: &Path) -> Init {
    let nsm_ko = blobs.join("nsm.ko");
    Init::Aws { init: blobs.join("init"), nsm_ko: nsm_ko.exists().then_some(nsm_ko) }
}
