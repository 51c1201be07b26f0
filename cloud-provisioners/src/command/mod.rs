//! The command line: what dstack-cloud offers for GCP, under the same names; and [`host`], the EC2 host of an enclave.

mod bring_up;
mod firewall;
pub mod host;
pub mod host_access;
pub(crate) mod machine;
mod new;
mod pull;
pub(crate) mod site;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use command_line::{Exit, Failure};

use crate::bring_up::{Registrar, Verifier};
use crate::ec2_nitro::AwsError;
use crate::{Error, gcp, vmm};

/// What to do with a project's machine.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Makes a project folder
    New(new::New),
    /// Opens the global settings in $EDITOR
    ConfigEdit,
    /// Generates what goes onto the configuration volume, and prints the compose hash
    Prepare(new::Prepare),
    /// Deploys the project as a TDX machine on GCP
    Deploy(machine::Deploy),
    /// Brings a new KMS up: deploys the project, has the KMS make its keys, verifies them, writes kms.json
    Up(bring_up::Up),
    /// Brings a second node up: deploys the project, has its KMS take over another one's keys
    Join(bring_up::Join),
    /// Shows the machine
    Status(machine::Status),
    /// Shows what the machine prints on its serial port
    Logs(machine::Logs),
    /// Stops the machine; its disks stay and cost money
    Stop(machine::Act),
    /// Starts a stopped machine
    Start(machine::Act),
    /// Removes the machine, its configuration and its firewall rules
    Remove(machine::Remove),
    /// Lists the machines made by keyferry in a Google project
    List(machine::List),
    /// Fetches an OS image and checks that it is the variant that boots
    Pull(pull::Pull),
    /// The machine of a project on a bare-metal TDX host
    #[command(subcommand)]
    Vmm(vmm::command::Command),
    /// Opens and closes ports of the machine
    #[command(subcommand)]
    Fw(firewall::Command),
}

/// What the program around this library lends it: evidence is verified, and measurements are registered, elsewhere.
pub trait Surroundings {
    /// Who judges evidence, with the anchors in a KMS's settings if given.
    ///
    /// # Errors
    ///
    /// A [`Failure`] when the settings cannot be used.
    fn verifier(&self, trust: Option<&Path>) -> Result<Box<dyn Verifier>, Failure>;

    /// Who registers measurements; asks before each unless `yes`.
    fn registrar(&self, yes: bool) -> Box<dyn Registrar>;
}

/// Where the project is.
#[derive(Debug, Args)]
pub struct ProjectArguments {
    /// The project folder
    #[arg(short = 'C', long, value_name = "DIR", default_value = ".")]
    pub directory: PathBuf,
}

/// How to reach Google.
#[derive(Debug, Args)]
pub struct GoogleArguments {
    /// Act as this service account
    #[arg(long, value_name = "EMAIL", env = "CLOUDSDK_AUTH_IMPERSONATE_SERVICE_ACCOUNT")]
    pub impersonate_service_account: Option<String>,
}

/// Carries a command out.
///
/// # Errors
///
/// A [`Failure`]: 2 for a project or setting that cannot work, 3 when Google or a check refused, 4 when no answer came in
/// time, 1 otherwise.
pub async fn run(command: Command, surroundings: &dyn Surroundings) -> Result<(), Failure> {
    match command {
        Command::New(arguments) => new::new(&arguments),
        Command::ConfigEdit => new::config_edit().await,
        Command::Prepare(arguments) => new::prepare(&arguments),
        Command::Deploy(arguments) => machine::deploy(arguments).await,
        Command::Up(arguments) => bring_up::up(arguments, surroundings).await,
        Command::Join(arguments) => bring_up::join(arguments, surroundings).await,
        Command::Status(arguments) => machine::status(arguments).await,
        Command::Logs(arguments) => machine::logs(arguments).await,
        Command::Stop(arguments) => machine::stop(arguments).await,
        Command::Start(arguments) => machine::start(arguments).await,
        Command::Remove(arguments) => machine::remove(arguments).await,
        Command::List(arguments) => machine::list(arguments).await,
        Command::Pull(arguments) => pull::pull(arguments).await,
        Command::Vmm(command) => vmm::command::run(command).await,
        Command::Fw(command) => firewall::run(command).await,
    }
}

/// How the failure of a library call ends the program.
#[must_use]
pub fn failure(error: Error) -> Failure {
    let exit = match &error {
        Error::Google(error) if error.is_no_answer() => Exit::NoAnswer,
        Error::Aws(error) if error.is_no_answer() => Exit::NoAnswer,
        Error::Aws(AwsError::NoRegion) => Exit::Usage,
        Error::Aws(AwsError::Incomplete { .. }) => Exit::Internal,
        Error::Google(
            gcp::Error::Refused { .. } | gcp::Error::Operation { .. } | gcp::Error::Credentials { .. },
        )
        | Error::Refused(_)
        | Error::Aws(_)
        | Error::Ec2(_)
        | Error::Locked { .. }
        | Error::NoHost { .. }
        | Error::VmmRefused(_)
        | Error::NotOurs { .. }
        | Error::EnvironmentKey { .. }
        | Error::NoInstance { .. } => Exit::Refused,
        Error::Vmm(error) if error.is_no_answer() => Exit::NoAnswer,
        Error::Vmm(error) if error.is_refusal() => Exit::Refused,
        Error::Registry(error) if error.is_no_answer() => Exit::NoAnswer,
        Error::Registry(_) => Exit::Refused,
        Error::Pull(error) => error.exit(),
        Error::Google(_) | Error::HttpClient(_) | Error::Random | Error::Disk { .. } => Exit::Internal,
        _ => Exit::Usage,
    };
    let hint = error.hint();
    let failure = Failure::new(exit, error);
    match hint {
        Some(hint) => failure.with_hint(hint),
        None => failure,
    }
}
