//! What every command shares: exit codes, how a failure is told, and logs on standard error.
//!
//! Standard output carries the answer and nothing else. A failure is one line, `error: ` and the chain of causes from
//! the outermost in, followed by a line `hint: ` when the next step is known.

#![forbid(unsafe_code)]

mod confirm;
mod exit;
mod failure;
#[cfg(feature = "logs")]
pub mod logs;
mod output;
#[cfg(feature = "signals")]
pub mod signals;

pub use confirm::confirm;
pub use exit::Exit;
pub use failure::{Failure, chain};
pub use output::print_line;
