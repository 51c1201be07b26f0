//! `keyferry get-keys`: in an enclave, the agent's own command; with `--project`, the whole way on this machine: a
//! project's image is built and booted, and the keys that it exports are opened; with `--host`, the same with the enclave
//! on a Nitro host.

mod generated;
mod on_host;

use std::path::{Path, PathBuf};
use std::time::Duration;

use attestation::OsImageHash;
use clap::{ArgGroup, ArgMatches, Args, FromArgMatches};
use cloud_provisioners::{Lock, command};
use command_line::{Exit, Failure};
use eif_builder::project::Project;
use enclave_agent::KmsUrl;
use enclave_agent::command::get_keys as agent;
use nsm_emulator::LocalRoot;
use tokio::task::spawn_blocking;

use super::enclave::run::ToolArguments;
use super::keys;
use super::local_enclave::{Console, LocalEnclave, NsmRoot, tools};
use generated::{Generated, PartArguments};
use on_host::{OnHost, RemoteArguments};

/// How long the enclave may take, without KVM on a busy machine.
const LIFETIME: Duration = Duration::from_secs(300);
/// What only the agent's form takes, and what it insists on.
const AGENT_ONLY: [&str; 2] = ["kms_urls", "app_id"];
/// What means nothing where the command is not itself in the enclave.
const INSIDE_ONLY: [&str; 2] = ["nsm", "proxy"];
/// The arguments that ask for an enclave to be started.
const ENCLAVE: &str = "enclave";
const STARTS_ENCLAVE: [&str; 3] = ["project", "host", "show_mrs"];

/// The two forms of the command.
#[derive(Debug)]
pub(crate) enum Arguments {
    /// In an enclave.
    Here(Box<agent::Arguments>),
    /// In an enclave that is started for it.
    Started(Box<Started>),
}

/// Arguments of the second form, beside those of the first that say where the keys go.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  In an enclave, through the parent's proxy:
    keyferry get-keys --kms-url https://kms.example.com:12001 --app-id 1111111111111111111111111111111111111111 \\
        --root-ca /etc/keyferry/kms-ca.pem --proxy vsock:3:3128 --output /run/app_keys.json
  From a project, in a virtual machine on this machine:
    keyferry get-keys --project . --nsm-root nsm --identity operator.txt --open 127.0.0.1:12001 \\
        --output app_keys.json
  The same on a Nitro host, whose record is in this directory:
    keyferry get-keys --project . --host . --identity operator.txt --output app_keys.json")]
pub(crate) struct ProjectArguments {
    /// Folder with keyferry.toml, or that file: builds its image, boots it in a virtual machine on this machine (or on
    /// --host), and opens the keys that it exports
    #[arg(long, value_name = "FOLDER")]
    project: Option<PathBuf>,
    /// With --project or --host: file with the age identity that opens the export; the project names its recipient
    #[arg(long, value_name = "FILE", requires = ENCLAVE)]
    identity: Option<PathBuf>,
    /// With --project or --host: directory of the root that the NSM signs under (`keyferry enclave root`), which the KMS
    /// must believe; AWS's with --host unless given
    #[arg(long, value_name = "DIRECTORY", requires = ENCLAVE)]
    nsm_root: Option<PathBuf>,
    /// With --project or --host: what the parent's proxy opens besides the KMS's name, such as 127.0.0.1:12001 for a KMS
    /// on the parent itself; repeat it for several
    #[arg(long, value_name = "HOST:PORT", requires = ENCLAVE)]
    open: Vec<String>,
    #[command(flatten)]
    remote: RemoteArguments,
    #[command(flatten)]
    parts: PartArguments,
    #[command(flatten)]
    tools: ToolArguments,
}

