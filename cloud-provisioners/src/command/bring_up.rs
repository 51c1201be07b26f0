//! `up` and `join`: a KMS from a project folder to serving.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use command_line::{Exit, Failure, confirm, print_line};
use ipnet::IpNet;
use kms_protocol::kms_file::KmsFile;
use kms_protocol::wire::webhook::TEE_VARIANT_NITRO;
use serde_json::json;
use zeroize::Zeroizing;

use super::machine::{Teller, opened, prepared};
use super::site::{Site, now};
use super::{GoogleArguments, ProjectArguments, Surroundings, failure};
use crate::bring_up::{
    Cause, Error, Exception, Expected, Gate, HttpNode, Machine, Measured, Milestone, Observer, Pending,
    Record, Registrar, Verifier, Wanted, bring_up, time_of,
};
use crate::gcp_tdx::{GcpMachine, Replace};
use crate::project::{KeyProvider, check_guest_image};
use crate::vmm::command::VmmArguments;
use crate::vmm::{self, VmmMachine};

/// Name of the file that says how the KMS is recognised, in the project.
const KMS_FILE: &str = "kms.json";
/// Kind of evidence that a TDX machine on GCP gives.
const GCP_TDX: &str = "dstack-gcp-tdx";
/// Kind of evidence that a TDX machine of one's own gives.
const TDX: &str = "dstack-tdx";

/// Arguments of `up`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  keyferry kms up --domain kms.example.com --operator 198.51.100.7/32
  keyferry kms up --domain kms.example.com --operator 198.51.100.7/32 --clients 203.0.113.0/24 --register
  keyferry kms up --domain kms.example.com --operator 198.51.100.7/32 --wait boot=30m
  keyferry kms up --target vmm --domain kms.example.com --clients 0.0.0.0/0 --os-image-hash $OS_IMAGE_HASH

With --target vmm the KMS's port is on the host's loopback until it serves: run this on the host, or at the end of
a tunnel, ssh -L 9080:127.0.0.1:9080 -L 12001:127.0.0.1:12001 HOST.

Run it again after any failure: it goes on from there. While the KMS is set up its port is open to --operator
alone, afterwards to --clients alone. kms.json, which it writes at the end, is what images pin:
  [kms]
  file = \"kms.json\"")]
pub struct Up {
    #[command(flatten)]
    common: Common,
}

/// Arguments of `join`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  keyferry kms join ../kms-a --domain kms-b.example.com --operator 198.51.100.7/32

The source's port must be open to the new machine. Nothing is believed that has other keys than kms.json of the
source.")]
pub struct Join {
    /// The KMS whose keys are taken over: its project folder, or its kms.json
    #[arg(value_name = "SOURCE")]
    source: PathBuf,
    #[command(flatten)]
    common: Common,
}

/// Where the machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Target {
    /// A TDX machine on GCP
    Gcp,
    /// A machine of the dstack-vmm on a TDX host
    Vmm,
}

#[derive(Debug, Args)]
struct Common {
    /// Where the machine is
    #[arg(long, value_enum, default_value = "gcp")]
    target: Target,
    /// The name clients will reach the KMS by
    #[arg(long, value_name = "NAME")]
    domain: String,
    /// Addresses that set the KMS up; repeat it for more; not with vmm, where only the host itself does
    #[arg(long, value_name = "CIDR", value_parser = operator)]
    operator: Vec<IpNet>,
    /// Addresses that may reach the KMS when it serves; nobody without it; with vmm everybody, 0.0.0.0/0
    #[arg(long, value_name = "CIDR")]
    clients: Vec<IpNet>,
    /// Port of the KMS on the machine; with vmm, of the host
    #[arg(long, env = "KMS_PORT", default_value_t = 12001, value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,
    /// The image hash the machine must have; that of the image's own files, found below image_search_paths, when not given
    #[arg(long, value_name = "HEX")]
    os_image_hash: Option<String>,
    /// The aggregated measurement the machine must have, when it is known
    #[arg(long, value_name = "HEX")]
    mr_aggregated: Option<String>,
    /// The hash of the device id the machine must have, when it is known
    #[arg(long, value_name = "HEX")]
    device_id: Option<String>,
    /// The contract the KMS must follow
    #[arg(long, value_name = "ADDRESS", env = "KMS_CONTRACT_ADDR")]
    kms_contract: Option<String>,
    /// The kind of evidence the machine must give: dstack-gcp-tdx, with vmm dstack-tdx, when not given
    #[arg(long, value_name = "NAME", env = "KMS_PLATFORM")]
    platform: Option<String>,
    /// Settings of a KMS whose core.attestation says what evidence is verified against
    #[arg(long, value_name = "FILE", env = "KMS_TRUST")]
    trust: Option<PathBuf>,
    /// Register the measurements as `keyferry chain` does, with its variables (RPC_URL, KMS_CONTRACT_ADDR, PRIVATE_KEY)
    #[arg(long)]
    register: bool,
    /// File with the token that the KMS asks for (core.onboard.token); the variable KMS_ONBOARD_TOKEN does too
    #[arg(long, value_name = "FILE")]
    onboard_token_file: Option<PathBuf>,
    /// Do not wait until the name leads to the machine; with vmm it is never waited for
    #[arg(long)]
    no_name_check: bool,
    /// Wait longer or shorter: NAME=TIME, such as boot=30m; repeat it for more
    #[arg(long, value_name = "NAME=TIME")]
    wait: Vec<Exception>,
    /// Ask the KMS on for so long once it serves, such as 10m, and let clients in only when it keeps answering
    #[arg(long, value_name = "TIME", value_parser = watch)]
    watch: Option<Duration>,
    /// Answer as JSON
    #[arg(long)]
    json: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    project: ProjectArguments,
    #[command(flatten)]
    google: GoogleArguments,
    #[command(flatten)]
    vmm: VmmArguments,
}

