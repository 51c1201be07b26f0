//! Why a host could not be used, and what to do about it.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::nitro::{Code, hint_for};
use super::setup::Unfit;

/// Why something on a host did not come about.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The private key that logs in cannot be used.
    #[error("private key {}: cannot be used", path.display())]
    PrivateKey {
        /// Its file.
        path: PathBuf,
        /// The reason.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No SSH server answered.
    #[error("{address} port {port}: no SSH connection")]
    Unreachable {
        /// The host.
        address: IpAddr,
        /// The port.
        port: u16,
        /// The reason.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Nothing says which key logs in.
    #[error("{address}: no key to log in with")]
    NoKey {
        /// The host.
        address: IpAddr,
    },
    /// The AWS CLI, which carries sessions of Systems Manager, does not start.
    #[error("the AWS CLI, aws, cannot be started")]
    NoAwsCli {
        /// The system's reason.
        source: std::io::Error,
    },
    /// The AWS CLI does not find its plugin for sessions.
    #[error("the AWS CLI does not find session-manager-plugin")]
    NoSessionPlugin,
    /// No session of Systems Manager led to the host's SSH server.
    #[error("{instance}: no SSH connection through Systems Manager: {words}")]
    NoSession {
        /// The instance.
        instance: String,
        /// What was said.
        words: String,
    },
    /// AWS does not want this session.
    #[error("{instance}: session of Systems Manager refused: {words}")]
    SessionRefused {
        /// The instance.
        instance: String,
        /// What was said.
        words: String,
    },
    /// EC2 Instance Connect did not let a key in.
    #[error("{instance}: EC2 Instance Connect did not take the key")]
    KeyNotSent {
        /// The instance.
        instance: String,
        /// Whether AWS said no, as opposed to nothing.
        refused: bool,
        /// The reason.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The host showed another key than the pinned one.
    #[error("{address} shows the host key {offered}, expected {expected}")]
    HostKeyDiffers {
        /// The host.
        address: IpAddr,
        /// Fingerprint of the pinned key.
        expected: String,
        /// Fingerprint of the key it showed.
        offered: String,
    },
    /// The host does not take the key or the user.
    #[error("{address}: login as {user} refused: Permission denied (publickey)")]
    LoginRefused {
        /// The user.
        user: String,
        /// The host.
        address: IpAddr,
    },
    /// The connection ended in the middle of a step.
    #[error("{step}: the connection was cut")]
    Cut {
        /// What was being done.
        step: String,
        /// The reason.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A step took too long.
    #[error("{step}: no end within {} s", waited.as_secs())]
    TimedOut {
        /// What was being done.
        step: String,
        /// How long was waited.
        waited: Duration,
    },
    /// A step's output is longer than anything it can have to say.
    #[error("{step}: more than {limit} bytes of output")]
    TooMuchOutput {
        /// What was being done.
        step: String,
        /// The bound, in bytes.
        limit: usize,
    },
    /// A step's command failed.
    #[error("{step}: exit code {status}: {words}")]
    Step {
        /// What was being done.
        step: String,
        /// The command's exit code.
        status: u32,
        /// The end of what it said.
        words: String,
    },
    /// nitro-cli failed.
    #[error("{step}: nitro-cli says {code}: {words}")]
    NitroCli {
        /// What was being done.
        step: String,
        /// Its code.
        code: Code,
        /// What it says about it.
        words: String,
    },
    /// The host said something that makes no sense.
    #[error("{step}: {problem}")]
    Answer {
        /// What was being done.
        step: String,
        /// What is wrong with the answer.
        problem: String,
    },
    /// The host cannot do what is asked of it.
    #[error(transparent)]
    Unfit(#[from] Unfit),
    /// The host did not come back after a restart.
    #[error("the host has not come back within {} s of its restart", waited.as_secs())]
    NotBack {
        /// How long was waited.
        waited: Duration,
    },
    /// The setup does the same things over and over.
    #[error("the host is still not ready after {rounds} steps, the last was: {last}")]
    NoEnd {
        /// Steps taken.
        rounds: usize,
        /// The last of them.
        last: String,
    },
    /// A file on this machine.
    #[error("{}: cannot {action}", path.display())]
    File {
        /// What was attempted, as a verb.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// What arrived on the host is not what was sent.
    #[error("{what}: arrived with SHA-256 {actual}, expected {expected}")]
    Damaged {
        /// What was sent.
        what: &'static str,
        /// Digest of what arrived.
        actual: String,
        /// Digest of what was sent.
        expected: String,
    },
    /// The host measures another image than the one that was sent.
    #[error("{register} of the image is {actual} on the host, expected {expected}")]
    Measurement {
        /// The register, `PCR0`.
        register: &'static str,
        /// What the host says.
        actual: String,
        /// What was computed here.
        expected: String,
    },
    /// The enclave runs in another way than it was started.
    #[error("the enclave is {actual}, expected {expected}")]
    EnclaveState {
        /// What nitro-cli says of it.
        actual: String,
        /// What was asked for.
        expected: &'static str,
    },
    /// The enclave ended and left nothing.
    #[error("the enclave ended without a result")]
    NoResult {
        /// The end of the proxy's log.
        log: String,
    },
    /// The enclave runs and nothing comes.
    #[error("no result from the enclave within {} s", waited.as_secs())]
    NoResultInTime {
        /// How long was waited.
        waited: Duration,
        /// The end of the proxy's log.
        log: String,
    },
    /// Something that does not happen.
    #[error("internal failure")]
    Internal(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl Error {
    /// Whether somebody said no, as opposed to nobody having answered.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::HostKeyDiffers { .. }
                | Self::LoginRefused { .. }
                | Self::SessionRefused { .. }
                | Self::KeyNotSent { refused: true, .. }
                | Self::Unfit(_)
                | Self::Measurement { .. }
                | Self::EnclaveState { .. }
                | Self::NitroCli { .. }
        )
    }

    /// Whether nobody answered in time.
    #[must_use]
    pub fn is_no_answer(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. }
                | Self::NoSession { .. }
                | Self::KeyNotSent { refused: false, .. }
                | Self::Cut { .. }
                | Self::TimedOut { .. }
                | Self::NotBack { .. }
                | Self::NoResultInTime { .. }
        )
    }

    /// Whether there was no connection, which a host that starts may still give.
    pub(super) fn is_unreachable(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. } | Self::NoSession { .. } | Self::KeyNotSent { refused: false, .. }
        )
    }

    /// The next step, when one is known.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::PrivateKey { .. } => {
                "an Ed25519, ECDSA or RSA key without a passphrase is needed, or one that the SSH agent has \
                 (`ssh-add`); `keyferry host up` makes one"
            }
            Self::NoKey { .. } => "give --ssh-key FILE",
            Self::NoAwsCli { .. } => {
                "install the AWS CLI, https://docs.aws.amazon.com/cli/latest/userguide/getting-started-install.html, and \
                 its Session Manager plugin"
            }
            Self::NoSessionPlugin => {
                "install it: https://docs.aws.amazon.com/systems-manager/latest/userguide/\
                 session-manager-working-with-install-plugin.html"
            }
            Self::NoSession { .. } => {
                "the instance must run, have an instance profile with AmazonSSMManagedInstanceCore, and reach Systems \
                 Manager; after a start that takes some minutes"
            }
            Self::SessionRefused { .. } => {
                "your credentials need ssm:StartSession on the instance and on the document AWS-StartSSHSession"
            }
            Self::KeyNotSent { .. } => {
                "your credentials need ec2-instance-connect:SendSSHPublicKey on the instance; or log in with --ssh-key FILE"
            }
            Self::Unreachable { address, .. } => {
                return Some(format!(
                    "is the instance running, and does its security group still let this machine's address reach \
                     {address} port 22? `keyferry host status` says"
                ));
            }
            Self::HostKeyDiffers { .. } => {
                "somebody else answers at this address, or the instance was replaced: compare with the keys in its \
                 console output (`keyferry host up` learns them); the connection was not used"
            }
            Self::LoginRefused { .. } => {
                "the user belongs to the image (ec2-user on Amazon Linux, ubuntu on Ubuntu), and the key to the instance"
            }
            Self::Cut { .. } | Self::TimedOut { .. } | Self::NotBack { .. } => {
                "run the same command again: it goes on from what is there"
            }
            Self::Step { words, .. } => return hint_for_words(words).map(str::to_owned),
            Self::NitroCli { code, .. } => return hint_for(*code).map(str::to_owned),
            Self::Unfit(unfit) => return Some(unfit.hint()),
            Self::NoEnd { .. } => "`keyferry host doctor` shows what is wrong with the host",
            Self::Damaged { .. } => "run the same command again: the upload starts over",
            Self::Measurement { .. } => "the host's nitro-cli reads another image: remove ~/.keyferry there",
            Self::NoResult { log } | Self::NoResultInTime { log, .. } => return Some(hint_for_log(log)),
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

fn hint_for_words(words: &str) -> Option<&'static str> {
    if words.contains("Could not resolve host") || words.contains("Cannot download repomd.xml") {
        return Some(
            "the host cannot reach its package repositories: its security group must let 443 (the region's S3) and \
             DNS out",
        );
    }
    if words.contains("password is required") {
        return Some("the user must be able to sudo without a password, as ec2-user is");
    }
    words
        .contains("No space left")
        .then_some("the host's disk is full: `keyferry host doctor` shows how much is left")
}

/// What a proxy's log says about an enclave from which nothing came.
fn hint_for_log(log: &str) -> String {
    if log.trim().is_empty() {
        return "the enclave did not get as far as the proxy: does its image start? `keyferry enclave run` boots it \
                on this machine, with its console"
            .to_owned();
    }
    if log.contains("not-allowed") || log.contains("no-rule") {
        return "the proxy refused a target: the image asks for another KMS than its project names; its log is kept \
                beside the keys"
            .to_owned();
    }
    "the proxy's log is kept beside the keys; `keyferry host doctor` tries the KMS from the host; a KMS that does not \
     know the image says so in its own log"
        .to_owned()
}
