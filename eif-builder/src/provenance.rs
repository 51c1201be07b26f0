//! The file beside an image that says what it was made of.

use serde::Serialize;
use serde_json::Value;

use crate::measure::Registers;

/// Something that went into an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Input {
    /// What it is for: kernel, init, agent, application, …
    pub role: String,
    /// Its name, without folders: those of one machine mean nothing on another.
    pub name: String,
    /// Digest of its bytes, 64 hex digits.
    pub sha256: String,
    /// Its length in bytes, where it is one file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
}

/// The provenance document. It has no time and no machine in it: the same inputs give the same file.
///
/// `Measurements` and `OsImageHash` are as in `measure --json`, so the file also serves as `--reference`.
pub fn document(image: &Input, inputs: &[Input], registers: &Registers) -> Value {
    let mut document = serde_json::json!({
        "Version": 1,
        "Tool": { "Name": env!("CARGO_PKG_NAME"), "Version": env!("CARGO_PKG_VERSION") },
        "Image": image,
        "Inputs": inputs,
    });
    if let (Value::Object(document), Value::Object(measured)) =
        (&mut document, crate::cli::to_json(registers))
    {
        document.extend(measured);
    }
    document
}
