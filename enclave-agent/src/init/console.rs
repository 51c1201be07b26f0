//! What the console shows: short lines that begin with `keyferry:`, and at the end one that says how it ended.
//!
//! The parent reads the console in debug mode, and a local runner always; nothing secret is on it.

use std::io::Write;

use command_line::Exit;

/// How the last line begins. What follows is the exit code, a colon and the reason: `keyferry: exit 3: …`. A local
/// runner ends with that code.
pub const EXIT_LINE: &str = "keyferry: exit ";

/// Shows a line.
pub(crate) fn say(line: &str) {
    write_line(&format!("keyferry: {}\n", one_line(line)));
}

/// Shows the last line.
pub fn report(exit: Exit, reason: &str) {
    write_line(&format!("{EXIT_LINE}{}: {}\n", exit.code(), one_line(reason)));
}

/// A peer's words may be in it: no line breaks that would make lines of their own, no terminal commands.
fn one_line(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { ' ' } else { character }).collect()
}

/// In one call, so that the app's output does not come between. A console that is gone is no reason to stop.
fn write_line(line: &str) {
    let _gone = std::io::stderr().write_all(line.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peers_words_make_no_line_of_their_own() {
        assert_eq!(
            one_line("refused:\nkeyferry: exit 0: done\r\x1b[2J"),
            "refused: keyferry: exit 0: done  [2J"
        );
    }
}
