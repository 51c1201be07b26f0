//! `keyferry host ssh|logs|setup|doctor`: a host over SSH, whoever launched it.

use std::net::IpAddr;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use command_line::{Exit, Failure};
use indicatif::HumanBytes;
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use crate::durable;
use crate::nitro_host::{
    Action, Error, Facts, Finding, Host, HostKey, HostLog, Patience, REACH_FILE, Reach, ReachError, Severity,
    Unit, Upload, Wanted, diagnose, quoted, setup, try_target,
};

/// Where the system keeps the keys of hosts.
const KNOWN_HOSTS: &str = ".ssh/known_hosts";
/// Longest line of a log that is asked for.
const MAX_LINES: i64 = 100_000;

/// What to do with a Nitro host over SSH.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Opens a shell on the host, or runs a command there
    ///
    /// The host's key is the pinned one in both cases. With a command: its output, and 0 only if it ended well.
    #[command(after_help = "Examples:
  keyferry host ssh
  keyferry host ssh -- sudo nitro-cli describe-enclaves")]
    Ssh(Ssh),
    /// Shows what the host's proxy, its allocator or nitro-cli wrote
    Logs(Logs),
    /// Makes the host ready for an enclave: nitro-cli, allocator, kernel module, host-proxy
    ///
    /// It looks at what is there and does what is missing; running it again changes nothing. It restarts the host when
    /// nothing else helps.
    #[command(after_help = "Examples:
  keyferry host setup --host-proxy target/x86_64-unknown-linux-gnu/release/host-proxy
  keyferry host setup --cpus 2 --memory 1024")]
    Setup(Setup),
    /// Names what is wrong with the host, and what helps; changes nothing
    #[command(after_help = "Exit code: 0 when no problem was found, 3 when one was.

Examples:
  keyferry host doctor
  keyferry host doctor --kms kms.example.com:12001 --json")]
    Doctor(Doctor),
}

/// Which host, and how it is reached.
#[derive(Clone, Debug, Args)]
pub struct HostArguments {
    /// The host: its folder with keyferry-host.json, that file, or its address
    #[arg(short = 'C', long = "host", value_name = "HOST", default_value = ".")]
    pub host: String,
    /// How it is reached, where no keyferry-host.json says so
    #[command(flatten)]
    pub login: LoginArguments,
}

/// How a host is reached, where no record says so.
#[derive(Clone, Debug, Args)]
pub struct LoginArguments {
    /// File with the private key that logs in, or with the public half of one that the SSH agent has
    #[arg(long, value_name = "FILE")]
    pub ssh_key: Option<PathBuf>,
    /// Who logs in
    #[arg(long, value_name = "USER")]
    pub ssh_user: Option<String>,
    /// Port of its SSH server
    #[arg(long, value_name = "PORT")]
    pub ssh_port: Option<u16>,
    /// What the host must prove itself with, such as "ssh-ed25519 AAAA…"; else what ~/.ssh/known_hosts has for it
    #[arg(long, value_name = "KEY")]
    pub host_key: Option<HostKey>,
}

impl HostArguments {
    /// How the host is reached: by its record, by what was given, and by the keys that the system knows.
    ///
    /// # Errors
    ///
    /// [`Exit::Usage`] when something is missing. A key that is not known is never taken from the host itself.
    pub fn reach(&self) -> Result<Reach, Failure> {
        let login = &self.login;
        let address: Option<IpAddr> = self.host.parse().ok();
        let record = match address {
            // A record in this folder may be that of the address.
            Some(address) => Reach::load(Path::new(REACH_FILE)).ok().filter(|reach| reach.address == address),
            None => Some(Reach::load(Path::new(&self.host)).map_err(|error| no_record(&self.host, error))?),
        };
        if let Some(mut reach) = record {
            let LoginArguments { ssh_key, ssh_user, ssh_port, host_key } = login.clone();
            if let Some(key) = ssh_key {
                reach.private_key = Some(key);
                reach.aws.iter_mut().for_each(|aws| aws.instance_connect = false);
            }
            reach.user = ssh_user.unwrap_or(reach.user);
            reach.port = ssh_port.unwrap_or(reach.port);
            reach.host_key = host_key.unwrap_or(reach.host_key);
            return Ok(reach);
        }
        let usage = |what: String| Failure::new(Exit::Usage, what);
        let address = address.ok_or_else(|| usage(format!("{}: no host", self.host)))?;
        let private_key = login.ssh_key.clone().ok_or_else(|| {
            usage(format!("{address}: no key to log in with")).with_hint("give --ssh-key FILE")
        })?;
        let port = login.ssh_port.unwrap_or(22);
        let host_key = match &login.host_key {
            Some(key) => key.clone(),
            None => known_key(address, port).ok_or_else(|| {
                usage(format!("{address}: its host key is not known, and it is not taken from the host itself"))
                    .with_hint(
                        "give --host-key \"ssh-ed25519 AAAA…\" as its console output shows it; `keyferry host up` \
                         learns it there",
                    )
            })?,
        };
        let user = login.ssh_user.clone().unwrap_or_else(|| "ec2-user".to_owned());
        let private_key = Some(private_key);
        Ok(Reach { address, port, user, private_key, host_key, instance_id: None, aws: None })
    }
}

