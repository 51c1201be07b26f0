//! A project and its machine on a VMM.
//!
//! ```text
//! (absent) ──plan: checks only──▶ intended in the ledger ──CreateVm──▶ made, id in the ledger ──RemoveVm──▶ (absent)
//!                                        └──── an answer that was lost: found by name and compose ────▲
//! ```
//!
//! A VMM lets several machines have one name, and has no id of ours to tell them apart by. So a machine is ours when the
//! ledger has its id, or when the ledger says that one was about to be made and the VMM has one of that name with exactly
//! our compose.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Client, Configuration, Machine, PortMapping, UserConfig};
use crate::ledger::Ledger;
use crate::patience::Pauses;
use crate::project::{App, AppCompose, KeyProvider, Project, Settings, State, random_id};
use crate::registry::{self, ImageName};
use crate::{Deadline, Error};

/// The section of `app.json` that is about the machine on a VMM.
pub const SECTION: &str = "vmm_config";
const OWN_DIRECTORY: &str = ".keyferry";
const LEDGER: &str = ".keyferry/vmm.json";
const MACHINE: &str = "vm";
/// The guest's limit for `.user-config`. Source: `dstack-util/src/host_shared.rs`.
const LARGEST_USER_CONFIG: usize = 1 << 20;

/// How long a guest may take to end its containers and shut down before it is stopped.
const SHUTDOWN: Duration = Duration::from_secs(90);
const FIRST_LOOK: Duration = Duration::from_millis(100);
const LAST_LOOK: Duration = Duration::from_secs(2);

/// The section `vmm_config` of `app.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Name of the machine; empty: that of the GCP section, or `dstack-` and the project's.
    pub name: String,
    /// Virtual processors.
    pub vcpu: u32,
    /// MiB.
    pub memory: u32,
    /// GB.
    pub disk_size: u32,
    /// `tcp:ADDRESS:HOST:GUEST`.
    pub ports: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        // What a KMS is known to run with.
        Self { name: String::new(), vcpu: 2, memory: 4096, disk_size: 20, ports: Vec::new() }
    }
}

/// Why a machine is not made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The VMM has no such image.
    #[error("guest image {image}: the VMM does not have it, it has {}", others.join(", "))]
    NoImage {
        /// The image.
        image: String,
        /// Those it has.
        others: Vec<String>,
    },
    /// The image lets people log in.
    #[error("guest image {image}: is a development image, whose secrets anybody with the console can read")]
    DevelopmentImage {
        /// The image.
        image: String,
    },
    /// The VMM has less to give.
    #[error("{what}: {wanted} wanted, the VMM gives at most {most}")]
    TooMuch {
        /// Of what.
        what: &'static str,
        /// How much.
        wanted: u32,
        /// Its limit.
        most: u32,
    },
    /// A port of the host belongs to another machine.
    #[error("port {port} of the host is published by the machine {other}")]
    PortTaken {
        /// The port.
        port: u32,
        /// The other machine.
        other: String,
    },
    /// A machine of this name runs another compose.
    #[error("machine {name}: is there already, with another compose")]
    Different {
        /// Its name.
        name: String,
    },
    /// A machine of this name is there, and this project did not make it.
    #[error("machine {name}: is there already, and this project did not make it")]
    NotOurs {
        /// Its name.
        name: String,
    },
    /// Keys would be lost.
    #[error("machine {name}: its disk may hold the only copy of the KMS's root keys")]
    HoldsKeys {
        /// Its name.
        name: String,
    },
}

impl Refusal {
    /// The next step.
    #[must_use]
    pub fn hint(&self) -> String {
        match self {
            Self::NoImage { image, .. } => {
                format!(
                    "fetch it into the VMM's image directory: `keyferry kms pull {image} --bare-metal --into DIR`"
                )
            }
            Self::DevelopmentImage { .. } => "set os_image to the production image in app.json".into(),
            Self::TooMuch { .. } => format!("ask for less in {SECTION} of app.json"),
            Self::PortTaken { .. } => {
                format!("choose another port of the host in {SECTION}.ports of app.json")
            }
            Self::Different { name } => format!(
                "a changed compose is another machine: onboard a second KMS first, then `keyferry kms vmm remove --lose-keys-of {name}`"
            ),
            Self::NotOurs { .. } => format!("choose another {SECTION}.name in app.json"),
            Self::HoldsKeys { name } => {
                format!("onboard a second KMS first; to lose the keys all the same: --lose-keys-of {name}")
            }
        }
    }
}

