//! What the exit code of every command means.

/// How a command ended. Scripts rely on the numbers: "no" is not "broken".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// 0: what was asked for is done.
    Done,
    /// 1: something on this side failed.
    Internal,
    /// 3: evidence, a policy or the KMS said no.
    Refused,
    /// 4: the other side gave no answer in time.
    NoAnswer,
    /// 130: interrupted from the terminal.
    Interrupted,
}
// 2, wrong usage, is clap's own exit code.

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Done => 0,
            Exit::Internal => 1,
            Exit::Refused => 3,
            Exit::NoAnswer => 4,
            Exit::Interrupted => 130,
        })
    }
}
