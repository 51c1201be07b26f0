//! Carries a plan out: each thing is in the ledger before the call that makes it, its id the moment it is known.

use std::path::Path;

use super::change::NewInstance;
use super::client::Client;
use super::console;
use super::error::AwsError;
use super::found::Instance;
use super::key_pair;
use super::plan::{Plan, Step};
use super::read::Which;
use super::state::{Access, Launch, State};
use crate::Error;
use crate::ledger::{Ledger, Phase};
use crate::nitro_host::HostKey;
use crate::patience::Deadline;

/// Kinds in the ledger.
pub(super) const INSTANCE: &str = "instance";
pub(super) const KEY_FILE: &str = "key-file";
pub(super) const KEY_PAIR: &str = "key-pair";
pub(super) const SECURITY_GROUP: &str = "security-group";

/// Watches what is done to a host.
pub trait Observer: Send {
    /// Step `number` of `total` begins.
    fn step(&mut self, number: usize, total: usize, step: &Step);
    /// Something exists now.
    fn made(&mut self, kind: &str, id: &str);
    /// Something exists no longer.
    fn gone(&mut self, kind: &str, id: &str);
    /// Something takes its time.
    fn waiting(&mut self, what: &str);
}

/// A host that runs.
pub(super) struct Running {
    pub(super) instance: Instance,
    pub(super) host_key: HostKey,
}

pub(super) struct Apply<'a> {
    pub(super) client: &'a Client,
    pub(super) directory: &'a Path,
    pub(super) ledger: &'a mut Ledger,
    pub(super) state: &'a mut State,
    pub(super) observer: &'a mut dyn Observer,
    /// What the steps made so far.
    pub(super) instance: Option<String>,
    pub(super) group: Option<String>,
    pub(super) public_key: Option<String>,
}

