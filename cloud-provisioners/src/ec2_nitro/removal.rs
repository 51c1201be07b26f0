//! The way back: what carries the deployment's id, in the order in which it can go.

use std::fmt;

use super::apply::{INSTANCE, KEY_FILE, KEY_PAIR, Observer, SECURITY_GROUP};
use super::client::Client;
use super::error::AwsError;
use super::found::Instance;
use super::read::Which;
use crate::Error;
use crate::ledger::{Ledger, Phase};
use crate::patience::Deadline;

/// What is there of a deployment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removal {
    /// Instances that have not ended: id and type.
    pub(super) instances: Vec<(String, String)>,
    /// Instances that are ending.
    pub(super) ending: Vec<String>,
    /// Security groups: id and name.
    pub(super) groups: Vec<(String, String)>,
    /// Key pairs, by name.
    pub(super) key_pairs: Vec<String>,
    /// Volumes.
    pub(super) volumes: Vec<String>,
    /// Private keys that were made here.
    pub(super) key_files: Vec<String>,
    /// An instance that was adopted, and stays.
    pub(super) adopted: Option<String>,
}

impl Removal {
    /// Whether nothing is there.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Display for Removal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (id, kind) in &self.instances {
            writeln!(f, "TERMINATE the instance {id} ({kind}) with its disks")?;
        }
        for id in &self.ending {
            writeln!(f, "wait for the end of the instance {id}")?;
        }
        for (id, name) in &self.groups {
            writeln!(f, "delete the security group {name} ({id})")?;
        }
        for name in &self.key_pairs {
            writeln!(f, "delete the key pair {name}")?;
        }
        for path in &self.key_files {
            writeln!(f, "delete the private key {path}")?;
        }
        if let Some(id) = &self.adopted {
            writeln!(f, "leave the instance {id} as it is, with its enclave option on")?;
        }
        Ok(())
    }
}

/// Asks AWS and the ledger what is there. A launch that was begun and does not show is waited for: it may be one whose
/// answer was lost.
///
/// # Errors
///
/// When AWS refuses or does not answer.
pub(super) async fn look(client: &Client, ledger: &Ledger) -> Result<Removal, Error> {
    let deployment = ledger.deployment_id();
    let tag = format!("tag:{}", super::DEPLOYMENT_TAG);
    let instances = ours(client, ledger).await?;
    let groups = client.groups(&[(&tag, deployment)]).await?;
    let key_pairs = client.key_pairs(&tag, deployment).await?;
    let files = ledger.resources().iter().filter(|it| it.kind == KEY_FILE);
    Ok(Removal {
        instances: instances
            .iter()
            .filter(|it| !it.is_ending())
            .map(|it| (it.id.clone(), it.instance_type.clone()))
            .collect(),
        ending: instances
            .iter()
            .filter(|it| it.is_ending() && !it.is_terminated())
            .map(|it| it.id.clone())
            .collect(),
        groups: groups.into_iter().map(|it| (it.id, it.name)).collect(),
        key_pairs: key_pairs.into_iter().map(|it| it.name).collect(),
        volumes: client.volumes(deployment).await?,
        key_files: files.map(|it| it.name.clone()).filter(|it| std::path::Path::new(it).exists()).collect(),
        adopted: None,
    })
}

/// The instances that were launched here: they carry the deployment's id, and a token of ours or an id in the ledger. A
/// tag alone is not enough, anybody can copy one.
async fn ours(client: &Client, ledger: &Ledger) -> Result<Vec<Instance>, AwsError> {
    let deployment = ledger.deployment_id();
    let recorded: Vec<_> = ledger.resources().iter().filter(|it| it.kind == INSTANCE).collect();
    let deadline = Deadline::within(client.patience.lost_launch);
    let mut pauses = client.pauses();
    loop {
        let mut found = client.instances(Which::Deployment(deployment)).await?;
        let prefix = format!("keyferry-{deployment}-");
        found.retain(|it| {
            it.client_token.starts_with(&prefix)
                || recorded.iter().any(|record| record.id.as_ref() == Some(&it.id))
        });
        let lost = recorded
            .iter()
            .filter(|record| record.phase == Phase::Intended)
            .any(|record| !found.iter().any(|it| it.client_token == record.name));
        if !lost || deadline.passed() {
            return Ok(found);
        }
        pauses.pause(deadline).await;
    }
}

