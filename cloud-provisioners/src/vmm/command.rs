//! `keyferry kms vmm`: a project's machine on a bare-metal host.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use command_line::{Exit, Failure, confirm, print_line};
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::console::{LINES, Reader};
use super::{Client, Deployment, Error, Machine, Outcome};
use crate::command::machine::print_text;
use crate::command::site::{Site, now};
use crate::command::{ProjectArguments, failure};
use crate::project::Project;

/// How often a console that is followed is asked for.
const LOG_PAUSE: Duration = Duration::from_secs(1);

/// A machine on a bare-metal TDX host, through its dstack-vmm
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Makes the machine of the project, or starts it
    Deploy(Deploy),
    /// Shows the machine
    Status(Status),
    /// Shows what the machine prints on its console
    Logs(Logs),
    /// Stops the machine; its disk stays
    Stop(Act),
    /// Starts the stopped machine
    Start(Act),
    /// Removes the machine with its disk
    Remove(Remove),
    /// Lists every machine of the VMM
    List(List),
    /// Lists the guest images of the VMM
    Images(List),
}

/// Where the VMM is.
#[derive(Clone, Debug, Args)]
pub struct VmmArguments {
    /// Address of the VMM: http://HOST:PORT, https://HOST or unix:PATH
    #[arg(long, value_name = "URL", env = "DSTACK_VMM_URL", default_value = "http://127.0.0.1:9080")]
    pub vmm: String,
    /// File with a token of the VMM; the variable DSTACK_VMM_TOKEN does too
    #[arg(long, value_name = "FILE")]
    pub vmm_token_file: Option<PathBuf>,
}

impl VmmArguments {
    /// A client of that VMM.
    ///
    /// # Errors
    ///
    /// When the address cannot be used, or the token not be read: without it no call is made.
    pub fn client(&self) -> Result<Client, Error> {
        let token = match &self.vmm_token_file {
            Some(path) => Some(read_token(path)?),
            None => std::env::var("DSTACK_VMM_TOKEN").ok().map(Zeroizing::new),
        };
        Client::new(&self.vmm, token.filter(|it| !it.is_empty()))
    }
}

fn read_token(path: &Path) -> Result<Zeroizing<String>, Error> {
    let text = std::fs::read_to_string(path).map(Zeroizing::new);
    let text = text.map_err(|source| Error::Token { path: path.to_owned(), source })?;
    Ok(Zeroizing::new(text.trim().to_owned()))
}

/// Arguments of `deploy`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  keyferry kms vmm deploy -C kms            the machine, when image, ports and registry are as they must be
  keyferry kms vmm logs -C kms")]
