//! From an application and a boot stack to a [`Recipe`].

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use crate::compress::Compression;
use crate::error::{Error, IoContext};
use crate::format::Arch;
use crate::layer::Lost;
use crate::linuxkit;
use crate::metadata::Metadata;
use crate::oci::{ContainerImage, Hashing, RunConfig, sha256};
use crate::provenance::Input;
use crate::ramdisk::{Init, Process, lines, resolve_user};
use crate::recipe::{Fill, Ramdisk, Recipe, check_kernel};
use crate::sign::Signer;
use crate::source;
use crate::tree::{Limits, Tree};

/// nitro-cli's command line for x86_64, without the newline.
pub const CMDLINE_X86_64: &str = "reboot=k panic=30 pci=off nomodules console=ttyS0 i8042.noaux i8042.nomux i8042.nopnp \
                                  i8042.dumbkbd random.trust_cpu=on";
/// nitro-cli's command line for aarch64, without the newline.
pub const CMDLINE_AARCH64: &str =
    "reboot=k panic=30 pci=off nomodules console=ttyS0 random.trust_cpu=on root=/dev/ram0";

/// What the image runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Application {
    /// One static binary.
    Binary(PathBuf),
    /// Everything below a folder.
    Directory(PathBuf),
    /// An OCI layout folder, and the name or digest of the image in it.
    OciLayout(PathBuf, Option<String>),
    /// The output of `docker save`, and the tag of the image in it.
    DockerArchive(PathBuf, Option<String>),
    /// An image in a registry.
    Registry(String),
}

/// What the ramdisk of a container image looks like.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Layout {
    /// Sorted by path, constant times, hard links kept, ENTRYPOINT followed by CMD.
    #[default]
    Sorted,
    /// What nitro-cli and the tools it calls make of the image, so that PCR2 of an existing one can be rebuilt: CMD
    /// displaces ENTRYPOINT, WORKDIR and USER are dropped.
    NitroCli,
}

/// Changes to what a container image says about running it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    /// Instead of ENTRYPOINT (which also drops CMD, as container engines do).
    pub entrypoint: Option<Vec<String>>,
    /// Instead of CMD.
    pub cmd: Option<Vec<String>>,
    /// Behind ENV; a later value wins.
    pub env: Vec<String>,
    /// Instead of WORKDIR.
    pub workdir: Option<String>,
    /// Instead of USER.
    pub user: Option<String>,
}

/// Everything that `eif-builder build` needs to know.
#[derive(Debug)]
pub struct Build {
    /// Architecture.
    pub arch: Arch,
    /// Kernel file.
    pub kernel: PathBuf,
    /// Kernel command line.
    pub cmdline: String,
    /// What the kernel starts.
    pub init: Init,
    /// What the image runs.
    pub application: Application,
    /// Changes to how it runs.
    pub overrides: Overrides,
    /// What its ramdisk looks like.
    pub layout: Layout,
    /// How the application's ramdisk is packed.
    pub compression: Compression,
    /// Metadata section.
    pub metadata: Metadata,
    /// Signs PCR0.
    pub signer: Option<Signer>,
    /// Lets file capabilities go, which a ramdisk cannot hold.
    pub drop_capabilities: bool,
}

/// A recipe and what is worth knowing about it.
#[derive(Debug)]
pub struct Prepared {
    /// The recipe.
    pub recipe: Recipe,
    /// What was left out or looks wrong.
    pub notes: Vec<String>,
    /// What went in, with digests.
    pub inputs: Vec<Input>,
}

/// Where a registry image is unpacked from: gets the reference and the architecture.
pub type Pull<'a> = &'a dyn Fn(&str, Arch) -> Result<ContainerImage, Error>;