fn no_record(host: &str, error: ReachError) -> Failure {
    let failure = Failure::new(Exit::Usage, error);
    failure.with_hint(format!(
        "`keyferry host up` writes {REACH_FILE}; for another host give its address as --host, with --ssh-key and \
         --host-key ({host:?} is no address)"
    ))
}

/// The first key of a host that the system knows and that is of an accepted type.
fn known_key(address: IpAddr, port: u16) -> Option<HostKey> {
    let path = Path::new(&std::env::var_os("HOME")?).join(KNOWN_HOSTS);
    let keys = russh::keys::known_hosts::known_host_keys_path(&address.to_string(), port, path).ok()?;
    keys.into_iter().find_map(|(_, key)| key.to_openssh().ok()?.parse().ok())
}

/// Arguments of `ssh`.
#[derive(Debug, Args)]
pub struct Ssh {
    #[command(flatten)]
    host: HostArguments,
    /// How long the command may take, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u64,
    /// What to run; a shell with nothing
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Arguments of `logs`.
#[derive(Debug, Args)]
pub struct Logs {
    #[command(flatten)]
    host: HostArguments,
    /// The allocator's instead of the proxy's
    #[arg(long, conflicts_with = "nitro")]
    allocator: bool,
    /// The newest log of nitro-cli instead of the proxy's
    #[arg(long)]
    nitro: bool,
    /// How many lines
    #[arg(short = 'n', long, value_name = "N", default_value_t = 200,
          value_parser = clap::value_parser!(u32).range(1..=MAX_LINES))]
    lines: u32,
}

/// Arguments of `setup`.
#[derive(Debug, Args)]
pub struct Setup {
    #[command(flatten)]
    host: HostArguments,
    /// Processors of the enclave
    #[arg(long, value_name = "N", default_value_t = 2)]
    cpus: u32,
    /// Memory of the enclave in MiB: at least four times its image
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    memory: u64,
    /// Architecture of the image
    #[arg(long, value_enum, default_value_t)]
    arch: ArchName,
    /// The proxy's program
    #[command(flatten)]
    proxy: ProxyArguments,
    /// Print what was done and what the host is like as JSON
    #[arg(long)]
    json: bool,
}

/// Where the proxy's program is.
#[derive(Clone, Debug, Args)]
pub struct ProxyArguments {
    /// host-proxy for the host, linked statically; the one beside this program unless given
    #[arg(long, value_name = "FILE", env = "KEYFERRY_HOST_PROXY")]
    pub host_proxy: Option<PathBuf>,
}

impl ProxyArguments {
    /// The program, found and hashed.
    ///
    /// # Errors
    ///
    /// [`Exit::Usage`] when there is none.
    pub async fn upload(&self) -> Result<Upload, Failure> {
        let beside = || std::env::current_exe().ok().map(|program| program.with_file_name("host-proxy"));
        let path = self.host_proxy.clone().or_else(beside).filter(|path| path.is_file());
        let path = path.ok_or_else(|| {
            Failure::new(Exit::Usage, "no host-proxy to install on the host")
                .with_hint("build it with scripts/static-agent.sh host-proxy, and give --host-proxy FILE")
        })?;
        Upload::of("host-proxy", &path).await.map_err(failure)
    }
}

/// An architecture, as `uname -m` says it.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum ArchName {
    #[default]
    #[value(name = "x86_64")]
    X86_64,
    #[value(name = "aarch64")]
    Aarch64,
}