/// Whether something had to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A machine was made.
    Made,
    /// It was there already.
    Unchanged,
}

/// Everything a deployment needs, checked on this machine.
pub struct Prepared {
    /// What the VMM is asked for.
    pub configuration: Configuration,
    /// The measured compose.
    pub compose: AppCompose,
    /// Container images that the guest pulls.
    pub images: Vec<ImageName>,
}

fn config_of(app: &App) -> Result<Config, Error> {
    match app.other.get(SECTION) {
        None => Ok(Config::default()),
        Some(section) => Config::deserialize(section)
            .map_err(|error| Error::Setting { setting: SECTION, problem: error.to_string() }),
    }
}

/// The ports that a project publishes.
pub(crate) fn published(app: &App) -> Result<Vec<PortMapping>, Error> {
    ports_of(&config_of(app)?)
}

fn ports_of(config: &Config) -> Result<Vec<PortMapping>, Error> {
    let wrong = |problem| Error::Setting { setting: "vmm_config.ports", problem };
    let ports: Result<Vec<PortMapping>, _> = config.ports.iter().map(|port| port.parse()).collect();
    ports.map_err(wrong)
}

fn name_of(app: &App, config: &Config) -> String {
    let (section, instance) = (config.name.as_str(), app.gcp_config.instance_name.as_str());
    match [section, instance].into_iter().find(|name| !name.is_empty()) {
        Some(name) => name.to_owned(),
        None => {
            let last = Path::new(&app.name).file_name().and_then(|it| it.to_str()).unwrap_or("kms");
            format!("dstack-{last}")
        }
    }
}

/// A project opened for work on its machine.
pub struct Deployment {
    project: Project,
    app: App,
    config: Config,
    ledger: Ledger,
}