/// Removes what is there, and waits until it is gone.
///
/// # Errors
///
/// When AWS refuses or does not answer. A later run goes on from there.
pub(super) async fn remove(
    client: &Client,
    ledger: &mut Ledger,
    removal: &Removal,
    observer: &mut dyn Observer,
) -> Result<(), Error> {
    for (id, _) in &removal.instances {
        client.terminate(id).await?;
    }
    let ids = removal.instances.iter().map(|(id, _)| id).chain(&removal.ending);
    for id in ids {
        wait_for_end(client, id, observer).await?;
        observer.gone(INSTANCE, id);
    }
    forget(ledger, INSTANCE)?;
    for id in client.volumes(ledger.deployment_id()).await? {
        until_unused(client, &format!("volume {id} is deleted"), async || client.delete_volume(&id).await)
            .await?;
        observer.gone("volume", &id);
    }
    for (id, name) in &removal.groups {
        let what = format!("security group {id} is deleted");
        until_unused(client, &what, async || client.delete_group(id).await).await?;
        ledger.gone(SECURITY_GROUP, name)?;
        observer.gone(SECURITY_GROUP, id);
    }
    forget(ledger, SECURITY_GROUP)?;
    for name in &removal.key_pairs {
        client.delete_key_pair(name).await?;
        ledger.gone(KEY_PAIR, name)?;
        observer.gone(KEY_PAIR, name);
    }
    forget(ledger, KEY_PAIR)?;
    for path in &removal.key_files {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::file("remove", std::path::Path::new(path))(error));
            }
            _ => {}
        }
        ledger.gone(KEY_FILE, path)?;
        observer.gone(KEY_FILE, path);
    }
    forget(ledger, KEY_FILE)
}

/// Takes everything of a kind out of the ledger, after AWS said that nothing of it is there.
fn forget(ledger: &mut Ledger, kind: &str) -> Result<(), Error> {
    let names: Vec<String> =
        ledger.resources().iter().filter(|it| it.kind == kind).map(|it| it.name.clone()).collect();
    names.iter().try_for_each(|name| ledger.gone(kind, name))
}

async fn wait_for_end(client: &Client, id: &str, observer: &mut dyn Observer) -> Result<(), AwsError> {
    let deadline = Deadline::within(client.patience.instance);
    let mut pauses = client.pauses();
    observer.waiting(&format!("{id} to be terminated"));
    loop {
        match client.instances(Which::Id(id)).await {
            Ok(found) if found.iter().all(Instance::is_terminated) => return Ok(()),
            Err(error) if !error.is_no_answer() => return Err(error),
            Err(error) if deadline.passed() => return Err(error),
            _ if deadline.passed() => {
                let what = format!("instance {id} is terminated");
                return Err(AwsError::Deadline { what, allowed: deadline.allowed() });
            }
            _ => pauses.pause(deadline).await,
        }
    }
}

/// Repeats a deletion while something still uses what is to be deleted.
async fn until_unused(
    client: &Client,
    what: &str,
    delete: impl AsyncFn() -> Result<(), AwsError>,
) -> Result<(), AwsError> {
    let deadline = Deadline::within(client.patience.instance);
    let mut pauses = client.pauses();
    loop {
        match delete().await {
            Err(error) if matches!(error.code(), Some("DependencyViolation" | "VolumeInUse")) => {
                if deadline.passed() {
                    return Err(AwsError::Deadline { what: what.to_owned(), allowed: deadline.allowed() });
                }
                tracing::debug!(%error, "still in use");
                pauses.pause(deadline).await;
            }
            other => return other,
        }
    }
}
