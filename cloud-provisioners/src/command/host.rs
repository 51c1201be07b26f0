//! `keyferry host`: the EC2 host of a Nitro Enclave.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use command_line::{Exit, Failure, confirm, print_line};
use ipnet::IpNet;
use serde_json::{Value, json};

use super::failure;
use crate::Error;
use crate::ec2_nitro::{
    Access, Client, Deployment, ImageChoice, Instance, KernelLine, Observer, Patience, Place, Step, Wanted,
    Which, default_key_file,
};
use crate::nitro_host::HostKey;

/// Longest wait for the service that tells the caller's address.
const ADDRESS_WAIT: Duration = Duration::from_secs(20);
/// Longer than any answer of that service.
const LONGEST_ADDRESS: usize = 64;

/// What to do with a host.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Makes the host, or goes on with making it
    Up(Box<Up>),
    /// Shows the host
    Status(Status),
    /// Lists the hosts made by keyferry in a region
    List(List),
    /// Removes the host and everything that was made for it
    Down(Down),
}

/// Where the host's records are.
#[derive(Debug, Args)]
pub struct HostArguments {
    /// The host's directory: deployment.json and the records of this program
    #[arg(short = 'C', long, value_name = "DIR", default_value = ".")]
    pub directory: PathBuf,
}

/// Who asks AWS.
#[derive(Debug, Args)]
pub struct AwsArguments {
    /// Profile of ~/.aws/config
    #[arg(long, value_name = "NAME", env = "AWS_PROFILE")]
    pub profile: Option<String>,
}

/// Where in AWS.
#[derive(Debug, Args)]
pub struct RegionArguments {
    /// AWS region; the profile's when not given
    #[arg(long, env = "AWS_REGION", value_parser = region)]
    pub region: Option<String>,
}

/// Arguments of `up`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  keyferry host up                                 a c5.xlarge in the default VPC, SSH from your address
  keyferry host up --region eu-west-1 --spot --yes
  keyferry host up --ssm --instance-profile NAME   no open port at all
  keyferry host up --instance-connect              no key pair: a new key for each connection
  keyferry host up --adopt i-0123456789abcdef0 --key ~/.ssh/id_ed25519

It shows what it is going to do and asks. Cut anywhere, it goes on from there when run again with the
same options. An instance costs money until `keyferry host down`.")]
pub struct Up {
    #[command(flatten)]
    host: HostArguments,
    #[command(flatten)]
    aws: AwsArguments,
    #[command(flatten)]
    place: RegionArguments,
    /// The instance's Name tag
    #[arg(long, default_value = "nitro-enclave-host")]
    name: String,
    /// Instance type: one that supports enclaves, with 4 vCPUs or more
    #[arg(short = 't', long, value_name = "TYPE", default_value = "c5.xlarge")]
    instance_type: String,
    /// Size of the encrypted root disk
    #[arg(long, value_name = "GIB", default_value_t = 20, value_parser = clap::value_parser!(i32).range(8..=16384))]
    volume: i32,
    /// Subnet; one of the default VPC when not given
    #[arg(long, value_name = "ID")]
    subnet: Option<String>,
    /// Image; Amazon Linux 2023 when not given
    #[arg(long, value_name = "AMI", conflicts_with = "kernel")]
    image: Option<String>,
    /// Kernel of Amazon Linux 2023
    #[arg(long, value_parser = kernel, default_value = "6.1")]
    kernel: KernelLine,
    /// User to log in as; told by the image when not given
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// Private key to log in with, or the public half of one that the SSH agent has; made when it is not there
    #[arg(short = 'i', long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// Log in with a new key for each connection, by EC2 Instance Connect: no key pair, and no key in a file
    #[arg(long, conflicts_with_all = ["key", "key_name", "adopt"])]
    instance_connect: bool,
    /// Name of its public half in EC2
    #[arg(long, value_name = "NAME")]
    key_name: Option<String>,
    /// The host's own SSH key, `ssh-ed25519 AAAA…`; read from its console when not given
    #[arg(long, value_name = "KEY")]
    host_key: Option<HostKey>,
    /// Let these addresses in to port 22; your own when not given
    #[arg(long, value_name = "CIDR", value_parser = source)]
    ssh_from: Option<IpNet>,
    /// Ask this service for your own address
    #[arg(
        long,
        value_name = "URL",
        env = "KEYFERRY_ADDRESS_SERVICE",
        default_value = "https://checkip.amazonaws.com"
    )]
    address_service: reqwest::Url,
    /// Open no port: SSH goes through AWS Systems Manager (takes the AWS CLI and its Session Manager plugin)
    #[arg(long, requires = "instance_profile", conflicts_with = "ssh_from")]
    ssm: bool,
    /// Instance profile whose role has AmazonSSMManagedInstanceCore
    #[arg(long, value_name = "NAME", requires = "ssm")]
    instance_profile: Option<String>,
    /// Take spare capacity: cheaper, and AWS may end it at any time
    #[arg(long)]
    spot: bool,
    /// Use this instance instead of a new one; its enclave option is switched on
    #[arg(long, value_name = "INSTANCE", conflicts_with_all = ["spot", "subnet", "image", "ssm", "key_name"], requires = "key")]
    adopt: Option<String>,
    /// Answer as JSON
    #[arg(long)]
    json: bool,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
}

