//! The metadata section: JSON that the tools show and nobody measures.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Error;

/// What the metadata section says, keys in the order in which the reference writes them.
///
/// None of it is measured or signed: anyone can change it without changing a register.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Metadata {
    /// Name of the image.
    pub image_name: String,
    /// Version of the image.
    pub image_version: String,
    /// Who built it, when, on what.
    pub build_metadata: BuildMetadata,
    /// Output of `docker inspect`, or null.
    pub docker_info: Value,
    /// Anything the user gave, or null; object keys are sorted.
    pub custom_metadata: Value,
}

/// Where an image comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct BuildMetadata {
    /// Time of the build, RFC 3339.
    pub build_time: String,
    /// Name of the tool.
    pub build_tool: String,
    /// Version of the tool.
    pub build_tool_version: String,
    /// Operating system of the kernel.
    pub operating_system: String,
    /// Version of the kernel.
    pub kernel_version: String,
}

/// Largest custom metadata document, in bytes; the reference tool's limit.
pub const MAX_CUSTOM_METADATA_LEN: usize = 4096;

impl Metadata {
    /// The section's payload: compact JSON without a newline.
    pub fn encode(&self) -> Vec<u8> {
        // Strings and JSON values have no reason to fail.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Reads a section's payload.
    ///
    /// # Errors
    /// When it is not JSON or one of the five keys is missing.
    pub fn decode(payload: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(payload)
    }
}

/// Parses a custom metadata document.
///
/// # Errors
/// When it is larger than 4 KiB or no JSON.
pub fn parse_custom(bytes: &[u8]) -> Result<Value, Error> {
    if bytes.len() > MAX_CUSTOM_METADATA_LEN {
        return Err(Error::Limit {
            object: "the custom metadata".into(),
            unit: "bytes",
            actual: bytes.len() as u64,
            max: MAX_CUSTOM_METADATA_LEN as u64,
        });
    }
    let value = serde_json::from_slice(bytes).map_err(|error| Error::input("the custom metadata", error))?;
    Ok(sorted(value))
}

/// Object keys in byte order. Whether serde_json sorts them by itself depends on a feature that any crate in the
/// build may switch on.
fn sorted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<(String, Value)> =
                map.into_iter().map(|(key, value)| (key, sorted(value))).collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(entries.into_iter().collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        other => other,
    }
}

/// Operating system and kernel version out of a kernel configuration, as the reference does: line 3 split at
/// spaces, slashes and dashes, words 1 and 3 (`# Linux/x86_64 6.6.79 Kernel Configuration`).
///
/// # Errors
/// When there is no such line.
pub fn kernel_from_config(config: &str) -> Result<(String, String), Error> {
    let line = config.lines().nth(2).unwrap_or_default();
    let words: Vec<&str> = line.split([' ', '/', '-']).collect();
    match (words.get(1), words.get(3)) {
        (Some(system), Some(version)) if !system.is_empty() && !version.is_empty() => {
            Ok(((*system).to_owned(), (*version).to_owned()))
        }
        _ => Err(Error::input(
            "the kernel configuration",
            format!("line 3 is {line:?}, expected `# Linux/ARCH VERSION Kernel Configuration`"),
        )),
    }
}

/// `seconds` since the epoch as RFC 3339 in UTC, written as the reference writes it (`+00:00`).
///
/// # Errors
/// When the year has more than four digits.
pub fn rfc3339(seconds: i64) -> Result<String, Error> {
    let time = time::OffsetDateTime::from_unix_timestamp(seconds)
        .map_err(|error| Error::input("SOURCE_DATE_EPOCH", error))?;
    let (year, month, day) = time.to_calendar_date();
    let (hour, minute, second) = time.to_hms();
    Ok(format!("{year:04}-{:02}-{day:02}T{hour:02}:{minute:02}:{second:02}+00:00", u8::from(month)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_the_reference_writes_them() {
        assert_eq!(rfc3339(0).unwrap(), "1970-01-01T00:00:00+00:00");
        assert_eq!(rfc3339(1_492_533_000).unwrap(), "2017-04-18T16:30:00+00:00");
        assert_eq!(rfc3339(951_782_399).unwrap(), "2000-02-28T23:59:59+00:00");
    }

    #[test]
    fn kernel_version_comes_from_line_three() {
        let config =
            "#\n# Automatically generated file; DO NOT EDIT.\n# Linux/x86_64 6.6.79 Kernel Configuration\n";
        assert_eq!(kernel_from_config(config).unwrap(), ("Linux".into(), "6.6.79".into()));
        assert!(kernel_from_config("CONFIG_64BIT=y\n").is_err());
    }

    #[test]
    fn custom_metadata_is_sorted_and_bounded() {
        let value = parse_custom("{\"b\":2,\"a\":{\"z\":[1,null,true],\"ü\":\"☃\"}}".as_bytes()).unwrap();
        assert_eq!(value.to_string(), "{\"a\":{\"z\":[1,null,true],\"ü\":\"☃\"},\"b\":2}");
        assert!(matches!(parse_custom(&[b' '; 4097]), Err(Error::Limit { actual: 4097, .. })));
    }
}
