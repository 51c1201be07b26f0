//! Command lines.

use std::path::PathBuf;

use attestation::OsImageHash;
use clap::{Args, Subcommand, ValueEnum};

use crate::format::Arch;

/// What can be done with enclave images.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print the measurements of an image, or of the image that a project would give
    #[command(after_help = "\
Examples:
  eif-builder measure app.eif
  eif-builder measure . --json > registered.json
  eif-builder measure . --expect 0x5f3c… --reference registered.json   # exit code 3 when it is another image")]
    Measure(MeasureArgs),
    /// Build an image from a binary, a folder, a container image or a project
    #[command(after_help = "\
Examples:
  eif-builder build . --output app.eif                                 # keyferry.toml in this folder
  eif-builder build --binary init --kernel bzImage --output app.eif
  eif-builder build --image registry.example/app@sha256:… --init aws --output app.eif
  eif-builder build --docker-archive app.tar --init aws --layout nitro-cli --output app.eif")]
    Build(Box<BuildArgs>),
    /// Write a commented keyferry.toml
    Init(InitArgs),
    /// Pin what a project takes from the network (registry tag, KMS certificate) in keyferry.lock
    Lock(LockArgs),
    /// Put kernel, command line and ramdisks into an image (flags as in AWS's eif_build)
    #[command(after_help = "\
Examples:
  eif-builder pack --kernel bzImage --cmdline 'console=ttyS0' --ramdisk boot.cpio --ramdisk app.cpio --output app.eif")]
    Pack(Box<PackArgs>),
    /// Tell what is in an image
    Describe(ImageArgs),
    /// Check structure, checksum, signature and ramdisks of an image
    #[command(after_help = "\
Examples:
  eif-builder verify app.eif --certificate signer.pem")]
    Verify(VerifyArgs),
    /// Write the sections of an image into a folder
    Extract(ExtractArgs),
    /// Compare two images, file by file and register by register
    #[command(after_help = "\
Examples:
  eif-builder diff yesterday.eif today.eif")]
    Diff(DiffArgs),
    /// Sign an image, replacing a signature that it has
    #[command(after_help = "\
Examples:
  eif-builder sign app.eif --signing-certificate signer.pem --private-key signer.key

  # with a key that never leaves AWS KMS:
  eif-builder sign app.eif --signing-certificate signer.pem --prepare message
  aws kms sign --key-id alias/signer --signing-algorithm ECDSA_SHA_384 --message-type RAW \\
    --message fileb://message --query Signature --output text | base64 -d > signature
  eif-builder sign app.eif --signing-certificate signer.pem --signature signature")]
    Sign(SignArgs),
    /// Remove the signature of an image
    Strip(StripArgs),
}

/// Processor architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ArchArg {
    /// 64-bit x86
    #[value(name = "x86_64", alias = "amd64")]
    X86_64,
    /// 64-bit Arm
    #[value(name = "aarch64", alias = "arm64")]
    Aarch64,
}

impl From<ArchArg> for Arch {
    fn from(arch: ArchArg) -> Self {
        match arch {
            ArchArg::X86_64 => Self::X86_64,
            ArchArg::Aarch64 => Self::Aarch64,
        }
    }
}

/// `eif-builder measure`
#[derive(Debug, Args)]
pub struct MeasureArgs {
    /// An enclave image, or a project file (keyferry.toml) or the folder with one
    #[arg(value_name = "IMAGE|PROJECT")]
    pub input: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    /// End with exit code 3 unless this is the OS_IMAGE_HASH (0x and 64 hex digits)
    #[arg(long, value_name = "HASH", value_parser = parse_hash)]
    pub expect: Option<OsImageHash>,
    /// Registers to compare with when --expect fails: the output of `measure --json` or a provenance file
    #[arg(long, value_name = "FILE")]
    pub reference: Option<PathBuf>,
    /// Measure images that loaders refuse, and say what is wrong with them
    #[arg(long)]
    pub lenient: bool,
}

