use std::io::{self, Write};

/// Writes a line to standard output and sends it off. A reader that left does not want it, which is no error.
pub fn print_line(line: &str) {
    let mut out = io::stdout().lock();
    let _reader_left = writeln!(out, "{line}").and_then(|()| out.flush());
}
