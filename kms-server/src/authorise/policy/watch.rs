//! A policy that follows its file. What cannot be used is reported and does not replace what can.
//!
//! The file is read again and again rather than watched: in containers it is often a mount or a link that is exchanged,
//! which notifications miss, and reading a few kilobytes costs nothing.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use kms_protocol::wire::webhook::AuthInfo;
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};
use tracing::{error, info, warn};

use super::{Policy, PolicyError, file};
use crate::authorise::{Authoriser, Grant, Pending, Question, Refusal};
use command_line::chain;

/// How long one look at the file may take, before it is reported. The next look waits for it.
const SLOW: Duration = Duration::from_secs(10);

/// The policy of a file, in its last usable version.
pub struct PolicyFile {
    path: PathBuf,
    every: Duration,
    state: RwLock<State>,
}

struct State {
    policy: Arc<Policy>,
    /// What the policy was read from.
    text: String,
    trouble: Option<Trouble>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Trouble {
    /// The text that cannot be used; reported once.
    Unusable(String),
    Unreadable,
    Slow,
}

impl PolicyFile {
    /// Reads the file, which must be usable at the start, and looks at it again `every` so often. Blocks.
    ///
    /// # Errors
    ///
    /// [`PolicyError`].
    pub fn open(path: PathBuf, every: Duration) -> Result<Self, PolicyError> {
        let text = file::read(&path)?;
        let policy = Arc::new(Policy::parse(&path, &text)?);
        let state = RwLock::new(State { policy, text, trouble: None });
        Ok(Self { path, every, state })
    }

    /// Looks at the file once.
    async fn look(&self) {
        let path = self.path.clone();
        let mut reading = spawn_blocking(move || file::read(&path));
        let text = match timeout(SLOW, &mut reading).await {
            Ok(text) => text,
            Err(_) => {
                warn!(file = %self.path.display(), "reading the policy takes long; the last one stays in force");
                self.write(|state| state.trouble = Some(Trouble::Slow));
                reading.await
            }
        };
        match text {
            Ok(Ok(text)) => self.take(text),
            Ok(Err(error)) => {
                let error = chain(&error);
                self.write(|state| {
                    if state.trouble != Some(Trouble::Unreadable) {
                        error!(error, "the policy cannot be read; the last one stays in force");
                        state.trouble = Some(Trouble::Unreadable);
                    }
                });
            }
            // Only a panic or the runtime's end loses a task.
            Err(error) => error!(%error, "looking at the policy failed"),
        }
    }

    /// Puts the text into force if it can be.
    fn take(&self, text: String) {
        self.write(|state| {
            if text == state.text {
                if state.trouble.take().is_some() {
                    info!(file = %self.path.display(), "the policy in force is in its file again");
                }
                return;
            }
            match Policy::parse(&self.path, &text) {
                Ok(policy) => {
                    info!(file = %self.path.display(), apps = policy.apps.len(), "a new policy is in force");
                    *state = State { policy: Arc::new(policy), text, trouble: None };
                }
                Err(error) => {
                    let trouble = Some(Trouble::Unusable(text));
                    if state.trouble != trouble {
                        let error = chain(&error);
                        error!(file = %self.path.display(), error, "the new policy cannot be used; the last one stays in force");
                        state.trouble = trouble;
                    }
                }
            }
        });
    }

    fn write(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.write().unwrap_or_else(PoisonError::into_inner));
    }

    fn read<T>(&self, read: impl FnOnce(&State) -> T) -> T {
        read(&self.state.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Authoriser for PolicyFile {
    fn kind(&self) -> &'static str {
        "policy"
    }

    fn authorise<'a>(&'a self, question: &'a Question) -> Pending<'a, Result<Grant, Refusal>> {
        let policy = self.read(|state| Arc::clone(&state.policy));
        Box::pin(std::future::ready(policy.decide(question)))
    }

    fn describe(&self) -> Pending<'_, Result<Option<AuthInfo>, Refusal>> {
        Box::pin(std::future::ready(Ok(None)))
    }

    fn tend(&self) -> Pending<'_, ()> {
        Box::pin(async {
            loop {
                sleep(self.every).await;
                self.look().await;
            }
        })
    }

    fn is_remote(&self) -> bool {
        false
    }

    /// Anybody may read this, so it says nothing of what is in the file.
    fn trouble(&self) -> Option<String> {
        let text = self.read(|state| match &state.trouble {
            None => None,
            Some(Trouble::Unusable(_)) => Some("the new policy cannot be used"),
            Some(Trouble::Unreadable) => Some("the policy cannot be read"),
            Some(Trouble::Slow) => Some("reading the policy takes long"),
        })?;
        Some(format!("{text}; the last one stays in force (the log says more)"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const APP: &str = "1111111111111111111111111111111111111111";

    fn policy(image: u8) -> String {
        format!("[apps.{APP}]\nimages = [\"{}\"]\n", hex::encode([image; 32]))
    }

    #[tokio::test]
    async fn a_new_policy_comes_into_force_and_a_broken_one_does_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("policy.toml");
        let write = |text: &str| std::fs::write(&path, text).unwrap();
        write(&policy(1));
        let file = PolicyFile::open(path.clone(), Duration::from_secs(1)).unwrap();
        let in_force = || file.read(|state| state.policy.as_ref().clone());
        let first = Policy::from_toml(&policy(1)).unwrap();
        file.look().await;
        assert_eq!((in_force(), file.trouble()), (first.clone(), None));

        for (name, broken) in [
            ("half of a file", policy(2).split_off(20)),
            ("nothing", String::new()),
            ("an unknown key", policy(2) + "imagse = []\n"),
            ("an empty list", format!("[apps.{APP}]\nimages = []\n")),
        ] {
            write(&broken);
            file.look().await;
            assert_eq!(in_force(), first, "{name}");
            assert!(file.trouble().unwrap().starts_with("the new policy cannot be used"), "{name}");
        }
        std::fs::remove_file(&path).unwrap();
        file.look().await;
        assert_eq!(in_force(), first);
        assert!(file.trouble().unwrap().starts_with("the policy cannot be read"));

        write(&policy(2));
        file.look().await;
        assert_eq!((in_force(), file.trouble()), (Policy::from_toml(&policy(2)).unwrap(), None));
    }

    #[tokio::test]
    async fn the_old_text_ends_the_trouble_too() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("policy.json");
        let text = format!(r#"{{"apps": {{"{APP}": {{"images": ["{}"]}}}}}}"#, hex::encode([1; 32]));
        std::fs::write(&path, &text).unwrap();
        let file = PolicyFile::open(path.clone(), Duration::from_secs(1)).unwrap();
        std::fs::write(&path, "{").unwrap();
        file.look().await;
        assert!(file.trouble().is_some());
        std::fs::write(&path, &text).unwrap();
        file.look().await;
        assert_eq!(file.trouble(), None);
    }

    #[test]
    fn a_server_does_not_start_with_a_broken_policy() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("policy.toml");
        assert!(matches!(PolicyFile::open(path.clone(), SLOW), Err(PolicyError::Read { .. })));
        std::fs::write(&path, "apps = 1").unwrap();
        assert!(matches!(PolicyFile::open(path.clone(), SLOW), Err(PolicyError::Shape(_))));
        std::fs::write(&path, " ".repeat(usize::try_from(super::super::MAX_FILE + 1).unwrap())).unwrap();
        assert!(matches!(PolicyFile::open(path, SLOW), Err(PolicyError::TooLong { .. })));
    }
}
