//! A project and its machine: what the commands do.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kms_protocol::AppId;
use kms_protocol::derive::K256PublicKey;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use super::apply::{IMAGE_KIND, INSTANCE, Observer, apply, observe};
use super::plan::{Plan, Replace, plan};
use super::{BootDisk, DEPLOYMENT_LABEL, Wanted, firewall_tag};
use crate::gcp::{Client, Instance};
use crate::ledger::Ledger;
use crate::patience::Deadline;
use crate::project::{App, GcpConfig, OsImage, Project, Settings, SharedFiles, State, expand, random_id};
use crate::{Error, disk, durable, env_key};

const READ: Duration = Duration::from_secs(60);
const CHANGE: Duration = Duration::from_secs(5 * 60);

/// Directory of a project in which this program keeps its ledger and what is being uploaded.
const OWN_DIRECTORY: &str = ".keyferry";

/// A project with its settings, opened for work on its machine.
pub struct Deployment {
    project: Project,
    app: App,
    config: GcpConfig,
    ledger: Ledger,
    own_directory: PathBuf,
}

/// An encryption of the variables. The digest is of what stands beside it in plain.
#[derive(Serialize, Deserialize)]
struct Encrypted {
    public_key: String,
    digest: String,
    ciphertext: String,
}

/// Everything a deployment needs, checked, before Google is asked for anything.
pub struct Prepared {
    /// What is wanted.
    pub wanted: Wanted,
    /// The files of the configuration volume.
    pub files: SharedFiles,
    /// Hash of the OS image by its own files, hex.
    pub os_image_hash: String,
    volume: Zeroizing<Vec<u8>>,
}

impl Deployment {
    /// Opens the project. Ids that `app.json` lacks are made and written to it.
    ///
    /// # Errors
    ///
    /// When the project cannot be read, or another process works on it.
    pub fn open(project: Project, settings: &Settings) -> Result<Self, Error> {
        let mut app = project.app()?;
        let mut changed = false;
        for id in [&mut app.instance_id_seed, &mut app.app_id] {
            if id.is_empty() {
                *id = random_id()?;
                changed = true;
            }
        }
        if changed {
            project.save_app(&app)?;
        }
        let own_directory = project.directory().join(OWN_DIRECTORY);
        std::fs::create_dir_all(&own_directory).map_err(Error::file("create", &own_directory))?;
        let ledger = Ledger::open(&own_directory.join("gcp.json"), random_id)?;
        let config = app.gcp_config.over(&settings.gcp);
        Ok(Self { project, app, config, ledger, own_directory })
    }

    /// The project.
    #[must_use]
    pub fn project(&self) -> &Project {
        &self.project
    }

    /// `app.json`.
    #[must_use]
    pub fn app(&self) -> &App {
        &self.app
    }

    /// The project's settings over the global ones.
    #[must_use]
    pub fn config(&self) -> &GcpConfig {
        &self.config
    }

    /// The OS image the project starts from.
    ///
    /// # Errors
    ///
    /// [`Error::OsImage`] when it is not on this machine, or incomplete.
    pub fn image(&self, settings: &Settings, home: &Path) -> Result<OsImage, Error> {
        let directory = self.project.directory();
        match self.config.boot_image_tar.as_str() {
            "" => OsImage::find(&self.app.os_image, &settings.image_directories(home, directory)),
            path => OsImage::of_disk(&self.app.os_image, &expand(path, home, directory)),
        }
    }

    /// The project's secret variables, encrypted to the app's key; `None` without any. `signers` are the roots whose
    /// word on that key counts.
    ///
    /// An encryption of the same variables to the same key is used again: a new one would be a new configuration, and
    /// with it a new machine.
    ///
    /// # Errors
    ///
    /// [`Error::EnvironmentKey`]; when a file cannot be read or written.
    pub async fn encrypted_environment(
        &self,
        kms_urls: &[String],
        signers: &[K256PublicKey],
    ) -> Result<Option<Vec<u8>>, Error> {
        let Some(environment) = self.project.environment(&self.app)? else { return Ok(None) };
        if environment.is_empty() {
            return Ok(None);
        }
        let missing = || Error::Setting {
            setting: "services.kms_urls",
            problem: "is empty in the global settings".into(),
        };
        let url = kms_urls.first().ok_or_else(missing)?;
        let app_id: AppId = self.app.app_id.parse().map_err(|_| Error::Setting {
            setting: "app_id",
            problem: format!("is {:?}, expected 40 hex characters", self.app.app_id),
        })?;
        let key = env_key::fetch(url, &app_id, signers).await?;
        let path = self.own_directory.join("environment.json");
        let digest = hex::encode(environment.digest()?);
        let known = std::fs::read(&path).ok().and_then(|it| serde_json::from_slice::<Encrypted>(&it).ok());
        if let Some(known) =
            known.filter(|known| known.public_key == hex::encode(key) && known.digest == digest)
            && let Ok(ciphertext) = hex::decode(known.ciphertext)
        {
            return Ok(Some(ciphertext));
        }
        let ciphertext = environment.encrypt(&key)?;
        let made = Encrypted { public_key: hex::encode(key), digest, ciphertext: hex::encode(&ciphertext) };
        let bytes = serde_json::to_vec(&made).map_err(|source| Error::Json { path: path.clone(), source })?;
        durable::replace(&path, &bytes, 0o600)?;
        Ok(Some(ciphertext))
    }