/// Arguments of `doctor`.
#[derive(Debug, Args)]
pub struct Doctor {
    #[command(flatten)]
    host: HostArguments,
    /// Also try from the host to reach this KMS
    #[arg(long, value_name = "HOST:PORT", value_parser = target)]
    kms: Option<(String, u16)>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn target(text: &str) -> Result<(String, u16), String> {
    let (host, port) = text.rsplit_once(':').ok_or("expected HOST:PORT")?;
    Ok((host.to_owned(), port.parse().map_err(|_| "expected a port after the last colon")?))
}

/// The unit of a proxy, with its digest.
#[must_use]
pub fn unit(text: &'static str) -> Unit {
    Unit { text, sha256: hex::encode(Sha256::digest(text)) }
}

/// Carries a command out. `proxy_unit` is the systemd unit of host-proxy.
///
/// # Errors
///
/// A [`Failure`]: 2 for a host that is not known, 3 when it or a check refuses, 4 when no answer came in time, 1
/// otherwise.
pub async fn run(command: Command, proxy_unit: &'static str) -> Result<Exit, Failure> {
    match command {
        Command::Ssh(arguments) => ssh(arguments).await,
        Command::Logs(arguments) => logs(arguments).await,
        Command::Setup(arguments) => set_up(arguments, proxy_unit).await,
        Command::Doctor(arguments) => doctor(arguments).await,
    }
}

async fn ssh(arguments: Ssh) -> Result<Exit, Failure> {
    let reach = arguments.host.reach()?;
    if arguments.command.is_empty() {
        return Err(shell(&reach));
    }
    let mut host = Host::new(reach, Patience::default());
    let ran = host.command(&arguments.command, Duration::from_secs(arguments.timeout)).await;
    host.close().await;
    let (stdout, stderr, status) = ran.map_err(failure)?;
    write_through(&stdout, &stderr);
    match status {
        0 => Ok(Exit::Done),
        status => Err(Failure::new(
            u8::try_from(status).map_or(Exit::Internal, Exit::from_code),
            format!("the command ended with exit code {status}"),
        )),
    }
}

fn write_through(stdout: &[u8], stderr: &str) {
    use std::io::Write as _;
    // A reader that left does not want it.
    let _reader_left = std::io::stderr().lock().write_all(stderr.as_bytes());
    let mut out = std::io::stdout().lock();
    let _reader_left = out.write_all(stdout).and_then(|()| out.flush());
}

/// Becomes OpenSSH's client, with a file of known hosts that holds the pinned key and nothing else.
fn shell(reach: &Reach) -> Failure {
    let Some(key) = &reach.private_key else {
        return Failure::new(
            Exit::Usage,
            "a shell needs a key in a file, and this host is given a new one each time",
        )
        .with_hint("give a command after --, or --ssh-key FILE");
    };
    let folder = key.parent().unwrap_or(Path::new("")).to_owned();
    let known = folder.join("keyferry-known-hosts");
    let line = match reach.port {
        22 => format!("{} {}\n", reach.address, reach.host_key),
        port => format!("[{}]:{port} {}\n", reach.address, reach.host_key),
    };
    if let Err(error) = durable::replace(&known, line.as_bytes(), 0o600) {
        return Failure::new(Exit::Internal, error);
    }
    let mut command = std::process::Command::new("ssh");
    command.arg("-i").arg(key).arg("-p").arg(reach.port.to_string());
    command.arg("-o").arg(format!("UserKnownHostsFile={}", known.display()));
    command.args(["-o", "GlobalKnownHostsFile=/dev/null", "-o", "StrictHostKeyChecking=yes"]);
    command.args(["-o", "IdentitiesOnly=yes", "-o", "UpdateHostKeys=no"]);
    if let Some(words) = reach.tunnel() {
        let words: Vec<String> = words.iter().map(|word| quoted(word).replace('%', "%%")).collect();
        command.arg("-o").arg(format!("ProxyCommand={}", words.join(" ")));
    }
    command.arg(format!("{}@{}", reach.user, reach.address));
    let error = command.exec();
    Failure::new(Exit::Internal, format!("ssh: {error}"))
        .with_hint("install OpenSSH's client, or give a command after --")
}

async fn logs(arguments: Logs) -> Result<Exit, Failure> {
    let mut host = Host::new(arguments.host.reach()?, Patience::default());
    let log = match (arguments.allocator, arguments.nitro) {
        (true, _) => HostLog::Allocator,
        (_, true) => HostLog::NitroCli,
        _ => HostLog::Proxy,
    };
    let text = host.log(log, arguments.lines).await;
    host.close().await;
    write_through(text.map_err(failure)?.as_bytes(), "");
    Ok(Exit::Done)
}

/// What `setup --json` prints.
#[derive(Serialize)]
struct SetUp {
    version: u32,
    done: Vec<String>,
    nitro_cli: Option<String>,
    processors: usize,
    memory_mib: u64,
}

async fn set_up(arguments: Setup, proxy_unit: &'static str) -> Result<Exit, Failure> {
    let reach = arguments.host.reach()?;
    let proxy = arguments.proxy.upload().await?;
    let arch = match arguments.arch {
        ArchName::X86_64 => "x86_64",
        ArchName::Aarch64 => "aarch64",
    };
    // No enclave has an empty name, so none is ended.
    let wanted = Wanted {
        arch,
        cpus: arguments.cpus,
        memory_mib: arguments.memory,
        name: String::new(),
        proxy,
        proxy_unit: unit(proxy_unit),
    };
    let mut host = Host::new(reach, Patience::default());
    let mut done = Vec::new();
    let mut note = |action: &Action| {
        tell(action);
        done.push(action.describe());
    };
    let facts = setup(&mut host, &wanted, &mut note).await;
    host.close().await;
    let facts = facts.map_err(failure)?;
    let report = SetUp {
        version: 1,
        done,
        nitro_cli: facts.nitro_cli.clone(),
        processors: facts.pool.len(),
        memory_mib: facts.free_hugepages_mib,
    };
    if arguments.json {
        print_json(&report);
    } else {
        command_line::print_line(&ready_line(&facts));
    }
    Ok(Exit::Done)
}

fn print_json(document: &impl Serialize) {
    // Texts and numbers alone: nothing in it can fail to be written.
    command_line::print_line(&serde_json::to_string_pretty(document).unwrap_or_default());
}

fn ready_line(facts: &Facts) -> String {
    format!(
        "ready: {}, {} processors and {} set aside for enclaves",
        facts.nitro_cli.as_deref().unwrap_or("no nitro-cli"),
        facts.pool.len(),
        HumanBytes(facts.free_hugepages_mib << 20)
    )
}

/// Shows an action on standard error, before it is done.
pub fn tell(action: &Action) {
    write_through(b"", &format!("{}\n", action.describe()));
}

/// What `doctor --json` prints.
#[derive(Serialize)]
struct Diagnosis<'a> {
    version: u32,
    findings: &'a [Finding],
}

