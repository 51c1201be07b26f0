use std::io::{IsTerminal as _, Write as _, stderr, stdin};

use crate::{Exit, Failure};

/// Shows `plan` on standard error and asks `question`, unless `yes` was given. Blocks while a person thinks.
///
/// # Errors
///
/// A [`Failure`] with [`Exit::Usage`] when the answer is no, or there is no terminal to ask on: nobody reads a prompt in
/// continuous integration.
pub fn confirm(plan: &str, question: &str, yes: bool) -> Result<(), Failure> {
    let mut out = stderr().lock();
    // Whether the plan can be shown decides nothing: --yes was given, or the question below fails too.
    let _shown = out.write_all(plan.as_bytes());
    if yes {
        return Ok(());
    }
    if !stdin().is_terminal() {
        return Err(
            Failure::new(Exit::Usage, "no terminal to ask on").with_hint("read the plan and give --yes")
        );
    }
    let _shown = write!(out, "{question} [y/N] ").and_then(|()| out.flush());
    let mut answer = String::new();
    let read = stdin().read_line(&mut answer).is_ok();
    match read && matches!(answer.trim(), "y" | "Y" | "yes") {
        true => Ok(()),
        false => Err(Failure::new(Exit::Usage, "not confirmed, nothing was done")),
    }
}
