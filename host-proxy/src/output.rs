//! The one place that writes to standard output. A reader that left is no error.

use std::io::Write;

pub(crate) fn print_line(line: &str) {
    let mut out = std::io::stdout().lock();
    let _reader_left = writeln!(out, "{line}").and_then(|()| out.flush());
}

pub(crate) fn print_json(value: &serde_json::Value) {
    print_line(&format!("{value:#}"));
}
