//! JSON as Python's `json` module writes it, which is what dstack-cloud puts on the measured disk: non-ASCII characters
//! escaped, and one of two layouts.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::Serializer;
use serde_json::ser::{Formatter, PrettyFormatter};

/// `json.dumps(value, indent=2)`: no newline at the end.
pub(crate) fn indented(value: &impl Serialize) -> Result<Vec<u8>, serde_json::Error> {
    write(value, Indented(PrettyFormatter::with_indent(b"  ")))
}

/// `json.dumps(value)`: one line, a space after each comma and colon.
pub(crate) fn one_line(value: &impl Serialize) -> Result<Vec<u8>, serde_json::Error> {
    write(value, OneLine)
}

fn write(value: &impl Serialize, formatter: impl Formatter) -> Result<Vec<u8>, serde_json::Error> {
    let mut bytes = Vec::new();
    value.serialize(&mut Serializer::with_formatter(&mut bytes, formatter))?;
    Ok(bytes)
}

/// Everything outside printable ASCII leaves as `\uXXXX`, beyond the basic plane as two of them.
fn write_ascii<W: ?Sized + Write>(writer: &mut W, fragment: &str) -> io::Result<()> {
    let mut units = [0; 2];
    for character in fragment.chars() {
        if matches!(character, ' '..='~') {
            writer.write_all(&[character as u8])?;
        } else {
            for unit in character.encode_utf16(&mut units) {
                write!(writer, "\\u{unit:04x}")?;
            }
        }
    }
    Ok(())
}

struct Indented(PrettyFormatter<'static>);

impl Formatter for Indented {
    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        write_ascii(writer, fragment)
    }

    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_array(writer)
    }

    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_array(writer)
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_array_value(writer, first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_array_value(writer)
    }

    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_object(writer)
    }

    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_object(writer)
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_object_key(writer, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_object_value(writer)
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_object_value(writer)
    }
}

struct OneLine;

impl Formatter for OneLine {
    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        write_ascii(writer, fragment)
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Expected bytes are what CPython 3.11 prints for the same value.
    #[test]
    fn layouts_and_escapes_are_those_of_python() {
        let value =
            json!({"a": ["b", 1, true, null], "e": [], "o": {}, "s": "é\u{7f}\u{1}\n\t\"\\/\u{1f511}"});
        let indented = String::from_utf8(indented(&value).unwrap()).unwrap();
        let one_line = String::from_utf8(one_line(&value).unwrap()).unwrap();
        assert_eq!(
            indented,
            "{\n  \"a\": [\n    \"b\",\n    1,\n    true,\n    null\n  ],\n  \"e\": [],\n  \"o\": {},\n  \
             \"s\": \"\\u00e9\\u007f\\u0001\\n\\t\\\"\\\\/\\ud83d\\udd11\"\n}"
        );
        assert_eq!(
            one_line,
            "{\"a\": [\"b\", 1, true, null], \"e\": [], \"o\": {}, \
             \"s\": \"\\u00e9\\u007f\\u0001\\n\\t\\\"\\\\/\\ud83d\\udd11\"}"
        );
    }

    proptest::proptest! {
        #[test]
        fn every_string_survives_both_layouts(text in ".*") {
            let value = Value::String(text);
            for bytes in [indented(&value).unwrap(), one_line(&value).unwrap()] {
                proptest::prop_assert!(bytes.is_ascii());
                proptest::prop_assert_eq!(&serde_json::from_slice::<Value>(&bytes).unwrap(), &value);
            }
        }
    }
}
