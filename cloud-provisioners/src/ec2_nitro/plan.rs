//! From what is wanted, recorded and found to the steps between them. Pure.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;

use super::found::{Found, Image, Instance, Machine, Subnet};
use super::state::{Access, ImageChoice, Launch, State, Wanted};
use crate::nitro_host::{HostKey, Reach};

/// An enclave of two vCPUs leaves the parent a core: the least that works on processors with two threads a core.
const LEAST_VCPUS: u32 = 4;
/// Accounts that publish images, and who logs in to these.
const USERS: [(&str, &str); 5] = [
    ("137112412989", "ec2-user"), // Amazon Linux
    ("099720109477", "ubuntu"),   // Canonical
    ("136693071363", "admin"),    // Debian
    ("309956199498", "ec2-user"), // Red Hat
    ("013907871322", "ec2-user"), // SUSE
];

/// What is recorded on this machine.
#[derive(Clone, Copy, Debug)]
pub(super) struct Recorded<'a> {
    pub(super) deployment: &'a str,
    pub(super) state: Option<&'a State>,
    /// Whether anything may have been made.
    pub(super) began: bool,
    /// How the host was last reached.
    pub(super) reach: Option<&'a Reach>,
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Make a private key on this machine.
    MakeKey,
    /// Give its public half to EC2.
    ImportKeyPair,
    /// Make a security group in this VPC.
    CreateGroup {
        /// The VPC.
        vpc: String,
    },
    /// Let these addresses in to port 22.
    AllowSsh(IpNet),
    /// Let these addresses, from an earlier run, in no longer.
    RevokeSsh(IpNet),
    /// Launch the instance in the first of these subnets that has room.
    Launch {
        /// A launch of an earlier run whose answer is not known: asked for again first.
        resume: Option<Launch>,
        /// Subnet and zone.
        places: Vec<(String, String)>,
    },
    /// Stop an instance.
    Stop(String),
    /// Switch its enclave option on.
    EnableEnclaves(String),
    /// Start it.
    Start(String),
    /// Wait until the instance runs, learn its SSH key and record how it is reached.
    Record {
        /// Its own key, when it is known already.
        host_key: Option<HostKey>,
    },
}

impl Step {
    /// Whether it begins to cost money.
    #[must_use]
    pub fn costs(&self) -> bool {
        matches!(self, Self::Launch { .. } | Self::Start(_))
    }

    /// Whether something that runs is interrupted.
    #[must_use]
    pub fn interrupts(&self) -> bool {
        matches!(self, Self::Stop(_))
    }
}

/// The steps to a host, in order, and what they need to know.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(super) wanted: Wanted,
    pub(super) account: String,
    pub(super) steps: Vec<Step>,
    /// The instance, when it is there.
    pub(super) instance: Option<String>,
    /// The security group, when it is there.
    pub(super) group: Option<String>,
    pub(super) group_name: String,
    pub(super) key_name: String,
    /// The public half of the key, when there is one.
    pub(super) public_key: Option<String>,
    /// Id of the image, or the parameter it is looked up by.
    pub(super) image: String,
    pub(super) root_device: String,
    pub(super) user: String,
}

impl Plan {
    /// The steps, in order.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wanted = &self.wanted;
        writeln!(f, "in account {}, region {}:", self.account, wanted.region)?;
        for (number, step) in self.steps.iter().enumerate() {
            write!(f, "{:>3}. ", number + 1)?;
            match step {
                Step::MakeKey => writeln!(f, "make the private key {}", wanted.key_file.display())?,
                Step::ImportKeyPair => writeln!(f, "give its public half to EC2 as {}", self.key_name)?,
                Step::CreateGroup { vpc } => {
                    writeln!(f, "create the security group {} in {vpc}", self.group_name)?;
                }
                Step::AllowSsh(source) => writeln!(f, "let {source} in to port 22, and nobody else")?,
                Step::RevokeSsh(source) => writeln!(f, "let {source} in no longer")?,
                Step::Launch { resume, places } => {
                    let zones: Vec<&str> = match resume {
                        Some(launch) => vec![&launch.zone],
                        None => places.iter().map(|(_, zone)| zone.as_str()).collect(),
                    };
                    let kind = if wanted.spot { "spot instance" } else { "instance" };
                    writeln!(
                        f,
                        "launch the {kind} {}: {} with enclaves in {}, encrypted disk of {} GiB, from {} (costs money)",
                        wanted.name,
                        wanted.instance_type,
                        zones.join(" or "),
                        wanted.volume_gib,
                        self.image,
                    )?;
                }
                Step::Stop(id) => writeln!(f, "STOP {id}: what runs on it ends")?,
                Step::EnableEnclaves(id) => writeln!(f, "switch the enclave option of {id} on")?,
                Step::Start(id) => writeln!(f, "start {id} (costs money)")?,
                Step::Record { host_key: None } => {
                    writeln!(f, "wait until it runs and its console shows its SSH key")?;
                }
                Step::Record { host_key: Some(_) } => writeln!(f, "wait until it runs")?,
            }
        }
        Ok(())
    }
}

