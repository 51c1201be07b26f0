//! Measurements as text and JSON.

use std::path::Path;

use attestation::{OsImageHash, Pcr};
use serde_json::Value;

use super::Io;
use crate::error::{Error, IoContext};
use crate::measure::Registers;
use crate::provenance::to_json;

/// Prints the answer of a measuring command.
pub(super) fn print(io: &mut Io<'_>, registers: &Registers, json: bool) -> Result<(), Error> {
    if json {
        return print_json(io, &to_json(registers));
    }
    let Registers { pcr0, pcr1, pcr2, pcr8 } = registers;
    let mut text = format!("PCR0: {pcr0}\nPCR1: {pcr1}\nPCR2: {pcr2}\n");
    if let Some(pcr8) = pcr8 {
        text += &format!("PCR8: {pcr8}\n");
    }
    text += &format!("OS_IMAGE_HASH: 0x{}\n", registers.os_image_hash());
    print_text(io, &text)
}

pub(super) fn print_text(io: &mut Io<'_>, text: &str) -> Result<(), Error> {
    io.out.write_all(text.as_bytes()).context("write", "the answer")
}

pub(super) fn print_json(io: &mut Io<'_>, value: &Value) -> Result<(), Error> {
    print_text(io, &format!("{value:#}\n"))
}

/// Reads registers out of a `measure --json` answer, a provenance file, or what nitro-cli prints.
pub(super) fn read_reference(path: &Path) -> Result<Registers, Error> {
    let text = std::fs::read_to_string(path).context("read", path)?;
    let value: Value = serde_json::from_str(&text).map_err(|error| Error::input(path.display(), error))?;
    let pcr = |name: &str| -> Result<Option<Pcr>, Error> {
        let Some(hex) = value.get("Measurements").and_then(|map| map.get(name)).and_then(Value::as_str)
        else {
            return Ok(None);
        };
        hex.parse().map(Some).map_err(|error| Error::input(path.display(), format!("{name}: {error}")))
    };
    let need = |name: &str| {
        pcr(name)?.ok_or_else(|| Error::input(path.display(), format!("has no Measurements.{name}")))
    };
    Ok(Registers { pcr0: need("PCR0")?, pcr1: need("PCR1")?, pcr2: need("PCR2")?, pcr8: pcr("PCR8")? })
}

/// The refusal when the hash is not the expected one: which registers differ, and what feeds them.
pub(super) fn mismatch(
    expected: &OsImageHash,
    actual: &Registers,
    reference: Option<&Registers>,
    inputs: &Inputs,
) -> Error {
    let mut text = format!("OS_IMAGE_HASH is 0x{}, expected 0x{expected}", actual.os_image_hash());
    match reference {
        None => {
            text += &format!("\n  PCR0 {} from {}", actual.pcr0, inputs.all());
            text += &format!("\n  PCR1 {} from {}", actual.pcr1, inputs.boot());
            text += &format!("\n  PCR2 {} from {}", actual.pcr2, inputs.app());
            text +=
                "\n  (give --reference FILE with the registered measurements to see which of them differs)";
        }
        Some(reference) if reference.os_image_hash() != *expected => {
            text += &format!("\n  the reference is for another image, 0x{}", reference.os_image_hash());
        }
        Some(reference) => {
            for (name, is, was, inputs) in [
                ("PCR0", actual.pcr0, reference.pcr0, inputs.all()),
                ("PCR1", actual.pcr1, reference.pcr1, inputs.boot()),
                ("PCR2", actual.pcr2, reference.pcr2, inputs.app()),
            ] {
                text += &if is == was {
                    format!("\n  {name} is as expected: {inputs}")
                } else {
                    format!("\n  {name} differs: {is}, expected {was}, from {inputs}")
                };
            }
        }
    }
    Error::Refused(text)
}

/// Names of what is measured, for messages.
#[derive(Debug)]
pub(super) struct Inputs {
    /// Ramdisks in order.
    pub(super) ramdisks: Vec<String>,
}

impl Inputs {
    fn all(&self) -> String {
        format!(
            "everything: {}{}",
            self.boot(),
            self.ramdisks.iter().skip(1).map(|name| format!(", {name}")).collect::<String>()
        )
    }

    fn boot(&self) -> String {
        format!("kernel, command line, {}", self.ramdisks.first().map_or("no ramdisk", String::as_str))
    }

    fn app(&self) -> String {
        match self.ramdisks.get(1..) {
            Some(rest) if !rest.is_empty() => rest.join(", "),
            _ => "nothing (there is one ramdisk)".to_owned(),
        }
    }
}