async fn doctor(arguments: Doctor) -> Result<Exit, Failure> {
    let mut host = Host::new(arguments.host.reach()?, Patience::default());
    let examined = examine(&mut host, arguments.kms.as_ref()).await;
    host.close().await;
    let findings = examined.map_err(failure)?;
    if arguments.json {
        print_json(&Diagnosis { version: 1, findings: &findings });
    } else {
        for Finding { severity, what, fix } in &findings {
            let severity = match severity {
                Severity::Problem => "problem",
                Severity::Note => "note",
            };
            command_line::print_line(&format!("{severity}: {what}\n  fix: {fix}"));
        }
        if findings.is_empty() {
            command_line::print_line("nothing is wrong with this host");
        }
    }
    let problems = findings.iter().any(|finding| finding.severity == Severity::Problem);
    Ok(if problems { Exit::Refused } else { Exit::Done })
}

async fn examine(host: &mut Host, kms: Option<&(String, u16)>) -> Result<Vec<Finding>, Error> {
    let mut findings = diagnose(&host.facts().await?);
    if let Some((name, port)) = kms {
        findings.extend(try_target(host, name, *port).await?);
    }
    Ok(findings)
}

/// How the failure of something on a host ends a program.
#[must_use]
pub fn failure(error: Error) -> Failure {
    let exit = match &error {
        error if error.is_refusal() => Exit::Refused,
        error if error.is_no_answer() => Exit::NoAnswer,
        Error::PrivateKey { .. } | Error::NoKey { .. } => Exit::Usage,
        Error::NoAwsCli { .. } | Error::NoSessionPlugin => Exit::Usage,
        _ => Exit::Internal,
    };
    let hint = error.hint();
    let failure = Failure::new(exit, error);
    match hint {
        Some(hint) => failure.with_hint(hint),
        None => failure,
    }
}
