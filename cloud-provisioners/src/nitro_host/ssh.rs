//! One SSH connection to a host whose key is known.
//!
//! The key must be exactly the pinned one: there is no first time on which any key is taken, and no question to answer
//! with yes. Only the pinned key's type is offered, so a host cannot answer with another key of its own.

use std::borrow::Cow;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use russh::client::{self, Handle};
use russh::keys::{Algorithm, PublicKeyOrCertificate};
use russh::{ChannelMsg, Disconnect, Preferred};
use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use transport::Endpoint;
use zeroize::Zeroizing;

use super::error::Error;
use super::instance_connect::ephemeral_key;
use super::login::{KeyError, LoginKey};
use super::reach::{HostKey, Reach};
use super::tunnel::Tunnel;

/// For the TCP connection alone.
const CONNECT: Duration = Duration::from_secs(10);
/// For key exchange and login together.
const LOGIN: Duration = Duration::from_secs(30);
/// For the same through a session of Systems Manager, and its start.
const SESSION: Duration = Duration::from_secs(90);
/// A peer that says nothing for this long, three times, is gone.
const KEEPALIVE: Duration = Duration::from_secs(15);

/// What goes to a command's standard input.
#[derive(Debug)]
pub(crate) enum Input {
    /// Nothing.
    None,
    /// A file, from where it stands.
    File(File),
}

/// What a command left.
#[derive(Debug)]
pub(crate) struct Output {
    /// Its exit code; 255 where a signal ended it.
    pub(crate) status: u32,
    /// Wiped when dropped: it may be an enclave's message.
    pub(crate) stdout: Zeroizing<Vec<u8>>,
    /// What it said besides.
    pub(crate) stderr: String,
}

/// What ended a conversation.
#[derive(Debug)]
pub(crate) enum Broken {
    /// The deadline.
    Late,
    /// The command wrote more than was to be kept.
    TooMuch,
    /// The connection.
    Cut(russh::Error),
}

/// A connection that was logged in.
pub(crate) struct Session {
    handle: Handle<Pin>,
    /// What carries it, where that is not a connection of its own.
    _tunnel: Option<Tunnel>,
}