impl Deployment {
    /// Opens the project.
    ///
    /// # Errors
    ///
    /// When it cannot be read, or another process works on it.
    pub fn open(project: Project) -> Result<Self, Error> {
        let app = project.app()?;
        let config = config_of(&app)?;
        let own_directory = project.directory().join(OWN_DIRECTORY);
        std::fs::create_dir_all(&own_directory).map_err(Error::file("create", &own_directory))?;
        let ledger = Ledger::open(&project.directory().join(LEDGER), random_id)?;
        Ok(Self { project, app, config, ledger })
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

    /// The machine's name.
    #[must_use]
    pub fn name(&self) -> String {
        name_of(&self.app, &self.config)
    }

    /// The VMM's id of a project's machine, for those who only look: whoever works on the project goes on.
    ///
    /// # Errors
    ///
    /// [`Error::NoInstance`] when there is none that the VMM has told the id of.
    pub fn id_at_a_glance(project: &Project) -> Result<String, Error> {
        let app = project.app()?;
        let name = name_of(&app, &config_of(&app)?);
        let resource = Ledger::glance(&project.directory().join(LEDGER), MACHINE, &name)?;
        resource.and_then(|it| it.id).ok_or(Error::NoInstance { name })
    }

    /// The ports of the host that lead into the machine.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] for one that is none.
    pub fn ports(&self) -> Result<Vec<PortMapping>, Error> {
        ports_of(&self.config)
    }

    /// Checks everything that can be checked on this machine.
    ///
    /// # Errors
    ///
    /// Whatever would make the deployment, or the guest's boot, fail later.
    pub fn prepare(&self, settings: &Settings) -> Result<Prepared, Error> {
        let app = &self.app;
        let wrong = |setting, problem: &str| Err(Error::Setting { setting, problem: problem.to_owned() });
        if app.secure_time {
            return wrong(
                "secure_time",
                "is true: on bare metal the boot then waits for a time that may never come",
            );
        }
        match app.key_provider {
            KeyProvider::Local | KeyProvider::Kms | KeyProvider::None => {}
            KeyProvider::Tpm => {
                return wrong("key_provider", "is tpm, which these guests do not have; expected local");
            }
        }
        if self.config.ports.is_empty() {
            return wrong("vmm_config.ports", "is empty: nothing of the machine could be reached");
        }
        for (setting, value) in [
            ("vmm_config.vcpu", self.config.vcpu),
            ("vmm_config.memory", self.config.memory),
            ("vmm_config.disk_size", self.config.disk_size),
        ] {
            if value == 0 {
                return wrong(setting, "is 0");
            }
        }
        let name = self.name();
        if name.is_empty() || !name.bytes().all(|it| it.is_ascii_alphanumeric() || b"-_.".contains(&it)) {
            let problem = format!("{name:?}: letters, digits, -, _ and . make a name");
            return Err(Error::Setting { setting: "vmm_config.name", problem });
        }
        if self.project.environment(app)?.is_some() {
            return wrong(
                "env_file",
                "encrypted variables need a KMS that is there already; use .user-config",
            );
        }
        let compose = self.project.compose(app, None)?;
        let text = String::from_utf8(compose.as_bytes().to_vec());
        let compose_file =
            text.map_err(|_| Error::NotText { path: self.project.directory().join(&app.app_compose_file) })?;
        let user_config = UserConfig::new(self.project.user_config()?);
        if user_config.size() > LARGEST_USER_CONFIG {
            let actual = user_config.size() as u64;
            return Err(Error::TooLarge { name: ".user-config", actual, limit: LARGEST_USER_CONFIG as u64 });
        }
        let images = self.images()?;
        let kms_urls = match app.key_provider {
            KeyProvider::Kms if settings.services.kms_urls.is_empty() => {
                return wrong("services.kms_urls", "is empty in the global settings");
            }
            KeyProvider::Kms => settings.services.kms_urls.clone(),
            _ => Vec::new(),
        };
        let configuration = Configuration {
            name,
            image: app.os_image.clone(),
            compose_file,
            vcpu: self.config.vcpu,
            memory: self.config.memory,
            disk_size: self.config.disk_size,
            ports: self.ports()?,
            user_config,
            kms_urls,
            gateway_urls: Vec::new(),
            stopped: false,
        };
        Ok(Prepared { configuration, compose, images })
    }

    /// The images the guest pulls. Of a compose that was made elsewhere only the docker compose inside is looked at.
    fn images(&self) -> Result<Vec<ImageName>, Error> {
        let images = registry::images_of(
            &self.project.docker_compose(&self.app)?,
            &self.project.pre_launch(&self.app)?,
        );
        Ok(images.into_iter().collect::<Result<_, registry::Error>>()?)
    }

    /// The project's machine, if it is there: the one the ledger has, or one whose making was not answered.
    ///
    /// # Errors
    ///
    /// When the VMM does not answer.
    pub async fn machine(&mut self, client: &Client) -> Result<Option<Machine>, Error> {
        let name = self.name();
        let Some(resource) = self.ledger.find(MACHINE, &name) else { return Ok(None) };
        if let Some(id) = resource.id.clone() {
            let machine = client.machine(&id).await?;
            if machine.is_none() {
                self.ledger.gone(MACHINE, &name)?;
            }
            return Ok(machine);
        }
        // Made, or not: the answer was lost. What has our name and our compose is ours.
        let compose = self.project.compose(&self.app, None)?;
        let ours = |machine: &Machine| {
            machine.configuration.as_ref().is_some_and(|it| it.compose_file.as_bytes() == compose.as_bytes())
        };
        let found = client.machines(&name).await?.into_iter().find(ours);
        if let Some(machine) = &found {
            self.ledger.made(MACHINE, &name, Some(&machine.id))?;
        }
        Ok(found)
    }

    /// Asks VMM and registries whether the machine can be made, before anything is changed.
    ///
    /// # Errors
    ///
    /// [`Error::VmmRefused`], [`Error::Registry`], or no answer.
    pub async fn check(&mut self, client: &Client, prepared: &Prepared) -> Result<Option<Machine>, Error> {
        let wanted = &prepared.configuration;
        if let Some(machine) = self.machine(client).await? {
            let same =
                machine.configuration.as_ref().is_some_and(|it| it.compose_file == wanted.compose_file);
            return match same {
                true => Ok(Some(machine)),
                false => Err(Refusal::Different { name: wanted.name.clone() }.into()),
            };
        }
        if !client.machines(&wanted.name).await?.is_empty() {
            return Err(Refusal::NotOurs { name: wanted.name.clone() }.into());
        }
        let images = client.images().await?;
        match images.iter().find(|image| image.name == wanted.image) {
            None => {
                let others = images.into_iter().map(|image| image.name).collect();
                return Err(Refusal::NoImage { image: wanted.image.clone(), others }.into());
            }
            Some(image) if image.is_dev => {
                return Err(Refusal::DevelopmentImage { image: image.name.clone() }.into());
            }
            Some(_) => {}
        }
        let resources = client.resources().await?;
        for (what, wanted, most) in [
            ("vcpu", wanted.vcpu, resources.max_allocable_vcpu),
            ("memory in MiB", wanted.memory, resources.max_allocable_memory_in_mb),
        ] {
            if most != 0 && wanted > most {
                return Err(Refusal::TooMuch { what, wanted, most }.into());
            }
        }
        for other in client.all_machines().await? {
            let ports = other.configuration.iter().flat_map(|it| &it.ports);
            for taken in ports {
                let clash =
                    |it: &&PortMapping| it.host_port == taken.host_port && it.protocol == taken.protocol;
                if let Some(port) = wanted.ports.iter().find(clash) {
                    return Err(Refusal::PortTaken { port: port.host_port, other: other.name }.into());
                }
            }
        }
        let http = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).build();
        let http = http.map_err(Error::HttpClient)?;
        for image in &prepared.images {
            registry::check(&http, image).await?;
        }
        Ok(None)
    }

