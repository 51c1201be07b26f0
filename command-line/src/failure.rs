use std::error::Error;
use std::fmt::{self, Display, Formatter};
use std::process::ExitCode;

use crate::Exit;

/// An error and what lies behind it, from the outermost in, on one line: `outer: inner: innermost`.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// A command that did not do what it was asked: why, how to end, and what to try next.
#[derive(Debug)]
pub struct Failure {
    exit: Exit,
    cause: Box<dyn Error + Send + Sync>,
    hint: Option<String>,
}

impl Failure {
    /// A failure that ends the process with `exit`.
    pub fn new(exit: Exit, cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { exit, cause: cause.into(), hint: None }
    }

    /// Adds the next step, as one sentence without a full stop.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// How the process is to end.
    pub fn exit(&self) -> Exit {
        self.exit
    }

    /// The cause and what lies behind it, from the outermost in, on one line.
    pub fn message(&self) -> String {
        chain(&*self.cause)
    }

    /// Tells the failure on standard error and gives the exit code to leave `main` with.
    #[expect(clippy::print_stderr, reason = "this is the one place where a command's last word is printed")]
    pub fn report(&self) -> ExitCode {
        eprintln!("{self}");
        self.exit.into()
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.message())?;
        match &self.hint {
            Some(hint) => write!(f, "\nhint: {hint}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug)]
    struct Outer(io::Error);

    impl Display for Outer {
        fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
            f.write_str("reading keys.json")
        }
    }

    impl Error for Outer {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            Some(&self.0)
        }
    }

    #[test]
    fn a_failure_reads_from_the_outermost_cause_in() {
        let cause = Outer(io::Error::new(io::ErrorKind::NotFound, "no such file"));
        let failure = Failure::new(Exit::Internal, cause).with_hint("run `keyferry get-keys` first");
        assert_eq!(
            failure.to_string(),
            "error: reading keys.json: no such file\nhint: run `keyferry get-keys` first"
        );
    }

    #[test]
    fn every_exit_keeps_its_number() {
        let all = [Exit::Done, Exit::Internal, Exit::Usage, Exit::Refused, Exit::NoAnswer, Exit::Interrupted];
        assert_eq!(all.map(Exit::code), [0, 1, 2, 3, 4, 130]);
    }
}
