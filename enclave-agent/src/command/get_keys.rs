//! `get-keys`: the trip on the command line.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use command_line::{Exit, Failure};
use kms_protocol::AppId;
use kms_protocol::derive::K256PublicKey;
use ratls::client::PinnedRoot;
use ratls::evidence::EvidencePolicy;
use rustls::time_provider::DefaultTimeProvider;
use serde::Serialize;
use tokio::task::spawn_blocking;
use transport::Endpoint;

use crate::nsm::{Nsm, NsmSource};
use crate::output::{Existing, KeyFile, OutputError};
use crate::policy::TdxPolicy;
use crate::{
    Deadlines, DebugMode, DurationArg, Error, GetKeys, KeySummary, Keys, KmsTrust, KmsUrl, Proxy, Retry,
    SealedRelease, Step, get_keys,
};

/// Largest PEM file read for a root CA.
const MAX_PEM: usize = 64 * 1024;
/// Most attempts that can be asked for.
const MAX_ATTEMPTS: i64 = 100;

/// Arguments of `get-keys`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  In an enclave, through the parent's proxy:
    enclave-agent get-keys --kms-url https://kms.example.com:12001 --app-id 1111111111111111111111111111111111111111 \\
        --root-ca /etc/keyferry/kms-ca.pem --proxy vsock:3:3128 --output /run/app_keys.json")]
pub struct Arguments {
    /// From where keys are fetched
    #[command(flatten)]
    pub fetch: FetchArguments,
    /// New file for the keys, mode 0600; without it they go to standard output
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Replaces the output file if there is one
    #[arg(long, requires = "output")]
    pub force: bool,
    /// Shows the keys even on a terminal
    #[arg(long, conflicts_with = "output")]
    pub reveal: bool,
    /// Prints a summary without secrets as JSON to standard output
    #[arg(long, requires = "output")]
    pub json: bool,
}

/// From where keys are fetched, and how; shared with `serve`.
#[derive(Debug, Args)]
pub struct FetchArguments {
    /// URL of the KMS, such as `https://kms.example.com:12001`; repeat it for replicas of one KMS
    #[arg(short = 'k', long = "kms-url", value_name = "URL", required = true)]
    pub kms_urls: Vec<KmsUrl>,
    /// App whose keys are wanted: 40 hex digits
    #[arg(long, value_name = "HEX")]
    pub app_id: AppId,
    /// What makes a server the KMS
    #[command(flatten)]
    pub trust: TrustArguments,
    /// Accepts keys only sealed to this enclave, which an upstream KMS does not do (docs/sealed-release.md)
    #[arg(long)]
    pub require_sealed: bool,
    /// Security module: /dev/nsm, or unix:PATH of a stand-in
    #[arg(long, value_name = "NSM", default_value = "/dev/nsm")]
    pub nsm: NsmSource,
    /// HTTP CONNECT proxy: vsock:CID:PORT, unix:PATH or tcp:HOST:PORT; otherwise HTTPS_PROXY, ALL_PROXY and NO_PROXY
    /// hold
    #[arg(long, value_name = "ENDPOINT")]
    pub proxy: Option<Endpoint>,
    /// Fetches keys in debug mode, where the parent can read them
    #[arg(long)]
    pub danger_allow_debug: bool,
    /// How long to wait
    #[command(flatten)]
    pub deadlines: DeadlineArguments,
}

/// What makes a server the KMS; at least one is needed, and all that are given must hold.
#[derive(Debug, Args)]
pub struct TrustArguments {
    /// The KMS's root CA (PEM); the recommended anchor
    #[arg(long, value_name = "PEMFILE")]
    pub root_ca: Option<PathBuf>,
    /// The KMS's root k256 public key (66 hex digits), which must have signed the app's k256 key. By itself it leaves
    /// TLS unauthenticated and does not cover the disk and environment keys: add --root-ca where you can
    #[arg(long, value_name = "HEX")]
    pub kms_k256_pubkey: Option<K256PublicKey>,
    /// Policy (TOML) that the TDX evidence in the KMS's certificate must meet
    #[arg(long, value_name = "FILE")]
    pub kms_policy: Option<PathBuf>,
    /// Trusts whoever answers, who can then choose the keys
    #[arg(long, conflicts_with_all = ["root_ca", "kms_k256_pubkey", "kms_policy"])]
    pub danger_accept_any_kms: bool,
}