impl Session {
    /// Connects, checks the host's key and logs in. Cancel safe.
    pub(crate) async fn connect(reach: &Reach) -> Result<Self, Error> {
        let unreachable = |source: Box<dyn std::error::Error + Send + Sync>| Error::Unreachable {
            address: reach.address,
            port: reach.port,
            source,
        };
        let unusable = |source: KeyError| Error::PrivateKey {
            path: reach.private_key.clone().unwrap_or_default(),
            source: source.into(),
        };
        let key = match (reach.aws(), &reach.private_key) {
            (Some((aws, instance)), _) if aws.instance_connect => {
                ephemeral_key(aws, instance, &reach.user).await?
            }
            (_, Some(path)) => {
                let path = path.clone();
                let reading = tokio::task::spawn_blocking(move || LoginKey::read(&path)).await;
                reading.map_err(|error| Error::Internal(error.into()))?.map_err(unusable)?
            }
            (_, None) => return Err(Error::NoKey { address: reach.address }),
        };
        let algorithm =
            Algorithm::new(reach.host_key.algorithm()).map_err(|error| unreachable(error.into()))?;
        let config = client::Config {
            preferred: Preferred { key: Cow::Owned(vec![algorithm]), ..Preferred::DEFAULT },
            keepalive_interval: Some(KEEPALIVE),
            nodelay: true,
            ..client::Config::default()
        };
        let offered = Arc::new(Mutex::new(None));
        let pin = Pin { expected: reach.host_key.clone(), offered: Arc::clone(&offered) };
        let (tunnel, logged_in) = match reach.aws() {
            Some((aws, instance)) if aws.session_manager => {
                let (tunnel, stream) = Tunnel::open(aws, instance, reach.port)?;
                let login = log_in(config, stream, pin, key, &reach.user);
                (Some(tunnel), timeout(SESSION, login).await)
            }
            _ => {
                let endpoint = Endpoint::tcp(&reach.address.to_string(), reach.port)
                    .map_err(|error| unreachable(error.into()))?;
                let stream = endpoint.connect(CONNECT).await.map_err(|error| unreachable(error.into()))?;
                (None, timeout(LOGIN, log_in(config, stream, pin, key, &reach.user)).await)
            }
        };
        if let Some(offered) = offered.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let expected = reach.host_key.fingerprint();
            return Err(Error::HostKeyDiffers { address: reach.address, expected, offered });
        }
        match logged_in {
            Ok(Ok((handle, true))) => Ok(Self { handle, _tunnel: tunnel }),
            Ok(Ok((_, false))) => {
                Err(Error::LoginRefused { user: reach.user.clone(), address: reach.address })
            }
            Ok(Err(KeyError::Ssh(russh::Error::NoCommonAlgo {
                kind: russh::AlgorithmKind::Key,
                theirs,
                ..
            }))) => {
                let offered = format!("one of the types {}", theirs.join(", "));
                let expected = format!("{} {}", reach.host_key.algorithm(), reach.host_key.fingerprint());
                Err(Error::HostKeyDiffers { address: reach.address, expected, offered })
            }
            Ok(Err(KeyError::Ssh(error))) => Err(match tunnel {
                Some(tunnel) => tunnel.verdict().await,
                None => unreachable(error.into()),
            }),
            Ok(Err(error)) => Err(unusable(error)),
            Err(late) => Err(match tunnel {
                Some(tunnel) => tunnel.verdict().await,
                None => unreachable(late.into()),
            }),
        }
    }

    /// Runs a command to its end. At most `limit` bytes of its output are kept; more is an error. Not cancel safe: the
    /// command may go on.
    pub(crate) async fn run(
        &self,
        command: &str,
        input: Input,
        limit: usize,
        deadline: Duration,
    ) -> Result<Output, Broken> {
        timeout(deadline, self.converse(command, input, limit)).await.map_err(|_| Broken::Late)?
    }

    async fn converse(&self, command: &str, input: Input, limit: usize) -> Result<Output, Broken> {
        let channel = self.handle.channel_open_session().await.map_err(Broken::Cut)?;
        channel.exec(true, command).await.map_err(Broken::Cut)?;
        let (mut answers, writer) = channel.split();
        let send = async {
            if let Input::File(file) = input {
                // The end of this reader is the end of the file; a channel that closed early shows in the answers.
                let _answers_tell = writer.data(file).await;
            }
            let _answers_tell = writer.eof().await;
            std::future::pending::<std::convert::Infallible>().await
        };
        let receive = async {
            let mut output =
                Output { status: 255, stdout: Zeroizing::new(Vec::new()), stderr: String::new() };
            let mut ended = false;
            while let Some(message) = answers.wait().await {
                match message {
                    ChannelMsg::Data { data } => {
                        if output.stdout.len() + data.len() > limit {
                            return Err(Broken::TooMuch);
                        }
                        output.stdout.extend_from_slice(&data);
                    }
                    ChannelMsg::ExtendedData { data, .. } => {
                        if output.stderr.len() + data.len() > limit {
                            return Err(Broken::TooMuch);
                        }
                        output.stderr.push_str(&String::from_utf8_lossy(&data));
                    }
                    ChannelMsg::ExitStatus { exit_status } => (output.status, ended) = (exit_status, true),
                    ChannelMsg::ExitSignal { .. } => ended = true,
                    ChannelMsg::Failure => return Err(Broken::Cut(russh::Error::RequestDenied)),
                    _ => {}
                }
            }
            // A channel that closes without a word about its command belongs to a connection that is gone.
            if ended { Ok(output) } else { Err(Broken::Cut(russh::Error::HUP)) }
        };
        tokio::select! {
            output = receive => output,
            never = send => match never {},
        }
    }

    /// Says goodbye; a peer that does not listen is left.
    pub(crate) async fn close(self) {
        let goodbye = self.handle.disconnect(Disconnect::ByApplication, "", "");
        let _gone_either_way = timeout(Duration::from_secs(1), goodbye).await;
    }
}

/// Speaks SSH on a stream, up to the answer whether the key is let in.
async fn log_in<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    config: client::Config,
    stream: S,
    pin: Pin,
    key: LoginKey,
    user: &str,
) -> Result<(Handle<Pin>, bool), KeyError> {
    let mut handle = client::connect_stream(Arc::new(config), stream, pin).await?;
    let admitted = key.log_in(&mut handle, user).await?;
    Ok((handle, admitted))
}

/// Compares the host's key with the pinned one.
struct Pin {
    expected: HostKey,
    /// The fingerprint of a key that was refused.
    offered: Arc<Mutex<Option<String>>>,
}

impl client::Handler for Pin {
    type Error = russh::Error;

    async fn check_server_key(&mut self, key: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        let offered = match key {
            PublicKeyOrCertificate::PublicKey { key, .. } => key.to_openssh().ok(),
            PublicKeyOrCertificate::Certificate(_) => None,
        };
        let offered = offered.and_then(|line| line.parse::<HostKey>().ok());
        if offered.as_ref() == Some(&self.expected) {
            return Ok(true);
        }
        let shown = offered.map_or_else(|| "a key of another kind".to_owned(), |key| key.fingerprint());
        *self.offered.lock().unwrap_or_else(PoisonError::into_inner) = Some(shown);
        Ok(false)
    }
}
