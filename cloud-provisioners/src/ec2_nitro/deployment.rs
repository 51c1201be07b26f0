//! A directory and the host that belongs to it: what the commands do.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::apply::{Apply, INSTANCE, KEY_PAIR, Observer, Running, SECURITY_GROUP, new_instance};
use super::client::Client;
use super::found::{Found, Instance};
use super::key_pair;
use super::plan::{Plan, Recorded, Refusal, Step, own_name, plan};
use super::read::Which;
use super::removal::{self, Removal};
use super::state::{ImageChoice, OWN_DIRECTORY, State, Wanted, own_file};
use crate::ledger::{Ledger, Phase};
use crate::nitro_host::{REACH_FILE, Reach};
use crate::{Error, durable};

const LEDGER: &str = "ec2.json";
/// What upstream's scripts read.
const DEPLOYMENT_FILE: &str = "deployment.json";
/// The port of the host's SSH server.
const SSH: u16 = 22;

/// `deployment.json`, as upstream's `deploy_host.sh` writes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeploymentFile {
    /// The instance.
    pub instance_id: String,
    /// Its address.
    pub public_ip: String,
}

/// A directory and its host.
#[derive(Debug)]
pub struct Deployment {
    directory: PathBuf,
    ledger: Ledger,
    state: Option<State>,
}

impl Deployment {
    /// Whether a host was begun in `directory`.
    #[must_use]
    pub fn exists(directory: &Path) -> bool {
        own_file(directory, LEDGER).exists()
    }