/// Why a host is refused before anything is changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The instance type cannot be a host.
    #[error("instance type {instance_type}: {problem}")]
    InstanceType {
        /// The type.
        instance_type: String,
        /// What is wrong with it.
        problem: String,
    },
    /// There is no subnet to launch into.
    #[error("no default VPC in {region}")]
    NoDefaultVpc {
        /// The region.
        region: String,
    },
    /// No subnet is in a zone that has the type.
    #[error("instance type {instance_type}: in none of the zones of {subnets}")]
    NoZone {
        /// The type.
        instance_type: String,
        /// The subnets that were looked at.
        subnets: String,
    },
    /// The image cannot be used.
    #[error("image {image}: {problem}")]
    Image {
        /// The image.
        image: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Nobody knows who logs in to this image.
    #[error("image {image}: it is not known who logs in to it")]
    UnknownUser {
        /// The image.
        image: String,
    },
    /// The key pair is there and its private half is not.
    #[error("key pair {name} exists in EC2, and its private key {} is not here", path.display())]
    KeyWithoutFile {
        /// The key pair.
        name: String,
        /// Where the private key was looked for.
        path: PathBuf,
    },
    /// The key pair is another key than the file.
    #[error("key pair {name} in EC2 is another key than {}", path.display())]
    OtherKey {
        /// The key pair.
        name: String,
        /// The private key.
        path: PathBuf,
    },
    /// The private key cannot be used.
    #[error("private key {}: {problem}", path.display())]
    KeyFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A host that was asked for differently is there.
    #[error("a host with another {what} was begun here: {recorded}, now {asked}")]
    Differs {
        /// The setting.
        what: &'static str,
        /// Its value then.
        recorded: String,
        /// Its value now.
        asked: String,
    },
    /// The host is another account's.
    #[error("the host here is in account {recorded}, these credentials are of account {actual}")]
    OtherAccount {
        /// The host's account.
        recorded: String,
        /// The credentials' account.
        actual: String,
    },
    /// The security group of this deployment's name is somebody else's.
    #[error("security group {name} exists and is not of this deployment")]
    OtherGroup {
        /// Its name.
        name: String,
    },
    /// More than one instance carries this deployment's id.
    #[error("instances {} all carry the id of this deployment", .0.join(", "))]
    Several(Vec<String>),
    /// The instance cannot be adopted.
    #[error("instance {instance}: {problem}")]
    Adopt {
        /// The instance.
        instance: String,
        /// Why not.
        problem: String,
    },
}

impl Refusal {
    /// The next step.
    #[must_use]
    pub fn hint(&self) -> String {
        match self {
            Self::InstanceType { .. } => {
                "c5.xlarge, m5.xlarge and r5.xlarge can; t types, metal and small ones cannot".into()
            }
            Self::NoDefaultVpc { .. } => {
                "give --subnet, or make a default VPC with `aws ec2 create-default-vpc`".into()
            }
            Self::NoZone { .. } => "give a --subnet in another zone, or another --instance-type".into(),
            Self::Image { .. } => "leave --image out to take Amazon Linux 2023".into(),
            Self::UnknownUser { .. } => "name the user with --user".into(),
            Self::KeyWithoutFile { .. } => {
                "put the private key there, or choose another --key-name; nothing can get it back from EC2"
                    .into()
            }
            Self::OtherKey { .. } => "choose another --key-name, or the right --key".into(),
            Self::KeyFile { .. } => "name another file with --key; one that is not there is made".into(),
            Self::Differs { .. } => {
                "remove it first with `keyferry host down`, or use another directory".into()
            }
            Self::OtherAccount { .. } => "use that account's credentials, for example with --profile".into(),
            Self::OtherGroup { name } => format!("delete the security group {name} if nobody needs it"),
            Self::Several(_) => "`keyferry host down` ends all of them".into(),
            Self::Adopt { .. } => "launch a new one: leave --adopt out".into(),
        }
    }
}

