//! A host, step by step: each step is one command with a name, a deadline here and on the host, and a bound on what it may
//! say. A connection is made when it is needed, and again after it was lost.

use std::fmt::Display;
use std::path::PathBuf;
use std::time::Duration;

use tracing::debug;
use zeroize::Zeroizing;

use super::error::Error;
use super::facts::{Facts, PROBE};
use super::nitro::{self, Enclave};
use super::reach::Reach;
use super::ssh::{Broken, Input, Output, Session};
use crate::patience::{Deadline, Pauses};

/// Answers are lists of facts, enclaves and log lines.
const MAX_OUTPUT: usize = 1 << 20;
/// How much longer than the host's own deadline is waited for its word.
const SLACK: Duration = Duration::from_secs(10);
/// Systems Manager knows an instance that starts so many times later than its SSH server answers.
const FIRST_SESSION: u32 = 5;
/// Characters of a message that are shown.
const SHOWN: usize = 600;
/// Before each command that runs as root: nitro-cli wants HOME, and sudo may have cut the path.
const PREAMBLE: &str =
    "export LC_ALL=C HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// How long to wait for what.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For an SSH server that does not answer yet.
    pub connect: Duration,
    /// For a step that only looks, writes a file or starts a unit.
    pub step: Duration,
    /// For the installation of packages.
    pub install: Duration,
    /// For the start of an enclave, whose heartbeat nitro-cli waits for.
    pub boot: Duration,
    /// For a restart of the host.
    pub restart: Duration,
    /// For the result of an enclave that runs.
    pub result: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self {
            connect: seconds(60),
            step: seconds(60),
            install: seconds(600),
            boot: seconds(300),
            restart: seconds(600),
            result: seconds(300),
        }
    }
}

/// A host and how it is reached.
pub struct Host {
    reach: Reach,
    patience: Patience,
    session: Option<Session>,
}

/// One command.
pub(super) struct Step<'a> {
    /// What is being done, for messages: `install nitro-cli`.
    pub(super) name: &'a str,
    /// A script for `sh`.
    pub(super) script: String,
    /// Who runs it.
    pub(super) root: bool,
    /// What it reads.
    pub(super) input: Input,
    /// How long it may take.
    pub(super) deadline: Duration,
    /// How much it may say, in bytes.
    pub(super) limit: usize,
}

impl Host {
    /// A host that nothing has been said to yet.
    #[must_use]
    pub fn new(reach: Reach, patience: Patience) -> Self {
        Self { reach, patience, session: None }
    }

    /// How it is reached.
    #[must_use]
    pub fn reach(&self) -> &Reach {
        &self.reach
    }

    /// How long it is waited for.
    #[must_use]
    pub fn patience(&self) -> &Patience {
        &self.patience
    }

    /// Connects if there is no connection. An SSH server that does not answer yet is asked again until the deadline.
    ///
    /// # Errors
    ///
    /// [`Error::Unreachable`], [`Error::HostKeyDiffers`], [`Error::LoginRefused`], [`Error::PrivateKey`].
    pub async fn connect(&mut self) -> Result<(), Error> {
        let sessions = self.reach.aws.as_ref().is_some_and(|aws| aws.session_manager);
        self.connect_within(self.patience.connect * if sessions { FIRST_SESSION } else { 1 }).await
    }

