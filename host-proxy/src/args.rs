//! The command line, shared by the `host-proxy` binary and by whoever offers the same commands elsewhere.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use command_line::logs::LogFormat;
use transport::Endpoint;

use crate::policy::rule::Rule;
use crate::policy::target::HostName;

const EXAMPLES: &str = "\
Examples:
  The enclave may reach its KMS, and nothing else:
      host-proxy --listen vsock:any:3128 --allow kms.example.com:12001
  Everything that a file says, with metrics and limits:
      host-proxy check /etc/host-proxy.toml && host-proxy --config /etc/host-proxy.toml
  A fixed forward, the receiver of the enclave's message, and its boot heartbeat:
      host-proxy --forward vsock:any:8000=tcp:192.0.2.7:443 \\
          --receive vsock:any:9999=/run/app_keys.json --heartbeat vsock:any:9000";

const CHECK_EXAMPLES: &str = "\
Examples:
  host-proxy check /etc/host-proxy.toml
  host-proxy check --json /etc/host-proxy.toml";

const EXPLAIN_EXAMPLES: &str = "\
Exit code: 0 when every target is allowed, 3 when one is refused.

Examples:
  host-proxy explain --config /etc/host-proxy.toml kms.example.com:12001
  host-proxy explain --allow '*.example.com:443' --resolve a.example.com=169.254.169.254 a.example.com:443
  host-proxy explain --json --allow 10.0.0.0/8:5432 10.1.2.3:5432 '[::ffff:127.0.0.1]:5432'";

const WAIT_EXAMPLES: &str = "\
Exit code: 0 when the enclave booted, 4 when the time was over.

Examples:
  host-proxy wait-for-boot --timeout 60
  host-proxy wait-for-boot --cid 16 && echo running";

/// The enclave's only way out: an allow-listing CONNECT proxy on the parent.
///
/// Without a command it runs, until SIGTERM or SIGINT lets the open connections end.
#[derive(Debug, Parser)]
#[command(name = "host-proxy", version, args_conflicts_with_subcommands = true, after_help = EXAMPLES)]
pub struct HostProxy {
    /// What to do instead of running.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// How to run.
    #[command(flatten)]
    pub run: RunArgs,
}

/// What the program can do besides running.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Read a configuration file and say what is wrong or unusual in it.
    #[command(after_help = CHECK_EXAMPLES)]
    Check(CheckArgs),
    /// Say which rule decides about a target, and why.
    #[command(after_help = EXPLAIN_EXAMPLES)]
    Explain(ExplainArgs),
    /// Answer the heartbeat of a booting enclave, and end when it came.
    #[command(after_help = WAIT_EXAMPLES)]
    WaitForBoot(WaitForBootArgs),
}