/// `eif-builder pack`
#[derive(Debug, Args)]
pub struct PackArgs {
    /// Kernel: a bzImage (x86_64) or an uncompressed Image (aarch64)
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Kernel configuration, from whose third line the metadata's system and kernel version are taken
    #[arg(long = "kernel_config", alias = "kernel-config", value_name = "FILE")]
    pub kernel_config: Option<PathBuf>,
    /// Kernel command line, stored as it is
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub cmdline: String,
    /// Ramdisk; can be given up to 29 times
    #[arg(long = "ramdisk", value_name = "FILE", required = true)]
    pub ramdisks: Vec<PathBuf>,
    /// Image to write
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
    /// Processor architecture
    #[arg(long, value_enum, default_value = "x86_64")]
    pub arch: ArchArg,
    /// Accept empty ramdisks, which no loader takes
    #[arg(long)]
    pub allow_empty_ramdisk: bool,
    /// What goes into the metadata section
    #[command(flatten)]
    pub metadata: MetadataArgs,
    /// Who signs
    #[command(flatten)]
    pub signer: SignerArgs,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

/// What an image runs.
#[derive(Debug, Clone, Default, Args)]
pub struct ApplicationArgs {
    /// Run a static binary
    #[arg(long, value_name = "FILE", group = "application")]
    pub binary: Option<PathBuf>,
    /// Run what is in a folder
    #[arg(long, value_name = "FOLDER", group = "application")]
    pub directory: Option<PathBuf>,
    /// Run a container image from an OCI layout folder
    #[arg(long, value_name = "FOLDER", group = "application")]
    pub oci_layout: Option<PathBuf>,
    /// Run a container image from the output of `docker save`
    #[arg(long, value_name = "FILE", group = "application")]
    pub docker_archive: Option<PathBuf>,
    /// Run a container image from a registry; give it by digest, or it can be another one tomorrow
    #[arg(long, value_name = "REFERENCE", group = "application")]
    pub image: Option<String>,
    /// Tag or digest in a layout or archive with several images
    #[arg(long, value_name = "NAME")]
    pub reference: Option<String>,
}

/// What the kernel starts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum InitArg {
    /// The application has an /init of its own
    #[default]
    Application,
    /// AWS's init from the blobs folder
    Aws,
    /// Keyferry's enclave-agent
    Agent,
}

/// How a ramdisk is packed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum CompressionArg {
    /// Not packed
    #[default]
    None,
    /// gzip
    Gzip,
    /// zstd
    Zstd,
}

impl From<CompressionArg> for crate::Compression {
    fn from(compression: CompressionArg) -> Self {
        match compression {
            CompressionArg::None => Self::None,
            CompressionArg::Gzip => Self::Gzip,
            CompressionArg::Zstd => Self::Zstd,
        }
    }
}

/// What the ramdisk of a container image looks like.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum LayoutArg {
    /// Sorted by path, constant times, ENTRYPOINT followed by CMD
    #[default]
    Sorted,
    /// Byte for byte what nitro-cli makes of the image, to rebuild the PCR2 of an existing one
    NitroCli,
}

impl From<LayoutArg> for crate::build::Layout {
    fn from(layout: LayoutArg) -> Self {
        match layout {
            LayoutArg::Sorted => Self::Sorted,
            LayoutArg::NitroCli => Self::NitroCli,
        }
    }
}

/// `eif-builder build`
#[derive(Debug, Args)]
pub struct BuildArgs {
    /// A project file (keyferry.toml) or the folder with one
    pub project: Option<PathBuf>,
    /// What the image runs
    #[command(flatten)]
    pub application: ApplicationArgs,
    /// Image to write
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
    /// Kernel [default: bzImage or Image in the blobs folder]
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Kernel configuration, for the metadata
    #[arg(long = "kernel_config", alias = "kernel-config", value_name = "FILE")]
    pub kernel_config: Option<PathBuf>,
    /// Kernel command line [default: nitro-cli's]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// Processor architecture
    #[arg(long, value_enum, default_value = "x86_64")]
    pub arch: ArchArg,
    /// What the kernel starts
    #[arg(long, value_enum, default_value = "application")]
    pub init: InitArg,
    /// Folder with AWS's bzImage, cmdline, init and nsm.ko
    #[arg(
        long,
        env = "NITRO_CLI_BLOBS",
        default_value = "/usr/share/nitro_enclaves/blobs",
        value_name = "FOLDER"
    )]
    pub blobs: PathBuf,
    /// Static enclave-agent, for --init agent
    #[arg(long, value_name = "FILE")]
    pub agent: Option<PathBuf>,
    /// Its measured configuration, /etc/keyferry/agent.toml in the image
    #[arg(long, value_name = "FILE")]
    pub agent_config: Option<PathBuf>,
    /// The NSM driver, for a kernel without it (--init agent; --init aws takes it from --blobs)
    #[arg(long, value_name = "FILE", requires = "agent")]
    pub nsm_ko: Option<PathBuf>,
    /// Instead of the container image's ENTRYPOINT; drops its CMD
    #[arg(long, value_name = "PROGRAM")]
    pub entrypoint: Option<String>,
    /// Added to the container image's ENV (NAME=value)
    #[arg(long, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Instead of the container image's WORKDIR
    #[arg(long, value_name = "FOLDER")]
    pub workdir: Option<String>,
    /// Instead of the container image's USER
    #[arg(long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// How the application's ramdisk is packed
    #[arg(long, value_enum, default_value = "none")]
    pub compression: CompressionArg,
    /// What the ramdisk of a container image looks like
    #[arg(long, value_enum, default_value = "sorted")]
    pub layout: LayoutArg,
    /// Leave out file capabilities, which a ramdisk cannot hold
    #[arg(long)]
    pub drop_capabilities: bool,
    /// What goes into the metadata section
    #[command(flatten)]
    pub metadata: MetadataArgs,
    /// Who signs
    #[command(flatten)]
    pub signer: SignerArgs,
    /// Where the provenance goes [default: the image's name and .provenance.json]
    #[arg(long, value_name = "FILE")]
    pub provenance: Option<PathBuf>,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    /// Instead of the container image's CMD
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// `eif-builder init`
#[derive(Debug, Args)]
pub struct InitArgs {
    /// Folder for the project file
    #[arg(default_value = ".")]
    pub folder: PathBuf,
}