impl Common {
    /// Whether those named can be told apart where the machine is.
    fn check_visitors(&self) -> Result<(), Failure> {
        let usage = |text: &str, hint: &str| Err(Failure::new(Exit::Usage, text).with_hint(hint));
        match self.target {
            Target::Gcp if self.operator.is_empty() => {
                usage("--operator is missing: who sets the KMS up?", "name your own address, 198.51.100.7/32")
            }
            Target::Vmm if !self.operator.is_empty() => usage(
                "--operator: a VMM cannot tell one visitor from another, so only its host sets the KMS up",
                "leave it out, and run this on the host or at the end of a tunnel to it",
            ),
            Target::Vmm if self.clients.iter().any(|network| network.prefix_len() != 0) => usage(
                "--clients: a VMM lets in everybody or nobody, expected 0.0.0.0/0",
                "keep others out with the host's firewall",
            ),
            _ => Ok(()),
        }
    }

    fn platform(&self) -> &str {
        let usual = match self.target {
            Target::Gcp => GCP_TDX,
            Target::Vmm => TDX,
        };
        self.platform.as_deref().unwrap_or(usual)
    }

    fn token(&self) -> Result<Option<Zeroizing<String>>, Failure> {
        let token = match &self.onboard_token_file {
            Some(path) => std::fs::read_to_string(path)
                .map(|text| Some(Zeroizing::new(text)))
                .map_err(|error| failure(crate::Error::file("read", path)(error)))?,
            None => std::env::var("KMS_ONBOARD_TOKEN").ok().map(Zeroizing::new),
        };
        Ok(token.map(|it| Zeroizing::new(it.trim().to_owned())).filter(|it| !it.is_empty()))
    }
}

/// Whoever can reach the port can set the KMS up: that cannot be everybody.
fn operator(text: &str) -> Result<IpNet, String> {
    let network: IpNet = text.parse().map_err(|_| "expected a network such as 198.51.100.7/32".to_owned())?;
    match network.prefix_len() {
        0 => Err("everybody could set up the KMS; name your own address".to_owned()),
        _ => Ok(network),
    }
}

fn watch(text: &str) -> Result<Duration, String> {
    time_of(text).ok_or_else(|| "expected a time such as 90s, 20m or 2h".to_owned())
}

pub(super) async fn up(arguments: Up, surroundings: &dyn Surroundings) -> Result<(), Failure> {
    on_target(arguments.common, None, surroundings).await
}

pub(super) async fn join(arguments: Join, surroundings: &dyn Surroundings) -> Result<(), Failure> {
    let source = read_kms_file(&arguments.source)?;
    on_target(arguments.common, Some(source), surroundings).await
}

/// The file itself, or the one in a project.
fn read_kms_file(path: &Path) -> Result<KmsFile, Failure> {
    let path = if path.is_dir() { path.join(KMS_FILE) } else { path.to_owned() };
    let bytes = std::fs::read(&path).map_err(|error| {
        let failure = failure(crate::Error::file("read", &path)(error));
        failure.with_hint(
            "name the project folder of a KMS that `keyferry kms up` has brought up, or its kms.json",
        )
    })?;
    KmsFile::decode(&bytes).map_err(|error| {
        Failure::new(Exit::Usage, std::io::Error::other(format!("{}: {error}", path.display())))
    })
}