    /// Checks everything that can be checked on this machine and makes the configuration volume. Reads the whole boot
    /// disk, so it belongs off the async threads.
    ///
    /// # Errors
    ///
    /// Whatever would make the deployment fail later.
    pub fn prepare(
        &self,
        settings: &Settings,
        home: &Path,
        encrypted_env: Option<Vec<u8>>,
    ) -> Result<Prepared, Error> {
        self.config.validate()?;
        let image = self.image(settings, home)?;
        let files = self.project.prepare(&self.app, &settings.services, &image, encrypted_env)?;
        let volume = disk::configuration_volume(files.files().collect::<Vec<_>>().into_iter())?;
        let boot_disk = BootDisk { sha256: hash(&image.disk())?, path: image.disk() };
        let configuration = Sha256::digest(&*volume).into();
        let id = self.ledger.deployment_id();
        let wanted = Wanted::new(&self.app, self.config.clone(), id, boot_disk, configuration)?;
        Ok(Prepared { wanted, files, os_image_hash: image.hash().to_string(), volume })
    }

    /// Where the record of a bring-up of this machine is.
    #[must_use]
    pub fn bring_up_record(&self) -> PathBuf {
        self.own_directory.join("bring-up.json")
    }

    /// Asks Google what is there and decides the steps.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] when the deployment cannot work or would lose something; when Google does not answer.
    pub async fn plan<'a>(
        &self,
        client: &Client,
        prepared: &'a Prepared,
        replace: &Replace,
        force_boot_image: bool,
    ) -> Result<Plan<'a>, Error> {
        let found = observe(client, &prepared.wanted).await?;
        Ok(plan(&prepared.wanted, &found, replace, force_boot_image)?)
    }

    /// Carries the plan out and writes `state.json`. `now` is the time as ISO 8601.
    ///
    /// # Errors
    ///
    /// When a step fails; a later run goes on from there.
    pub async fn apply(
        &mut self,
        client: &Client,
        prepared: &Prepared,
        plan: &Plan<'_>,
        observer: &mut dyn Observer,
        now: &str,
    ) -> Result<Instance, Error> {
        let uploads = self.own_directory.join("uploads");
        let wanted = &prepared.wanted;
        apply(client, wanted, plan, &prepared.volume, &mut self.ledger, &uploads, observer).await?;
        let (zone, name) = (&self.config.zone, &self.config.instance_name);
        let instance = client.instance(zone, name, Deadline::within(READ)).await?;
        let instance = instance.ok_or_else(|| Error::NoInstance { name: name.clone() })?;
        let mut state = self.project.state()?.unwrap_or_default();
        if state.created_at.is_empty() || !plan.steps().is_empty() {
            now.clone_into(&mut state.created_at);
        }
        state.boot_image.clone_from(&wanted.config.boot_image);
        state.data_image.clone_from(&self.config.data_image);
        state.shared_image = wanted.shared_image();
        self.save(state, Some(&instance), &instance.status, now)?;
        Ok(instance)
    }

    /// The machine as Google shows it, or `None`; `state.json` is brought up to date.
    ///
    /// # Errors
    ///
    /// When Google refuses or does not answer.
    pub async fn status(&mut self, client: &Client, now: &str) -> Result<Option<Instance>, Error> {
        let found = self.find(client).await?;
        if let Some(state) = self.project.state()? {
            let status = found.as_ref().map_or("NOT_FOUND", |instance| instance.status.as_str());
            self.save(state, found.as_ref(), status, now)?;
        }
        Ok(found)
    }

    /// Stops the machine. One that is not there is stopped.
    ///
    /// # Errors
    ///
    /// When Google refuses or does not answer.
    pub async fn stop(&mut self, client: &Client, now: &str) -> Result<Option<Instance>, Error> {
        if self.find(client).await?.is_some() {
            let (zone, name) = (&self.config.zone, &self.config.instance_name);
            client.stop_instance(zone, name, Deadline::within(CHANGE)).await?;
        }
        self.status(client, now).await
    }

    /// Starts the machine.
    ///
    /// # Errors
    ///
    /// [`Error::NoInstance`]; when Google refuses or does not answer.
    pub async fn start(&mut self, client: &Client, now: &str) -> Result<Option<Instance>, Error> {
        let (zone, name) = (&self.config.zone, &self.config.instance_name);
        if self.find(client).await?.is_none() {
            return Err(Error::NoInstance { name: name.clone() });
        }
        client.start_instance(zone, name, Deadline::within(CHANGE)).await?;
        self.status(client, now).await
    }

    /// Whether deleting the machine would delete keys that exist nowhere else.
    #[must_use]
    pub fn holds_keys(&self) -> bool {
        self.app.key_provider.keys_die_with_the_machine()
    }

    /// Removes the machine, its configuration image and its firewall rules; boot and data images stay, other machines
    /// start from them. Only what carries this deployment's id, or was made by dstack-cloud for this project, goes.
    ///
    /// # Errors
    ///
    /// [`Error::NotOurs`]; when Google refuses or does not answer. A later run goes on from there.
    pub async fn remove(
        &mut self,
        client: &Client,
        keep_images: bool,
        now: &str,
    ) -> Result<Vec<String>, Error> {
        let (zone, name) = (self.config.zone.clone(), self.config.instance_name.clone());
        let mut removed = Vec::new();
        if let Some(instance) = self.find(client).await? {
            match instance.labels.get(DEPLOYMENT_LABEL) {
                Some(other) if other != self.ledger.deployment_id() => {
                    return Err(Error::NotOurs { name, deployment: other.clone() });
                }
                _ => {}
            }
            let change = Deadline::within(CHANGE);
            if instance.deletion_protection {
                client.set_deletion_protection(&zone, &name, false, change).await?;
            }
            client.delete_instance(&zone, &name, change).await?;
            removed.push(format!("instance {name}"));
        }
        self.ledger.gone(INSTANCE, &name)?;
        let tag = firewall_tag(&name);
        for rule in client.firewalls_for(&tag, Deadline::within(READ)).await? {
            // A rule for other machines too is not this project's to delete.
            if rule.target_tags == [tag.as_str()] {
                client.delete_firewall(&rule.name, Deadline::within(CHANGE)).await?;
                removed.push(format!("firewall rule {}", rule.name));
            }
        }
        if !keep_images {
            let image = format!("{name}-shared");
            if client.image(&image, Deadline::within(READ)).await?.is_some() {
                client.delete_image(&image, Deadline::within(CHANGE)).await?;
                removed.push(format!("image {image}"));
            }
            self.ledger.gone(IMAGE_KIND, &image)?;
        }
        if let Some(state) = self.project.state()? {
            self.save(state, None, "REMOVED", now)?;
        }
        Ok(removed)
    }

    async fn find(&self, client: &Client) -> Result<Option<Instance>, Error> {
        let (zone, name) = (&self.config.zone, &self.config.instance_name);
        Ok(client.instance(zone, name, Deadline::within(READ)).await?)
    }

    fn save(
        &self,
        mut state: State,
        instance: Option<&Instance>,
        status: &str,
        now: &str,
    ) -> Result<(), Error> {
        state.instance_name.clone_from(&self.config.instance_name);
        state.project.clone_from(&self.config.project);
        state.zone.clone_from(&self.config.zone);
        let address = |found: Option<&str>| found.unwrap_or_default().to_owned();
        state.external_ip = address(instance.and_then(Instance::external_ip));
        state.internal_ip = address(instance.and_then(Instance::internal_ip));
        status.clone_into(&mut state.status);
        now.clone_into(&mut state.updated_at);
        self.project.save_state(&state)
    }
}

/// SHA-256 of a file.
fn hash(path: &Path) -> Result<[u8; 32], Error> {
    let failed = || Error::file("read", path);
    let mut file = File::open(path).map_err(failed())?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer).map_err(failed())? {
            0 => return Ok(hash.finalize().into()),
            count => hash.update(&buffer[..count]),
        }
    }
}