/// Decides the steps.
///
/// # Errors
///
/// [`Refusal`] when there cannot be such a host, or something else is in its place.
pub(super) fn plan(wanted: &Wanted, recorded: Recorded<'_>, found: &Found) -> Result<Plan, Refusal> {
    check_record(wanted, recorded, found)?;
    let mut plan = Plan {
        wanted: wanted.clone(),
        account: found.account.clone(),
        steps: Vec::new(),
        instance: None,
        group: found.group.as_ref().map(|group| group.id.clone()),
        group_name: own_name(recorded.deployment),
        key_name: wanted.key_name.clone().unwrap_or_else(|| own_name(recorded.deployment)),
        public_key: found.local_key.clone(),
        image: String::new(),
        root_device: "/dev/xvda".to_owned(),
        user: String::new(),
    };
    match &wanted.adopt {
        Some(id) => adopt(&mut plan, id, recorded, found)?,
        None => make(&mut plan, recorded, found)?,
    }
    Ok(plan)
}

/// Name of the deployment's security group, and of its key pair where none was given.
pub(super) fn own_name(deployment: &str) -> String {
    format!("keyferry-{deployment}")
}

fn check_record(wanted: &Wanted, recorded: Recorded<'_>, found: &Found) -> Result<(), Refusal> {
    let Some(state) = recorded.state.filter(|_| recorded.began) else { return Ok(()) };
    if state.account != found.account {
        return Err(Refusal::OtherAccount { recorded: state.account.clone(), actual: found.account.clone() });
    }
    let before = &state.wanted;
    let access = |wanted: &Wanted| match &wanted.access {
        // The addresses may change: people move.
        Access::Ssh(_) => "ssh".to_owned(),
        Access::Ssm { instance_profile } => format!("ssm by {instance_profile}"),
    };
    let optional = |value: &Option<String>| value.clone().unwrap_or_else(|| "none".to_owned());
    let login =
        |wanted: &Wanted| if wanted.instance_connect { "a new key each time" } else { "one key" }.to_owned();
    let settings: [(&'static str, String, String); 10] = [
        ("region", before.region.clone(), wanted.region.clone()),
        ("instance type", before.instance_type.clone(), wanted.instance_type.clone()),
        ("image", before.image.to_string(), wanted.image.to_string()),
        ("subnet", optional(&before.subnet), optional(&wanted.subnet)),
        ("access", access(before), access(wanted)),
        ("key name", optional(&before.key_name), optional(&wanted.key_name)),
        ("login", login(before), login(wanted)),
        ("disk", before.volume_gib.to_string(), wanted.volume_gib.to_string()),
        ("market", before.spot.to_string(), wanted.spot.to_string()),
        ("instance", optional(&before.adopt), optional(&wanted.adopt)),
    ];
    match settings.into_iter().find(|(_, before, now)| before != now) {
        Some((what, recorded, asked)) => Err(Refusal::Differs { what, recorded, asked }),
        None => Ok(()),
    }
}

/// A host of our own.
fn make(plan: &mut Plan, recorded: Recorded<'_>, found: &Found) -> Result<(), Refusal> {
    let wanted = plan.wanted.clone();
    let machine = check_machine(&wanted.instance_type, &wanted, found)?;
    choose_image(plan, machine, found)?;
    let alive: Vec<&Instance> = found.instances.iter().filter(|it| !it.is_ending()).collect();
    if alive.len() > 1 {
        return Err(Refusal::Several(alive.iter().map(|it| it.id.clone()).collect()));
    }
    let vpc = found.subnets.first().map(|subnet| subnet.vpc.clone());
    let vpc = vpc.ok_or_else(|| Refusal::NoDefaultVpc { region: wanted.region.clone() })?;
    plan_key(plan, found)?;
    plan_group(plan, recorded, found, vpc)?;
    match alive.first() {
        Some(instance) => running(plan, recorded, instance),
        None => {
            let places = places(&wanted, found)?;
            let begun = recorded.state.and_then(|state| state.launch.clone());
            // The token of an instance that has ended would give that instance again.
            let ended = |launch: &Launch| found.instances.iter().any(|it| it.client_token == launch.token);
            let resume = begun.filter(|launch| !ended(launch));
            plan.steps.push(Step::Launch { resume, places });
            plan.steps.push(Step::Record { host_key: wanted.host_key.clone() });
        }
    }
    Ok(())
}

fn check_machine<'a>(instance_type: &str, wanted: &Wanted, found: &'a Found) -> Result<&'a Machine, Refusal> {
    let refuse = |problem: String| Refusal::InstanceType { instance_type: instance_type.to_owned(), problem };
    let machine = found.machine.as_ref();
    let machine =
        machine.ok_or_else(|| refuse(format!("there is none of this name in {}", wanted.region)))?;
    if !machine.enclaves {
        return Err(refuse("AWS does not support enclaves on it".into()));
    }
    if machine.vcpus < LEAST_VCPUS {
        return Err(refuse(format!("has {} vCPUs, expected at least {LEAST_VCPUS}", machine.vcpus)));
    }
    if wanted.spot && !machine.spot {
        return Err(refuse("is not offered as a spot instance".into()));
    }
    Ok(machine)
}

