//! What a host lacks, one action at a time.
//!
//! ```text
//! look ──▶ next ──┬─ nothing: ready
//!   ▲             ├─ unfit: why, and what a person can do
//!   └─── act ◀────┴─ an action
//! ```
//!
//! [`next`] is a function of what is there and what this run has tried; an action that did not help is followed by the
//! next remedy, and a run that was cut starts over with what is there. The order of the remedies for too few processors
//! or too little memory: an enclave of ours that was left, the allocator's file, its restart, memory in one piece, a
//! restart of the machine, which gives memory that is in one piece.

use super::allocator::{Allocator, Cpus};
use super::error::Error;
use super::facts::Facts;
use super::host::{Host, quoted, shown};
use super::upload::{Upload, upload};

/// Memory that stays with the parent, in MiB.
const PARENT_MIB: u64 = 1024;
/// More actions than any host needs.
const MAX_ROUNDS: usize = 24;
/// How the names of our enclaves begin.
pub(super) const NAME: &str = "keyferry-";
/// Where the proxy lies on the host.
const PROXY: &str = "/usr/local/bin/host-proxy";
const PROXY_UNIT: &str = "/etc/systemd/system/host-proxy.service";
/// First line of a configuration of ours.
pub(super) const MARK: &str = "# Written by keyferry.";

/// What a host is wanted for.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Architecture of the image, `x86_64`.
    pub arch: &'static str,
    /// Processors of the enclave.
    pub cpus: u32,
    /// Its memory in MiB: at least four times its image.
    pub memory_mib: u64,
    /// Whose enclaves may be ended: those with exactly this name.
    pub name: String,
    /// The proxy's program.
    pub proxy: Upload,
    /// The proxy's unit.
    pub proxy_unit: Unit,
}

/// A systemd unit.
#[derive(Clone, Debug)]
pub struct Unit {
    /// Its text.
    pub text: &'static str,
    /// Digest of the text, in hex.
    pub sha256: String,
}

/// What is done to a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Packages.
    InstallNitroCli,
    /// modprobe.
    LoadModule,
    /// A restart of the machine.
    Restart(Restart),
    /// An enclave of ours that was left.
    EndEnclave(String),
    /// The allocator's file.
    WriteAllocator(Allocator),
    /// So that memory is set aside when the machine starts.
    EnableAllocator,
    /// So that it reads its file: enabling an active unit changes nothing.
    RestartAllocator,
    /// Caches dropped, memory compacted, and the allocator restarted.
    FreeMemory,
    /// The proxy's program.
    InstallProxy,
    /// The proxy's unit.
    InstallProxyUnit,
}

/// Why the machine is restarted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    /// The module is there for another kernel than the one that runs.
    OtherKernel,
    /// The module is not there although it should be.
    NoModule,
    /// Memory is in too many pieces.
    Fragmented,
}

impl Action {
    /// For people.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::InstallNitroCli => "install nitro-cli".into(),
            Self::LoadModule => "load the kernel module nitro_enclaves".into(),
            Self::Restart(Restart::OtherKernel) => {
                "restart the host: nitro_enclaves is installed for a newer kernel than the one that runs"
                    .into()
            }
            Self::Restart(Restart::NoModule) => "restart the host: the kernel module is missing".into(),
            Self::Restart(Restart::Fragmented) => {
                "restart the host: its memory is too fragmented for hugepages".into()
            }
            Self::EndEnclave(id) => format!("end the enclave {id}, left by an earlier run"),
            Self::WriteAllocator(allocator) => format!(
                "set {} processors and {} MiB aside in allocator.yaml",
                allocator.cpus.count(),
                allocator.memory_mib
            ),
            Self::EnableAllocator => "let the allocator start with the host".into(),
            Self::RestartAllocator => "restart the allocator".into(),
            Self::FreeMemory => "drop caches, compact memory, restart the allocator".into(),
            Self::InstallProxy => "install host-proxy".into(),
            Self::InstallProxyUnit => "install the unit of host-proxy".into(),
        }
    }
}

