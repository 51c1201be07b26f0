use std::process::ExitCode;

/// How a command ended. Scripts rely on the numbers: "no" is not "broken".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// 0: what was asked for is done.
    Done,
    /// 1: something on this side failed.
    Internal,
    /// 2: the arguments or the configuration are wrong. clap uses the same number.
    Usage,
    /// 3: evidence, a policy or the KMS said no.
    Refused,
    /// 4: the other side gave no answer in time.
    NoAnswer,
    /// 130: interrupted from the terminal.
    Interrupted,
}

impl Exit {
    /// What a program of ours that ended with this number meant; a number of somebody else's is a failure.
    pub fn from_code(code: u8) -> Self {
        [Self::Done, Self::Usage, Self::Refused, Self::NoAnswer, Self::Interrupted]
            .into_iter()
            .find(|exit| exit.code() == code)
            .unwrap_or(Self::Internal)
    }

    /// The number the process ends with.
    pub fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Internal => 1,
            Self::Usage => 2,
            Self::Refused => 3,
            Self::NoAnswer => 4,
            Self::Interrupted => 130,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}