fn choose_image(plan: &mut Plan, machine: &Machine, found: &Found) -> Result<(), Refusal> {
    match &plan.wanted.image {
        ImageChoice::AmazonLinux2023(line) => {
            let architecture =
                machine.architectures.iter().find(|it| matches!(it.as_str(), "x86_64" | "arm64"));
            let architecture = architecture.map_or("x86_64", String::as_str);
            plan.image = format!(
                "resolve:ssm:/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-{}-{architecture}",
                line.name()
            );
            plan.user = plan.wanted.user.clone().unwrap_or_else(|| "ec2-user".to_owned());
        }
        ImageChoice::Id(id) => {
            let refuse = |problem: String| Refusal::Image { image: id.clone(), problem };
            let image = found.image.as_ref().ok_or_else(|| refuse("is not there".into()))?;
            if !machine.architectures.contains(&image.architecture) {
                return Err(refuse(format!(
                    "is for {}, {} is {}",
                    image.architecture,
                    plan.wanted.instance_type,
                    machine.architectures.join(" or ")
                )));
            }
            plan.image.clone_from(id);
            plan.root_device.clone_from(&image.root_device);
            plan.user = user(&plan.wanted, image)?;
        }
    }
    Ok(())
}

/// Who logs in to an image.
fn user(wanted: &Wanted, image: &Image) -> Result<String, Refusal> {
    let published =
        || USERS.iter().find(|(owner, _)| *owner == image.owner).map(|(_, user)| (*user).to_owned());
    wanted.user.clone().or_else(published).ok_or_else(|| Refusal::UnknownUser { image: image.id.clone() })
}

fn plan_key(plan: &mut Plan, found: &Found) -> Result<(), Refusal> {
    if plan.wanted.instance_connect {
        return Ok(());
    }
    let (name, path) = (plan.key_name.clone(), plan.wanted.key_file.clone());
    match (&found.key_pair, &found.local_key) {
        (Some(_), None) => return Err(Refusal::KeyWithoutFile { name, path }),
        (Some(pair), Some(local)) if pair.public_key.as_ref() != Some(local) => {
            return Err(Refusal::OtherKey { name, path });
        }
        (Some(_), Some(_)) => {}
        (None, local) => {
            if local.is_none() {
                plan.steps.push(Step::MakeKey);
            }
            plan.steps.push(Step::ImportKeyPair);
        }
    }
    Ok(())
}