/// How long to wait for whom.
#[derive(Debug, Args)]
pub struct DeadlineArguments {
    /// For one connection, and for the proxy's answer
    #[arg(long, value_name = "TIME", default_value = "5s")]
    pub connect_timeout: DurationArg,
    /// For one TLS handshake
    #[arg(long, value_name = "TIME", default_value = "10s")]
    pub handshake_timeout: DurationArg,
    /// For one request and its answer
    #[arg(long, value_name = "TIME", default_value = "60s")]
    pub request_timeout: DurationArg,
    /// For one attestation document
    #[arg(long, value_name = "TIME", default_value = "30s")]
    pub nsm_timeout: DurationArg,
    /// For everything together
    #[arg(long, value_name = "TIME", default_value = "120s")]
    pub timeout: DurationArg,
    /// How often to start over when the network fails or the KMS is busy; refusals are final
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=MAX_ATTEMPTS))]
    pub attempts: u32,
    /// How far this clock may be from the NSM's signed time
    #[arg(long, value_name = "TIME", default_value = "300s")]
    pub max_clock_skew: DurationArg,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    version: u32,
    output: PathBuf,
    trusted_by: Vec<&'static str>,
    #[serde(flatten)]
    keys: KeySummary,
}

/// Fetches the keys and delivers them.
///
/// # Errors
/// A [`Failure`] with its exit code; nothing is left at the output's name then.
pub async fn run(arguments: Arguments) -> Result<(), Failure> {
    let delivery = Delivery::new(&arguments)?;
    let (output, json) = (arguments.output.clone(), arguments.json);
    let (config, nsm) = arguments.fetch.prepare().await?;
    let keys = get_keys(&config, &nsm, &mut narrate).await?;
    let trusted_by = config.trust.names();
    spawn_blocking(move || {
        delivery.deliver(&keys)?;
        if let Some(output) = output.filter(|_| json) {
            let report = Report { version: 1, output, trusted_by, keys: keys.summary() };
            print(&serde_json::to_vec_pretty(&report).map_err(internal)?)?;
        }
        Ok(())
    })
    .await
    .map_err(internal)?
}

impl FetchArguments {
    /// Reads the files that arguments name, and turns the rest into one validated value.
    pub(super) async fn prepare(self) -> Result<(GetKeys, Arc<dyn Nsm>), Failure> {
        let (config, nsm) = spawn_blocking(move || prepare(self)).await.map_err(internal)??;
        if config.trust.is_danger() {
            tell("warning: the KMS is not authenticated; whoever answers can choose the keys");
        }
        Ok((config, nsm))
    }
}

fn prepare(arguments: FetchArguments) -> Result<(GetKeys, Arc<dyn Nsm>), Failure> {
    let FetchArguments { kms_urls, app_id, trust, nsm, proxy, danger_allow_debug, deadlines, require_sealed } =
        arguments;
    let trust = trust.load()?;
    let nsm = nsm.open().map_err(|error| Error::from(crate::evidence::EvidenceError::Nsm(error)))?;
    let DeadlineArguments {
        connect_timeout,
        handshake_timeout,
        request_timeout,
        nsm_timeout,
        timeout,
        attempts,
        max_clock_skew,
    } = deadlines;
    let config = GetKeys {
        kms_urls,
        app_id,
        trust,
        sealed: SealedRelease::required_if(require_sealed),
        proxy: proxy.map_or_else(Proxy::from_env, Proxy::Endpoint),
        deadlines: Deadlines {
            connect: connect_timeout.into(),
            handshake: handshake_timeout.into(),
            request: request_timeout.into(),
            nsm: nsm_timeout.into(),
            total: timeout.into(),
        },
        retry: Retry { attempts, ..Retry::default() },
        debug_mode: if danger_allow_debug { DebugMode::DangerAllow } else { DebugMode::Refuse },
        max_clock_skew: max_clock_skew.into(),
        time: Arc::new(DefaultTimeProvider),
    };
    Ok((config, nsm))
}

impl TrustArguments {
    /// Reads the anchors. One that cannot be read ends the command; it is never left out.
    ///
    /// # Errors
    /// A [`Failure`]: refused (3) without any anchor, usage (2) for one that cannot be read.
    pub fn load(self) -> Result<KmsTrust, Failure> {
        let Self { root_ca, kms_k256_pubkey, kms_policy, danger_accept_any_kms } = self;
        if danger_accept_any_kms {
            return Ok(KmsTrust::danger_accept_any_kms());
        }
        let root = root_ca.map(read_root).transpose()?;
        let policy = kms_policy
            .map(|path| TdxPolicy::from_file(&path).map(|policy| Arc::new(policy) as Arc<dyn EvidencePolicy>))
            .transpose()
            .map_err(|error| Failure::new(Exit::Usage, error))?;
        KmsTrust::anchored(root, policy, kms_k256_pubkey).map_err(|error| {
            Failure::new(Exit::Refused, error).with_hint(
                "give --root-ca FILE with the KMS's root-ca.crt (or --kms-policy or --kms-k256-pubkey); \
                 --danger-accept-any-kms does without",
            )
        })
    }
}