    /// Makes the machine unless it is there; starts it when it is stopped. [`Deployment::check`] comes first.
    ///
    /// # Errors
    ///
    /// When the VMM refuses; a later run goes on from there.
    pub async fn apply(
        &mut self,
        client: &Client,
        prepared: &Prepared,
        found: Option<Machine>,
        now: &str,
    ) -> Result<(Machine, Outcome), Error> {
        let name = prepared.configuration.name.clone();
        let (machine, outcome) = match found {
            Some(machine) => {
                if !machine.is_running() {
                    client.start(&machine.id).await?;
                }
                (self.find(client, &machine.id, &name).await?, Outcome::Unchanged)
            }
            None => {
                self.ledger.intend(MACHINE, &name)?;
                let made = client.create(&prepared.configuration).await;
                let id = match made {
                    Ok(id) => id,
                    // A refusal made nothing; any other end may have.
                    Err(error) if error.is_refusal() => {
                        self.ledger.gone(MACHINE, &name)?;
                        return Err(error.into());
                    }
                    Err(error) => return Err(error.into()),
                };
                self.ledger.made(MACHINE, &name, Some(&id))?;
                (self.find(client, &id, &name).await?, Outcome::Made)
            }
        };
        self.save(client, &machine, now)?;
        Ok((machine, outcome))
    }

    /// Publishes these ports of the machine instead of those it has. A guest's ports are settled when it starts: one that
    /// runs is shut down, so that what it has written is on its disk, and started again.
    ///
    /// Cut anywhere it leaves a machine that a later run starts, with the old ports or with these.
    ///
    /// # Errors
    ///
    /// When the VMM refuses.
    pub(super) async fn publish(
        &self,
        client: &Client,
        machine: &Machine,
        ports: &[PortMapping],
    ) -> Result<(), Error> {
        if machine.is_running() {
            self.shut_down(client, &machine.id).await?;
        }
        client.publish(&machine.id, ports).await?;
        Ok(client.start(&machine.id).await?)
    }

