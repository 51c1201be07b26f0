//! `fw`: ports of the machine.

use clap::{Args, Subcommand};
use command_line::{Failure, print_line};
use ipnet::IpNet;

use super::site::{Site, client};
use super::{GoogleArguments, ProjectArguments, failure};
use crate::gcp_tdx::firewall::{self, Action, Outcome, Port};

/// What to do with the machine's ports.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Lets traffic to a port in
    Allow(Set),
    /// Keeps traffic to a port out, whatever lets it in
    Deny(Set),
    /// Removes the rules for a port
    Remove(Remove),
    /// Lists the rules for the machine
    List(List),
}

/// Arguments of `fw allow` and `fw deny`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  keyferry kms fw allow 12001 --source 198.51.100.7/32
  keyferry kms fw deny 18000")]
pub struct Set {
    /// PORT, PORT/tcp or PORT/udp
    port: Port,
    /// Addresses the rule is for; repeat it for more
    #[arg(short, long, value_name = "CIDR", default_value = "0.0.0.0/0")]
    source: Vec<IpNet>,
    #[command(flatten)]
    project: ProjectArguments,
    #[command(flatten)]
    google: GoogleArguments,
}

/// Arguments of `fw remove`.
#[derive(Debug, Args)]
pub struct Remove {
    /// PORT, PORT/tcp or PORT/udp
    port: Port,
    #[command(flatten)]
    project: ProjectArguments,
    #[command(flatten)]
    google: GoogleArguments,
}

/// Arguments of `fw list`.
#[derive(Debug, Args)]
pub struct List {
    #[command(flatten)]
    project: ProjectArguments,
    #[command(flatten)]
    google: GoogleArguments,
}

pub(super) async fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Allow(arguments) => set(Action::Allow, arguments).await,
        Command::Deny(arguments) => set(Action::Deny, arguments).await,
        Command::Remove(arguments) => remove(arguments).await,
        Command::List(arguments) => list(arguments).await,
    }
}

async fn set(action: Action, arguments: Set) -> Result<(), Failure> {
    let deployment = Site::read()?.open(&arguments.project)?;
    let config = deployment.config();
    config.validate().map_err(failure)?;
    let sources: Vec<String> = arguments.source.iter().map(IpNet::to_string).collect();
    let client = client(&config.project, &arguments.google).await?;
    let outcome = firewall::set(&client, config, action, arguments.port, &sources).await.map_err(failure)?;
    let (verb, port) = (if action == Action::Allow { "let in" } else { "kept out" }, arguments.port);
    let before = match outcome {
        Outcome::Made => "",
        Outcome::Changed => " (before: other sources)",
        Outcome::Unchanged => " (as before)",
    };
    print_line(&format!("{port} from {} is {verb}{before}", sources.join(", ")));
    Ok(())
}

async fn remove(arguments: Remove) -> Result<(), Failure> {
    let deployment = Site::read()?.open(&arguments.project)?;
    let config = deployment.config();
    config.validate().map_err(failure)?;
    let client = client(&config.project, &arguments.google).await?;
    let removed =
        firewall::remove(&client, config, arguments.port).await.map_err(|error| failure(error.into()))?;
    match removed.as_slice() {
        [] => print_line(&format!("there is no rule for {}", arguments.port)),
        removed => removed.iter().for_each(|name| print_line(&format!("removed {name}"))),
    }
    Ok(())
}

async fn list(arguments: List) -> Result<(), Failure> {
    let deployment = Site::read()?.open(&arguments.project)?;
    let config = deployment.config();
    config.validate().map_err(failure)?;
    let client = client(&config.project, &arguments.google).await?;
    for rule in firewall::list(&client, config).await.map_err(|error| failure(error.into()))? {
        let (verb, ports) =
            if rule.denied.is_empty() { ("allow", &rule.allowed) } else { ("deny", &rule.denied) };
        let ports: Vec<String> =
            ports.iter().map(|it| format!("{} {}", it.protocol, it.ports.join(","))).collect();
        print_line(&format!(
            "{}  {verb} {}  from {}",
            rule.name,
            ports.join("; "),
            rule.source_ranges.join(", ")
        ));
    }
    Ok(())
}