fn read_root(path: PathBuf) -> Result<PinnedRoot, Failure> {
    let usage = |reason: String| Failure::new(Exit::Usage, format!("--root-ca {}: {reason}", path.display()));
    let text = fs::read_to_string(&path).map_err(|error| usage(error.to_string()))?;
    if text.len() > MAX_PEM {
        return Err(usage(format!("larger than {MAX_PEM} bytes")));
    }
    PinnedRoot::from_pem(&text).map_err(|error| usage(command_line::chain(&error)))
}

/// Where the keys go.
enum Delivery {
    File(KeyFile),
    Stdout,
}

impl Delivery {
    /// Decides before keys are asked for.
    fn new(arguments: &Arguments) -> Result<Self, Failure> {
        let Some(path) = &arguments.output else {
            if io::stdout().is_terminal() && !arguments.reveal {
                return Err(Failure::new(
                    Exit::Usage,
                    "standard output is a terminal, which would show the keys",
                )
                .with_hint("give -o FILE, or --reveal to see them"));
            }
            return Ok(Self::Stdout);
        };
        let existing = if arguments.force { Existing::Replace } else { Existing::Keep };
        let file = KeyFile::new(path, existing);
        file.check()?;
        Ok(Self::File(file))
    }

    fn deliver(&self, keys: &Keys) -> Result<(), Failure> {
        let json = keys.to_json().map_err(internal)?;
        match self {
            Self::Stdout => print(&json),
            Self::File(file) => {
                file.write(&json)?;
                tell(&format!("App keys written to: {}", file.path().display()));
                Ok(())
            }
        }
    }
}

impl From<OutputError> for Failure {
    fn from(error: OutputError) -> Self {
        let (exit, hint) = match &error {
            OutputError::Exists { .. } => {
                (Exit::Usage, Some("choose another name, or replace the file with --force"))
            }
            OutputError::NotAFile { .. } => {
                (Exit::Usage, Some("create the directory, or choose another name"))
            }
            OutputError::Write { source, .. } => (
                Exit::Internal,
                match source.kind() {
                    io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Some(
                        "free some space there, or choose another place with -o; no partial file is left",
                    ),
                    io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                        Some("choose a place that this user may write to with -o")
                    }
                    _ => None,
                },
            ),
        };
        let failure = Failure::new(exit, error);
        match hint {
            Some(hint) => failure.with_hint(hint),
            None => failure,
        }
    }
}

/// Upstream's lines, and what an operator wants to see of retries.
pub(super) fn narrate(step: Step<'_>) {
    match step {
        Step::Connecting { url, .. } => tell(&format!("Connecting to KMS: {url}")),
        Step::Retrying { error, pause } => {
            let pause = Duration::from_millis(u64::try_from(pause.as_millis()).unwrap_or(u64::MAX));
            tell(&format!("{}; trying again in {pause:?}", command_line::chain(error)));
        }
        Step::Attested { .. } | Step::Connected { .. } | Step::TempCa { .. } | Step::Released { .. } => {}
    }
}

#[expect(clippy::print_stderr, reason = "the command's remarks; standard output is for the answer")]
pub(super) fn tell(line: &str) {
    eprintln!("{line}");
}

/// Writes the answer and a line feed. A reader that went away does not want it any more.
pub(super) fn print(answer: &[u8]) -> Result<(), Failure> {
    print_parts(&[answer, b"\n"])
}

/// Writes the answer as it is.
pub(super) fn print_raw(answer: &[u8]) -> Result<(), Failure> {
    print_parts(&[answer])
}

fn print_parts(parts: &[&[u8]]) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    let written = parts.iter().try_for_each(|part| out.write_all(part)).and_then(|()| out.flush());
    match written {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::new(Exit::Internal, format!("standard output: {error}")))
        }
        _ => Ok(()),
    }
}

pub(super) fn internal(error: impl std::error::Error + Send + Sync + 'static) -> Failure {
    Failure::new(Exit::Internal, error)
}