pub struct Deploy {
    #[command(flatten)]
    project: ProjectArguments,
    #[command(flatten)]
    vmm: VmmArguments,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// Answer as JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `status`.
#[derive(Debug, Args)]
pub struct Status {
    #[command(flatten)]
    project: ProjectArguments,
    #[command(flatten)]
    vmm: VmmArguments,
    /// Answer as JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `logs`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  keyferry kms vmm logs -C kms -n 50
  keyferry kms vmm logs -C kms --follow     until Ctrl-C, also across the machine's restarts")]
pub struct Logs {
    #[command(flatten)]
    project: ProjectArguments,
    #[command(flatten)]
    vmm: VmmArguments,
    /// Go on with what the machine prints from now on
    #[arg(short, long)]
    follow: bool,
    /// This many of the last lines
    #[arg(short = 'n', long, default_value_t = 100, value_name = "N")]
    lines: usize,
}

/// Arguments of `stop` and `start`.
#[derive(Debug, Args)]
pub struct Act {
    #[command(flatten)]
    project: ProjectArguments,
    #[command(flatten)]
    vmm: VmmArguments,
}

/// Arguments of `remove`.
#[derive(Debug, Args)]
pub struct Remove {
    #[command(flatten)]
    project: ProjectArguments,
    #[command(flatten)]
    vmm: VmmArguments,
    /// Remove the machine of this name although its keys are lost with it
    #[arg(long, value_name = "NAME")]
    lose_keys_of: Option<String>,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

/// Arguments of `list` and `images`.
#[derive(Debug, Args)]
pub struct List {
    #[command(flatten)]
    vmm: VmmArguments,
    /// Answer as JSON
    #[arg(long)]
    json: bool,
}

/// Carries a command out.
///
/// # Errors
///
/// A [`Failure`], as for the other machines.
pub async fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Deploy(arguments) => deploy(arguments).await,
        Command::Status(arguments) => status(arguments).await,
        Command::Logs(arguments) => logs(arguments).await,
        Command::Stop(arguments) => {
            let (mut deployment, client) = opened(&arguments.project, &arguments.vmm)?;
            let stopped = deployment.stop(&client).await.map_err(failure)?;
            print_line(if stopped { "stopped" } else { "there is no machine" });
            Ok(())
        }
        Command::Start(arguments) => {
            let (mut deployment, client) = opened(&arguments.project, &arguments.vmm)?;
            tell(&deployment.start(&client).await.map_err(failure)?);
            Ok(())
        }
        Command::Remove(arguments) => remove(arguments).await,
        Command::List(arguments) => list(arguments).await,
        Command::Images(arguments) => images(arguments).await,
    }
}

pub(crate) fn opened(
    project: &ProjectArguments,
    vmm: &VmmArguments,
) -> Result<(Deployment, Client), Failure> {
    let project = Project::open(&project.directory).map_err(failure)?;
    let client = vmm.client().map_err(|error| failure(error.into()))?;
    Ok((Deployment::open(project).map_err(failure)?, client))
}

/// The plan of a deployment, for people.
#[must_use]
pub fn plan(prepared: &super::Prepared, client: &Client) -> String {
    let it = &prepared.configuration;
    let ports: Vec<String> = it.ports.iter().map(ToString::to_string).collect();
    format!(
        "make the machine {} on {}: {} with {} vCPU, {} MiB, {} GB, {}\n",
        it.name,
        client.address(),
        it.image,
        it.vcpu,
        it.memory,
        it.disk_size,
        ports.join(" "),
    )
}

async fn ask(plan: String, yes: bool) -> Result<(), Failure> {
    let asked = tokio::task::spawn_blocking(move || confirm(&plan, "carry this out?", yes)).await;
    asked.map_err(|error| Failure::new(Exit::Internal, error))?
}

async fn deploy(arguments: Deploy) -> Result<(), Failure> {
    let (mut deployment, client) = opened(&arguments.project, &arguments.vmm)?;
    let prepared = deployment.prepare(&Site::read()?.settings).map_err(failure)?;
    let found = deployment.check(&client, &prepared).await.map_err(failure)?;
    if found.is_none() {
        ask(plan(&prepared, &client), arguments.yes).await?;
    }
    let (machine, outcome) = deployment.apply(&client, &prepared, found, &now()).await.map_err(failure)?;
    if outcome == Outcome::Unchanged {
        tracing::info!("the machine of this compose is there already");
    }
    let hash = hex::encode(prepared.compose.hash());
    if arguments.json {
        let changed = outcome == Outcome::Made;
        print_line(
            &json!({"changed": changed, "composeHash": hash, "machine": describe(&machine)}).to_string(),
        );
        return Ok(());
    }
    print_line(&format!("COMPOSE_HASH: 0x{hash}"));
    tell(&machine);
    Ok(())
}

async fn status(arguments: Status) -> Result<(), Failure> {
    let (mut deployment, client) = opened(&arguments.project, &arguments.vmm)?;
    let machine = deployment.machine(&client).await.map_err(failure)?;
    let name = deployment.name();
    let machine = machine.ok_or_else(|| failure(crate::Error::NoInstance { name }))?;
    match arguments.json {
        true => print_line(&describe(&machine).to_string()),
        false => tell(&machine),
    }
    Ok(())
}

/// The project is not opened for work: a bring-up that waits can be watched.
async fn logs(arguments: Logs) -> Result<(), Failure> {
    let project = Project::open(&arguments.project.directory).map_err(failure)?;
    let client = arguments.vmm.client().map_err(|error| failure(error.into()))?;
    let id = Deployment::id_at_a_glance(&project).map_err(failure)?;
    let read = async |lines| client.log(&id, lines).await.map_err(|error| failure(error.into()));
    if !arguments.follow {
        let log = read(arguments.lines).await?;
        print_line(log.trim_end());
        tell_failures(&log);
        return Ok(());
    }
    let (mut reader, log) = (Reader::default(), read(LINES).await?);
    let there: Vec<&str> = reader.new_text(&log).split_inclusive('\n').collect();
    let mut new = there[there.len().saturating_sub(arguments.lines)..].concat();
    while print_text(&new) {
        tell_failures(&new);
        tokio::time::sleep(LOG_PAUSE).await;
        let log = read(LINES).await?;
        reader.new_text(&log).clone_into(&mut new);
    }
    Ok(())
}

fn tell_failures(log: &str) {
    for (symptom, line) in crate::doctor::recognise(log) {
        tracing::warn!(line, cause = symptom.cause, remedy = symptom.remedy, "known failure");
    }
}

async fn remove(arguments: Remove) -> Result<(), Failure> {
    let (mut deployment, client) = opened(&arguments.project, &arguments.vmm)?;
    let name = deployment.name();
    if deployment.holds_keys() && arguments.lose_keys_of.as_deref() != Some(name.as_str()) {
        return Err(failure(super::Refusal::HoldsKeys { name }.into()));
    }
    ask(format!("REMOVE the machine {name} with its disk\n"), arguments.yes).await?;
    let removed = deployment.remove(&client, arguments.lose_keys_of.as_deref()).await.map_err(failure)?;
    print_line(&if removed { format!("removed {name}") } else { "there was nothing to remove".to_owned() });
    Ok(())
}

async fn list(arguments: List) -> Result<(), Failure> {
    let client = arguments.vmm.client().map_err(|error| failure(error.into()))?;
    let machines = client.all_machines().await.map_err(|error| failure(error.into()))?;
    if arguments.json {
        print_line(&json!(machines.iter().map(describe).collect::<Vec<_>>()).to_string());
        return Ok(());
    }
    for machine in &machines {
        print_line(&format!("{}  {}  {}", machine.name, machine.status, machine.id));
    }
    Ok(())
}

async fn images(arguments: List) -> Result<(), Failure> {
    let client = arguments.vmm.client().map_err(|error| failure(error.into()))?;
    let images = client.images().await.map_err(|error| failure(error.into()))?;
    if arguments.json {
        print_line(&json!(images).to_string());
        return Ok(());
    }
    for image in &images {
        print_line(&format!(
            "{}  {}{}",
            image.name,
            image.version,
            if image.is_dev { "  development" } else { "" }
        ));
    }
    Ok(())
}

fn describe(machine: &Machine) -> Value {
    let ports = machine.configuration.iter().flat_map(|it| &it.ports).map(ToString::to_string);
    json!({
        "name": machine.name,
        "id": machine.id,
        "status": machine.status,
        "uptime": machine.uptime,
        "appId": machine.app_id,
        "instanceId": machine.instance_id,
        "bootProgress": machine.boot_progress,
        "bootError": machine.boot_error,
        "ports": ports.collect::<Vec<_>>(),
    })
}

fn tell(machine: &Machine) {
    print_line(&format!("machine: {} ({})\nstatus: {}", machine.name, machine.id, machine.status));
    for (name, value) in [("boot", &machine.boot_progress), ("boot error", &machine.boot_error)] {
        if !value.is_empty() {
            print_line(&format!("{name}: {value}"));
        }
    }
    for port in machine.configuration.iter().flat_map(|it| &it.ports) {
        print_line(&format!("port: {port}"));
    }
}
