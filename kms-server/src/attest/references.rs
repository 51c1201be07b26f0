//! Which registers a TDX image has: what ties a guest's word about its image to what the CPU measured.
//!
//! On bare-metal TDX the registers depend on the image and on the machine's shape (processors, memory, devices).
//! `dstack-mr` computes them from an image; its JSON is what the file holds, per image hash:
//!
//! ```json
//! {"7f98…": [{"mrtd": "…", "rtmr0": "…", "rtmr1": "…", "rtmr2": "…"}]}
//! ```
//!
//! Without the file no guest on bare-metal TDX gets anything, for its image hash would be its own word.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kms_protocol::tdx::TdRegisters;
use serde::Deserialize;

/// Longest file.
const MAX_FILE: u64 = 16 << 20;

/// The registers of every image that is known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct References(BTreeMap<[u8; 32], Vec<[[u8; 48]; 4]>>);

/// Why there are no references.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReferencesError {
    /// The file cannot be read.
    #[error("cannot read the measurements {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is too long.
    #[error("the measurements {} are longer than {MAX_FILE} bytes", path.display())]
    TooLong {
        /// Which.
        path: PathBuf,
    },
    /// The text is not JSON of the expected shape.
    #[error("the measurements are not valid: {0}")]
    Shape(String),
}

/// Other registers that `dstack-mr` prints are ignored: they follow from these.
#[derive(Deserialize)]
struct Row {
    mrtd: String,
    rtmr0: String,
    rtmr1: String,
    rtmr2: String,
}

impl References {
    /// Reads the file.
    ///
    /// # Errors
    ///
    /// [`ReferencesError`].
    pub fn load(path: &Path) -> Result<Self, ReferencesError> {
        let read = |source| ReferencesError::Read { path: path.to_owned(), source };
        if std::fs::metadata(path).map_err(read)?.len() > MAX_FILE {
            return Err(ReferencesError::TooLong { path: path.to_owned() });
        }
        Self::from_json(&std::fs::read_to_string(path).map_err(read)?)
    }

    /// Reads JSON.
    ///
    /// # Errors
    ///
    /// [`ReferencesError::Shape`].
    pub fn from_json(text: &str) -> Result<Self, ReferencesError> {
        let shape = |what: String| ReferencesError::Shape(what);
        let images: BTreeMap<String, Vec<Row>> =
            serde_json::from_str(text).map_err(|error| shape(error.to_string()))?;
        let mut known = BTreeMap::new();
        for (image, rows) in images {
            if rows.is_empty() {
                return Err(shape(format!("{image} has no measurements; leave it out instead")));
            }
            let hash = unhex::<32>(&image).ok_or_else(|| shape(format!("{image:?} is no image hash")))?;
            let rows = rows.iter().map(|row| {
                let [mrtd, rtmr0, rtmr1, rtmr2] =
                    [&row.mrtd, &row.rtmr0, &row.rtmr1, &row.rtmr2].map(|text| {
                        unhex::<48>(text)
                            .ok_or_else(|| shape(format!("{image}: {text:?} is not 96 hexadecimal digits")))
                    });
                Ok([mrtd?, rtmr0?, rtmr1?, rtmr2?])
            });
            known.insert(hash, rows.collect::<Result<Vec<_>, ReferencesError>>()?);
        }
        Ok(Self(known))
    }

    /// The image hash, if these registers are known to be that image's. The error is for the client.
    pub(super) fn check(&self, claimed: &[u8], registers: &TdRegisters) -> Result<[u8; 32], String> {
        let hash: [u8; 32] = claimed.try_into().map_err(|_| "os_image_hash must be 32 bytes".to_owned())?;
        let rows = self.0.get(&hash).ok_or_else(|| {
            format!("no measurements are known for image {} (core.image.tdx_measurements)", hex::encode(hash))
        })?;
        let [rtmr0, rtmr1, rtmr2] = registers.rtmrs;
        if rows.contains(&[registers.mrtd, rtmr0, rtmr1, rtmr2]) {
            Ok(hash)
        } else {
            Err("MRs do not match".into())
        }
    }
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    hex::decode_to_slice(text.strip_prefix("0x").unwrap_or(text), &mut bytes).ok()?;
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(byte: u8) -> String {
        let register = hex::encode([byte; 48]);
        format!(
            r#"{{"mrtd":"{register}","rtmr0":"{register}","rtmr1":"{register}","rtmr2":"{register}","mr_image":""}}"#
        )
    }

    fn registers(byte: u8) -> TdRegisters {
        TdRegisters { mrtd: [byte; 48], rtmrs: [[byte; 48]; 3], owner: [[0; 48]; 3] }
    }

    #[test]
    fn only_listed_registers_of_listed_images_pass() {
        let image = hex::encode([9; 32]);
        let references = References::from_json(&format!(r#"{{"{image}":[{},{}]}}"#, row(1), row(2))).unwrap();
        assert_eq!(references.check(&[9; 32], &registers(1)), Ok([9; 32]));
        assert_eq!(references.check(&[9; 32], &registers(2)), Ok([9; 32]));
        assert_eq!(references.check(&[9; 32], &registers(3)), Err("MRs do not match".into()));
        let one_off = TdRegisters { rtmrs: [[1; 48], [1; 48], [2; 48]], ..registers(1) };
        assert_eq!(references.check(&[9; 32], &one_off), Err("MRs do not match".into()));
        assert!(references.check(&[8; 32], &registers(1)).unwrap_err().contains("no measurements are known"));
        assert!(references.check(&[], &registers(1)).is_err());
        assert!(References::default().check(&[9; 32], &registers(1)).is_err());
    }

    #[test]
    fn files_with_mistakes_are_refused() {
        let image = hex::encode([9; 32]);
        for (name, text) in [
            ("no JSON", "x".to_owned()),
            ("an empty list", format!(r#"{{"{image}":[]}}"#)),
            ("a short hash", format!(r#"{{"00":[{}]}}"#, row(1))),
            ("a short register", format!(r#"{{"{image}":[{}]}}"#, row(1).replacen("01", "", 1))),
            ("a missing register", format!(r#"{{"{image}":[{{"mrtd":""}}]}}"#)),
        ] {
            assert!(References::from_json(&text).is_err(), "{name}");
        }
    }
}
