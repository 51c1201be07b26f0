//! A machine's console, read again and again: a VMM gives its last lines and knows no positions.

/// Lines that are asked for at a time: more than a boot prints.
pub(super) const LINES: usize = 10_000;
/// So much of the end of what was read is looked for in what is read next.
const TAIL: usize = 1 << 10;

/// Knows what was read.
#[derive(Debug, Default)]
pub(super) struct Reader {
    tail: String,
}

impl Reader {
    /// What stands in `log` behind what was read before. All of it when that is not found: the machine was started anew, and
    /// its log with it.
    pub(super) fn new_text<'a>(&mut self, log: &'a str) -> &'a str {
        let known = if self.tail.is_empty() { None } else { log.rfind(&self.tail) };
        let text = known.map_or(log, |at| &log[at + self.tail.len()..]);
        if !text.is_empty() {
            let start = log.ceil_char_boundary(log.len().saturating_sub(TAIL));
            log[start..].clone_into(&mut self.tail);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_log_that_begins_anew_is_read_from_its_beginning() {
        let mut reader = Reader::default();
        assert_eq!(reader.new_text("one\n"), "one\n");
        assert_eq!(reader.new_text("one\n"), "");
        assert_eq!(reader.new_text("one\ntwo\n"), "two\n");
        assert_eq!(reader.new_text(""), "");
        assert_eq!(reader.new_text("Linux version\n"), "Linux version\n");
        assert_eq!(reader.new_text("Linux version\nup\n"), "up\n");
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_once(lines in proptest::collection::vec("[a-zé]{1,40}", 1..60), kept in 5usize..30) {
            let (mut reader, mut all, mut printed) = (Reader::default(), String::new(), String::new());
            for (number, line) in lines.iter().enumerate() {
                // Lines differ, as those with a time do.
                printed.push_str(&format!("[{number}] {line}\n"));
                let last: Vec<&str> = printed.split_inclusive('\n').collect();
                let log = last[last.len().saturating_sub(kept * 100)..].concat();
                all.push_str(reader.new_text(&log));
            }
            prop_assert_eq!(all, printed);
        }
    }
}
