//! What the commands do to a machine.

use std::io::Write as _;
use std::time::Duration;

use clap::Args;
use command_line::{Exit, Failure, confirm, print_line};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::site::{Site, client, now};
use super::{GoogleArguments, ProjectArguments, failure};
use crate::gcp::{Client, Instance};
use crate::gcp_tdx::{Deployment, MANAGED_BY, Observer, Prepared, Replace, Step};
use crate::project::Project;
use crate::{Deadline, Error, env_key};

/// How often the serial port is asked for more.
const LOG_PAUSE: Duration = Duration::from_secs(2);
const READ: Duration = Duration::from_secs(60);

/// Arguments of `deploy`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  keyferry kms deploy                     the project in this directory
  keyferry kms deploy --delete --yes      replace a machine whose keys are elsewhere

A machine of the key provider tpm holds keys that exist nowhere else. It is replaced only with
--lose-keys-of and its name.")]
pub struct Deploy {
    #[command(flatten)]
    project: ProjectArguments,
    #[command(flatten)]
    google: GoogleArguments,
    /// Replace the machine if it is there
    #[arg(short, long)]
    delete: bool,
    /// Replace the machine of this name although its keys are lost with it
    #[arg(long, value_name = "INSTANCE", requires = "delete")]
    lose_keys_of: Option<String>,
    /// Make the boot image again under the same name
    #[arg(long)]
    force_boot_image: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

/// Arguments of `status`.
#[derive(Debug, Args)]
pub struct Status {
    #[command(flatten)]
    project: ProjectArguments,
    #[command(flatten)]
    google: GoogleArguments,
    /// Answer as JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `stop` and `start`.
#[derive(Debug, Args)]
pub struct Act {
    #[command(flatten)]
    project: ProjectArguments,
    #[command(flatten)]
    google: GoogleArguments,
}

/// Arguments of `logs`.
#[derive(Debug, Args)]
pub struct Logs {
    #[command(flatten)]
    project: ProjectArguments,
    #[command(flatten)]
    google: GoogleArguments,
    /// Go on with what the machine prints from now on
    #[arg(short, long)]
    follow: bool,
    /// Begin with this many lines of what is there
    #[arg(short = 'n', long, default_value_t = 100, value_name = "N")]
    lines: usize,
}

/// Arguments of `remove`.
#[derive(Debug, Args)]
pub struct Remove {
    #[command(flatten)]
    project: ProjectArguments,
    #[command(flatten)]
    google: GoogleArguments,
    /// Keep the image with the machine's configuration
    #[arg(long)]
    keep_images: bool,
    /// Remove the machine of this name although its keys are lost with it
    #[arg(long, value_name = "INSTANCE")]
    lose_keys_of: Option<String>,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

/// Arguments of `list`.
#[derive(Debug, Args)]
pub struct List {
    #[command(flatten)]
    google: GoogleArguments,
    /// Google project; the one of the global settings when not given
    #[arg(short, long, value_name = "ID")]
    project: Option<String>,
    /// Answer as JSON
    #[arg(long)]
    json: bool,
}

/// Tells steps and uploads on standard error.
#[derive(Default)]
pub(super) struct Teller {
    bar: Option<ProgressBar>,
}

impl Observer for Teller {
    fn step(&mut self, number: usize, total: usize, step: &Step) {
        tracing::info!(number, total, ?step, "step");
    }

    fn made(&mut self, kind: &str, name: &str) {
        tracing::info!(kind, name, "made");
    }

