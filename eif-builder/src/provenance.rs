//! The file beside an image that says what it was made of.

use serde::Serialize;
use serde_json::{Map, Value, json};

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
    if let (Value::Object(document), Value::Object(measured)) = (&mut document, to_json(registers)) {
        document.extend(measured);
    }
    document
}

/// nitro-cli's `Measurements`, and the hash beside them.
pub fn to_json(registers: &Registers) -> Value {
    json!({
        "Measurements": measurements(registers),
        "OsImageHash": format!("0x{}", registers.os_image_hash()),
    })
}

/// The object that nitro-cli prints under `Measurements`.
pub fn measurements(registers: &Registers) -> Value {
    let Registers { pcr0, pcr1, pcr2, pcr8 } = registers;
    let mut map = Map::new();
    // nitro-cli prints a debug string here that differs by release; nobody should compare it.
    map.insert("HashAlgorithm".into(), "Sha384 { ... }".into());
    for (name, pcr) in
        [("PCR0", Some(pcr0)), ("PCR1", Some(pcr1)), ("PCR2", Some(pcr2)), ("PCR8", pcr8.as_ref())]
    {
        if let Some(pcr) = pcr {
            map.insert(name.into(), pcr.to_string().into());
        }
    }
    map.into()
}
