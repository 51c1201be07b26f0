//! The way itself.

use std::path::Path;
use std::time::Duration;

use ipnet::IpNet;
use kms_protocol::kms_file::KmsFile;
use kms_protocol::report_data;
use kms_protocol::wire::webhook::BootInfo;
use kms_protocol::wire::{AttestationInfoResponse, BootstrapResponse};

use super::console::{Milestone, Milestones};
use super::error::Error;
use super::gate::{Gate, Patience};
use super::machine::{Guest, Machine, Visitors};
use super::node::{Authoriser, Front, Node, NodeError, Place, Refusal};
use super::record::{Keys, Measured, Record, Role, State};
use super::{Registrar, Verifier};
use crate::patience::{Deadline, Pauses};

/// Pauses between two looks.
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(500);
pub(super) const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// What the machine must measure, and show in its evidence; hex.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Kind of TEE.
    pub tee_variant: String,
    /// Hash of the OS image, as the image's files or the operator have it.
    pub os_image_hash: String,
    /// Hash of `app-compose.json`.
    pub compose_hash: String,
    /// The app's id.
    pub app_id: String,
    /// The aggregated measurement, when it is known from elsewhere.
    pub mr_aggregated: Option<String>,
    /// Hash of the device id, when the device is to be a known one.
    pub device_id: Option<String>,
    /// Address of the KMS contract that the KMS must follow.
    pub kms_contract: Option<String>,
}

/// What is to become of the machine.
#[derive(Debug)]
pub struct Wanted<'a> {
    /// The KMS's name.
    pub domain: String,
    /// The KMS whose keys are taken over; without one new keys are made.
    pub source: Option<KmsFile>,
    /// Who sets the KMS up.
    pub operators: Vec<IpNet>,
    /// Who may reach the KMS when it serves; nobody when empty.
    pub clients: Vec<IpNet>,
    /// Whether the name must lead to the machine's address, as seen from here.
    pub check_name: bool,
    /// How long the KMS is asked on once it serves, before clients are let in; zero: not at all.
    pub watch: Duration,
    /// What must be found.
    pub expected: Expected,
    /// How long to wait for what.
    pub patience: Patience,
    /// Where `kms.json` goes.
    pub kms_file: &'a Path,
}

impl Wanted<'_> {
    /// How the KMS gets its keys.
    #[must_use]
    pub fn role(&self) -> Role {
        match &self.source {
            None => Role::First,
            Some(source) => Role::Replica { source: source.url.clone() },
        }
    }
}

/// Watches.
pub trait Observer: Send {
    /// Something is so now.
    fn reached(&mut self, what: &str);
    /// Something is waited for; what was seen last.
    fn waiting(&mut self, gate: Gate, last: &str);
    /// The guest got further.
    fn milestone(&mut self, milestone: Milestone);
    /// These have to be registered by hand.
    fn to_register(&mut self, measured: &Measured);
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// What `kms.json` holds.
    pub file: KmsFile,
    /// Whether it was so before.
    pub as_before: bool,
}

/// Brings the KMS up, going on with what `record` says was done.
///
/// Everything may be cut at any point: a later call goes on from there. It is not undone when it fails.
///
/// # Errors
///
/// [`Error`], with what was seen last and where to look.
pub async fn bring_up<M: Machine, N: Node>(
    machine: &mut M,
    node: &N,
    judges: (&dyn Verifier, &dyn Registrar),
    wanted: &Wanted<'_>,
    record: &mut Record,
    observer: &mut dyn Observer,
) -> Result<Outcome, Error> {
    let (verifier, registrar) = judges;
    Run { machine, node, verifier, registrar, wanted, record, observer }.run().await
}

pub(super) struct Run<'a, M, N> {
    pub(super) machine: &'a mut M,
    pub(super) node: &'a N,
    pub(super) verifier: &'a dyn Verifier,
    pub(super) registrar: &'a dyn Registrar,
    pub(super) wanted: &'a Wanted<'a>,
    pub(super) record: &'a mut Record,
    pub(super) observer: &'a mut dyn Observer,
}

/// A wait that has an end.
pub(super) struct Wait {
    gate: Gate,
    deadline: Deadline,
    pauses: Pauses,
    /// What to do, when more is known than where to look.
    remedy: Option<&'static str>,
}