async fn on_target(
    arguments: Common,
    source: Option<KmsFile>,
    surroundings: &dyn Surroundings,
) -> Result<(), Failure> {
    // What can be wrong on this machine is found before anything is made.
    arguments.check_visitors()?;
    let registrar: Box<dyn Registrar> = match arguments.register {
        true => surroundings.registrar(arguments.yes),
        false => Box::new(ByHand),
    };
    let job = Job {
        verifier: surroundings.verifier(arguments.trust.as_deref())?,
        registrar,
        node: HttpNode::new(arguments.token()?),
        arguments,
        source,
    };
    match job.arguments.target {
        Target::Gcp => on_gcp(job).await,
        Target::Vmm => on_vmm(job).await,
    }
}

/// What is to be done, wherever the machine is.
struct Job {
    arguments: Common,
    source: Option<KmsFile>,
    verifier: Box<dyn Verifier>,
    registrar: Box<dyn Registrar>,
    node: HttpNode,
}

async fn on_gcp(job: Job) -> Result<(), Failure> {
    let arguments = &job.arguments;
    let (site, deployment, client) = opened(&arguments.project, &arguments.google).await?;
    let (mut deployment, prepared) = prepared(site, deployment).await?;
    let plan = deployment.plan(&client, &prepared, &Replace::No, false).await.map_err(failure)?;
    if !plan.steps().is_empty() {
        ask(plan.to_string(), arguments.yes).await?;
    }
    let (compose, app) = (prepared.files.compose(), deployment.app());
    let app_id = match app.key_provider {
        KeyProvider::Kms => app.app_id.clone(),
        _ => hex::encode(compose.app_id()),
    };
    let expected = expected(arguments, &prepared.os_image_hash, &compose.hash(), app_id);
    let (directory, record) = (deployment.project().directory().to_owned(), deployment.bring_up_record());
    let mut teller = Teller::default();
    let mut machine = GcpMachine::new(&mut deployment, &client, &prepared, arguments.port, &mut teller, now);
    let open = format!("keyferry kms fw allow {}", arguments.port);
    carry_out(&mut machine, &job, expected, (&directory, &record), &open).await
}

async fn on_vmm(job: Job) -> Result<(), Failure> {
    let arguments = &job.arguments;
    let site = Site::read()?;
    let (mut deployment, client) = vmm::command::opened(&arguments.project, &arguments.vmm)?;
    if !client.is_local() {
        let text = format!("VMM {}: the KMS is set up from its host alone", client.address());
        let hint = format!(
            "run this on the host, or through a tunnel: ssh -L 9080:127.0.0.1:9080 -L {0}:127.0.0.1:{0} HOST",
            arguments.port
        );
        return Err(Failure::new(Exit::Usage, text).with_hint(hint));
    }
    for doubt in deployment.project().doubts(deployment.app()).map_err(failure)? {
        tracing::warn!("{doubt}");
    }
    let mut prepared = deployment.prepare(&site.settings).map_err(failure)?;
    let os_image_hash = match &arguments.os_image_hash {
        Some(hash) => hash.clone(),
        None => guest_image_hash(&site, &deployment).await?,
    };
    let there = deployment.check(&client, &prepared).await.map_err(failure)?;
    let plan = vmm::command::plan(&prepared, &client);
    let app_id = hex::encode(prepared.compose.app_id());
    let expected = expected(arguments, &os_image_hash, &prepared.compose.hash(), app_id);
    let (directory, record) = (deployment.project().directory().to_owned(), deployment.bring_up_record());
    let machine = VmmMachine::new(&mut deployment, &client, &mut prepared, arguments.port, now);
    let mut machine = machine.map_err(failure)?;
    if !arguments.clients.is_empty() && machine.published().is_loopback() {
        let problem = format!("publishes port {} on loopback alone, where no client is", arguments.port);
        return Err(failure(crate::Error::Setting { setting: "vmm_config.ports", problem }));
    }
    if there.is_none() {
        ask(plan, arguments.yes).await?;
    }
    let open = "the same command with --clients 0.0.0.0/0";
    carry_out(&mut machine, &job, expected, (&directory, &record), open).await
}

/// The hash of the project's guest image by its own files, when they are on this machine: the VMM does not tell it.
async fn guest_image_hash(site: &Site, deployment: &vmm::Deployment) -> Result<String, Failure> {
    let image = deployment.app().os_image.clone();
    let directories = site.settings.image_directories(&site.home, deployment.project().directory());
    let Some(directory) = directories.iter().map(|it| it.join(&image)).find(|it| it.is_dir()) else {
        let text = format!("guest image {image}: its hash is not known here");
        let hint =
            "give --os-image-hash, as the release names it and `keyferry kms pull --bare-metal` shows it";
        return Err(Failure::new(Exit::Usage, text).with_hint(hint));
    };
    let checked = tokio::task::spawn_blocking(move || check_guest_image(&directory, &image)).await;
    checked.map_err(|error| Failure::new(Exit::Internal, error))?.map_err(failure)
}