    async fn shut_down(&self, client: &Client, id: &str) -> Result<(), Error> {
        match client.shut_down(id).await {
            Ok(()) => {
                let (deadline, mut pauses) = (Deadline::within(SHUTDOWN), Pauses::new(FIRST_LOOK, LAST_LOOK));
                while client.machine(id).await?.is_some_and(|it| it.is_running()) && !deadline.passed() {
                    pauses.pause(deadline).await;
                }
            }
            Err(error) if error.is_refusal() => {
                tracing::warn!(%error, "the guest cannot be asked to shut down, so it is stopped");
            }
            Err(error) => return Err(error.into()),
        }
        // Also of a guest that is down: the VMM would start it again by itself.
        Ok(client.stop(id).await?)
    }

    /// Where [`crate::bring_up`] notes how far it is.
    #[must_use]
    pub fn bring_up_record(&self) -> PathBuf {
        self.project.directory().join(OWN_DIRECTORY).join("vmm-bring-up.json")
    }

    async fn find(&self, client: &Client, id: &str, name: &str) -> Result<Machine, Error> {
        client.machine(id).await?.ok_or_else(|| Error::NoInstance { name: name.to_owned() })
    }

    /// Stops the machine; its disk stays. Whether there was one.
    ///
    /// # Errors
    ///
    /// When the VMM refuses.
    pub async fn stop(&mut self, client: &Client) -> Result<bool, Error> {
        match self.machine(client).await? {
            None => Ok(false),
            Some(machine) => client.stop(&machine.id).await.map(|()| true).map_err(Error::from),
        }
    }

    /// Starts the stopped machine.
    ///
    /// # Errors
    ///
    /// [`Error::NoInstance`] when there is none.
    pub async fn start(&mut self, client: &Client) -> Result<Machine, Error> {
        let name = self.name();
        let machine = self.machine(client).await?;
        let machine = machine.ok_or_else(|| Error::NoInstance { name: name.clone() })?;
        if !machine.is_running() {
            client.start(&machine.id).await?;
        }
        self.find(client, &machine.id, &name).await
    }

    /// Removes the machine with its disk. `lose_keys_of` must be its name where the disk may hold keys. Whether there was
    /// one.
    ///
    /// # Errors
    ///
    /// [`Error::VmmRefused`] when keys would be lost.
    pub async fn remove(&mut self, client: &Client, lose_keys_of: Option<&str>) -> Result<bool, Error> {
        let name = self.name();
        let Some(machine) = self.machine(client).await? else {
            self.ledger.gone(MACHINE, &name)?;
            return Ok(false);
        };
        if self.holds_keys() && lose_keys_of != Some(name.as_str()) {
            return Err(Refusal::HoldsKeys { name }.into());
        }
        if machine.is_running() {
            client.stop(&machine.id).await?;
        }
        client.remove(&machine.id).await?;
        self.ledger.gone(MACHINE, &name)?;
        if let Some(mut state) = self.project.state()? {
            state.status = "REMOVED".to_owned();
            self.project.save_state(&state)?;
        }
        Ok(true)
    }

    /// Whether removing the machine may lose keys for good.
    #[must_use]
    pub fn holds_keys(&self) -> bool {
        self.app.key_provider.keys_die_with_the_machine()
    }

    fn save(&self, client: &Client, machine: &Machine, now: &str) -> Result<(), Error> {
        let mut other = serde_json::Map::new();
        other.insert("vm_id".into(), Value::from(machine.id.as_str()));
        other.insert("vmm".into(), Value::from(client.address()));
        let state = State {
            instance_name: machine.name.clone(),
            status: machine.status.to_uppercase(),
            created_at: now.to_owned(),
            updated_at: now.to_owned(),
            boot_image: self.app.os_image.clone(),
            other,
            ..State::default()
        };
        self.project.save_state(&state)
    }
}