/// Arguments of `status`.
#[derive(Debug, Args)]
pub struct Status {
    #[command(flatten)]
    host: HostArguments,
    #[command(flatten)]
    aws: AwsArguments,
    /// Answer as JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `list`.
#[derive(Debug, Args)]
pub struct List {
    #[command(flatten)]
    aws: AwsArguments,
    #[command(flatten)]
    place: RegionArguments,
    /// Also instances made by others
    #[arg(short, long)]
    all: bool,
    /// Answer as JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `down`.
#[derive(Debug, Args)]
#[command(after_help = "\
Removes, in this order: the instance with its disks, the security group, the key pair, and the private
key if it was made here. Only what carries this deployment's id goes. An adopted instance stays.")]
pub struct Down {
    #[command(flatten)]
    host: HostArguments,
    #[command(flatten)]
    aws: AwsArguments,
    /// Show what would go, and remove nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
}

/// Carries a command out.
///
/// # Errors
///
/// A [`Failure`]: 2 for a setting that cannot work, 3 when AWS or a check refused, 4 when no answer came in time, 1
/// otherwise.
pub async fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Up(arguments) => up(*arguments).await,
        Command::Status(arguments) => status(arguments).await,
        Command::List(arguments) => list(arguments).await,
        Command::Down(arguments) => down(arguments).await,
    }
}

fn region(text: &str) -> Result<String, String> {
    let mut characters = text.chars();
    let plausible = text.len() <= 32
        && text.split('-').count() >= 3
        && characters.all(|it| it.is_ascii_lowercase() || it.is_ascii_digit() || it == '-');
    match (plausible, text.char_indices().next_back()) {
        (true, Some((end, last)))
            if last.is_ascii_lowercase() && text[..end].ends_with(|it: char| it.is_ascii_digit()) =>
        {
            Err(format!("that is a zone; its region is {}", &text[..end]))
        }
        (true, Some((_, last))) if last.is_ascii_digit() => Ok(text.to_owned()),
        _ => Err("expected a region, such as us-east-1".to_owned()),
    }
}

fn kernel(text: &str) -> Result<KernelLine, String> {
    [KernelLine::V6_1, KernelLine::V6_12, KernelLine::V6_18]
        .into_iter()
        .find(|line| line.name() == text)
        .ok_or_else(|| "expected 6.1, 6.12 or 6.18".to_owned())
}

/// Addresses in CIDR notation, or one address. AWS refuses ranges with bits beyond their length.
fn source(text: &str) -> Result<IpNet, String> {
    let one = || text.parse::<std::net::IpAddr>().map(IpNet::from);
    let range = text.parse::<IpNet>().or_else(|_| one());
    let range = range.map_err(|_| "expected addresses such as 203.0.113.7/32".to_owned())?;
    match range.prefix_len() {
        0 => Err("that is everybody; give your own addresses".to_owned()),
        _ => Ok(range.trunc()),
    }
}

/// Tells steps on standard error.
struct Teller;

impl Observer for Teller {
    fn step(&mut self, number: usize, total: usize, step: &Step) {
        tracing::debug!(number, total, ?step, "step");
    }

    fn made(&mut self, kind: &str, id: &str) {
        tracing::info!(kind, id, "made");
    }

    fn gone(&mut self, kind: &str, id: &str) {
        tracing::info!(kind, id, "removed");
    }

    fn waiting(&mut self, what: &str) {
        tracing::info!("waiting for {what}");
    }
}

async fn connect(profile: Option<&String>, region: Option<&String>) -> Result<Client, Failure> {
    let place = Place { profile: profile.cloned(), region: region.cloned() };
    Client::connect(&place, Patience::default()).await.map_err(|error| failure(error.into()))
}

async fn up(arguments: Up) -> Result<(), Failure> {
    let directory = absolute(&arguments.host.directory)?;
    let mut deployment = Deployment::open(&directory).map_err(failure)?;
    let recorded = deployment.wanted().map(|wanted| &wanted.region);
    let client =
        connect(arguments.aws.profile.as_ref(), arguments.place.region.as_ref().or(recorded)).await?;
    let wanted = wanted(&arguments, &directory, client.region()).await?;
    let plan = deployment.plan(&client, &wanted).await.map_err(failure)?;
    if plan.steps().iter().any(|step| step.costs() || step.interrupts()) {
        ask(plan.to_string(), arguments.yes).await?;
    }
    let instance = deployment.apply(&client, &plan, &mut Teller).await.map_err(failure)?;
    tell(&deployment, client.region(), &instance, arguments.json)
}