async fn ask(plan: String, yes: bool) -> Result<(), Failure> {
    let asked = tokio::task::spawn_blocking(move || confirm(&plan, "carry this out?", yes)).await;
    asked.map_err(|error| Failure::new(Exit::Internal, error))?
}

/// `open` is what opens the port to clients later.
async fn carry_out(
    machine: &mut impl Machine,
    job: &Job,
    expected: Expected,
    (directory, record): (&Path, &Path),
    open: &str,
) -> Result<(), Failure> {
    let Job { arguments, source, verifier, registrar, node } = job;
    let kms_file = directory.join(KMS_FILE);
    let wanted = Wanted {
        domain: arguments.domain.clone(),
        source: source.clone(),
        operators: arguments.operator.clone(),
        clients: arguments.clients.clone(),
        // The host of a VMM reaches the KMS over loopback, whatever its name leads to.
        check_name: !arguments.no_name_check && arguments.target == Target::Gcp,
        watch: arguments.watch.unwrap_or_default(),
        expected,
        patience: arguments.wait.iter().copied().collect(),
        kms_file: &kms_file,
    };
    let mut record = Record::open(record, wanted.role(), &wanted.domain).map_err(failure)?;
    let judges = (verifier.as_ref(), registrar.as_ref());
    let mut diary = Diary::default();
    let outcome = bring_up(machine, node, judges, &wanted, &mut record, &mut diary).await;
    let outcome = outcome.map_err(bring_up_failure)?;
    let KmsFile { url, ca_pubkey, k256_pubkey, node, .. } = &outcome.file;
    if arguments.json {
        let file = serde_json::to_value(&outcome.file).map_err(|it| Failure::new(Exit::Internal, it))?;
        print_line(&json!({"version": 1, "asBefore": outcome.as_before, "kms": file}).to_string());
        return Ok(());
    }
    print_line(&format!(
        "{url}\n  root CA key    {ca_pubkey}\n  K256 root      {k256_pubkey}\n  image          {}\n  \
         mr_aggregated  {}\nwritten to {}",
        node.os_image_hash,
        node.mr_aggregated,
        kms_file.display()
    ));
    if wanted.clients.is_empty() {
        tracing::info!("the port is closed to clients; what opens it: {open}");
    }
    Ok(())
}

fn expected(arguments: &Common, os_image_hash: &str, compose_hash: &[u8; 32], app_id: String) -> Expected {
    let bare = |text: &str| text.trim_start_matches("0x").to_lowercase();
    let os_image_hash = bare(arguments.os_image_hash.as_deref().unwrap_or(os_image_hash));
    Expected {
        tee_variant: arguments.platform().to_owned(),
        compose_hash: match arguments.platform() {
            // An enclave runs what its image holds, and has no other hash.
            TEE_VARIANT_NITRO => os_image_hash.clone(),
            _ => hex::encode(compose_hash),
        },
        os_image_hash,
        app_id,
        mr_aggregated: arguments.mr_aggregated.as_deref().map(bare),
        device_id: arguments.device_id.as_deref().map(bare),
        kms_contract: arguments.kms_contract.clone(),
    }
}

/// How a bring-up that failed ends the program.
pub(super) fn bring_up_failure(error: Error) -> Failure {
    let error = match error {
        Error::Machine(error) => return failure(error),
        error => error,
    };
    let exit = match &error {
        error if error.is_late() => Exit::NoAnswer,
        Error::OtherRole { .. } => Exit::Usage,
        _ => Exit::Refused,
    };
    let hint = error.hint();
    let failure = Failure::new(exit, error);
    match hint {
        Some(hint) => failure.with_hint(hint),
        None => failure,
    }
}

/// Somebody else registers.
struct ByHand;

impl Registrar for ByHand {
    fn register<'a>(&'a self, _measured: &'a Measured) -> Pending<'a, Result<bool, Cause>> {
        Box::pin(std::future::ready(Ok(false)))
    }
}

/// Tells the way on standard error.
#[derive(Default)]
pub(super) struct Diary {
    /// What was told of the current wait: the same is not told twice.
    last: String,
}

impl Observer for Diary {
    fn reached(&mut self, what: &str) {
        tracing::info!("{what}");
    }

    fn waiting(&mut self, gate: Gate, last: &str) {
        if self.last != last {
            tracing::info!(%gate, seen = last, "waiting for {}", gate.waits_for());
            last.clone_into(&mut self.last);
        }
    }

    fn milestone(&mut self, milestone: Milestone) {
        tracing::info!("console: {}", milestone.name());
    }

    fn to_register(&mut self, measured: &Measured) {
        tracing::info!(
            "register these with the KMS's authoriser; this command waits. On the KMS contract:\n  {}",
            measured.commands().join("\n  ")
        );
    }
}