impl Build {
    /// Reads the application and prepares the ramdisks. Nothing is written but temporary files.
    ///
    /// # Errors
    /// When an input is missing, for another architecture, or cannot be put into a ramdisk without changing what
    /// it does.
    pub fn prepare(self, pull: Pull<'_>) -> Result<Prepared, Error> {
        check_kernel(&self.kernel, self.arch)?;
        let mut lost = Lost::default();
        let mut inputs = vec![Input::file("kernel", &self.kernel)?];
        match &self.init {
            Init::Aws { init, nsm_ko } => {
                source::check_static(init, self.arch)?;
                inputs.push(Input::file("init", init)?);
                if let Some(nsm_ko) = nsm_ko {
                    inputs.push(Input::file("nsm.ko", nsm_ko)?);
                }
            }
            Init::Agent { binary, nsm_ko, config } => {
                source::check_static(binary, self.arch)?;
                inputs.push(Input::file("agent", binary)?);
                if let Some(nsm_ko) = nsm_ko {
                    inputs.push(Input::file("nsm.ko", nsm_ko)?);
                }
                inputs.push(Input::text("agent.toml", config));
            }
            Init::Application => {}
        }
        let (tree, run) = self.application(&mut lost, &mut inputs, pull)?;
        let mut notes = self.check_lost(&lost)?;
        let label = self.application.name();
        let fill = match self.layout {
            Layout::Sorted => {
                let process = process(&tree, run, &self.overrides)?;
                self.init.app_ramdisk(tree, &process)?
            }
            Layout::NitroCli => self.nitro_cli_ramdisk(tree, run, &mut notes)?,
        };
        if matches!(self.application, Application::Directory(_)) {
            // A folder has no digest of its own: that of its archive stands for it.
            let mut digest = HashingSink::default();
            fill(&mut digest)?;
            inputs.push(digest.input("application", &label));
        }
        let mut ramdisks = Vec::new();
        if let Some(fill) = self.init.boot_ramdisk() {
            ramdisks.push(Ramdisk::Archive {
                label: "boot ramdisk (init)".into(),
                compression: Compression::None,
                fill,
            });
        }
        ramdisks.push(Ramdisk::Archive {
            label: format!("application ramdisk ({label})"),
            compression: self.compression,
            fill,
        });
        let recipe = Recipe {
            arch: self.arch,
            kernel: self.kernel,
            cmdline: self.cmdline.into_bytes(),
            metadata: self.metadata,
            ramdisks,
            signer: self.signer,
            allow_empty_ramdisk: false,
        };
        Ok(Prepared { recipe, notes, inputs })
    }

    fn application(
        &self,
        lost: &mut Lost,
        inputs: &mut Vec<Input>,
        pull: Pull<'_>,
    ) -> Result<(Tree, RunConfig), Error> {
        let image = match &self.application {
            Application::Binary(path) => {
                inputs.push(Input::file("application", path)?);
                let name = if matches!(self.init, Init::Application) { "init" } else { "app" };
                let run = RunConfig { entrypoint: vec![format!("/{name}")], ..RunConfig::default() };
                return Ok((source::from_binary(path, name, self.arch)?, run));
            }
            Application::Directory(path) => {
                return Ok((source::from_directory(path, lost)?, RunConfig::default()));
            }
            Application::OciLayout(path, name) => {
                ContainerImage::from_layout(path, name.as_deref(), self.arch)?
            }
            Application::DockerArchive(path, name) => {
                ContainerImage::from_archive(path, name.as_deref(), self.arch)?
            }
            Application::Registry(reference) => pull(reference, self.arch)?,
        };
        let label = self.application.name();
        if let Some(manifest) = &image.manifest {
            inputs.push(Input::digest("manifest", &label, manifest));
        }
        inputs.push(Input::digest("config", &label, &image.config));
        let tree = image.unpack(Limits::default(), lost)?;
        Ok((tree, image.run))
    }

    fn nitro_cli_ramdisk(&self, tree: Tree, run: RunConfig, notes: &mut Vec<String>) -> Result<Fill, Error> {
        const LAYOUT: &str = "layout nitro-cli";
        if !matches!(self.init, Init::Aws { .. }) {
            return Err(Error::input(LAYOUT, "is what AWS's init reads; it goes with init aws"));
        }
        if matches!(self.application, Application::Binary(_) | Application::Directory(_)) {
            return Err(Error::input(LAYOUT, "is for container images"));
        }
        if self.compression != Compression::None {
            return Err(Error::input(LAYOUT, "is not packed; leave the compression out"));
        }
        let Overrides { entrypoint, cmd, env, workdir, user } = self.overrides.clone();
        let (workdir, user) = (workdir.unwrap_or(run.working_dir), user.unwrap_or(run.user));
        if !matches!(workdir.as_str(), "" | "/") {
            notes.push(format!("WORKDIR {workdir} is dropped, as nitro-cli does: everything starts in /"));
        }
        if !matches!(user.as_str(), "" | "0" | "root" | "0:0" | "root:root") {
            notes.push(format!("USER {user} is dropped, as nitro-cli does: everything runs as root"));
        }
        let (entrypoint, cmd) = (entrypoint.unwrap_or(run.entrypoint), cmd.unwrap_or(run.cmd));
        let command = if cmd.is_empty() { entrypoint } else { cmd };
        if command.is_empty() {
            return Err(Error::input(
                "the image",
                "has neither ENTRYPOINT nor CMD; give a command after `--`",
            ));
        }
        linuxkit::app_ramdisk(tree, lines(&command)?, lines(&merged(run.env, env))?)
    }

