//! `serve`: the keys beside an app, for images that bring an init of their own.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Args};
use command_line::Failure;
use tokio::signal::unix::{SignalKind, signal};
use transport::Endpoint;

use super::get_keys::{FetchArguments, internal, narrate, print, tell};
use crate::DurationArg;
use crate::delivery::{Delivery, Export, Form, Owner, Recipient, Renewal, TmpfsFile};
use crate::service::{Service, Settings, StartError};
use command_line::chain;

/// Arguments of `serve`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  The dstack guest API for an app, beside an init of the image's own:
    enclave-agent serve --kms-url https://kms.example.com:12001 --app-id 1111111111111111111111111111111111111111 \\
        --root-ca /etc/keyferry/kms-ca.pem --proxy vsock:3:3128 --socket /var/run/dstack.sock")]
#[command(group(ArgGroup::new("ways").args(["sockets", "keys_file", "export"]).multiple(true).required(true)))]
pub struct Arguments {
    /// From where keys are fetched
    #[command(flatten)]
    pub fetch: FetchArguments,
    /// Serves the dstack guest API on this Unix socket; repeat it for /var/run/dstack.sock and /var/run/tappd.sock
    #[arg(long = "socket", value_name = "PATH")]
    pub sockets: Vec<PathBuf>,
    /// Keeps the keys in this file, mode 0600, which must be on a tmpfs
    #[arg(long, value_name = "FILE")]
    pub keys_file: Option<PathBuf>,
    /// The app's user, who may connect to the sockets and read the file
    #[arg(long, value_name = "UID[:GID]")]
    pub app_user: Option<AppUser>,
    /// Sends the keys to this receiver, as vsock:3:9999
    #[arg(long, value_name = "ENDPOINT", requires = "form")]
    pub export: Option<Endpoint>,
    /// Encrypts the export to this age recipient; repeat it for several
    #[arg(long = "recipient", value_name = "AGE", group = "form", requires = "export")]
    pub recipients: Vec<Recipient>,
    /// Exports the keys in plain, so that the parent has them
    #[arg(long, group = "form", conflicts_with = "recipients", requires = "export")]
    pub danger_export_plaintext: bool,
    /// How long the export may take, retries included
    #[arg(long, value_name = "TIME", default_value = "60s")]
    pub export_timeout: DurationArg,
    /// Fetches the keys again as often; without it only on SIGHUP and when the app asks
    #[arg(long, value_name = "TIME")]
    pub refresh: Option<DurationArg>,
}

/// A user and a group by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AppUser(pub Owner);

/// Why a text is no user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a user by number, or user:group")]
pub struct ParseUserError;

impl std::str::FromStr for AppUser {
    type Err = ParseUserError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            // The last number means "unchanged" to chown.
            text.parse().ok().filter(|number| digits && *number != u32::MAX).ok_or(ParseUserError)
        };
        let (uid, gid) = text.split_once(':').unwrap_or((text, text));
        Ok(Self(Owner { uid: number(uid)?, gid: number(gid)? }))
    }
}

/// Fetches the keys, delivers them, and stays until SIGTERM.
///
/// # Errors
/// A [`Failure`] with its exit code.
pub async fn run(arguments: Arguments) -> Result<(), Failure> {
    let mut terminate = signal(SignalKind::terminate()).map_err(internal)?;
    let mut hangup = signal(SignalKind::hangup()).map_err(internal)?;
    let Arguments { fetch, sockets, refresh, app_user, .. } = &arguments;
    let app = app_user.map(|AppUser(owner)| owner);
    let listening = sockets.first().cloned();
    let nsm_timeout = fetch.deadlines.nsm_timeout.into();
    let settings = Settings {
        delivery: Delivery {
            file: arguments.keys_file.as_ref().map(|path| TmpfsFile::new(path, app)),
            export: arguments.export(nsm_timeout),
        },
        sockets: sockets.clone(),
        app,
        refresh: refresh.map(Into::into),
    };
    if arguments.danger_export_plaintext {
        tell("warning: the keys leave this enclave in plain; whoever runs the parent has them");
    }
    let (config, nsm) = arguments.fetch.prepare().await?;
    let service = Service::start(settings, config, nsm, &mut narrate).await?;
    let refresher = service.refresher().clone();
    let ready = listening.map_or("ready".to_owned(), |path| format!("listening on unix:{}", path.display()));
    print(ready.as_bytes())?;
    tokio::select! {
        never = service.run(report) => match never {},
        () = async {
            while hangup.recv().await.is_some() {
                refresher.request();
            }
            std::future::pending().await
        } => Ok(()),
        _ = terminate.recv() => Ok(()),
    }
}

impl Arguments {
    fn export(&self, nsm_deadline: Duration) -> Option<Export> {
        let form = if self.danger_export_plaintext {
            Form::DangerPlaintext
        } else {
            Form::Sealed(self.recipients.clone())
        };
        let deadline = self.export_timeout.into();
        self.export.clone().map(|to| Export { to, form, deadline, nsm_deadline })
    }
}

fn report(renewal: Renewal<'_>) {
    match renewal {
        Renewal::Step(step) => narrate(step),
        Renewal::Done { changed: true } => tell("the KMS gave other keys than before; they are in use now"),
        Renewal::Done { changed: false } => tell("the KMS gave the same keys as before"),
        Renewal::NotFetched(error) => tell(&format!("new keys: {}; the old ones stay in use", chain(error))),
        Renewal::NotDelivered(error) => tell(&format!("new keys are in use, but: {}", chain(error))),
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        let hint = match &error {
            StartError::Keys(error) => error.hint(),
            StartError::Delivery(error) => error.hint(),
            StartError::GuestApi(_) => None,
        };
        let failure = Self::new(error.exit(), error);
        match hint {
            Some(hint) => failure.with_hint(hint),
            None => failure,
        }
    }
}