/// What a host cannot do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unfit {
    /// The image is for other processors.
    #[error("the host is {actual}, the image is for {expected}")]
    Architecture {
        /// The host's.
        actual: String,
        /// The image's.
        expected: &'static str,
    },
    /// There is no package of nitro-cli.
    #[error("nitro-cli is missing, and {os} has no package of it that is known here")]
    System {
        /// Distribution and version.
        os: String,
    },
    /// The installation said it went well.
    #[error("nitro-cli is still missing after its installation")]
    NitroCli,
    /// No kernel on the host has the module.
    #[error("kernel {kernel} has no module nitro_enclaves")]
    Module {
        /// The kernel that runs.
        kernel: String,
    },
    /// The module is loaded and finds no device.
    #[error("the module nitro_enclaves is loaded and there is no /dev/nitro_enclaves")]
    EnclavesOff,
    /// An enclave of ours does not end.
    #[error("enclave {id} does not end")]
    Stuck {
        /// Its id.
        id: String,
    },
    /// Enclaves of somebody else hold what is needed.
    #[error("{what} needed, and {} held by other enclaves: {}", held, enclaves.join(", "))]
    Occupied {
        /// What is needed.
        what: String,
        /// What they hold.
        held: String,
        /// Their ids.
        enclaves: Vec<String>,
    },
    /// The machine is too small.
    #[error("{asked} processors asked for, the host can give {most} of its {cpus}")]
    Processors {
        /// Wanted.
        asked: u32,
        /// What can be given: processor 0 and its siblings stay.
        most: u32,
        /// The host's.
        cpus: u32,
    },
    /// The machine is too small.
    #[error("{asked} MiB asked for, the host can give {most} of its {memory} MiB")]
    Memory {
        /// Wanted.
        asked: u64,
        /// What can be given.
        most: u64,
        /// The host's.
        memory: u64,
    },
    /// The allocator does not do what its file says, also after a restart of the machine.
    #[error("the allocator sets aside {pool} processors and {hugepages_mib} MiB, {log}")]
    Allocator {
        /// What is set aside.
        pool: usize,
        /// What is free in hugepages.
        hugepages_mib: u64,
        /// What it says.
        log: String,
    },
    /// There is no room for images.
    #[error("{free} MiB free on the host's disk, {needed} needed")]
    Disk {
        /// What is free.
        free: u64,
        /// What is needed.
        needed: u64,
    },
    /// Somebody else's proxy.
    #[error("/etc/host-proxy.toml on the host was not written by keyferry")]
    ForeignProxy,
}

impl Unfit {
    /// What a person can do.
    #[must_use]
    pub fn hint(&self) -> String {
        match self {
            Self::Architecture { .. } => {
                "launch an instance type of the image's architecture (c5.xlarge is x86_64, c6g.large is aarch64)".into()
            }
            Self::System { .. } => "use Amazon Linux 2023, or install nitro-cli by hand and run this again".into(),
            Self::NitroCli => "see what `keyferry host ssh -- dnf list aws-nitro-enclaves-cli` says".into(),
            Self::Module { .. } => {
                "on Ubuntu install linux-modules-extra-aws for this kernel; Amazon Linux 2023 has the module".into()
            }
            Self::EnclavesOff => {
                "the instance was launched without EnclaveOptions.Enabled, or its type has no enclaves: launch another \
                 with `keyferry host up`"
                    .into()
            }
            Self::Stuck { id } => format!("`keyferry host ssh -- sudo nitro-cli terminate-enclave --enclave-id {id}`"),
            Self::Occupied { enclaves, .. } => format!(
                "they were not started for this project, so they are left alone; end them if they are yours: \
                 `keyferry host ssh -- sudo nitro-cli terminate-enclave --enclave-id {}`",
                enclaves.first().map_or("ID", String::as_str)
            ),
            Self::Processors { .. } => "lower [run] cpus, or launch a larger instance type".into(),
            Self::Memory { .. } => "lower [run] memory_mib, or launch a larger instance type".into(),
            Self::Allocator { .. } => "`keyferry host logs --allocator` shows all it said".into(),
            Self::Disk { .. } => "remove ~/.keyferry on the host, or launch it with a larger volume".into(),
            Self::ForeignProxy => "move it away if it is not needed, or use a host of its own".into(),
        }
    }
}

/// What this run has done already.
#[derive(Clone, Debug, Default)]
pub(super) struct Tried {
    installed: bool,
    loaded: bool,
    ended: Vec<String>,
    allocator_restarted: bool,
    memory_freed: bool,
    restarted: bool,
}

impl Tried {
    pub(super) fn note(&mut self, action: &Action) {
        match action {
            Action::InstallNitroCli => self.installed = true,
            Action::LoadModule => self.loaded = true,
            Action::Restart(_) => self.restarted = true,
            Action::EndEnclave(id) => self.ended.push(id.clone()),
            Action::WriteAllocator(_) => self.allocator_restarted = false,
            Action::RestartAllocator => self.allocator_restarted = true,
            Action::FreeMemory => self.memory_freed = true,
            Action::EnableAllocator | Action::InstallProxy | Action::InstallProxyUnit => {}
        }
    }
}

