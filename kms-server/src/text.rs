//! Errors as one line.

/// A text of several lines, as parsers write them, on one line.
pub(crate) fn one_line(text: impl std::fmt::Display) -> String {
    let text = text.to_string();
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_joined() {
        assert_eq!(one_line("a\n  b\n\nc\n"), "a, b, c");
        assert_eq!(one_line("a"), "a");
    }
}
