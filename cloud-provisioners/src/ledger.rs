//! What a deployment made in a cloud, on disk before and after each call that makes something.
//!
//! ```text
//! (absent) ──intend──▶ intended ──made──▶ made ──gone──▶ (absent)
//!                          └────────gone─────────────────▲
//! ```
//!
//! A crash between a call and its answer leaves an `intended` entry: the next run asks the cloud whether the thing
//! exists. Nothing that is not in the ledger is ever deleted.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::lock::Lock;
use crate::{Error, durable};

/// Version of the file; a later one is refused rather than misread.
const VERSION: u32 = 1;

/// How far the making of a resource got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// About to be made, or made without our having seen the answer.
    Intended,
    /// Made: the cloud said so.
    Made,
}

/// One thing in a cloud.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resource {
    /// What it is, in the cloud's own words: `instance`, `security-group`, `firewall`.
    pub kind: String,
    /// The name we gave it.
    pub name: String,
    /// The id the cloud gave it, where that is not the name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// How far its making got.
    pub phase: Phase,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    version: u32,
    deployment_id: String,
    resources: Vec<Resource>,
}

/// The record of one deployment, locked for this process while it lives.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    content: Content,
    lock: Lock,
}

impl Ledger {
    /// Opens the ledger at `path`, or begins one. `new_id` names a deployment that has none yet; each resource is
    /// tagged with it.
    ///
    /// # Errors
    ///
    /// [`Error::Locked`] when another process has it open; when the file cannot be read or is of a later version.
    pub fn open(path: &Path, new_id: impl FnOnce() -> Result<String, Error>) -> Result<Self, Error> {
        let lock = Lock::file(&path.with_extension("lock"))?;
        let content = match std::fs::read(path) {
            Ok(bytes) => parse(&bytes).map_err(|source| Error::Json { path: path.to_owned(), source })?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Content { version: VERSION, deployment_id: new_id()?, resources: Vec::new() }
            }
            Err(error) => return Err(Error::file("read", path)(error)),
        };
        let ledger = Self { path: path.to_owned(), content, lock };
        ledger.save()?;
        Ok(ledger)
    }

    /// What the ledger at `path` says of one resource at this moment, without taking it from whoever works with it.
    ///
    /// # Errors
    ///
    /// When the file cannot be read or is of a later version.
    pub fn glance(path: &Path, kind: &str, name: &str) -> Result<Option<Resource>, Error> {
        let content = match std::fs::read(path) {
            Ok(bytes) => parse(&bytes).map_err(|source| Error::Json { path: path.to_owned(), source })?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::file("read", path)(error)),
        };
        Ok(content.resources.into_iter().find(|it| it.kind == kind && it.name == name))
    }

    /// The id every resource of this deployment is tagged with.
    #[must_use]
    pub fn deployment_id(&self) -> &str {
        &self.content.deployment_id
    }

    /// Everything that may exist, in the order it was begun.
    #[must_use]
    pub fn resources(&self) -> &[Resource] {
        &self.content.resources
    }

    /// The resource of this kind and name, if it may exist.
    #[must_use]
    pub fn find(&self, kind: &str, name: &str) -> Option<&Resource> {
        self.content.resources.iter().find(|it| it.kind == kind && it.name == name)
    }

    /// Records that a resource is about to be made. One already recorded stays as it is.
    ///
    /// # Errors
    ///
    /// When the ledger cannot be written: then the call must not be made.
    pub fn intend(&mut self, kind: &str, name: &str) -> Result<(), Error> {
        if self.find(kind, name).is_none() {
            let resource =
                Resource { kind: kind.to_owned(), name: name.to_owned(), id: None, phase: Phase::Intended };
            self.content.resources.push(resource);
            self.save()?;
        }
        Ok(())
    }

    /// Records that a resource exists, with the id the cloud gave it.
    ///
    /// # Errors
    ///
    /// When the ledger cannot be written.
    pub fn made(&mut self, kind: &str, name: &str, id: Option<&str>) -> Result<(), Error> {
        self.intend(kind, name)?;
        for resource in self.content.resources.iter_mut().filter(|it| it.kind == kind && it.name == name) {
            resource.phase = Phase::Made;
            resource.id = id.map(str::to_owned);
        }
        self.save()
    }

    /// Records that a resource does not exist any more.
    ///
    /// # Errors
    ///
    /// When the ledger cannot be written.
    pub fn gone(&mut self, kind: &str, name: &str) -> Result<(), Error> {
        self.content.resources.retain(|it| it.kind != kind || it.name != name);
        self.save()
    }

    /// Removes the ledger of a deployment of which nothing is left. Anything that may exist keeps it.
    ///
    /// # Errors
    ///
    /// When the file cannot be removed.
    pub fn discard(self) -> Result<(), Error> {
        if !self.content.resources.is_empty() {
            return Ok(());
        }
        std::fs::remove_file(&self.path).map_err(Error::file("remove", &self.path))?;
        self.lock.remove()
    }

    fn save(&self) -> Result<(), Error> {
        let failed = |source| Error::Json { path: self.path.clone(), source };
        let mut bytes = serde_json::to_vec_pretty(&self.content).map_err(failed)?;
        bytes.push(b'\n');
        durable::replace(&self.path, &bytes, 0o600)
    }
}

fn parse(bytes: &[u8]) -> Result<Content, serde_json::Error> {
    let content: Content = serde_json::from_slice(bytes)?;
    if content.version == VERSION {
        return Ok(content);
    }
    let found = content.version;
    Err(serde::de::Error::custom(format!(
        "version {found} of the deployment record, this program knows {VERSION}"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path) -> Result<Ledger, Error> {
        Ledger::open(path, || Ok("d-1".to_owned()))
    }

    #[test]
    fn what_was_recorded_is_there_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ledger.json");
        let mut ledger = open(&path).unwrap();
        ledger.intend("instance", "kms").unwrap();
        ledger.intend("firewall", "kms-allow-tcp-12001").unwrap();
        ledger.made("instance", "kms", Some("i-1")).unwrap();
        ledger.gone("firewall", "kms-allow-tcp-12001").unwrap();
        drop(ledger);

        let ledger = Ledger::open(&path, || unreachable!("the deployment has an id")).unwrap();
        assert_eq!(ledger.deployment_id(), "d-1");
        let instance = Resource {
            kind: "instance".into(),
            name: "kms".into(),
            id: Some("i-1".into()),
            phase: Phase::Made,
        };
        assert_eq!(ledger.resources(), [instance]);
    }

    #[test]
    fn two_processes_cannot_work_on_one_deployment() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ledger.json");
        let _first = open(&path).unwrap();
        assert!(matches!(open(&path), Err(Error::Locked { .. })));
    }

    #[test]
    fn a_later_version_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ledger.json");
        std::fs::write(&path, r#"{"version":2,"deployment_id":"d","resources":[]}"#).unwrap();
        assert!(matches!(open(&path), Err(Error::Json { .. })));
        assert!(std::fs::read_to_string(&path).unwrap().contains("\"version\":2"));
    }
}