    fn check_lost(&self, lost: &Lost) -> Result<Vec<String>, Error> {
        let Lost { capabilities, attributes, sockets } = lost;
        let list =
            |paths: &std::collections::BTreeSet<String>| paths.iter().cloned().collect::<Vec<_>>().join(", ");
        let mut notes = Vec::new();
        if !capabilities.is_empty() {
            if !self.drop_capabilities {
                let reason = "have file capabilities, which a ramdisk cannot hold; --drop-capabilities leaves them out";
                return Err(Error::input(list(capabilities), reason));
            }
            notes.push(format!("file capabilities left out: {}", list(capabilities)));
        }
        if !attributes.is_empty() {
            notes.push(format!("extended attributes left out: {}", list(attributes)));
        }
        if !sockets.is_empty() {
            notes.push(format!("sockets left out: {}", list(sockets)));
        }
        if self.cmdline.ends_with(['\n', ' ']) {
            notes.push("the kernel command line ends in white space, which is measured".into());
        }
        Ok(notes)
    }
}

impl Application {
    /// A name without the host's folders in it.
    fn name(&self) -> String {
        let file = |path: &Path| path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        match self {
            Self::Binary(path) | Self::Directory(path) => file(path),
            Self::OciLayout(path, name) | Self::DockerArchive(path, name) => {
                name.clone().unwrap_or_else(|| file(path))
            }
            Self::Registry(reference) => reference.clone(),
        }
    }
}

/// What is started: ENTRYPOINT followed by CMD, both replaceable.
fn process(tree: &Tree, run: RunConfig, overrides: &Overrides) -> Result<Process, Error> {
    let Overrides { entrypoint, cmd, env, workdir, user } = overrides.clone();
    let default_cmd = if entrypoint.is_some() { Vec::new() } else { run.cmd };
    let mut args = entrypoint.unwrap_or(run.entrypoint);
    args.extend(cmd.unwrap_or(default_cmd));
    let (uid, gid) = resolve_user(tree, &user.unwrap_or(run.user))?;
    let cwd = workdir.unwrap_or(run.working_dir);
    let cwd = if cwd.is_empty() { "/".to_owned() } else { cwd };
    Ok(Process { args, env: merged(run.env, env), cwd, uid, gid })
}

/// The image's environment with changes; a later value wins.
fn merged(mut env: Vec<String>, newer: Vec<String>) -> Vec<String> {
    let name = |pair: &str| pair.split('=').next().unwrap_or_default().to_owned();
    env.retain(|pair| !newer.iter().any(|newer| name(newer) == name(pair)));
    env.extend(newer);
    env
}

/// Digests what is written to it.
struct HashingSink {
    context: aws_lc_rs::digest::Context,
    len: u64,
}

impl Default for HashingSink {
    fn default() -> Self {
        Self { context: aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256), len: 0 }
    }
}

impl HashingSink {
    fn input(self, role: &str, name: &str) -> Input {
        Input {
            role: role.into(),
            name: name.into(),
            sha256: hex::encode(self.context.finish()),
            size: Some(self.len),
        }
    }
}

impl Write for HashingSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.context.update(bytes);
        self.len += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Input {
    fn file(role: &str, path: &Path) -> Result<Self, Error> {
        let file = File::open(path).context("open", path)?;
        let size = file.metadata().context("read", path)?.len();
        let sha256 = Hashing::new(file.take(u64::MAX)).finish().context("read", path)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { role: role.into(), name, sha256, size: Some(size) })
    }

    fn text(role: &str, text: &str) -> Self {
        let size = Some(text.len() as u64);
        Self { role: role.into(), name: role.into(), sha256: sha256(text.as_bytes()), size }
    }

    fn digest(role: &str, name: &str, digest: &str) -> Self {
        let sha256 = digest.strip_prefix("sha256:").unwrap_or(digest).to_owned();
        Self { role: role.into(), name: name.into(), sha256, size: None }
    }
}