/// How to run.
#[derive(Clone, Debug, Default, Args)]
pub struct RunArgs {
    /// Configuration file; SIGHUP reads it again.
    #[arg(long, env = "HOST_PROXY_CONFIG", value_name = "FILE",
          conflicts_with_all = ["listen", "allow", "check_sni", "forward", "receive", "heartbeat", "admin"])]
    pub config: Option<PathBuf>,
    /// Address of the CONNECT proxy: vsock:any:3128, unix:PATH or tcp:HOST:PORT.
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Vec<Endpoint>,
    /// Rule of the allow-list: HOST:PORTS, *.SUFFIX:PORTS, ADDRESS:PORTS or RANGE:PORTS.
    ///
    /// A name that resolves to an address that is not public (loopback, private ...) also needs a rule that names the
    /// address, such as 127.0.0.1:8000.
    #[arg(long, value_name = "RULE", requires = "listen")]
    pub allow: Vec<Rule>,
    /// Check that the TLS server name is the name in the CONNECT.
    #[arg(long, requires = "listen")]
    pub check_sni: bool,
    /// Fixed forward, for example vsock:any:8000=tcp:192.0.2.7:443.
    #[arg(long, value_name = "ADDRESS=TARGET", value_parser = parse_pair)]
    pub forward: Vec<(Endpoint, Endpoint)>,
    /// Receiver of framed messages, for example vsock:any:9999=/run/app_keys.json.
    #[arg(long, value_name = "ADDRESS=FILE", value_parser = parse_receive)]
    pub receive: Vec<(Endpoint, PathBuf)>,
    /// Address where boot heartbeats are answered, usually vsock:any:9000.
    #[arg(long, value_name = "ADDRESS")]
    pub heartbeat: Vec<Endpoint>,
    /// Address of metrics and health.
    #[arg(long, value_name = "ADDRESS")]
    pub admin: Option<Endpoint>,
    /// How log lines on standard error are written. RUST_LOG filters them.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormatArg,
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum LogFormatArg {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl From<LogFormatArg> for LogFormat {
    fn from(format: LogFormatArg) -> Self {
        match format {
            LogFormatArg::Text => Self::Text,
            LogFormatArg::Json => Self::Json,
        }
    }
}

/// What to check.
#[derive(Clone, Debug, Args)]
pub struct CheckArgs {
    /// The configuration file.
    #[arg(value_name = "CONFIG")]
    pub config: PathBuf,
    /// Print one JSON document.
    #[arg(long)]
    pub json: bool,
}

/// What to explain.
#[derive(Clone, Debug, Args)]
pub struct ExplainArgs {
    /// Use the allow-lists of this configuration file.
    #[arg(long, value_name = "FILE", conflicts_with = "allow")]
    pub config: Option<PathBuf>,
    /// Use this rule; may be given more than once.
    #[arg(long, value_name = "RULE")]
    pub allow: Vec<Rule>,
    /// Use these addresses for a name instead of asking the resolver; may be given more than once.
    #[arg(long, value_name = "NAME=ADDR[,ADDR]", value_parser = parse_resolve)]
    pub resolve: Vec<(HostName, Vec<IpAddr>)>,
    /// Ask as the enclave with this context id.
    #[arg(long, value_name = "CID")]
    pub cid: Option<u32>,
    /// Print one JSON document.
    #[arg(long)]
    pub json: bool,
    /// Targets, exactly as they would stand in a CONNECT line; after -- when one begins with a hyphen.
    #[arg(required = true, value_name = "TARGET")]
    pub targets: Vec<String>,
}

/// Whose boot to wait for.
#[derive(Clone, Debug, Args)]
pub struct WaitForBootArgs {
    /// Where the enclave connects to.
    #[arg(long, value_name = "ADDRESS", default_value = "vsock:any:9000")]
    pub listen: Endpoint,
    /// The enclave's context id; any, by default.
    #[arg(long, value_name = "CID")]
    pub cid: Option<u32>,
    /// How long to wait, in seconds.
    #[arg(long, value_name = "SECONDS", default_value = "120", value_parser = parse_seconds)]
    pub timeout: Duration,
}

fn parse_pair(text: &str) -> Result<(Endpoint, Endpoint), String> {
    let (listen, target) = split_pair(text)?;
    Ok((listen, target.parse().map_err(|error| format!("{error}"))?))
}

fn parse_receive(text: &str) -> Result<(Endpoint, PathBuf), String> {
    let (listen, path) = split_pair(text)?;
    Ok((listen, path.into()))
}

fn split_pair(text: &str) -> Result<(Endpoint, &str), String> {
    let (listen, rest) = text.split_once('=').ok_or("no =; expected ADDRESS=VALUE")?;
    Ok((listen.parse().map_err(|error| format!("{error}"))?, rest))
}

fn parse_resolve(text: &str) -> Result<(HostName, Vec<IpAddr>), String> {
    let (name, addresses) = text.split_once('=').ok_or("no =; expected NAME=ADDR")?;
    let name = name.parse().map_err(|error| format!("{name:?}: {error}"))?;
    let read = |address: &str| {
        let bare = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(address);
        bare.parse().map_err(|_| format!("{address:?} is not an address"))
    };
    Ok((name, addresses.split(',').map(read).collect::<Result<_, _>>()?))
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: u64 = text.parse().map_err(|_| "expected a whole number of seconds".to_owned())?;
    Ok(Duration::from_secs(seconds))
}