    fn uploaded(&mut self, name: &str, stored: u64, total: u64) {
        let bar = self.bar.get_or_insert_with(|| {
            let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {eta}");
            let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(total).with_style(style).with_message(name.to_owned())
        });
        bar.set_position(stored);
        if stored == total {
            bar.finish_and_clear();
            self.bar = None;
        }
    }
}

pub(super) async fn opened(
    project: &ProjectArguments,
    google: &GoogleArguments,
) -> Result<(Site, Deployment, Client), Failure> {
    let site = Site::read()?;
    let deployment = site.open(project)?;
    deployment.config().validate().map_err(failure)?;
    let client = client(&deployment.config().project, google).await?;
    Ok((site, deployment, client))
}

pub(super) async fn deploy(arguments: Deploy) -> Result<(), Failure> {
    let (site, deployment, client) = opened(&arguments.project, &arguments.google).await?;
    let (mut deployment, prepared) = prepared(site, deployment).await?;
    let replace = match (arguments.delete, arguments.lose_keys_of) {
        (false, _) => Replace::No,
        (true, None) => Replace::Yes,
        (true, Some(name)) => Replace::LosingKeysOf(name),
    };
    let plan =
        deployment.plan(&client, &prepared, &replace, arguments.force_boot_image).await.map_err(failure)?;
    if plan.steps().iter().any(|step| step.deletes() || step.costs()) {
        let shown = plan.to_string();
        let yes = arguments.yes;
        let asked = tokio::task::spawn_blocking(move || confirm(&shown, "carry this out?", yes)).await;
        asked.map_err(|error| Failure::new(Exit::Internal, error))??;
    }
    let mut teller = Teller::default();
    let instance = deployment.apply(&client, &prepared, &plan, &mut teller, &now()).await.map_err(failure)?;
    tell(&instance);
    Ok(())
}

/// Reads the boot disk and makes the volume off the async threads.
pub(super) async fn prepared(site: Site, deployment: Deployment) -> Result<(Deployment, Prepared), Failure> {
    let signers = env_key::signers(&site.settings_path).map_err(failure)?;
    let environment = deployment.encrypted_environment(&site.settings.services.kms_urls, &signers).await;
    let environment = environment.map_err(failure)?;
    let work = tokio::task::spawn_blocking(move || {
        for doubt in deployment.project().doubts(deployment.app())? {
            tracing::warn!("{doubt}");
        }
        let prepared = deployment.prepare(&site.settings, &site.home, environment)?;
        Ok::<_, Error>((deployment, prepared))
    });
    work.await.map_err(|error| Failure::new(Exit::Internal, error))?.map_err(failure)
}

fn tell(instance: &Instance) {
    let address = |found: Option<&str>| found.unwrap_or("none").to_owned();
    print_line(&format!(
        "instance:    {}\nzone:        {}\nstatus:      {}\nexternal ip: {}\ninternal ip: {}",
        instance.name,
        instance.zone_name(),
        instance.status,
        address(instance.external_ip()),
        address(instance.internal_ip()),
    ));
}

fn describe(instance: &Instance) -> serde_json::Value {
    json!({
        "instance": instance.name,
        "zone": instance.zone_name(),
        "status": instance.status,
        "externalIp": instance.external_ip(),
        "internalIp": instance.internal_ip(),
        "created": instance.creation_timestamp,
    })
}

pub(super) async fn status(arguments: Status) -> Result<(), Failure> {
    let (_, mut deployment, client) = opened(&arguments.project, &arguments.google).await?;
    match deployment.status(&client, &now()).await.map_err(failure)? {
        Some(instance) if arguments.json => print_line(&describe(&instance).to_string()),
        Some(instance) => tell(&instance),
        None => return Err(failure(Error::NoInstance { name: deployment.config().instance_name.clone() })),
    }
    Ok(())
}

pub(super) async fn stop(arguments: Act) -> Result<(), Failure> {
    let (_, mut deployment, client) = opened(&arguments.project, &arguments.google).await?;
    match deployment.stop(&client, &now()).await.map_err(failure)? {
        Some(instance) => tell(&instance),
        None => print_line("there is no machine to stop"),
    }
    Ok(())
}

pub(super) async fn start(arguments: Act) -> Result<(), Failure> {
    let (_, mut deployment, client) = opened(&arguments.project, &arguments.google).await?;
    if let Some(instance) = deployment.start(&client, &now()).await.map_err(failure)? {
        tell(&instance);
    }
    Ok(())
}

pub(super) async fn remove(arguments: Remove) -> Result<(), Failure> {
    let (_, mut deployment, client) = opened(&arguments.project, &arguments.google).await?;
    let name = deployment.config().instance_name.clone();
    if deployment.holds_keys() && arguments.lose_keys_of.as_deref() != Some(name.as_str()) {
        let failure = Failure::new(
            Exit::Refused,
            format!("instance {name} holds keys that exist nowhere else, and removing it deletes them"),
        );
        let hint =
            format!("onboard a second KMS first; to lose the keys all the same: --lose-keys-of {name}");
        return Err(failure.with_hint(hint));
    }
    let plan =
        format!("DELETE the machine {name} with its disks, its configuration and its firewall rules\n");
    let yes = arguments.yes;
    let asked = tokio::task::spawn_blocking(move || confirm(&plan, "carry this out?", yes)).await;
    asked.map_err(|error| Failure::new(Exit::Internal, error))??;
    let removed = deployment.remove(&client, arguments.keep_images, &now()).await.map_err(failure)?;
    match removed.as_slice() {
        [] => print_line("there was nothing to remove"),
        removed => removed.iter().for_each(|it| print_line(&format!("removed {it}"))),
    }
    Ok(())
}

pub(super) async fn list(arguments: List) -> Result<(), Failure> {
    let site = Site::read()?;
    let project = arguments.project.unwrap_or_else(|| site.settings.gcp.project.clone());
    if project.is_empty() {
        let failure = Failure::new(Exit::Usage, "no Google project");
        return Err(failure.with_hint("give --project, or set gcp.project with `keyferry kms config-edit`"));
    }
    let client = client(&project, &arguments.google).await?;
    let (label, value) = MANAGED_BY;
    let found = client.instances_labelled(label, value, Deadline::within(READ)).await;
    let found = found.map_err(|error| failure(error.into()))?;
    if arguments.json {
        let all: Vec<_> = found.iter().map(describe).collect();
        print_line(&json!(all).to_string());
        return Ok(());
    }
    for instance in &found {
        let address = instance.external_ip().unwrap_or("none");
        print_line(&format!("{}  {}  {}  {address}", instance.name, instance.zone_name(), instance.status));
    }
    Ok(())
}

pub(super) async fn logs(arguments: Logs) -> Result<(), Failure> {
    // The project is not opened for work: a bring-up that waits can be watched.
    let site = Site::read()?;
    let app = Project::open(&arguments.project.directory).and_then(|it| it.app()).map_err(failure)?;
    let config = app.gcp_config.over(&site.settings.gcp);
    config.validate().map_err(failure)?;
    let client = client(&config.project, &arguments.google).await?;
    let read = async |start| {
        let output =
            client.serial_output(&config.zone, &config.instance_name, start, Deadline::within(READ)).await;
        output.map_err(|error| failure(error.into()))
    };
    let mut output = read(0).await?;
    let lines: Vec<&str> = output.contents.split_inclusive('\n').collect();
    let shown = lines[lines.len().saturating_sub(arguments.lines)..].concat();
    if !print_text(&shown) {
        return Ok(());
    }
    if !arguments.follow {
        return Ok(());
    }
    let mut position = output.next;
    loop {
        tokio::time::sleep(LOG_PAUSE).await;
        output = read(position).await?;
        if output.start > position {
            let lost = output.start - position;
            tracing::warn!(lost, "the server has dropped output before it could be read, bytes");
        }
        position = output.next.max(position);
        if !print_text(&output.contents) {
            return Ok(());
        }
    }
}

/// Prints text as it is. Whether anyone still reads.
pub(crate) fn print_text(text: &str) -> bool {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_ok()
}