async fn wanted(arguments: &Up, directory: &Path, region: &str) -> Result<Wanted, Failure> {
    let access = match (&arguments.instance_profile, arguments.ssh_from) {
        (Some(instance_profile), _) => Access::Ssm { instance_profile: instance_profile.clone() },
        (None, Some(source)) => Access::Ssh(source),
        // An adopted instance keeps its own rules.
        (None, None) if arguments.adopt.is_some() => Access::Ssh(IpNet::default()),
        (None, None) => Access::Ssh(own_address(&arguments.address_service).await?),
    };
    let key_file = match &arguments.key {
        Some(path) => absolute(path)?,
        None => default_key_file(directory),
    };
    Ok(Wanted {
        region: region.to_owned(),
        name: arguments.name.clone(),
        instance_type: arguments.instance_type.clone(),
        image: match &arguments.image {
            Some(id) => ImageChoice::Id(id.clone()),
            None => ImageChoice::AmazonLinux2023(arguments.kernel),
        },
        subnet: arguments.subnet.clone(),
        access,
        key_name: arguments.key_name.clone(),
        key_file,
        volume_gib: arguments.volume,
        spot: arguments.spot,
        user: arguments.user.clone(),
        host_key: arguments.host_key.clone(),
        adopt: arguments.adopt.clone(),
        instance_connect: arguments.instance_connect,
        profile: arguments.aws.profile.clone(),
    })
}

/// The address this machine is seen with.
async fn own_address(service: &reqwest::Url) -> Result<IpNet, Failure> {
    let failed = |problem: String| {
        let failure = Failure::new(Exit::NoAnswer, format!("{service}: cannot tell your address: {problem}"));
        failure.with_hint("give your addresses with --ssh-from")
    };
    let client = reqwest::Client::builder().timeout(ADDRESS_WAIT).build();
    let client = client.map_err(|error| failed(error.to_string()))?;
    let answer = client.get(service.clone()).send().await.and_then(reqwest::Response::error_for_status);
    let mut answer = answer.map_err(|error| failed(error.without_url().to_string()))?;
    let mut body = Vec::new();
    while let Some(part) = answer.chunk().await.map_err(|error| failed(error.without_url().to_string()))? {
        body.extend_from_slice(&part);
        if body.len() > LONGEST_ADDRESS {
            return Err(failed("expected one address".into()));
        }
    }
    let text = String::from_utf8_lossy(&body);
    let address = text.trim().parse::<std::net::IpAddr>();
    address.map(IpNet::from).map_err(|_| failed(format!("{:?} is no address", text.trim())))
}

async fn ask(plan: String, yes: bool) -> Result<(), Failure> {
    let asked = tokio::task::spawn_blocking(move || confirm(&plan, "carry this out?", yes)).await;
    asked.map_err(|error| Failure::new(Exit::Internal, error))?
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path)
        .map_err(|error| Failure::new(Exit::Usage, format!("{}: {error}", path.display())))
}

fn describe(region: &str, instance: &Instance) -> Value {
    json!({
        "version": 1,
        "instanceId": instance.id,
        "name": instance.name(),
        "region": region,
        "zone": instance.zone,
        "state": instance.state,
        "instanceType": instance.instance_type,
        "architecture": instance.architecture,
        "enclaves": instance.enclaves,
        "spot": instance.spot,
        "publicIp": instance.public_ip,
        "privateIp": instance.private_ip,
        "launched": instance.launched,
        "deployment": instance.deployment(),
    })
}

fn tell(deployment: &Deployment, region: &str, instance: &Instance, as_json: bool) -> Result<(), Failure> {
    let reach = deployment.reach().map_err(failure)?;
    let fingerprint = reach.as_ref().map(|reach| reach.host_key.fingerprint());
    if as_json {
        let mut all = describe(region, instance);
        all["user"] = json!(reach.as_ref().map(|reach| &reach.user));
        all["hostKey"] = json!(reach.as_ref().map(|reach| reach.host_key.to_string()));
        print_line(&all.to_string());
        return Ok(());
    }
    let address = |found: Option<std::net::IpAddr>| found.map_or("none".to_owned(), |it| it.to_string());
    print_line(&format!(
        "instance:    {} ({})\ntype:        {}{}\nregion:      {region}, {}\nstate:       {}\nenclaves:    {}\n\
         public ip:   {}\nprivate ip:  {}\nuser:        {}\nhost key:    {}",
        instance.id,
        instance.name(),
        instance.instance_type,
        if instance.spot { ", spot" } else { "" },
        instance.zone,
        instance.state,
        if instance.enclaves { "on" } else { "off" },
        address(instance.public_ip),
        address(instance.private_ip),
        reach.as_ref().map_or("unknown", |reach| reach.user.as_str()),
        fingerprint.as_deref().unwrap_or("unknown"),
    ));
    Ok(())
}