impl Apply<'_> {
    /// Carries `plan` out, up to a host that runs when the plan has a step for it.
    ///
    /// # Errors
    ///
    /// When a step fails; what was made is in the ledger, and a later run goes on from there.
    pub(super) async fn run(&mut self, plan: &Plan) -> Result<Option<Running>, Error> {
        self.state.save(self.directory)?;
        let mut running = None;
        for (index, step) in plan.steps.iter().enumerate() {
            self.observer.step(index + 1, plan.steps.len(), step);
            match step {
                Step::MakeKey => self.make_key(plan)?,
                Step::ImportKeyPair => self.import_key_pair(plan).await?,
                Step::CreateGroup { vpc } => self.create_group(plan, vpc).await?,
                Step::AllowSsh(source) => self.allow_ssh(*source).await?,
                Step::RevokeSsh(source) => {
                    let group = self.known_group()?;
                    self.client.revoke_ssh(&group, *source).await?;
                }
                Step::Launch { resume, places } => self.launch(plan, resume.as_ref(), places).await?,
                Step::Stop(id) => self.stop(id).await?,
                Step::EnableEnclaves(id) => {
                    self.wait_for(id, "stopped").await?;
                    self.client.enable_enclaves(id).await?;
                }
                Step::Start(id) => {
                    self.wait_for(id, "stopped").await?;
                    self.client.start(id).await?;
                }
                Step::Record { host_key } => running = Some(self.follow(host_key.clone()).await?),
            }
        }
        Ok(running)
    }

    fn make_key(&mut self, plan: &Plan) -> Result<(), Error> {
        let path = &plan.wanted.key_file;
        let name = path.display().to_string();
        self.ledger.intend(KEY_FILE, &name)?;
        self.public_key = Some(key_pair::make(path, &plan.key_name)?);
        self.made(KEY_FILE, &name, None)
    }

    async fn import_key_pair(&mut self, plan: &Plan) -> Result<(), Error> {
        let public = self.public_key.clone();
        let missing = AwsError::Incomplete { call: "ImportKeyPair", missing: "public key" };
        let public = public.ok_or(missing)?;
        self.ledger.intend(KEY_PAIR, &plan.key_name)?;
        let deployment = self.ledger.deployment_id().to_owned();
        match self.client.import_key_pair(&plan.key_name, &public, &deployment).await {
            // A repetition of a call whose answer was lost. Whose it is was looked at before; whose it became since
            // then, the tag says.
            Err(error) if error.code() == Some("InvalidKeyPair.Duplicate") => {
                let pairs = self.client.key_pairs("key-name", &plan.key_name).await?;
                if !pairs.iter().any(|pair| pair.deployment.as_ref() == Some(&deployment)) {
                    self.ledger.gone(KEY_PAIR, &plan.key_name)?;
                    return Err(error.into());
                }
            }
            Err(error) => return Err(self.refused(KEY_PAIR, &plan.key_name, error)?),
            Ok(()) => {}
        }
        self.made(KEY_PAIR, &plan.key_name, None)
    }

    async fn create_group(&mut self, plan: &Plan, vpc: &str) -> Result<(), Error> {
        let name = &plan.group_name;
        self.ledger.intend(SECURITY_GROUP, name)?;
        let deployment = self.ledger.deployment_id().to_owned();
        let id = match self.client.create_group(name, vpc, &deployment).await {
            // As with the key pair.
            Err(error) if error.code() == Some("InvalidGroup.Duplicate") => {
                let groups = self.client.groups(&[("vpc-id", vpc), ("group-name", name)]).await?;
                let ours = groups.into_iter().find(|it| it.deployment.as_ref() == Some(&deployment));
                ours.map(|group| group.id).ok_or(error)?
            }
            Err(error) => return Err(self.refused(SECURITY_GROUP, name, error)?),
            Ok(id) => id,
        };
        self.made(SECURITY_GROUP, name, Some(&id))?;
        self.group = Some(id);
        Ok(())
    }

    async fn allow_ssh(&mut self, source: ipnet::IpNet) -> Result<(), Error> {
        let group = self.known_group()?;
        let deadline = Deadline::within(self.client.patience.call);
        let mut pauses = self.client.pauses();
        loop {
            match self.client.allow_ssh(&group, source).await {
                // A new group is not known everywhere at once.
                Err(error) if error.is_not_found() && !deadline.passed() => pauses.pause(deadline).await,
                other => return Ok(other?),
            }
        }
    }

    async fn launch(
        &mut self,
        plan: &Plan,
        resume: Option<&Launch>,
        places: &[(String, String)],
    ) -> Result<(), Error> {
        let begun = resume.map(|it| (it.subnet.clone(), it.zone.clone(), Some(it.token.clone())));
        let others = places.iter().map(|(subnet, zone)| (subnet.clone(), zone.clone(), None));
        let attempts = begun.into_iter().chain(others);
        let mut last = AwsError::Incomplete { call: "RunInstances", missing: "subnet" };
        for (subnet, zone, token) in attempts {
            let token = match token {
                Some(token) => token,
                None => new_token(self.ledger.deployment_id())?,
            };
            self.state.launch = Some(Launch { token: token.clone(), subnet, zone });
            self.state.save(self.directory)?;
            self.ledger.intend(INSTANCE, &token)?;
            match self.launch_once(plan, &token).await {
                Ok(instance) => {
                    self.made(INSTANCE, &token, Some(&instance))?;
                    self.instance = Some(instance);
                    return Ok(());
                }
                Err(error) if error.is_refusal() => {
                    // Nothing was made under this token.
                    self.ledger.gone(INSTANCE, &token)?;
                    self.state.launch = None;
                    self.state.save(self.directory)?;
                    if !error.is_about_the_zone() {
                        return Err(error.into());
                    }
                    tracing::warn!(%error, "this zone cannot, the next one is asked");
                    last = error;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(last.into())
    }

    async fn launch_once(&mut self, plan: &Plan, token: &str) -> Result<String, AwsError> {
        let subnet = self.state.launch.as_ref().map_or("", |launch| launch.subnet.as_str());
        let new = new_instance(plan, self.ledger.deployment_id(), Some(token), subnet, self.group.as_deref());
        let deadline = Deadline::within(self.client.patience.call);
        let mut pauses = self.client.pauses();
        loop {
            match self.client.launch(&new).await {
                // A new group or key pair is not known everywhere at once.
                Err(error)
                    if matches!(error.code(), Some("InvalidGroup.NotFound" | "InvalidKeyPair.NotFound"))
                        && !deadline.passed() =>
                {
                    pauses.pause(deadline).await;
                }
                // Ours, launched with this token when something else was asked for.
                Err(error) if error.code() == Some("IdempotentParameterMismatch") => {
                    let ours = self.client.instances(Which::Deployment(new.deployment)).await?;
                    let ours = ours.into_iter().find(|it| it.client_token == token);
                    return ours.map(|it| it.id).ok_or(error);
                }
                other => return other.map(|instance| instance.id),
            }
        }
    }

    async fn stop(&mut self, id: &str) -> Result<(), Error> {
        self.client.stop(id).await?;
        self.wait_for(id, "stopped").await?;
        Ok(())
    }

    /// Waits until the instance runs and its SSH key is known.
    async fn follow(&mut self, known: Option<HostKey>) -> Result<Running, Error> {
        let id = self.instance.clone();
        let id = id.ok_or(AwsError::Incomplete { call: "RunInstances", missing: "instance" })?;
        let instance = self.wait_for(&id, "running").await?;
        if !instance.enclaves {
            return Err(AwsError::EnclavesOff { instance: id }.into());
        }
        let host_key = match known {
            Some(key) => key,
            None => self.learn_key(&id).await?,
        };
        Ok(Running { instance, host_key })
    }

    async fn wait_for(&mut self, id: &str, state: &'static str) -> Result<Instance, AwsError> {
        let deadline = Deadline::within(self.client.patience.instance);
        let mut pauses = self.client.pauses();
        self.observer.waiting(&format!("{id} to be {state}"));
        loop {
            let found = self.client.instances(Which::Id(id)).await;
            let found = match found {
                Ok(found) => found.into_iter().next(),
                // What lasts is a failure; a moment of overload while waiting is none.
                Err(error) if error.is_no_answer() && !deadline.passed() => None,
                Err(error) => return Err(error),
            };
            match found {
                Some(instance) if instance.state == state && instance.address().is_some() => {
                    return Ok(instance);
                }
                Some(instance) if instance.is_ending() => {
                    let reason = instance.reason.unwrap_or_else(|| "AWS gives no reason".to_owned());
                    return Err(AwsError::Ended { instance: id.to_owned(), state: instance.state, reason });
                }
                _ => {}
            }
            if deadline.passed() {
                let what = format!("instance {id} is {state}");
                return Err(AwsError::Deadline { what, allowed: deadline.allowed() });
            }
            pauses.pause(deadline).await;
        }
    }

    async fn learn_key(&mut self, id: &str) -> Result<HostKey, AwsError> {
        let deadline = Deadline::within(self.client.patience.console);
        let mut pauses = self.client.pauses();
        self.observer.waiting(&format!("the SSH key of {id} on its console"));
        loop {
            let console = match self.client.console(id).await {
                Ok(console) => console,
                Err(error) if error.is_no_answer() && !deadline.passed() => String::new(),
                Err(error) => return Err(error),
            };
            if let Some(key) = console::host_keys(&console).into_iter().next() {
                return Ok(key);
            }
            if deadline.passed() {
                let what = format!("the SSH key of {id} is on its console");
                return Err(AwsError::Deadline { what, allowed: deadline.allowed() });
            }
            pauses.pause(deadline).await;
        }
    }

    fn known_group(&self) -> Result<String, AwsError> {
        self.group.clone().ok_or(AwsError::Incomplete { call: "CreateSecurityGroup", missing: "group id" })
    }

    fn made(&mut self, kind: &str, name: &str, id: Option<&str>) -> Result<(), Error> {
        self.ledger.made(kind, name, id)?;
        self.observer.made(kind, id.unwrap_or(name));
        Ok(())
    }

    /// After a refusal nothing was made, so nothing stays in the ledger; after silence it stays.
    fn refused(&mut self, kind: &str, name: &str, error: AwsError) -> Result<Error, Error> {
        let intended = self.ledger.find(kind, name).is_some_and(|it| it.phase == Phase::Intended);
        if error.is_refusal() && intended {
            self.ledger.gone(kind, name)?;
        }
        Ok(error.into())
    }
}

/// The launch that `plan` asks for.
pub(super) fn new_instance<'a>(
    plan: &'a Plan,
    deployment: &'a str,
    token: Option<&'a str>,
    subnet: &'a str,
    group: Option<&'a str>,
) -> NewInstance<'a> {
    let wanted = &plan.wanted;
    let instance_profile = match &wanted.access {
        Access::Ssh(_) => None,
        Access::Ssm { instance_profile } => Some(instance_profile.as_str()),
    };
    NewInstance {
        deployment,
        name: &wanted.name,
        token,
        instance_type: &wanted.instance_type,
        image: &plan.image,
        root_device: &plan.root_device,
        volume_gib: wanted.volume_gib,
        subnet,
        group,
        key_name: group.filter(|_| !wanted.instance_connect).map(|_| plan.key_name.as_str()),
        instance_profile,
        spot: wanted.spot,
    }
}

/// A client token: AWS takes 64 characters.
fn new_token(deployment: &str) -> Result<String, Error> {
    let mut bytes = [0; 8];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| Error::Random)?;
    Ok(format!("keyferry-{deployment}-{}", hex::encode(bytes)))
}
