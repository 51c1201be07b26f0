//! [`ProcessFile`]: what the image runs, `/etc/keyferry/process.json`.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use serde::Deserialize;

/// Program, arguments, environment, directory and user; measured with the app. Unknown keys are refused.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessFile {
    /// Program and arguments. A program without a slash is looked for in the environment's PATH.
    pub args: Vec<String>,
    /// `NAME=value` pairs.
    pub env: Vec<String>,
    /// Working directory.
    pub cwd: String,
    /// Numeric user.
    pub uid: u32,
    /// Numeric group.
    pub gid: u32,
}

/// Why there is nothing to run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// Not the builder's JSON.
    #[error("not a process description")]
    Syntax(#[from] serde_json::Error),
    /// The image has neither ENTRYPOINT nor CMD.
    #[error("args is empty: the image says nothing to run")]
    NoProgram,
    /// A text that no program can be given.
    #[error("{what} has a zero byte in it")]
    ZeroByte {
        /// Which.
        what: &'static str,
    },
    /// An environment entry without a name.
    #[error("environment entry {position} is not NAME=value")]
    Environment {
        /// Which, from 0.
        position: usize,
    },
}

impl ProcessFile {
    /// Reads and checks a description.
    ///
    /// # Errors
    /// [`ProcessError`].
    pub fn from_json(text: &str) -> Result<Self, ProcessError> {
        let process: Self = serde_json::from_str(text)?;
        if process.args.is_empty() {
            return Err(ProcessError::NoProgram);
        }
        let texts = (process.args.iter().map(|arg| ("args", arg)))
            .chain(process.env.iter().map(|pair| ("env", pair)))
            .chain([("cwd", &process.cwd)]);
        for (what, text) in texts {
            if text.contains('\0') {
                return Err(ProcessError::ZeroByte { what });
            }
        }
        let nameless = |pair: &String| pair.split_once('=').is_none_or(|(name, _)| name.is_empty());
        match process.env.iter().position(nameless) {
            Some(position) => Err(ProcessError::Environment { position }),
            None => Ok(process),
        }
    }

    /// The command, with `additions` to its environment where the image does not say otherwise.
    pub(super) fn command(&self, additions: &[(String, String)]) -> Command {
        let mut command = Command::new(&self.args[0]);
        command.args(&self.args[1..]).env_clear().current_dir(&self.cwd).stdin(Stdio::null());
        for (name, value) in additions {
            command.env(name, value);
        }
        for (name, value) in self.env.iter().filter_map(|pair| pair.split_once('=')) {
            command.env(OsString::from(name), OsString::from(value));
        }
        // A group of its own, so that a signal reaches what the app started too.
        command.process_group(0);
        // Only what differs: without privileges even the same user cannot be set with its groups.
        if rustix::process::getgid().as_raw() != self.gid {
            command.gid(self.gid);
        }
        if rustix::process::getuid().as_raw() != self.uid {
            command.uid(self.uid);
        }
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(args: &str, env: &str) -> Result<ProcessFile, ProcessError> {
        ProcessFile::from_json(&format!(
            r#"{{"args": {args}, "env": {env}, "cwd": "/", "uid": 1, "gid": 2}}"#
        ))
    }

    #[test]
    fn the_images_environment_wins_over_ours() {
        let process = with(r#"["/app", "-v"]"#, r#"["HTTP_PROXY=http://other", "EMPTY="]"#).unwrap();
        let additions = [("HTTP_PROXY", "ours"), ("https_proxy", "ours")];
        let command = process.command(&additions.map(|(name, value)| (name.to_owned(), value.to_owned())));
        let value = |name: &str| {
            let mut pairs = command.get_envs();
            pairs.find(|(it, _)| *it == name).and_then(|(_, value)| value?.to_str())
        };
        assert_eq!(value("HTTP_PROXY"), Some("http://other"));
        assert_eq!(value("https_proxy"), Some("ours"));
        assert_eq!(value("EMPTY"), Some(""));
        assert_eq!(command.get_envs().count(), 3);
        assert_eq!(command.get_args().collect::<Vec<_>>(), ["-v"]);
    }

    #[test]
    fn what_cannot_be_run_is_refused() {
        assert!(matches!(with("[]", "[]"), Err(ProcessError::NoProgram)));
        assert!(matches!(with(r#"["a\u0000"]"#, "[]"), Err(ProcessError::ZeroByte { what: "args" })));
        assert!(matches!(
            with(r#"["a"]"#, r#"["A=1", "=x"]"#),
            Err(ProcessError::Environment { position: 1 })
        ));
        assert!(matches!(with(r#"["a"]"#, r#"["A"]"#), Err(ProcessError::Environment { position: 0 })));
        for wrong in ["", "{}", r#"{"args":["a"],"env":[],"cwd":"/","uid":0,"gid":0,"user":"x"}"#] {
            assert!(matches!(ProcessFile::from_json(wrong), Err(ProcessError::Syntax(_))), "{wrong}");
        }
    }
}