/// Opens the deployment of a directory that has one.
fn existing(host: &HostArguments) -> Result<Deployment, Failure> {
    let directory = absolute(&host.directory)?;
    if !Deployment::exists(&directory) {
        return Err(failure(Error::NoHost { directory }));
    }
    Deployment::open(&directory).map_err(failure)
}

async fn status(arguments: Status) -> Result<(), Failure> {
    let deployment = existing(&arguments.host)?;
    // Whatever the surroundings say, the host is where it was made.
    let recorded = deployment.wanted().map(|wanted| &wanted.region);
    let client = connect(arguments.aws.profile.as_ref(), recorded).await?;
    match deployment.status(&client).await.map_err(failure)? {
        Some(instance) => tell(&deployment, client.region(), &instance, arguments.json),
        None => Err(failure(Error::NoHost { directory: arguments.host.directory })),
    }
}

async fn list(arguments: List) -> Result<(), Failure> {
    let client = connect(arguments.aws.profile.as_ref(), arguments.place.region.as_ref()).await?;
    let which = if arguments.all { Which::All } else { Which::Managed };
    let mut found = client.instances(which).await.map_err(|error| failure(error.into()))?;
    found.retain(|instance| !instance.is_terminated());
    found.sort_by(|one, other| (one.name(), &one.id).cmp(&(other.name(), &other.id)));
    if arguments.json {
        let all: Vec<_> = found.iter().map(|instance| describe(client.region(), instance)).collect();
        print_line(&json!(all).to_string());
        return Ok(());
    }
    for instance in &found {
        let address = |found: Option<std::net::IpAddr>| found.map_or("none".to_owned(), |it| it.to_string());
        print_line(&format!(
            "{}  {}  {}  {}  {}  {}",
            instance.id,
            if instance.name().is_empty() { "-" } else { instance.name() },
            instance.instance_type,
            instance.state,
            address(instance.public_ip),
            address(instance.private_ip),
        ));
    }
    Ok(())
}

async fn down(arguments: Down) -> Result<(), Failure> {
    let directory = absolute(&arguments.host.directory)?;
    if !Deployment::exists(&directory) {
        print_line("there is nothing to remove");
        return Ok(());
    }
    let deployment = Deployment::open(&directory).map_err(failure)?;
    // Whatever the surroundings say, the host is where it was made.
    let recorded = deployment.wanted().map(|wanted| &wanted.region);
    let client = connect(arguments.aws.profile.as_ref(), recorded).await?;
    let removal = deployment.removal(&client).await.map_err(failure)?;
    if arguments.dry_run {
        let shown = removal.to_string();
        print_line(if removal.is_empty() { "nothing would be removed" } else { shown.trim_end() });
        return Ok(());
    }
    if !removal.is_empty() {
        ask(removal.to_string(), arguments.yes).await?;
    }
    deployment.remove(&client, &removal, &mut Teller).await.map_err(failure)?;
    print_line(if removal.is_empty() {
        "there was nothing to remove"
    } else {
        "removed; nothing of this host is left"
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zone_is_not_taken_for_a_region() {
        assert_eq!(region("us-east-1").as_deref(), Ok("us-east-1"));
        assert_eq!(region("us-gov-west-1").as_deref(), Ok("us-gov-west-1"));
        assert_eq!(region("us-east-1a").unwrap_err(), "that is a zone; its region is us-east-1");
        for wrong in ["", "us", "US-EAST-1", "virginia", "us-east-", "a/b-c-1", "é-é-1"] {
            assert_eq!(region(wrong).unwrap_err(), "expected a region, such as us-east-1", "{wrong}");
        }
    }

    #[test]
    fn ssh_is_not_opened_to_everybody_by_accident() {
        let text = |given: &str| source(given).map(|it| it.to_string());
        assert_eq!(text("203.0.113.7").as_deref(), Ok("203.0.113.7/32"));
        assert_eq!(text("203.0.113.7/24").as_deref(), Ok("203.0.113.0/24"));
        assert_eq!(text("2001:db8::1").as_deref(), Ok("2001:db8::1/128"));
        assert!(text("0.0.0.0/0").unwrap_err().contains("everybody"));
        assert!(text("::/0").is_err() && text("here").is_err());
    }
}