impl<M: Machine, N: Node> Run<'_, M, N> {
    async fn run(mut self) -> Result<Outcome, Error> {
        self.same_machine().await?;
        if let Some(outcome) = self.served_before().await? {
            return Ok(outcome);
        }
        let place = self.place().await?;
        self.machine.admit(&Visitors::Operators(self.wanted.operators.clone())).await?;
        if self.boot(&place).await? == Front::Onboarding {
            self.onboard(&place).await?;
        }
        let mut served = self.serving(&place).await?;
        self.watch(&place).await?;
        let clients = Visitors::Clients(self.wanted.clients.clone());
        if self.machine.admit(&clients).await? == Guest::StartsAnew {
            // What served before the machine was started anew is not known to serve now.
            let place = self.place().await?;
            self.boot(&place).await?;
            served = self.serving(&place).await?;
        }
        let file = self.write(&place, &served)?;
        self.record.note(|state| state.served = true)?;
        Ok(Outcome { file, as_before: false })
    }

    /// Deploys, and sees to it that the record speaks of this machine and of what is wanted now.
    async fn same_machine(&mut self) -> Result<(), Error> {
        let machine = self.machine.deploy().await?;
        let (role, domain) = (self.wanted.role(), self.wanted.domain.as_str());
        let State { machine: known, role: begun, domain: name, asked, .. } = &self.record.state;
        if *known != machine || (!asked && (*begun != role || name != domain)) {
            self.record.begin_anew(role, domain, &machine)?;
        } else if *begun != role || name != domain {
            let shown = |role: &Role, name: &str| match role {
                Role::First => format!("{name} with keys of its own"),
                Role::Replica { source } => format!("{name} with the keys of {source}"),
            };
            return Err(Error::OtherRole { begun: shown(begun, name), now: shown(&role, domain) });
        }
        self.observer.reached("the machine is there");
        Ok(())
    }

    /// What an earlier run has finished, if it is all still there.
    async fn served_before(&mut self) -> Result<Option<Outcome>, Error> {
        if !self.record.state.served {
            return Ok(None);
        }
        let Some(file) = std::fs::read(self.wanted.kms_file).ok().and_then(|it| KmsFile::decode(&it).ok())
        else {
            return Ok(None);
        };
        let same = self
            .record
            .state
            .keys
            .as_ref()
            .is_some_and(|keys| keys.ca_pubkey == file.ca_pubkey && keys.k256_pubkey == file.k256_pubkey);
        if !same {
            return Ok(None);
        }
        self.machine.admit(&Visitors::Clients(self.wanted.clients.clone())).await?;
        Ok(Some(Outcome { file, as_before: true }))
    }

    async fn place(&mut self) -> Result<Place, Error> {
        let mut wait = self.wait(Gate::Address);
        loop {
            if let Some(address) = self.machine.address().await? {
                self.observer.reached(&format!("the KMS's address is {address}"));
                return Ok(Place { address, domain: self.wanted.domain.clone() });
            }
            self.not_yet(&mut wait, "it has none").await?;
        }
    }

    /// Waits until the KMS answers, in one way or the other.
    async fn boot(&mut self, place: &Place) -> Result<Front, Error> {
        let mut wait = self.wait(Gate::Boot);
        let (mut console, mut position, mut readable) = (Milestones::default(), 0, true);
        loop {
            let why = match self.node.front(place).await {
                Front::Nothing(why) => why,
                front => {
                    self.observer.reached("the KMS answers");
                    return Ok(front);
                }
            };
            if readable {
                match self.machine.console(position).await {
                    Ok(said) => {
                        let passed = match position {
                            0 => console.catch_up(&said.text),
                            _ => console.read(&said.text),
                        };
                        position = said.next;
                        for milestone in passed {
                            self.observer.milestone(milestone);
                        }
                    }
                    // Some organisations forbid the serial port; the KMS is what counts.
                    Err(error) => {
                        tracing::warn!(%error, "the console cannot be read");
                        readable = false;
                    }
                }
            }
            if let Some(trouble) = console.trouble() {
                if trouble.is_final {
                    return Err(Error::Guest { said: trouble.said, remedy: trouble.remedy });
                }
                wait.remedy = Some(trouble.remedy);
            }
            let last = match readable {
                true => format!("{}; {}: {why}", console.describe(), place.address),
                false => format!("{}: {why}", place.address),
            };
            self.not_yet(&mut wait, &last).await?;
        }
    }

    /// From a KMS without keys to one that was told to serve.
    async fn onboard(&mut self, place: &Place) -> Result<(), Error> {
        self.authoriser(place).await?;
        let measured = self.measure(place).await?;
        self.name(place).await?;
        if !self.record.state.registered {
            if !measured.names_a_device() {
                tracing::warn!(
                    "the machine tells no device: its device id is the hash of nothing, and is not registered"
                );
            }
            let failed = |source| Error::Registration { source, commands: measured.commands() };
            let registered = self.registrar.register(&measured).await.map_err(failed)?;
            if registered {
                self.observer.reached("the measurements are registered");
                self.record.note(|state| state.registered = true)?;
            } else {
                self.observer.to_register(&measured);
            }
        }
        if let Some(made) = self.get_keys(place).await? {
            self.verify_keys(&made).await?;
        }
        self.finish(place).await
    }

    async fn authoriser(&mut self, place: &Place) -> Result<(), Error> {
        let mut wait = self.wait(Gate::Authoriser);
        while let Authoriser::NotYet(why) = self.node.authoriser(place).await {
            self.not_yet(&mut wait, &why).await?;
        }
        Ok(())
    }

    /// What the machine says it measures; refused early when it is not what it should be. It came over plain HTTP: what
    /// counts is the evidence that is verified later, and compared with this.
    async fn measure(&mut self, place: &Place) -> Result<Measured, Error> {
        let mut wait = self.wait(Gate::Measurements);
        let info = loop {
            match self.node.attestation_info(place).await {
                Ok(info) => break info,
                Err(source) if source.is_final() => {
                    return Err(Error::Node { call: "GetAttestationInfo", answer: source });
                }
                Err(error) => self.not_yet(&mut wait, &format!("it {error}")).await?,
            }
        };
        let AttestationInfoResponse {
            device_id,
            mr_aggregated,
            os_image_hash,
            tee_variant,
            kms_contract_address,
            ..
        } = info;
        let measured = Measured {
            tee_variant,
            os_image_hash: hex::encode(os_image_hash),
            mr_aggregated: hex::encode(mr_aggregated),
            device_id: hex::encode(device_id),
        };
        self.compare(&measured)?;
        if let Some(expected) = &self.wanted.expected.kms_contract
            && !kms_contract_address.is_empty()
            && !kms_contract_address.eq_ignore_ascii_case(expected)
        {
            let (actual, expected) = (kms_contract_address, expected.clone());
            return Err(Error::Unexpected { what: "the KMS's contract", actual, expected });
        }
        self.observer.reached("the machine says it measures what is expected");
        self.record.note(|state| state.measured = Some(measured.clone()))?;
        Ok(measured)
    }

    fn compare(&self, measured: &Measured) -> Result<(), Error> {
        let expected = &self.wanted.expected;
        let Measured { tee_variant, os_image_hash, mr_aggregated, device_id } = measured;
        same("tee_variant", tee_variant, &expected.tee_variant)?;
        same("os_image_hash", os_image_hash, &expected.os_image_hash)?;
        if let Some(expected) = &expected.mr_aggregated {
            same("mr_aggregated", mr_aggregated, expected)?;
        }
        if let Some(expected) = &expected.device_id {
            same("device_id", device_id, expected)?;
        }
        Ok(())
    }

    async fn name(&mut self, place: &Place) -> Result<(), Error> {
        if !self.wanted.check_name {
            return Ok(());
        }
        let (mut wait, wanted) = (self.wait(Gate::Name), place.address.ip());
        loop {
            let last = match self.node.resolve(&place.domain).await {
                Ok(found) if found.contains(&wanted) => break,
                Ok(found) => {
                    let found: Vec<_> = found.iter().map(ToString::to_string).collect();
                    format!("{} leads to {}, expected {wanted}", place.domain, found.join(", "))
                }
                Err(why) => format!("{} leads nowhere ({why}), expected {wanted}", place.domain),
            };
            self.not_yet(&mut wait, &last).await?;
        }
        self.observer.reached("the name leads to the machine");
        Ok(())
    }

    /// Has the KMS make or take over keys. `None` when it has some already, or says nothing about them.
    async fn get_keys(&mut self, place: &Place) -> Result<Option<BootstrapResponse>, Error> {
        let mut wait = self.wait(Gate::Registration);
        // From here on it may have keys, whatever we hear of it.
        self.record.note(|state| state.asked = true)?;
        let wanted = self.wanted;
        loop {
            let (call, made) = match &wanted.source {
                None => ("Bootstrap", self.node.bootstrap(place).await.map(Some)),
                Some(source) => ("Onboard", self.node.onboard(place, &source.url).await.map(|_| None)),
            };
            let source = match made {
                Ok(made) => {
                    self.observer.reached("the KMS has keys");
                    return Ok(made);
                }
                Err(source) => source,
            };
            let last = format!("{call}: the KMS {source}");
            match source.refusal() {
                Some(Refusal::HasKeys) => return Ok(None),
                Some(
                    Refusal::NotAllowed
                    | Refusal::AuthoriserAway
                    | Refusal::LightClient
                    | Refusal::SourceAway,
                ) => self.not_yet(&mut wait, &last).await?,
                // The answer was lost; what became of the question shows in the next one's.
                None if matches!(source, NodeError::Unreachable(_)) => {
                    if self.node.front(place).await == Front::Serving {
                        return Ok(None);
                    }
                    self.not_yet(&mut wait, &last).await?;
                }
                _ => return Err(Error::Node { call, answer: source }),
            }
        }
    }

    /// Believes in keys only when evidence binds them, and is evidence of what was deployed.
    pub(super) async fn verify_keys(&mut self, made: &BootstrapResponse) -> Result<(), Error> {
        let of = "the bootstrap";
        let k256 = <[u8; 33]>::try_from(made.k256_pubkey.as_slice());
        let k256 = k256.map_err(|error| Error::Evidence { of, source: error.into() })?;
        let binding = report_data::bootstrap(&made.ca_pubkey, &k256);
        let info = self.verifier.evidence(&made.attestation, binding).await;
        let info = info.map_err(|source| Error::Evidence { of, source })?;
        self.judge(&info)?;
        self.observer.reached("the evidence binds the keys");
        let keys = Keys { ca_pubkey: hex::encode(&made.ca_pubkey), k256_pubkey: hex::encode(k256) };
        let proven = Measured::of(&info);
        self.record.note(|state| (state.keys, state.measured) = (Some(keys), Some(proven)))?;
        Ok(())
    }

    /// Whether verified evidence is of what was deployed, and of what was said before.
    pub(super) fn judge(&self, info: &BootInfo) -> Result<(), Error> {
        let proven = Measured::of(info);
        self.compare(&proven)?;
        if let Some(said) = &self.record.state.measured {
            same("mr_aggregated", &proven.mr_aggregated, &said.mr_aggregated)?;
            same("device_id", &proven.device_id, &said.device_id)?;
        }
        let expected = &self.wanted.expected;
        same("compose_hash", &hex::encode(&info.compose_hash), &expected.compose_hash)?;
        same("app_id", &hex::encode(&info.app_id), &expected.app_id)
    }

    async fn finish(&mut self, place: &Place) -> Result<(), Error> {
        let mut wait = self.wait(Gate::Finish);
        loop {
            match self.node.finish(place).await {
                Ok(()) => break,
                Err(error @ NodeError::Unreachable(_)) => {
                    if self.node.front(place).await == Front::Serving {
                        break;
                    }
                    self.not_yet(&mut wait, &format!("Finish: the KMS {error}")).await?;
                }
                Err(source) => return Err(Error::Node { call: "Finish", answer: source }),
            }
        }
        self.observer.reached("onboarding is finished");
        Ok(())
    }

    pub(super) fn wait(&self, gate: Gate) -> Wait {
        Wait {
            gate,
            deadline: Deadline::within(self.wanted.patience.of(gate)),
            pauses: Pauses::new(FIRST_PAUSE, LONGEST_PAUSE),
            remedy: None,
        }
    }

    /// Pauses before the next look, or ends the wait.
    pub(super) async fn not_yet(&mut self, wait: &mut Wait, last: &str) -> Result<(), Error> {
        let gate = wait.gate;
        if wait.deadline.passed() {
            let look = match wait.remedy {
                Some(remedy) => remedy.to_owned(),
                None => gate.look(&self.machine.console_command()),
            };
            return Err(Error::Late { gate, allowed: wait.deadline.allowed(), last: last.to_owned(), look });
        }
        self.observer.waiting(gate, last);
        wait.pauses.pause(wait.deadline).await;
        Ok(())
    }
}

pub(super) fn same(what: &'static str, actual: &str, expected: &str) -> Result<(), Error> {
    if actual.eq_ignore_ascii_case(expected) {
        return Ok(());
    }
    let shown = |text: &str| if text.is_empty() { "empty".to_owned() } else { text.to_owned() };
    Err(Error::Unexpected { what, actual: shown(actual), expected: shown(expected) })
}