    /// Opens `directory` for work on its host.
    ///
    /// # Errors
    ///
    /// [`Error::Locked`] when another process works on it; when its files cannot be read or written.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        let own = directory.join(OWN_DIRECTORY);
        std::fs::create_dir_all(&own).map_err(Error::file("create", &own))?;
        let ledger = Ledger::open(&own_file(directory, LEDGER), new_id)?;
        let state = State::read(directory)?;
        Ok(Self { directory: directory.to_owned(), ledger, state })
    }

    /// The id everything made here is tagged with.
    #[must_use]
    pub fn id(&self) -> &str {
        self.ledger.deployment_id()
    }

    /// What was asked for, when a host was begun.
    #[must_use]
    pub fn wanted(&self) -> Option<&Wanted> {
        self.state.as_ref().map(|state| &state.wanted)
    }

    /// How the host is reached, when it is recorded.
    ///
    /// # Errors
    ///
    /// When the record cannot be read.
    pub fn reach(&self) -> Result<Option<Reach>, Error> {
        let path = self.directory.join(REACH_FILE);
        if !path.exists() {
            return Ok(None);
        }
        Ok(Some(Reach::load(&path)?))
    }

    /// Asks AWS what is there and decides the steps. A launch is tried without being made, so that a missing permission
    /// shows before anything is.
    ///
    /// # Errors
    ///
    /// [`Error::Ec2`] when there cannot be such a host; when AWS refuses or does not answer.
    pub async fn plan(&self, client: &Client, wanted: &Wanted) -> Result<Plan, Error> {
        let found = self.observe(client, wanted).await?;
        let reach = self.reach()?;
        let recorded = Recorded {
            deployment: self.id(),
            state: self.state.as_ref(),
            began: self.began(),
            reach: reach.as_ref(),
        };
        let plan = plan(wanted, recorded, &found)?;
        for step in &plan.steps {
            if let Step::Launch { places, resume: None } = step {
                let subnet = places.first().map_or("", |(subnet, _)| subnet.as_str());
                let new = new_instance(&plan, self.id(), None, subnet, None);
                match client.try_launch(&new).await {
                    Err(error) if !error.is_about_the_zone() => return Err(error.into()),
                    _ => {}
                }
            }
        }
        Ok(plan)
    }

    /// Whether anything may have been made.
    fn began(&self) -> bool {
        !self.ledger.resources().is_empty() || self.directory.join(REACH_FILE).exists()
    }

    async fn observe(&self, client: &Client, wanted: &Wanted) -> Result<Found, Error> {
        let account = client.account().await?;
        let local_key = if wanted.instance_connect { None } else { key_pair::public_key(&wanted.key_file)? };
        if let Some(id) = &wanted.adopt {
            let instances = client.instances(Which::Id(id)).await?;
            let (mut machine, mut image) = (None, None);
            if let Some(instance) = instances.first() {
                machine = client.machine(&instance.instance_type).await?;
                image = client.image(&instance.image).await?;
            }
            return Ok(Found { account, machine, image, local_key, instances, ..Found::default() });
        }
        let machine = client.machine(&wanted.instance_type).await?;
        // Without such a type nothing else matters, and asking where it is would be an error.
        if machine.is_none() {
            return Ok(Found { account, ..Found::default() });
        }
        let image = match &wanted.image {
            ImageChoice::AmazonLinux2023(_) => None,
            ImageChoice::Id(id) => client.image(id).await?,
        };
        let subnets = match &wanted.subnet {
            Some(id) => client.subnets(None, Some(id)).await?,
            None => match client.default_vpc().await? {
                Some(vpc) => client.subnets(Some(&vpc), None).await?,
                None => Vec::new(),
            },
        };
        let group = match subnets.first() {
            Some(subnet) => {
                let name = own_name(self.id());
                client.groups(&[("vpc-id", &subnet.vpc), ("group-name", &name)]).await?.into_iter().next()
            }
            None => None,
        };
        let key_name = wanted.key_name.clone().unwrap_or_else(|| own_name(self.id()));
        Ok(Found {
            account,
            machine,
            zones: client.zones_with(&wanted.instance_type).await?,
            subnets,
            image,
            group,
            key_pair: client.key_pairs("key-name", &key_name).await?.into_iter().next(),
            local_key,
            instances: client.instances(Which::Deployment(self.id())).await?,
        })
    }

    /// Carries the plan out and records how the host is reached.
    ///
    /// # Errors
    ///
    /// When a step fails; a later run goes on from there.
    pub async fn apply(
        &mut self,
        client: &Client,
        plan: &Plan,
        observer: &mut dyn Observer,
    ) -> Result<Instance, Error> {
        self.reconcile(plan)?;
        let before = self.state.take().filter(|state| state.account == plan.account);
        let mut state = before.unwrap_or_else(|| State::new(plan.account.clone(), plan.wanted.clone()));
        state.wanted.clone_from(&plan.wanted);
        let mut apply = Apply {
            client,
            directory: &self.directory,
            ledger: &mut self.ledger,
            state: &mut state,
            observer,
            instance: plan.instance.clone(),
            group: plan.group.clone(),
            public_key: plan.public_key.clone(),
        };
        let done = apply.run(plan).await;
        let instance = apply.instance.clone();
        self.state = Some(state);
        match done? {
            Some(running) => {
                self.record(plan, &running)?;
                Ok(running.instance)
            }
            None => {
                let id = instance.unwrap_or_default();
                let found = client.instances(Which::Id(&id)).await?.into_iter().next();
                found.ok_or_else(|| Error::NoHost { directory: self.directory.clone() })
            }
        }
    }

    /// Writes into the ledger what was found of this deployment: its making may have been cut before it was recorded.
    fn reconcile(&mut self, plan: &Plan) -> Result<(), Error> {
        let intended: Vec<(String, String)> = self
            .ledger
            .resources()
            .iter()
            .filter(|it| it.phase == Phase::Intended)
            .map(|it| (it.kind.clone(), it.name.clone()))
            .collect();
        let imports = plan.steps.contains(&Step::ImportKeyPair);
        for (kind, name) in intended {
            match kind.as_str() {
                KEY_PAIR if name == plan.key_name && !imports => self.ledger.made(KEY_PAIR, &name, None)?,
                SECURITY_GROUP if plan.group.is_some() => {
                    self.ledger.made(SECURITY_GROUP, &name, plan.group.as_deref())?;
                }
                INSTANCE if plan.instance.is_some() => {
                    self.ledger.made(INSTANCE, &name, plan.instance.as_deref())?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn record(&self, plan: &Plan, running: &Running) -> Result<(), Error> {
        let instance = &running.instance;
        let none = || Error::NoHost { directory: self.directory.clone() };
        let address = instance.address().ok_or_else(none)?;
        let wanted = &plan.wanted;
        let reach = Reach {
            address,
            port: SSH,
            user: plan.user.clone(),
            private_key: (!wanted.instance_connect).then(|| wanted.key_file.clone()),
            host_key: running.host_key.clone(),
            instance_id: Some(instance.id.clone()),
            aws: wanted.aws(),
        };
        reach.save(&self.directory.join(REACH_FILE))?;
        let path = self.directory.join(DEPLOYMENT_FILE);
        let file = DeploymentFile { instance_id: instance.id.clone(), public_ip: address.to_string() };
        let failed = |source| Error::Json { path: path.clone(), source };
        let mut bytes = serde_json::to_vec_pretty(&file).map_err(failed)?;
        bytes.push(b'\n');
        durable::replace(&path, &bytes, 0o644)
    }

    /// The host as AWS shows it, or `None`.
    ///
    /// # Errors
    ///
    /// When AWS refuses or does not answer.
    pub async fn status(&self, client: &Client) -> Result<Option<Instance>, Error> {
        self.check_place(client).await?;
        let adopted = self.wanted().and_then(|wanted| wanted.adopt.clone());
        let which = adopted.as_deref().map_or(Which::Deployment(self.id()), Which::Id);
        let mut found = client.instances(which).await?;
        found.sort_by_key(Instance::is_ending);
        Ok(found.into_iter().find(|it| !it.is_terminated()))
    }

    /// What is there of this deployment.
    ///
    /// # Errors
    ///
    /// When AWS refuses or does not answer; [`Refusal::OtherAccount`] when another account's credentials would not show
    /// it.
    pub async fn removal(&self, client: &Client) -> Result<Removal, Error> {
        self.check_place(client).await?;
        let mut removal = removal::look(client, &self.ledger).await?;
        removal.adopted = self.wanted().and_then(|wanted| wanted.adopt.clone());
        Ok(removal)
    }

    /// In another region or account nothing of this host shows, which must not pass for its end.
    async fn check_place(&self, client: &Client) -> Result<(), Error> {
        let Some(state) = &self.state else { return Ok(()) };
        if state.wanted.region != client.region() {
            let (recorded, asked) = (state.wanted.region.clone(), client.region().to_owned());
            return Err(Refusal::Differs { what: "region", recorded, asked }.into());
        }
        let actual = client.account().await?;
        if state.account != actual {
            return Err(Refusal::OtherAccount { recorded: state.account.clone(), actual }.into());
        }
        Ok(())
    }

    /// Removes what is there, in AWS and here.
    ///
    /// # Errors
    ///
    /// When AWS refuses or does not answer. A later run goes on from there.
    pub async fn remove(
        mut self,
        client: &Client,
        removal: &Removal,
        observer: &mut dyn Observer,
    ) -> Result<(), Error> {
        removal::remove(client, &mut self.ledger, removal, observer).await?;
        for name in [DEPLOYMENT_FILE, REACH_FILE] {
            forget(&self.directory.join(name))?;
        }
        forget(&own_file(&self.directory, "host.json"))?;
        self.ledger.discard()
    }
}

fn forget(path: &Path) -> Result<(), Error> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::file("remove", path)(error)),
        _ => Ok(()),
    }
}

fn new_id() -> Result<String, Error> {
    let mut bytes = [0; 8];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| Error::Random)?;
    Ok(hex::encode(bytes))
}