/// What is to be done next, if anything.
pub(super) fn next(facts: &Facts, wanted: &Wanted, tried: &Tried) -> Result<Option<Action>, Unfit> {
    if facts.arch != wanted.arch {
        return Err(Unfit::Architecture { actual: facts.arch.clone(), expected: wanted.arch });
    }
    if facts.proxy_config.as_ref().is_some_and(|line| line != MARK) {
        return Err(Unfit::ForeignProxy);
    }
    let needed = wanted.proxy.len.div_ceil(1 << 20) * 2;
    if facts.disk_free_mib < needed {
        return Err(Unfit::Disk { free: facts.disk_free_mib, needed });
    }
    if facts.nitro_cli.is_none() {
        return match (tried.installed, facts.os.starts_with("amzn ")) {
            (true, _) => Err(Unfit::NitroCli),
            (false, false) => Err(Unfit::System { os: facts.os.clone() }),
            (false, true) => Ok(Some(Action::InstallNitroCli)),
        };
    }
    if let Some(action) = module(facts, tried)? {
        return Ok(Some(action));
    }
    if let Some(left) = facts.enclaves.iter().find(|it| it.enclave_name.as_ref() == Some(&wanted.name)) {
        let id = left.enclave_id.clone();
        return if tried.ended.contains(&id) {
            Err(Unfit::Stuck { id })
        } else {
            Ok(Some(Action::EndEnclave(id)))
        };
    }
    if let Some(action) = allocator(facts, wanted, tried)? {
        return Ok(Some(action));
    }
    if facts.proxy_sha256.as_ref() != Some(&wanted.proxy.sha256) {
        return Ok(Some(Action::InstallProxy));
    }
    if facts.proxy_unit_sha256.as_ref() != Some(&wanted.proxy_unit.sha256) {
        return Ok(Some(Action::InstallProxyUnit));
    }
    Ok(None)
}

fn module(facts: &Facts, tried: &Tried) -> Result<Option<Action>, Unfit> {
    if facts.device {
        return Ok(None);
    }
    if facts.module_loaded {
        return Err(Unfit::EnclavesOff);
    }
    if facts.has_module() && !tried.loaded {
        return Ok(Some(Action::LoadModule));
    }
    if tried.restarted {
        return Err(Unfit::Module { kernel: facts.kernel.clone() });
    }
    let other = !facts.modules.is_empty() && !facts.has_module();
    Ok(Some(Action::Restart(if other { Restart::OtherKernel } else { Restart::NoModule })))
}

fn allocator(facts: &Facts, wanted: &Wanted, tried: &Tried) -> Result<Option<Action>, Unfit> {
    let threads = facts.threads_per_core.max(1);
    // The allocator takes whole cores only, and processor 0 with its siblings stays.
    let most = (facts.cpus / threads).saturating_sub(1) * threads;
    let cpus = wanted.cpus.next_multiple_of(threads);
    if cpus > most {
        return Err(Unfit::Processors { asked: wanted.cpus, most, cpus: facts.cpus });
    }
    let most = facts.memory_mib.saturating_sub(PARENT_MIB);
    // Whole pages, of 2 MiB at the least: half a page would never be there.
    let memory_mib = wanted.memory_mib.next_multiple_of(2);
    if memory_mib > most {
        return Err(Unfit::Memory { asked: memory_mib, most, memory: facts.memory_mib });
    }
    let held_cpus: u32 = facts.enclaves.iter().map(|it| it.cpus).fold(0, u32::saturating_add);
    let held_mib: u64 = facts.enclaves.iter().map(|it| it.memory_mib).fold(0, u64::saturating_add);
    let written = facts.allocator.as_ref().and_then(|file| file.as_ref().ok());
    let enough_written = written.is_some_and(|file| {
        file.cpus.count() >= cpus.saturating_add(held_cpus)
            && file.cpus.count() % threads == 0
            && file.memory_mib >= memory_mib.saturating_add(held_mib)
    });
    let enough = facts.allocator_active == "active"
        && facts.pool.len() >= usize::try_from(cpus.saturating_add(held_cpus)).unwrap_or(usize::MAX)
        && facts.free_hugepages_mib >= memory_mib;
    if (!enough_written || !enough) && !facts.enclaves.is_empty() {
        // The allocator does not restart while an enclave runs, and these are not ours to end.
        let enclaves = facts.enclaves.iter().map(|it| it.enclave_id.clone()).collect();
        let what = format!("{cpus} processors and {memory_mib} MiB");
        let held = format!("{held_cpus} processors and {held_mib} MiB are");
        return Err(Unfit::Occupied { what, held, enclaves });
    }
    if !enough_written {
        return Ok(Some(Action::WriteAllocator(Allocator { memory_mib, cpus: Cpus::Count(cpus) })));
    }
    if facts.allocator_enabled != "enabled" {
        return Ok(Some(Action::EnableAllocator));
    }
    if enough {
        return Ok(None);
    }
    Ok(Some(match tried {
        Tried { allocator_restarted: false, .. } => Action::RestartAllocator,
        Tried { memory_freed: false, .. } => Action::FreeMemory,
        Tried { restarted: false, .. } => Action::Restart(Restart::Fragmented),
        _ => {
            let said = shown(&facts.allocator_log);
            let log = if said.is_empty() { "and says nothing".into() } else { format!("and says: {said}") };
            let (pool, hugepages_mib) = (facts.pool.len(), facts.free_hugepages_mib);
            return Err(Unfit::Allocator { pool, hugepages_mib, log });
        }
    }))
}

