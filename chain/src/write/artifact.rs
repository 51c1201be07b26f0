use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use alloy::primitives::Bytes;
use serde_json::Value;

use crate::{Error, Result};

/// Largest compiled contract that is read, in bytes. A Hardhat file with its ABI is some 100 kB, a Foundry one with its
/// syntax tree a few MB.
const MAX_ARTIFACT: u64 = 32 << 20;
/// Folders below the given one that are searched. Hardhat nests `artifacts/contracts/X.sol/X.json`.
const MAX_DEPTH: usize = 6;

/// A compiled contract.
#[derive(Clone)]
pub struct Artifact {
    /// Its name.
    pub name: String,
    /// The code that creates it, without constructor arguments.
    pub bytecode: Bytes,
}

/// A folder of compiled contracts, as Hardhat (`artifacts/`) or Foundry (`out/`) leaves it.
pub struct Artifacts(Source);

enum Source {
    Folder(PathBuf),
    BuiltIn,
}

impl Artifacts {
    /// Contracts below this folder.
    pub fn below(folder: impl Into<PathBuf>) -> Self {
        Self(Source::Folder(folder.into()))
    }

    /// This project's stand-ins, for local chains.
    pub fn built_in() -> Self {
        Self(Source::BuiltIn)
    }

    /// The contract called `name`, from `name.json`.
    ///
    /// # Errors
    /// [`Error::Artifact`] when there is none, more than one that differ, or one that cannot be deployed as it is.
    pub fn contract(&self, name: &str) -> Result<Artifact> {
        let folder = match &self.0 {
            Source::Folder(folder) => folder,
            Source::BuiltIn => return built_in(name),
        };
        let wrong = |path: &Path, problem: String| Error::Artifact {
            name: name.to_owned(),
            path: path.to_owned(),
            problem,
        };
        let mut found = Vec::new();
        find(folder, &format!("{name}.json"), MAX_DEPTH, &mut found)
            .map_err(|error| wrong(folder, error.to_string()))?;
        let mut contract: Option<(Bytes, PathBuf)> = None;
        for path in found {
            let mut text = Vec::new();
            let read = File::open(&path).and_then(|it| it.take(MAX_ARTIFACT).read_to_end(&mut text));
            read.map_err(|error| wrong(&path, error.to_string()))?;
            let bytecode = bytecode(&text).map_err(|problem| wrong(&path, problem))?;
            match &contract {
                Some((first, other)) if *first != bytecode => {
                    let problem = format!("{} holds another contract of this name", other.display());
                    return Err(wrong(&path, problem));
                }
                _ => contract = Some((bytecode, path)),
            }
        }
        match contract {
            Some((bytecode, _)) => Ok(Artifact { name: name.to_owned(), bytecode }),
            None => Err(wrong(folder, format!("no {name}.json, compile the contracts first"))),
        }
    }
}

fn built_in(name: &str) -> Result<Artifact> {
    let text = match name {
        "DstackApp" => include_str!("../../contracts/artifacts/DstackApp.json"),
        "DstackKms" => include_str!("../../contracts/artifacts/DstackKms.json"),
        "ERC1967Proxy" => include_str!("../../contracts/artifacts/ERC1967Proxy.json"),
        _ => "{}",
    };
    bytecode(text.as_bytes()).map(|bytecode| Artifact { name: name.to_owned(), bytecode }).map_err(
        |problem| Error::Artifact { name: name.to_owned(), path: PathBuf::from("built in"), problem },
    )
}

/// `bytecode` is a string for Hardhat and an object with a string for Foundry.
fn bytecode(text: &[u8]) -> Result<Bytes, String> {
    let json: Value = serde_json::from_slice(text).map_err(|error| format!("not JSON: {error}"))?;
    let code = json["bytecode"].as_str().or_else(|| json["bytecode"]["object"].as_str());
    let code = code.ok_or("no bytecode in it")?.trim_start_matches("0x");
    if code.contains("__") {
        return Err("its libraries are not linked".to_owned());
    }
    match hex::decode(code) {
        Ok(code) if code.is_empty() => Err("it is abstract: no bytecode".to_owned()),
        Ok(code) => Ok(code.into()),
        Err(_) => Err("its bytecode is not hex".to_owned()),
    }
}

fn find(folder: &Path, name: &str, depth: usize, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_file() && entry.file_name() == name {
            found.push(entry.path());
        } else if kind.is_dir() && depth > 0 && entry.file_name() != "node_modules" {
            find(&entry.path(), name, depth - 1, found)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_tools_folders_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let hardhat = folder.path().join("contracts/A.sol");
        let foundry = folder.path().join("B.sol");
        std::fs::create_dir_all(&hardhat).unwrap();
        std::fs::create_dir_all(&foundry).unwrap();
        std::fs::write(hardhat.join("A.json"), r#"{"bytecode":"0x6001"}"#).unwrap();
        std::fs::write(foundry.join("B.json"), r#"{"bytecode":{"object":"0x6002"}}"#).unwrap();
        let artifacts = Artifacts::below(folder.path());
        assert_eq!(artifacts.contract("A").unwrap().bytecode[..], [0x60, 1]);
        assert_eq!(artifacts.contract("B").unwrap().bytecode[..], [0x60, 2]);
    }

    #[test]
    fn what_cannot_be_deployed_is_refused() {
        let cases = [
            (r#"{"bytecode":"0x60__$ab$__01"}"#, "its libraries are not linked"),
            (r#"{"bytecode":"0x"}"#, "it is abstract: no bytecode"),
            (r#"{"bytecode":"0xzz"}"#, "its bytecode is not hex"),
            (r#"{"abi":[]}"#, "no bytecode in it"),
        ];
        for (text, problem) in cases {
            assert_eq!(bytecode(text.as_bytes()).unwrap_err(), problem);
        }
    }

    #[test]
    fn two_contracts_of_one_name_are_not_guessed_between() {
        let folder = tempfile::tempdir().unwrap();
        for (name, code) in [("one", "0x01"), ("two", "0x02")] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
            let text = format!(r#"{{"bytecode":"{code}"}}"#);
            std::fs::write(folder.path().join(name).join("A.json"), text).unwrap();
        }
        let error = Artifacts::below(folder.path()).contract("A").map(drop).unwrap_err();
        assert!(error.to_string().contains("another contract of this name"), "{error}");
    }

    #[test]
    fn the_built_in_contracts_are_complete() {
        for name in ["DstackApp", "DstackKms", "ERC1967Proxy"] {
            assert!(built_in(name).unwrap().bytecode.len() > 100);
        }
    }
}
