//! SSH through a session of AWS Systems Manager, to a host that has no open port: the AWS CLI with its Session Manager
//! plugin carries the bytes between its standard input and output and the host's SSH server, as AWS documents it for
//! OpenSSH's `ProxyCommand`. Who answers there is proven by the pinned host key as ever.

use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncReadExt as _, Join};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::error::Error;
use super::host::shown;
use super::reach::Aws;

/// AWS's document of sessions that carry SSH.
const DOCUMENT: &str = "AWS-StartSSHSession";
/// For a session that ended to say why.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// What it may say.
const MAX_WORDS: u64 = 16 << 10;

/// A session. It ends when dropped.
pub(super) struct Tunnel {
    instance: String,
    cli: Child,
    /// The CLI and its plugin, which does not end with it.
    group: Option<Pid>,
    words: JoinHandle<String>,
}

/// Both directions of a session.
pub(super) type Stream = Join<ChildStdout, ChildStdin>;

/// The words of a command that carries SSH to `port` of an instance.
pub(super) fn command(aws: &Aws, instance: &str, port: u16) -> Vec<String> {
    let mut words = vec!["aws".to_owned(), "ssm".to_owned(), "start-session".to_owned()];
    let port = format!("portNumber={port}");
    for (name, value) in [
        ("--target", instance),
        ("--document-name", DOCUMENT),
        ("--parameters", &port),
        ("--region", &aws.region),
    ] {
        words.extend([name.to_owned(), value.to_owned()]);
    }
    if let Some(profile) = &aws.profile {
        words.extend(["--profile".to_owned(), profile.clone()]);
    }
    words
}

impl Tunnel {
    /// Starts a session. Whether it comes about shows in its stream, which ends, and then in [`Self::verdict`].
    pub(super) fn open(aws: &Aws, instance: &str, port: u16) -> Result<(Self, Stream), Error> {
        let words = command(aws, instance, port);
        let mut cli = Command::new(&words[0]);
        cli.args(&words[1..]).process_group(0).kill_on_drop(true);
        cli.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut cli = cli.spawn().map_err(|source| Error::NoAwsCli { source })?;
        let group = cli.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        let (Some(stdin), Some(stdout), Some(mut stderr)) =
            (cli.stdin.take(), cli.stdout.take(), cli.stderr.take())
        else {
            return Err(Error::Internal("the pipes of a new process are there".into()));
        };
        let words = tokio::spawn(async move {
            let mut kept = Vec::new();
            // What was read before a failure is worth having.
            let _partial = (&mut stderr).take(MAX_WORDS).read_to_end(&mut kept).await;
            // The rest is read and dropped, or the session would stop at a full pipe.
            let _rest = tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await;
            shown(&String::from_utf8_lossy(&kept))
        });
        let stream = tokio::io::join(stdout, stdin);
        Ok((Self { instance: instance.to_owned(), cli, group, words }, stream))
    }

    /// What a session says that did not lead to an SSH server.
    pub(super) async fn verdict(mut self) -> Error {
        let instance = self.instance.clone();
        let ended = timeout(LAST_WORDS, self.cli.wait()).await.is_ok();
        if ended {
            // It waited for its plugin, and whose its number is from now on is not known.
            self.group = None;
        }
        self.end();
        let words = timeout(LAST_WORDS, &mut self.words).await;
        let words = words.ok().and_then(Result::ok).filter(|words| !words.is_empty());
        let words = words.unwrap_or_else(|| "it says nothing".to_owned());
        // Without its plugin the CLI ends the session, which may be refused in turn, and then says so.
        if words.contains("SessionManagerPlugin is not found") || words.contains("TerminateSession") {
            return Error::NoSessionPlugin;
        }
        // An instance that boots is not connected for a minute or two; whatever else AWS refuses, it will refuse again.
        match ended && words.contains("An error occurred") && !words.contains("TargetNotConnected") {
            true => Error::SessionRefused { instance, words },
            false => Error::NoSession { instance, words },
        }
    }

    fn end(&mut self) {
        if let Some(group) = self.group.take() {
            // Fails where nothing of it is left.
            let _gone = kill_process_group(group, Signal::KILL);
        }
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.end();
        self.words.abort();
    }
}
