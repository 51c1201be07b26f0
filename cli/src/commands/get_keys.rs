//! `keyferry get-keys`: in an enclave, the agent's own command; with `--project`, the whole way on this machine: a
//! project's image is built and booted, and the keys that it exports are opened.

use std::path::{Path, PathBuf};
use std::time::Duration;

use attestation::OsImageHash;
use clap::{ArgMatches, Args, FromArgMatches};
use command_line::{Exit, Failure};
use eif_builder::project::Project;
use enclave_agent::KmsUrl;
use enclave_agent::command::get_keys as agent;
use nsm_emulator::LocalRoot;
use tokio::task::spawn_blocking;

use super::enclave::run::ToolArguments;
use super::keys;
use super::local_enclave::{Console, LocalEnclave, NsmRoot, tools};

/// How long the enclave may take, without KVM on a busy machine.
const ENCLAVE: Duration = Duration::from_secs(300);
/// What only the agent's form takes, and what it insists on.
const AGENT_ONLY: [&str; 2] = ["kms_urls", "app_id"];

/// The two forms of the command.
#[derive(Debug)]
pub(crate) enum Arguments {
    /// In an enclave.
    Here(Box<agent::Arguments>),
    /// From a project, in a virtual machine.
    Project(Box<FromProject>),
}

/// Arguments of the second form, beside those of the first that say where the keys go.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  In an enclave, through the parent's proxy:
    keyferry get-keys --kms-url https://kms.example.com:12001 --app-id 1111111111111111111111111111111111111111 \\
        --root-ca /etc/keyferry/kms-ca.pem --proxy vsock:3:3128 --output /run/app_keys.json
  From a project, in a virtual machine on this machine:
    keyferry get-keys --project . --nsm-root nsm --identity operator.txt --open 127.0.0.1:12001 \\
        --output app_keys.json")]
pub(crate) struct ProjectArguments {
    /// Folder with keyferry.toml, or that file: builds its image, boots it in a virtual machine on this machine, and
    /// opens the keys that it exports
    #[arg(long, value_name = "FOLDER")]
    project: Option<PathBuf>,
    /// With --project: file with the age identity that opens the export; the project names its recipient
    #[arg(long, value_name = "FILE", requires = "project")]
    identity: Option<PathBuf>,
    /// With --project: directory of the root that the machine's NSM signs under (`keyferry enclave root`), which the KMS
    /// must believe
    #[arg(long, value_name = "DIRECTORY", requires = "project")]
    nsm_root: Option<PathBuf>,
    /// With --project: what the parent's proxy opens besides the KMS's name, such as 127.0.0.1:12001 for a KMS on this
    /// machine; repeat it for several
    #[arg(long, value_name = "HOST:PORT", requires = "project")]
    open: Vec<String>,
    #[command(flatten)]
    tools: ToolArguments,
}

impl Args for Arguments {
    fn augment_args(command: clap::Command) -> clap::Command {
        let command = ProjectArguments::augment_args(agent::Arguments::augment_args(command));
        AGENT_ONLY.into_iter().fold(command, |command, id| {
            command.mut_arg(id, |argument| {
                argument.required(false).required_unless_present("project").conflicts_with("project")
            })
        })
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Arguments {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        if matches.contains_id("project") {
            return Ok(Self::Project(Box::new(FromProject {
                arguments: ProjectArguments::from_arg_matches(matches)?,
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
pub(crate) struct FromProject {
    arguments: ProjectArguments,
    output: Option<PathBuf>,
    force: bool,
    reveal: bool,
    json: bool,
}

pub(crate) async fn run(arguments: Arguments) -> Result<Exit, Failure> {
    enclave_agent::forbid_core_dumps().map_err(internal)?;
    match arguments {
        Arguments::Here(arguments) => agent::run(*arguments).await.map(|()| Exit::Done),
        Arguments::Project(project) => project.run().await,
    }
}

impl FromProject {
    async fn run(self) -> Result<Exit, Failure> {
        let Self { arguments, output, force, reveal, json } = self;
        let ProjectArguments { project, identity, nsm_root, open, tools: tool_arguments } = arguments;
        let usage = |what: &str| Failure::new(Exit::Usage, what.to_owned());
        let identity =
            identity.ok_or_else(|| usage("--project needs --identity FILE, which opens the keys"))?;
        let nsm_root = nsm_root.ok_or_else(|| {
            usage("--project needs --nsm-root DIRECTORY, which the KMS believes")
                .with_hint("`keyferry enclave root DIRECTORY` makes one")
        })?;
        let tools = tools(&tool_arguments)?;
        let directory = tempfile::tempdir().map_err(internal)?;
        let image = directory.path().join("image.eif");
        let (project, image_path) = (project.unwrap_or_default(), image.clone());
        let built = spawn_blocking(move || Built::new(&project, &image_path)).await.map_err(internal)??;
        let root = LocalRoot::open(&nsm_root).map_err(internal)?;
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
            lifetime: ENCLAVE,
            until_exported: true,
        };
        enclave.run().await?.into_result()?;
        let open = keys::Open::of_enclave(
            export,
            identity,
            built.os_image_hash,
            nsm_root.join("root.pem"),
            keys::Target { output, force, reveal, json },
        );
        spawn_blocking(move || open.run()).await.map_err(internal)?
    }
}

/// A project's image, and what it says about running it.
struct Built {
    os_image_hash: OsImageHash,
    /// The KMS as the proxy's rule.
    kms: String,
    memory_mib: u64,
    cpus: u8,
}

impl Built {
    fn new(folder: &Path, image: &Path) -> Result<Self, Failure> {
        let project = Project::read(folder).map_err(internal)?;
        let usage = |what: &str| Failure::new(Exit::Usage, format!("{}: {what}", folder.display()));
        let kms = project.file.kms.as_ref().ok_or_else(|| usage("has no [kms]: there are no keys to get"))?;
        if kms.recipients.is_empty() {
            return Err(usage("[kms] names no recipients, so the keys stay in the enclave")
                .with_hint("add recipients = [\"age1…\"] with the recipient of your identity"));
        }
        let url: KmsUrl = kms.url.parse().map_err(internal)?;
        let run = project.file.run;
        let recipe = project.build(None).and_then(|build| build.prepare(&eif_builder::registry::pull));
        let assembled = recipe.map_err(internal)?.recipe.write(image).map_err(internal)?;
        Ok(Self {
            os_image_hash: assembled.registers.os_image_hash(),
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