fn plan_group(plan: &mut Plan, recorded: Recorded<'_>, found: &Found, vpc: String) -> Result<(), Refusal> {
    let before = match &found.group {
        Some(group) if group.deployment.as_deref() != Some(recorded.deployment) => {
            return Err(Refusal::OtherGroup { name: group.name.clone() });
        }
        Some(group) => group.ssh_from.clone(),
        None => {
            plan.steps.push(Step::CreateGroup { vpc });
            Vec::new()
        }
    };
    let wanted = match plan.wanted.access {
        Access::Ssh(source) => Some(source),
        Access::Ssm { .. } => None,
    };
    plan.steps.extend(wanted.filter(|source| !before.contains(source)).map(Step::AllowSsh));
    plan.steps.extend(before.into_iter().filter(|it| Some(*it) != wanted).map(Step::RevokeSsh));
    Ok(())
}

fn places(wanted: &Wanted, found: &Found) -> Result<Vec<(String, String)>, Refusal> {
    let usable = found.subnets.iter().filter(|subnet| found.zones.contains(&subnet.zone));
    let places: Vec<_> = usable.map(|Subnet { id, zone, .. }| (id.clone(), zone.clone())).collect();
    if places.is_empty() {
        let subnets: Vec<_> =
            found.subnets.iter().map(|subnet| format!("{} ({})", subnet.id, subnet.zone)).collect();
        let (instance_type, subnets) = (wanted.instance_type.clone(), subnets.join(", "));
        return Err(Refusal::NoZone { instance_type, subnets });
    }
    Ok(places)
}

/// An instance that is there: started if it is not, and recorded if it is not.
fn running(plan: &mut Plan, recorded: Recorded<'_>, instance: &Instance) {
    plan.instance = Some(instance.id.clone());
    let stopped = matches!(instance.state.as_str(), "stopping" | "stopped");
    if stopped {
        plan.steps.push(Step::Start(instance.id.clone()));
    }
    let before = recorded.reach.filter(|reach| reach.instance_id.as_ref() == Some(&instance.id));
    let address: Option<IpAddr> = instance.address();
    let same = |reach: &Reach| Some(reach.address) == address && reach.aws == plan.wanted.aws();
    let current = before.is_some_and(same) && instance.state == "running" && instance.enclaves;
    if !current {
        // A key once learned stays: a machine that moves to another address keeps its identity.
        let known = before.map(|reach| reach.host_key.clone());
        plan.steps.push(Step::Record { host_key: plan.wanted.host_key.clone().or(known) });
    }
}

/// Somebody else's instance, used as it is but for its enclave option.
fn adopt(plan: &mut Plan, id: &str, recorded: Recorded<'_>, found: &Found) -> Result<(), Refusal> {
    let refuse = |problem: &str| Refusal::Adopt { instance: id.to_owned(), problem: problem.to_owned() };
    let instance = found.instances.first().ok_or_else(|| refuse("is not there"))?;
    if instance.is_ending() {
        return Err(refuse(&format!("is {}", instance.state)));
    }
    if let Some(other) = instance.deployment().filter(|other| *other != recorded.deployment) {
        return Err(refuse(&format!("belongs to the deployment {other}")));
    }
    check_machine(&instance.instance_type, &plan.wanted, found)?;
    if found.local_key.is_none() {
        let problem = "is not there, and only it logs in to an instance that is".to_owned();
        return Err(Refusal::KeyFile { path: plan.wanted.key_file.clone(), problem });
    }
    plan.user = match (&plan.wanted.user, &found.image) {
        (Some(user), _) => user.clone(),
        (None, Some(image)) => user(&plan.wanted, image)?,
        (None, None) => return Err(Refusal::UnknownUser { image: instance.image.clone() }),
    };
    if !instance.enclaves {
        if !instance.can_stop || instance.spot {
            return Err(refuse("cannot be stopped, which switching its enclave option on takes"));
        }
        if instance.hibernates {
            return Err(refuse("is set up to hibernate, which excludes enclaves"));
        }
        if instance.state != "stopped" {
            plan.steps.push(Step::Stop(id.to_owned()));
        }
        plan.steps.push(Step::EnableEnclaves(id.to_owned()));
        if instance.state != "stopped" && instance.state != "stopping" {
            plan.steps.push(Step::Start(id.to_owned()));
        }
    }
    running(plan, recorded, instance);
    Ok(())
}

#[cfg(test)]
mod tests;