/// `eif-builder lock`
#[derive(Debug, Args)]
pub struct LockArgs {
    /// A project file (keyferry.toml) or the folder with one
    #[arg(default_value = ".")]
    pub project: PathBuf,
    /// Pin this PEM certificate as the KMS's root CA instead of asking the KMS
    #[arg(long, value_name = "FILE")]
    pub kms_ca: Option<PathBuf>,
}

/// What goes into the metadata section, which nobody measures.
#[derive(Debug, Clone, Default, Args)]
pub struct MetadataArgs {
    /// Name of the image [default: name of the kernel file]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Version of the image [default: 1.0]
    #[arg(long = "version", id = "image_version", value_name = "VERSION")]
    pub version: Option<String>,
    /// JSON file with custom metadata
    #[arg(long, value_name = "FILE")]
    pub metadata: Option<PathBuf>,
    /// Time of the build, any text [default: SOURCE_DATE_EPOCH, else 1970-01-01T00:00:00+00:00]
    #[arg(long, value_name = "TIME")]
    pub build_time: Option<String>,
    /// Name of the build tool [default: eif-builder]
    #[arg(long, value_name = "NAME")]
    pub build_tool: Option<String>,
    /// Version of the build tool
    #[arg(long, value_name = "VERSION")]
    pub build_tool_version: Option<String>,
    /// Operating system of the image [default: OS]
    #[arg(long, value_name = "NAME")]
    pub img_os: Option<String>,
    /// Kernel version of the image [default: kernel]
    #[arg(long, value_name = "VERSION")]
    pub img_kernel: Option<String>,
    /// Seconds since the epoch for the build time
    #[arg(long, env = "SOURCE_DATE_EPOCH", hide = true, value_name = "SECONDS")]
    pub source_date_epoch: Option<i64>,
}

/// Key and certificate.
#[derive(Debug, Clone, Default, Args)]
pub struct SignerArgs {
    /// PEM certificate of the signer
    #[arg(long, value_name = "FILE", requires = "private_key")]
    pub signing_certificate: Option<PathBuf>,
    /// PEM private key of the signer (P-384 or P-256)
    #[arg(long, value_name = "FILE", requires = "signing_certificate")]
    pub private_key: Option<PathBuf>,
}

/// A command that reads one image.
#[derive(Debug, Args)]
pub struct ImageArgs {
    /// Enclave image
    pub image: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

/// `eif-builder verify`
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Enclave image
    pub image: PathBuf,
    /// PEM certificate that must have signed the image
    #[arg(long, value_name = "FILE")]
    pub certificate: Option<PathBuf>,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

/// `eif-builder extract`
#[derive(Debug, Args)]
pub struct ExtractArgs {
    /// Enclave image
    pub image: PathBuf,
    /// Folder to write to; must not exist
    #[arg(long, short, value_name = "FOLDER")]
    pub output: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

/// `eif-builder diff`
#[derive(Debug, Args)]
pub struct DiffArgs {
    /// First image
    pub before: PathBuf,
    /// Second image
    pub after: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

/// Where the signature comes from.
#[derive(Debug, Clone, Args)]
#[group(required = true, multiple = false)]
pub struct SigningKeyArgs {
    /// PEM private key of the signer (P-384 or P-256)
    #[arg(long, value_name = "FILE")]
    pub private_key: Option<PathBuf>,
    /// Write what a key elsewhere (AWS KMS, a hardware module) has to sign, and leave the image as it is
    #[arg(long, value_name = "FILE")]
    pub prepare: Option<PathBuf>,
    /// Attach the signature that such a key made, in DER or as r and s behind each other
    #[arg(long, value_name = "FILE")]
    pub signature: Option<PathBuf>,
}

/// `eif-builder sign`
#[derive(Debug, Args)]
pub struct SignArgs {
    /// Enclave image
    pub image: PathBuf,
    /// PEM certificate of the signer
    #[arg(long, value_name = "FILE")]
    pub signing_certificate: PathBuf,
    /// How to sign
    #[command(flatten)]
    pub key: SigningKeyArgs,
    /// Where to write [default: replace the image]
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

/// `eif-builder strip`
#[derive(Debug, Args)]
pub struct StripArgs {
    /// Enclave image
    pub image: PathBuf,
    /// Where to write [default: replace the image]
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

fn parse_hash(text: &str) -> Result<OsImageHash, String> {
    text.strip_prefix("0x")
        .unwrap_or(text)
        .parse()
        .map_err(|error: attestation::ParseError| error.to_string())
}