/// Makes a host ready: looks, does what is to be done, and looks again until nothing is left. `tell` hears of each action
/// before it is done.
///
/// # Errors
///
/// [`Error::Unfit`] when a person has to do something; when the host cannot be asked or a step fails. Running it again
/// goes on from what is there.
pub async fn setup(
    host: &mut Host,
    wanted: &Wanted,
    tell: &mut (dyn FnMut(&Action) + Send),
) -> Result<Facts, Error> {
    let mut tried = Tried::default();
    let mut last = String::new();
    for _round in 0..MAX_ROUNDS {
        let facts = host.facts().await?;
        let Some(action) = next(&facts, wanted, &tried)? else { return Ok(facts) };
        tell(&action);
        act(host, &action, &facts, wanted).await?;
        tried.note(&action);
        last = action.describe();
    }
    Err(Error::NoEnd { rounds: MAX_ROUNDS, last })
}

async fn act(host: &mut Host, action: &Action, facts: &Facts, wanted: &Wanted) -> Result<(), Error> {
    let allocator_unit = "nitro-enclaves-allocator.service";
    let name = action.describe();
    match action {
        Action::InstallNitroCli => {
            let mut step = host.step(&name, "dnf install -y -q aws-nitro-enclaves-cli");
            step.deadline = host.patience().install;
            host.run(step).await?;
        }
        // Whether these helped is seen in the next look, and why not in the log of the unit.
        Action::LoadModule => drop(host.attempt(host.step(&name, "modprobe nitro_enclaves")).await?),
        Action::RestartAllocator => {
            let script = format!("systemctl restart {allocator_unit}");
            drop(host.attempt(host.step(&name, script)).await?);
        }
        Action::FreeMemory => {
            let script = format!(
                "sync; sysctl -q -w vm.drop_caches=3; sysctl -q -w vm.compact_memory=1; systemctl restart {allocator_unit}"
            );
            drop(host.attempt(host.step(&name, script)).await?);
        }
        Action::Restart(_) => host.restart(&facts.boot_id).await?,
        Action::EndEnclave(id) => host.end_enclave(id).await?,
        Action::WriteAllocator(allocator) => {
            let script = replace("/etc/nitro_enclaves/allocator.yaml", &allocator.render());
            host.run(host.step(&name, script)).await?;
        }
        Action::EnableAllocator => {
            host.run(host.step(&name, format!("systemctl enable -q {allocator_unit}"))).await?;
        }
        Action::InstallProxy => {
            let uploaded = upload(host, &wanted.proxy).await?;
            // A program that does not run here must not become the unit's.
            let script = format!(
                "set -e; install -m 0755 {0} {PROXY}.new; {PROXY}.new --version >&2; mv -f {PROXY}.new {PROXY}",
                quoted(&uploaded)
            );
            host.run(host.step(&name, script)).await?;
        }
        Action::InstallProxyUnit => {
            let script = format!(
                "set -e; {}; systemctl daemon-reload; systemctl enable -q host-proxy.service",
                replace(PROXY_UNIT, wanted.proxy_unit.text)
            );
            host.run(host.step(&name, script)).await?;
        }
    }
    Ok(())
}

/// A script that replaces a file of root's, whole or not at all.
pub(super) fn replace(path: &str, content: &str) -> String {
    format!(
        "set -e; umask 022; mkdir -p \"$(dirname {path})\"; printf %s {} > {path}.keyferry; sync {path}.keyferry; \
         mv -f {path}.keyferry {path}",
        quoted(content)
    )
}

#[cfg(test)]
mod tests;