    async fn connect_within(&mut self, allowed: Duration) -> Result<(), Error> {
        if self.session.is_some() {
            return Ok(());
        }
        let deadline = Deadline::within(allowed);
        let mut pauses = Pauses::new(Duration::from_millis(200), Duration::from_secs(5));
        loop {
            match Session::connect(&self.reach).await {
                Ok(session) => {
                    self.session = Some(session);
                    return Ok(());
                }
                Err(error) if error.is_unreachable() && !deadline.passed() => {
                    debug!(%error, "no connection yet");
                    pauses.pause(deadline).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Ends the connection.
    pub async fn close(&mut self) {
        if let Some(session) = self.session.take() {
            session.close().await;
        }
    }

    /// A step that runs as root and has the usual deadline.
    pub(super) fn step<'a>(&self, name: &'a str, script: impl Into<String>) -> Step<'a> {
        let (script, deadline) = (script.into(), self.patience.step);
        Step { name, script, root: true, input: Input::None, deadline, limit: MAX_OUTPUT }
    }

    /// Carries a step out, whatever its exit code. Not cancel safe: the command may go on.
    pub(super) async fn attempt(&mut self, step: Step<'_>) -> Result<Output, Error> {
        let Step { name, script, root, input, deadline, limit } = step;
        debug!(step = name, "on the host");
        self.connect().await?;
        let Some(session) = &self.session else {
            return Err(Error::Internal("a connection that was made is there".into()));
        };
        // The host ends the command by itself, also where this program is gone by then.
        let sudo = if root { "sudo -n " } else { "" };
        let (preamble, seconds) =
            (if root { PREAMBLE } else { "export LC_ALL=C" }, deadline.as_secs().max(1));
        let command =
            format!("{sudo}timeout -k 5 {seconds} sh -c {}", quoted(&format!("{preamble}; {script}")));
        let told = session.run(&command, input, limit, deadline + SLACK).await;
        let step = || name.to_owned();
        match told {
            Ok(output) if matches!(output.status, 124 | 137) => {
                Err(Error::TimedOut { step: step(), waited: deadline })
            }
            Ok(output) => Ok(output),
            Err(broken) => {
                // What the channel is still busy with must not meet the next step.
                self.session = None;
                Err(match broken {
                    Broken::Late => Error::TimedOut { step: step(), waited: deadline + SLACK },
                    Broken::TooMuch => Error::TooMuchOutput { step: step(), limit },
                    Broken::Cut(source) => Error::Cut { step: step(), source: source.into() },
                })
            }
        }
    }

    /// Carries a step out that must succeed. Not cancel safe.
    pub(super) async fn run(&mut self, step: Step<'_>) -> Result<Zeroizing<Vec<u8>>, Error> {
        let name = step.name.to_owned();
        let output = self.attempt(step).await?;
        if output.status == 0 {
            return Ok(output.stdout);
        }
        Err(failure(&name, &output))
    }

    /// What the host is like.
    ///
    /// # Errors
    ///
    /// When it cannot be asked, or its answer makes no sense.
    pub async fn facts(&mut self) -> Result<Facts, Error> {
        let name = "look at the host";
        let answer = self.run(self.step(name, PROBE)).await?;
        Facts::parse(&String::from_utf8_lossy(&answer))
            .map_err(|problem| Error::Answer { step: name.into(), problem })
    }

    /// Its enclaves.
    pub(super) async fn enclaves(&mut self) -> Result<Vec<Enclave>, Error> {
        self.json("list the enclaves", "nitro-cli describe-enclaves").await
    }

    /// Ends an enclave by its id. One that has ended by itself is no error.
    pub(super) async fn end_enclave(&mut self, id: &str) -> Result<(), Error> {
        let script = format!("nitro-cli terminate-enclave --enclave-id {}", quoted(id));
        let name = "end the enclave";
        let output = self.attempt(self.step(name, script)).await?;
        if output.status == 0 || !self.enclaves().await?.iter().any(|enclave| enclave.enclave_id == id) {
            return Ok(());
        }
        Err(failure(name, &output))
    }

    /// A step that answers with JSON.
    pub(super) async fn json<T: serde::de::DeserializeOwned>(
        &mut self,
        name: &str,
        script: &str,
    ) -> Result<T, Error> {
        let answer = self.run(self.step(name, script)).await?;
        parsed(name, &answer)
    }

    /// Restarts the host and waits until it is back.
    pub(super) async fn restart(&mut self, boot_id: &str) -> Result<(), Error> {
        let waited = self.patience.restart;
        let deadline = Deadline::within(waited);
        // The answer is lost with the connection, as a rule.
        match self.attempt(self.step("restart the host", "systemctl reboot")).await {
            Ok(output) if output.status != 0 => return Err(failure("restart the host", &output)),
            Ok(_) | Err(Error::Cut { .. }) => {}
            Err(error) => return Err(error),
        }
        let mut pauses = Pauses::new(Duration::from_millis(500), Duration::from_secs(5));
        loop {
            let again = match self.boot_id().await {
                Ok(now) => now == boot_id,
                Err(error) if error.is_unreachable() || matches!(error, Error::Cut { .. }) => true,
                Err(error) => return Err(error),
            };
            if !again {
                return Ok(());
            }
            if deadline.passed() {
                return Err(Error::NotBack { waited });
            }
            self.close().await;
            pauses.pause(deadline).await;
        }
    }

    async fn boot_id(&mut self) -> Result<String, Error> {
        let answer =
            self.run(self.step("ask for the boot id", "cat /proc/sys/kernel/random/boot_id")).await?;
        Ok(String::from_utf8_lossy(&answer).trim().to_owned())
    }

    /// What a person wants to have run there, as the login user: its output and exit code.
    ///
    /// # Errors
    ///
    /// As every step.
    pub async fn command(
        &mut self,
        words: &[String],
        deadline: Duration,
    ) -> Result<(Zeroizing<Vec<u8>>, String, u32), Error> {
        let script = words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ");
        let step =
            Step { root: false, deadline, limit: 16 * MAX_OUTPUT, ..self.step("run the command", script) };
        let output = self.attempt(step).await?;
        Ok((output.stdout, output.stderr, output.status))
    }

    /// The last `lines` lines of a log.
    ///
    /// # Errors
    ///
    /// As every step.
    pub async fn log(&mut self, log: HostLog, lines: u32) -> Result<String, Error> {
        let script = match log {
            HostLog::Proxy => format!("journalctl -u host-proxy.service -n {lines} -o cat --no-pager"),
            HostLog::Allocator => {
                format!("journalctl -u nitro-enclaves-allocator.service -n {lines} -o short-iso --no-pager")
            }
            HostLog::NitroCli => format!(
                "newest=$(ls -t /var/log/nitro_enclaves/*.log 2>/dev/null | head -n 1); \
                 [ -z \"$newest\" ] || tail -n {lines} \"$newest\""
            ),
        };
        let text = self.run(self.step("read the log", script)).await?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

/// A log on a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostLog {
    /// The proxy's.
    Proxy,
    /// The allocator's.
    Allocator,
    /// The newest that nitro-cli wrote.
    NitroCli,
}

/// What a command's failure means.
pub(super) fn failure(step: &str, output: &Output) -> Error {
    let step = step.to_owned();
    if let Some((code, words)) = nitro::error(&output.stderr) {
        return Error::NitroCli { step, code, words };
    }
    let words = if output.stderr.trim().is_empty() {
        String::from_utf8_lossy(&output.stdout).into_owned()
    } else {
        output.stderr.clone()
    };
    Error::Step { step, status: output.status, words: shown(&words) }
}

/// The end of a text on one line, without what a terminal would act on.
pub(super) fn shown(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    let line: Vec<char> = words.join(" ").chars().filter(|character| !character.is_control()).collect();
    let from = line.len().saturating_sub(SHOWN);
    line[from..].iter().collect()
}

pub(super) fn parsed<T: serde::de::DeserializeOwned>(step: &str, answer: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(answer).map_err(|error| not_json(step, error))
}

pub(super) fn not_json(step: &str, problem: impl Display) -> Error {
    Error::Answer { step: step.to_owned(), problem: format!("not the JSON that is expected: {problem}") }
}

/// A word for the shell, whatever is in it.
pub(crate) fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// A failure with a file on this machine.
pub(super) fn file_failure(
    action: &'static str,
    path: impl Into<PathBuf>,
) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.into();
    move |source| Error::File { action, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_stays_one_word() {
        for word in ["plain", "two words", "it's", "$(reboot)", "'; reboot; '", "a\nb", ""] {
            let script = format!("printf %s {}", quoted(word));
            let output = std::process::Command::new("sh").arg("-c").arg(script).output().unwrap();
            assert_eq!(output.stdout, word.as_bytes());
        }
    }

    #[test]
    fn the_end_of_a_message_is_shown_without_control_characters() {
        assert_eq!(shown("  a\n\u{1b}[31mb\tc\u{7}\n"), "a [31mb c");
        assert_eq!(shown(&"x".repeat(2000)).len(), SHOWN);
    }
}
