//! `up` and `join`: a KMS from a project folder to serving.

use std::path::{Path, PathBuf};

use clap::Args;
use command_line::{Exit, Failure, confirm, print_line};
use ipnet::IpNet;
use kms_protocol::kms_file::KmsFile;
use kms_protocol::wire::webhook::TEE_VARIANT_NITRO;
use serde_json::json;

use super::machine::{Teller, opened, prepared};
use super::site::now;
use super::{GoogleArguments, ProjectArguments, Surroundings, failure};
use crate::bring_up::{
    Cause, Error, Exception, Expected, Gate, HttpNode, Measured, Milestone, Observer, Pending, Record,
    Registrar, Wanted, bring_up,
};
use crate::gcp_tdx::{Deployment, GcpMachine, Prepared, Replace};
use crate::project::KeyProvider;

/// Name of the file that says how the KMS is recognised, in the project.
const KMS_FILE: &str = "kms.json";
/// Kind of evidence that a TDX machine on GCP gives.
const GCP_TDX: &str = "dstack-gcp-tdx";

/// Arguments of `up`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  keyferry kms up --domain kms.example.com --operator 198.51.100.7/32
  keyferry kms up --domain kms.example.com --operator 198.51.100.7/32 --clients 203.0.113.0/24 --register
  keyferry kms up --domain kms.example.com --operator 198.51.100.7/32 --wait boot=30m

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

#[derive(Debug, Args)]
struct Common {
    /// The name clients will reach the KMS by
    #[arg(long, value_name = "NAME")]
    domain: String,
    /// Addresses that set the KMS up; repeat it for more
    #[arg(long, value_name = "CIDR", required = true, value_parser = operator)]
    operator: Vec<IpNet>,
    /// Addresses that may reach the KMS when it serves; nobody without it
    #[arg(long, value_name = "CIDR")]
    clients: Vec<IpNet>,
    /// Port of the KMS on the machine
    #[arg(long, env = "KMS_PORT", default_value_t = 12001, value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,
    /// The image hash the machine must have; that of the image's own files when not given
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
    /// The kind of evidence the machine must give
    #[arg(long, value_name = "NAME", env = "KMS_PLATFORM", default_value = GCP_TDX)]
    platform: String,
    /// Settings of a KMS whose core.attestation says what evidence is verified against
    #[arg(long, value_name = "FILE", env = "KMS_TRUST")]
    trust: Option<PathBuf>,
    /// Register the measurements as `keyferry chain` does, with its variables (RPC_URL, KMS_CONTRACT_ADDR, PRIVATE_KEY)
    #[arg(long)]
    register: bool,
    /// Do not wait until the name leads to the machine
    #[arg(long)]
    no_name_check: bool,
    /// Wait longer or shorter: NAME=TIME, such as boot=30m; repeat it for more
    #[arg(long, value_name = "NAME=TIME")]
    wait: Vec<Exception>,
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
}

/// Whoever can reach the port can set the KMS up: that cannot be everybody.
fn operator(text: &str) -> Result<IpNet, String> {
    let network: IpNet = text.parse().map_err(|_| "expected a network such as 198.51.100.7/32".to_owned())?;
    match network.prefix_len() {
        0 => Err("everybody could set up the KMS; name your own address".to_owned()),
        _ => Ok(network),
    }
}

pub(super) async fn up(arguments: Up, surroundings: &dyn Surroundings) -> Result<(), Failure> {
    on_gcp(arguments.common, None, surroundings).await
}

pub(super) async fn join(arguments: Join, surroundings: &dyn Surroundings) -> Result<(), Failure> {
    let source = read_kms_file(&arguments.source)?;
    on_gcp(arguments.common, Some(source), surroundings).await
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

async fn on_gcp(
    arguments: Common,
    source: Option<KmsFile>,
    surroundings: &dyn Surroundings,
) -> Result<(), Failure> {
    // What can be wrong on this machine is found before anything is made.
    let verifier = surroundings.verifier(arguments.trust.as_deref())?;
    let (site, deployment, client) = opened(&arguments.project, &arguments.google).await?;
    let (mut deployment, prepared) = prepared(site, deployment).await?;
    let expected = expected(&arguments, &deployment, &prepared);
    let plan = deployment.plan(&client, &prepared, &Replace::No, false).await.map_err(failure)?;
    if !plan.steps().is_empty() {
        let (shown, yes) = (plan.to_string(), arguments.yes);
        let asked = tokio::task::spawn_blocking(move || confirm(&shown, "carry this out?", yes)).await;
        asked.map_err(|error| Failure::new(Exit::Internal, error))??;
    }
    let registrar: Box<dyn Registrar> = match arguments.register {
        true => surroundings.registrar(arguments.yes),
        false => Box::new(ByHand),
    };
    let directory = deployment.project().directory().to_owned();
    let kms_file = directory.join(KMS_FILE);
    let wanted = Wanted {
        domain: arguments.domain,
        source,
        operators: arguments.operator,
        clients: arguments.clients,
        check_name: !arguments.no_name_check,
        expected,
        patience: arguments.wait.into_iter().collect(),
        kms_file: &kms_file,
    };
    let record = Record::open(&deployment.bring_up_record(), wanted.role(), &wanted.domain);
    let mut record = record.map_err(failure)?;
    let mut teller = Teller::default();
    let mut machine = GcpMachine::new(&mut deployment, &client, &prepared, arguments.port, &mut teller, now);
    let judges = (verifier.as_ref(), registrar.as_ref());
    let mut diary = Diary::default();
    let outcome = bring_up(&mut machine, &HttpNode, judges, &wanted, &mut record, &mut diary).await;
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
        tracing::info!("the port is closed; open it with `keyferry kms fw allow {}`", arguments.port);
    }
    Ok(())
}

fn expected(arguments: &Common, deployment: &Deployment, prepared: &Prepared) -> Expected {
    let bare = |text: &String| text.trim_start_matches("0x").to_lowercase();
    let compose = prepared.files.compose();
    let app = deployment.app();
    let os_image_hash = arguments.os_image_hash.as_ref().map_or_else(|| prepared.os_image_hash.clone(), bare);
    Expected {
        tee_variant: arguments.platform.clone(),
        compose_hash: match arguments.platform.as_str() {
            // An enclave runs what its image holds, and has no other hash.
            TEE_VARIANT_NITRO => os_image_hash.clone(),
            _ => hex::encode(compose.hash()),
        },
        os_image_hash,
        app_id: match app.key_provider {
            KeyProvider::Kms => app.app_id.clone(),
            _ => hex::encode(compose.app_id()),
        },
        mr_aggregated: arguments.mr_aggregated.as_ref().map(bare),
        device_id: arguments.device_id.as_ref().map(bare),
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