impl Args for Arguments {
    fn augment_args(command: clap::Command) -> clap::Command {
        let command = ProjectArguments::augment_args(agent::Arguments::augment_args(command));
        let command = command.group(ArgGroup::new(ENCLAVE).args(STARTS_ENCLAVE).multiple(true));
        let command = AGENT_ONLY.into_iter().fold(command, |command, id| {
            command.mut_arg(id, |argument| {
                argument.required(false).required_unless_present("project").conflicts_with("project")
            })
        });
        INSIDE_ONLY
            .into_iter()
            .fold(command, |command, id| command.mut_arg(id, |argument| argument.conflicts_with(ENCLAVE)))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Arguments {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        if matches.contains_id(ENCLAVE) {
            let project = matches.contains_id("project");
            return Ok(Self::Started(Box::new(Started {
                arguments: ProjectArguments::from_arg_matches(matches)?,
                // A project says itself from where its keys come.
                fetch: if project { None } else { Some(agent::FetchArguments::from_arg_matches(matches)?) },
                output: matches.get_one("output").cloned(),
                force: matches.get_flag("force"),
                reveal: matches.get_flag("reveal"),
                json: matches.get_flag("json"),
            })));
        }
        Ok(Self::Here(Box::new(agent::Arguments::from_arg_matches(matches)?)))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// The second form, with what it shares with the first.
#[derive(Debug)]
pub(crate) struct Started {
    arguments: ProjectArguments,
    /// Where there is no project.
    fetch: Option<agent::FetchArguments>,
    output: Option<PathBuf>,
    force: bool,
    reveal: bool,
    json: bool,
}

pub(crate) async fn run(arguments: Arguments) -> Result<Exit, Failure> {
    enclave_agent::forbid_core_dumps().map_err(internal)?;
    match arguments {
        Arguments::Here(arguments) => agent::run(*arguments).await.map(|()| Exit::Done),
        Arguments::Started(started) => started.run().await,
    }
}

impl Started {
    async fn run(self) -> Result<Exit, Failure> {
        let Self { arguments, fetch, output, force, reveal, json } = self;
        let ProjectArguments { project, mut identity, nsm_root, open, remote, parts, tools } = arguments;
        let (project, lock) = match (project, fetch) {
            (Some(project), _) => (project, None),
            (None, Some(fetch)) => {
                let Generated { folder, identity: kept, lock } = parts.generate(fetch, identity).await?;
                identity = Some(kept);
                (folder, Some(lock))
            }
            (None, None) => return Err(Failure::new(Exit::Usage, "--project is missing")),
        };
        let target = keys::Target { output, force, reveal, json };
        if remote.show_mrs {
            return show_measurements(project, json).await;
        }
        let usage = |what: &str| Failure::new(Exit::Usage, what.to_owned());
        let identity =
            identity.ok_or_else(|| usage("--project needs --identity FILE, which opens the keys"))?;
        if remote.host.is_some() {
            // A second run would end the enclave of the first.
            let _alone = match lock {
                Some(lock) => lock,
                None => Lock::directory(folder_of(&project)).map_err(command::failure)?,
            };
            let directory = tempfile::tempdir().map_err(internal)?;
            let image = directory.path().join("image.eif");
            let built = Built::here(project, image.clone()).await?;
            let module_root = nsm_root.map(|directory| directory.join("root.pem"));
            return OnHost { remote, built, image, open, identity, module_root, target }
                .run(directory.path())
                .await;
        }
        let nsm_root = nsm_root.ok_or_else(|| {
            usage("--project needs --nsm-root DIRECTORY, which the KMS believes")
                .with_hint("`keyferry enclave root DIRECTORY` makes one")
        })?;
        in_virtual_machine(project, identity, &nsm_root, open, &tools, target).await
    }
}

/// The folder of a project that is given by that or by its file.
fn folder_of(project: &Path) -> &Path {
    match project.parent() {
        Some(folder) if project.is_file() && folder.as_os_str().is_empty() => Path::new("."),
        Some(folder) if project.is_file() => folder,
        _ => project,
    }
}

async fn in_virtual_machine(
    project: PathBuf,
    identity: PathBuf,
    nsm_root: &Path,
    open: Vec<String>,
    tool_arguments: &ToolArguments,
    target: keys::Target,
) -> Result<Exit, Failure> {
    let tools = tools(tool_arguments)?;
    let directory = tempfile::tempdir().map_err(internal)?;
    let image = directory.path().join("image.eif");
    let built = Built::here(project, image.clone()).await?;
    let root = LocalRoot::open(nsm_root).map_err(internal)?;
    let export = directory.path().join("keys.age");
    let enclave = LocalEnclave {
        image: &image,
        tools,
        root: NsmRoot::Kept(&root),
        opens: std::iter::once(built.kms).chain(open).collect(),
        export: export.clone(),
        console: Console::new(tell),
        memory_mib: Some(built.memory_mib),
        cpus: built.cpus,
        lifetime: LIFETIME,
        until_exported: true,
    };
    enclave.run().await?.into_result()?;
    let root = Some(nsm_root.join("root.pem"));
    let open = keys::Open::of_enclave(export, identity, built.os_image_hash, root, target);
    spawn_blocking(move || open.run()).await.map_err(internal)?
}

/// Prints what the project's image measures to, as `eif-builder measure` does.
async fn show_measurements(project: PathBuf, json: bool) -> Result<Exit, Failure> {
    let measure = spawn_blocking(move || {
        let recipe = Project::read(&project)?.build(None)?.prepare(&eif_builder::registry::pull)?.recipe;
        recipe.measure()
    });
    let registers = measure.await.map_err(internal)?.map_err(internal)?.registers;
    let hash = registers.os_image_hash();
    let [pcr0, pcr1, pcr2] = [registers.pcr0, registers.pcr1, registers.pcr2];
    if json {
        let text = serde_json::json!({ "version": 1, "PCR0": pcr0.to_string(), "PCR1": pcr1.to_string(),
            "PCR2": pcr2.to_string(), "OsImageHash": format!("0x{hash}") });
        command_line::print_line(&text.to_string());
    } else {
        command_line::print_line(&format!(
            "PCR0: {pcr0}\nPCR1: {pcr1}\nPCR2: {pcr2}\nOS_IMAGE_HASH: 0x{hash}"
        ));
    }
    Ok(Exit::Done)
}

/// A project's image, and what it says about running it.
struct Built {
    os_image_hash: OsImageHash,
    /// PCR0, PCR1 and PCR2, in hex.
    pcrs: [String; 3],
    /// Architecture, `x86_64`.
    arch: &'static str,
    app_id: String,
    /// The KMS as the proxy's rule.
    kms: String,
    memory_mib: u64,
    cpus: u8,
}

impl Built {
    async fn here(project: PathBuf, image: PathBuf) -> Result<Self, Failure> {
        spawn_blocking(move || Self::new(&project, &image)).await.map_err(internal)?
    }

    fn new(folder: &Path, image: &Path) -> Result<Self, Failure> {
        let project = Project::read(folder).map_err(internal)?;
        let usage = |what: &str| Failure::new(Exit::Usage, format!("{}: {what}", folder.display()));
        let kms = project.file.kms.as_ref().ok_or_else(|| usage("has no [kms]: there are no keys to get"))?;
        if kms.recipients.is_empty() {
            return Err(usage("[kms] names no recipients, so the keys stay in the enclave")
                .with_hint("add recipients = [\"age1…\"] with the recipient of your identity"));
        }
        let url: KmsUrl = kms.url.parse().map_err(internal)?;
        let (run, arch, app_id) = (project.file.run, project.arch().name(), kms.app_id.clone());
        let recipe = project.build(None).and_then(|build| build.prepare(&eif_builder::registry::pull));
        let assembled = recipe.map_err(internal)?.recipe.write(image).map_err(internal)?;
        let registers = &assembled.registers;
        Ok(Self {
            os_image_hash: registers.os_image_hash(),
            pcrs: [registers.pcr0, registers.pcr1, registers.pcr2].map(|pcr| pcr.to_string()),
            arch,
            app_id,
            kms: format!("{}:{}", url.host(), url.port()),
            memory_mib: run.memory_mib.into(),
            cpus: u8::try_from(run.cpus).map_err(internal)?,
        })
    }
}

/// The enclave's console goes where remarks go; standard output is for the keys.
#[expect(clippy::print_stderr, reason = "the enclave's console; standard output is for the answer")]
fn tell(line: &str) {
    eprintln!("{line}");
}

fn internal(error: impl std::error::Error + Send + Sync + 'static) -> Failure {
    Failure::new(Exit::Internal, error)
}
