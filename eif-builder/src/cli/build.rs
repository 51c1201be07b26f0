//! `eif-builder build`, `init` and `lock`

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::pack::{metadata, signer};
use super::{ApplicationArgs, BuildArgs, InitArg, InitArgs, Io, LockArgs, report};
use crate::build::{Application, Build, CMDLINE_AARCH64, CMDLINE_X86_64, Overrides, Prepared};
use crate::error::{Error, IoContext};
use crate::format::Arch;
use crate::oci::Hashing;
use crate::project::{LOCK_FILE, LockedCa, LockedImage, PROJECT_FILE, Project, TEMPLATE, aws_init};
use crate::provenance::{Input, document};
use crate::ramdisk::Init;
use crate::registry::{Registry, pull};

pub(super) fn run(args: &BuildArgs, io: &mut Io<'_>) -> Result<(), Error> {
    let prepared = prepare(args)?;
    for note in &prepared.notes {
        writeln!(io.err, "warning: {note}").context("write", "a warning")?;
    }
    let assembled = prepared.recipe.write(&args.output)?;
    let provenance = provenance_path(&args.output, args.provenance.as_deref());
    let file = File::open(&args.output).context("open", &args.output)?;
    let image = Input {
        role: "image".into(),
        name: args.output.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        sha256: Hashing::new(file).finish().context("read", &args.output)?,
        size: Some(assembled.len),
    };
    let text = format!("{:#}\n", document(&image, &prepared.inputs, &assembled.registers));
    std::fs::write(&provenance, text).context("write", &provenance)?;
    report::print(io, &assembled.registers, args.json)
}

fn provenance_path(output: &Path, given: Option<&Path>) -> PathBuf {
    given.map_or_else(
        || {
            let mut name = output.as_os_str().to_owned();
            name.push(".provenance.json");
            name.into()
        },
        Path::to_owned,
    )
}

fn prepare(args: &BuildArgs) -> Result<Prepared, Error> {
    let mut build = match (&args.project, application(&args.application)) {
        (Some(project), None) => Project::read(project)?.build(args.metadata.source_date_epoch)?,
        (None, Some(application)) => from_flags(args, application)?,
        (Some(_), Some(_)) => {
            return Err(Error::input("the command line", "names a project and an application"));
        }
        (None, None) => {
            return Err(Error::input(
                "the command line",
                "names nothing to build: a project, or --binary, --directory, --oci-layout, --docker-archive or --image",
            ));
        }
    };
    build.signer = signer(&args.signer)?;
    build.prepare(&pull)
}

fn application(args: &ApplicationArgs) -> Option<Application> {
    let ApplicationArgs { binary, directory, oci_layout, docker_archive, image, reference } = args.clone();
    binary
        .map(Application::Binary)
        .or(directory.map(Application::Directory))
        .or(oci_layout.map(|path| Application::OciLayout(path, reference.clone())))
        .or(docker_archive.map(|path| Application::DockerArchive(path, reference)))
        .or(image.map(Application::Registry))
}

fn from_flags(args: &BuildArgs, application: Application) -> Result<Build, Error> {
    let arch = Arch::from(args.arch);
    let (kernel_name, default_cmdline) = match arch {
        Arch::X86_64 => ("bzImage", CMDLINE_X86_64),
        Arch::Aarch64 => ("Image", CMDLINE_AARCH64),
    };
    let kernel = args.kernel.clone().unwrap_or_else(|| args.blobs.join(kernel_name));
    let from_blobs = args.kernel.is_none();
    let config = args.kernel_config.clone().or_else(|| {
        let path = args.blobs.join(format!("{kernel_name}.config"));
        (from_blobs && path.exists()).then_some(path)
    });
    let cmdline_blob = args.blobs.join("cmdline");
    let cmdline = match &args.cmdline {
        Some(cmdline) => cmdline.clone(),
        // nitro-cli trims its file, too: the newline would be measured.
        None if from_blobs && cmdline_blob.exists() => {
            std::fs::read_to_string(&cmdline_blob).context("read", &cmdline_blob)?.trim().to_owned()
        }
        None => default_cmdline.to_owned(),
    };
    let init = match (args.init, &args.agent, &args.agent_config) {
        (InitArg::Application, None, None) => Init::Application,
        (InitArg::Aws, None, None) => aws_init(&args.blobs),
        (InitArg::Agent, Some(binary), Some(config)) => Init::Agent {
            binary: binary.clone(),
            nsm_ko: args.nsm_ko.clone(),
            config: std::fs::read_to_string(config).context("read", config)?,
        },
        (InitArg::Agent, ..) => {
            return Err(Error::input("--init agent", "needs --agent FILE and --agent-config FILE"));
        }
        (..) => return Err(Error::input("--agent", "goes with --init agent")),
    };
    let command = (!args.command.is_empty()).then(|| args.command.clone());
    Ok(Build {
        arch,
        metadata: metadata(&args.metadata, &kernel, config.as_deref())?,
        kernel,
        cmdline,
        init,
        application,
        overrides: Overrides {
            entrypoint: args.entrypoint.clone().map(|program| vec![program]),
            cmd: command,
            env: args.env.clone(),
            workdir: args.workdir.clone(),
            user: args.user.clone(),
        },
        compression: args.compression.into(),
        layout: args.layout.into(),
        signer: None,
        drop_capabilities: args.drop_capabilities,
    })
}

pub(super) fn init(args: &InitArgs, io: &mut Io<'_>) -> Result<(), Error> {
    let path = args.folder.join(PROJECT_FILE);
    // An existing project is never overwritten.
    let mut file = File::create_new(&path).context("create", &path)?;
    file.write_all(TEMPLATE.as_bytes()).context("write", &path)?;
    report::print_text(io, &format!("{}\n", path.display()))
}

pub(super) fn lock(args: &LockArgs, io: &mut Io<'_>) -> Result<(), Error> {
    let mut project = Project::read(&args.project)?;
    let registry = Registry::new()?;
    if let Some(reference) = project.file.image.registry.clone().filter(|name| !name.contains("@sha256:")) {
        let pinned = registry.pin(&reference)?;
        project.lock.image = Some(LockedImage { reference, pinned });
    }
    if let (Some(kms), Some(path)) = (&project.file.kms, &args.kms_ca) {
        crate::read_certificate(path)?;
        let certificate = std::fs::read_to_string(path).context("read", path)?;
        project.lock.kms_ca = Some(LockedCa { url: kms.url.clone(), certificate });
    } else if let Some(kms) = project.file.kms.as_ref().filter(|kms| kms.kms_ca.as_deref() == Some("fetch")) {
        let certificate = registry.fetch_kms_ca(&kms.url)?;
        let der = crate::signature::certificate_der(certificate.as_bytes())?;
        let fingerprint = crate::oci::sha256(&der);
        writeln!(io.err, "warning: this is what {} answers now; compare it with the KMS's own:", kms.url)
            .and_then(|()| writeln!(io.err, "  SHA-256 of the root CA {fingerprint}"))
            .context("write", "a warning")?;
        project.lock.kms_ca = Some(LockedCa { url: kms.url.clone(), certificate });
    }
    let path = project.folder.join(LOCK_FILE);
    let text = toml::to_string(&project.lock).map_err(|error| Error::input(path.display(), error))?;
    std::fs::write(&path, text).context("write", &path)?;
    report::print_text(io, &format!("{}\n", path.display()))
}
