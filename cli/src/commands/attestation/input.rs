//! Reads a document in whatever form people keep it.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use attestation::{Error, MAX_EVIDENCE_LEN};
use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

/// Evidence in hex, with white space in plenty. What is longer is refused with nothing of it looked at.
const MAX_INPUT_LEN: usize = 64 * 1024;

const ANY_PADDING: GeneralPurposeConfig =
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
const BASE64: [GeneralPurpose; 2] = [
    GeneralPurpose::new(&alphabet::STANDARD, ANY_PADDING),
    GeneralPurpose::new(&alphabet::URL_SAFE, ANY_PADDING),
];

/// What a file holds.
pub(super) enum Input {
    /// Bytes to decode.
    Evidence(Vec<u8>),
    /// More than any document.
    TooLarge(Error),
    /// Nothing, for this reason.
    Unreadable(io::Error),
}

impl Input {
    /// Reads a file, or standard input for `-`.
    pub(super) fn read(path: &Path) -> Self {
        match read_bounded(path, MAX_INPUT_LEN) {
            Ok(Some(content)) => Self::Evidence(decode(content)),
            Ok(None) => Self::TooLarge(Error::TooLarge { actual: MAX_INPUT_LEN + 1, max: MAX_EVIDENCE_LEN }),
            Err(error) => Self::Unreadable(error),
        }
    }
}

/// The content of a file, or of standard input for `-`; `None` if it is longer than `max`.
pub(in crate::commands) fn read_bounded(path: &Path, max: usize) -> io::Result<Option<Vec<u8>>> {
    if path == Path::new("-") { bounded(io::stdin().lock(), max) } else { bounded(File::open(path)?, max) }
}

fn bounded(reader: impl Read, max: usize) -> io::Result<Option<Vec<u8>>> {
    let mut content = Vec::new();
    reader.take(max as u64 + 1).read_to_end(&mut content)?;
    Ok((content.len() <= max).then_some(content))
}

/// Hex (with or without 0x) and base64 (either alphabet, padded or not) may hold white space anywhere. Everything else
/// is taken as the raw document; those start with a byte that is no text.
fn decode(content: Vec<u8>) -> Vec<u8> {
    if content.is_empty() || !content.is_ascii() {
        return content;
    }
    let text: Vec<u8> = content.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let digits = text.strip_prefix(b"0x").unwrap_or(&text);
    let from_hex = hex::decode(digits).ok();
    let from_base64 = || BASE64.iter().find_map(|engine| engine.decode(&text).ok());
    from_hex.or_else(from_base64).filter(|evidence| !evidence.is_empty()).unwrap_or(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_one_document_reads_alike() {
        let raw = [0x84, 0x44, 0xa1, 0x01, 0xfb, 0xff];
        for form in [
            "8444a101fbff",
            "0x8444A101FBFF",
            "84 44\n a1 01\tfb ff\r\n",
            "hEShAfv/",
            "hEShAfv_",
            "hESh\nAfv/\n",
        ] {
            assert_eq!(decode(form.into()), raw, "{form:?}");
        }
        assert_eq!(decode(raw.into()), raw);
        assert_eq!(decode(b"hESh".into()), raw[..3]);
        assert_eq!(decode(b"hEQ=".into()), raw[..2]);
        assert_eq!(decode(b"hEQ".into()), raw[..2]);
    }

    #[test]
    fn what_is_neither_stays_as_it_is() {
        for text in ["", " ", "0x", "-----BEGIN", "{}"] {
            assert_eq!(decode(text.into()), text.as_bytes());
        }
    }

    #[test]
    fn reading_stops_behind_the_limit() {
        assert_eq!(bounded(&[7; 10][..], 10).unwrap(), Some(vec![7; 10]));
        assert_eq!(bounded(io::repeat(7), 10).unwrap(), None);
    }
}
