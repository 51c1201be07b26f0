//! What is wrong with a host, and what helps: each known failure by its name.

use serde::Serialize;

use super::error::Error;
use super::facts::Facts;
use super::host::{Host, quoted, shown};
use super::setup::{MARK, NAME};

/// Less than this for images is worth a word, in MiB.
const LITTLE_DISK: u64 = 1024;

/// One thing that is wrong, or worth knowing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Whether enclaves cannot run with it.
    pub severity: Severity,
    /// What it is.
    pub what: String,
    /// What helps.
    pub fix: String,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// No enclave runs, or none gets its keys.
    Problem,
    /// Worth knowing.
    Note,
}

fn problem(what: impl Into<String>, fix: impl Into<String>) -> Finding {
    Finding { severity: Severity::Problem, what: what.into(), fix: fix.into() }
}

fn note(what: impl Into<String>, fix: impl Into<String>) -> Finding {
    Finding { severity: Severity::Note, what: what.into(), fix: fix.into() }
}

const SETUP: &str = "`keyferry host setup`";

/// What the facts say is wrong.
#[must_use]
pub fn diagnose(facts: &Facts) -> Vec<Finding> {
    let mut found = Vec::new();
    if facts.nitro_cli.is_none() {
        found.push(problem(
            "nitro-cli: command not found",
            format!("{SETUP} installs it (dnf, Amazon Linux 2023)"),
        ));
    }
    module(facts, &mut found);
    allocator(facts, &mut found);
    enclaves(facts, &mut found);
    proxy(facts, &mut found);
    if facts.disk_free_mib < LITTLE_DISK {
        found.push(note(
            format!("{} MiB are free where images are put", facts.disk_free_mib),
            "remove ~/.keyferry on the host, or launch it with a larger volume",
        ));
    }
    found
}

fn module(facts: &Facts, found: &mut Vec<Finding>) {
    if facts.device {
        return;
    }
    found.push(match (facts.module_loaded, facts.has_module(), facts.modules.first()) {
        (true, ..) => problem(
            "E19: the module nitro_enclaves is loaded, but /dev/nitro_enclaves is missing",
            "the instance runs without EnclaveOptions.Enabled, or its type has no enclaves: launch another with \
             `keyferry host up`",
        ),
        (false, true, _) => {
            problem("E19: the module nitro_enclaves is not loaded", format!("{SETUP} loads it"))
        }
        (false, false, Some(other)) => problem(
            format!("Module nitro_enclaves not found: installed for kernel {other}, running is {}", facts.kernel),
            format!("restart the host, which {SETUP} does"),
        ),
        (false, false, None) => problem(
            format!("Module nitro_enclaves not found: no installed kernel has it, running is {}", facts.kernel),
            "use Amazon Linux 2023; on Ubuntu install linux-modules-extra-aws and restart",
        ),
    });
}

fn allocator(facts: &Facts, found: &mut Vec<Finding>) {
    let threads = facts.threads_per_core.max(1);
    let most = (facts.cpus / threads).saturating_sub(1) * threads;
    match &facts.allocator {
        None => found.push(problem("allocator.yaml is missing", format!("{SETUP} writes it"))),
        Some(Err(error)) => {
            found.push(problem(format!("allocator.yaml: {error}"), format!("{SETUP} replaces it")))
        }
        Some(Ok(file)) => {
            let count = file.cpus.count();
            if count % threads != 0 {
                found.push(problem(
                    format!("allocator.yaml: {count} processors are not whole cores of {threads} threads"),
                    format!("{SETUP} writes a multiple of {threads}"),
                ));
            } else if count > most {
                found.push(problem(
                    format!("allocator.yaml: {count} processors, the host can give {most} of its {}", facts.cpus),
                    "processor 0 and its siblings stay with the host: lower cpu_count, or use a larger instance type",
                ));
            }
            let pool = u32::try_from(facts.pool.len()).unwrap_or(u32::MAX);
            if facts.allocator_active == "active" && pool != count && count <= most {
                found.push(problem(
                    format!("E22: {pool} processors are set aside, allocator.yaml says {count}"),
                    format!(
                        "the allocator was not restarted (enabling an active unit changes nothing): {SETUP} does, when \
                         no enclave runs"
                    ),
                ));
            }
            let enclaves: u64 = facts.enclaves.iter().map(|it| it.memory_mib).fold(0, u64::saturating_add);
            let set_aside = facts.hugepages_mib.max(facts.free_hugepages_mib.saturating_add(enclaves));
            if facts.allocator_active == "active" && set_aside < file.memory_mib {
                found.push(problem(
                    format!("E27: {set_aside} MiB are in hugepages, allocator.yaml says {}", file.memory_mib),
                    format!("memory is fragmented: {SETUP} compacts it, and restarts the host if that is not enough"),
                ));
            }
        }
    }
    if facts.allocator_active == "active" {
        if facts.allocator_enabled != "enabled" {
            found.push(note(
                "the allocator does not start with the host",
                format!("{SETUP} enables it: memory is in one piece only right after a start"),
            ));
        }
        return;
    }
    let (what, fix) = explain_allocator(&facts.allocator_log);
    found.push(problem(format!("the allocator is {}: {what}", facts.allocator_active), fix));
}

/// What the allocator's own words mean.
fn explain_allocator(log: &str) -> (String, &'static str) {
    let known = [
        (
            "The CPU pool file is missing",
            "the kernel module is not loaded, or the instance was launched without enclaves",
        ),
        (
            "Could not re-online CPUs because there is at least one enclave currently running",
            "end the enclaves first: `keyferry host ssh -- sudo nitro-cli describe-enclaves` lists them",
        ),
        (
            "Failed to configure entire amount of requested memory",
            "memory is fragmented: `keyferry host setup` compacts it, and restarts the host if that is not enough",
        ),
        (
            "Failed to find suitable CPUs",
            "cpu_count is more than one NUMA node can give without processor 0's core",
        ),
        (
            "The CPU count is not multiple of",
            "cpu_count must be whole cores: `keyferry host setup` rounds it up",
        ),
        ("missing memory reservation", "allocator.yaml has no line ---, so that nothing in it counts"),
    ];
    match known.into_iter().find(|(words, _)| log.contains(words)) {
        Some((words, fix)) => (words.to_owned(), fix),
        None => {
            let said = shown(log);
            let said = if said.is_empty() { "it says nothing".to_owned() } else { said };
            (said, "`keyferry host setup` starts it; `keyferry host logs --allocator` shows all it said")
        }
    }
}

fn enclaves(facts: &Facts, found: &mut Vec<Finding>) {
    for enclave in &facts.enclaves {
        let name = enclave.enclave_name.as_deref().unwrap_or("without a name");
        let ours = if name.starts_with(NAME) { "; its project's next run ends it" } else { "" };
        found.push(note(
            format!(
                "enclave {} ({name}) holds {} processors and {} MiB",
                enclave.enclave_id, enclave.cpus, enclave.memory_mib
            ),
            format!(
                "if it is left over (E22, E27): `keyferry host ssh -- sudo nitro-cli terminate-enclave --enclave-id \
                 {}`{ours}",
                enclave.enclave_id
            ),
        ));
        if enclave.flags.as_deref() == Some("DEBUG_MODE") {
            found.push(note(
                format!("enclave {} runs in debug mode: its PCRs are zero", enclave.enclave_id),
                "a KMS answers \"Boot denied: OS image is not allowed\"; start it without --debug-mode",
            ));
        }
    }
}

fn proxy(facts: &Facts, found: &mut Vec<Finding>) {
    match (&facts.proxy_sha256, &facts.proxy_config) {
        (None, _) => found.push(problem("host-proxy is not installed", format!("{SETUP} installs it"))),
        (Some(_), Some(line)) if line != MARK => found.push(problem(
            "/etc/host-proxy.toml was not written by keyferry",
            "it is left alone: move it away if it is not needed, or use a host of its own",
        )),
        (Some(_), Some(_)) if facts.proxy_active != "active" => found.push(note(
            format!("host-proxy is {}", facts.proxy_active),
            "`keyferry get-keys --host` starts it; `keyferry host logs` shows what it said",
        )),
        (Some(_), _) => {}
    }
}

/// Tries from the host what its proxy will do: to resolve a name and to connect.
///
/// # Errors
///
/// When the host cannot be asked.
pub async fn try_target(host: &mut Host, name: &str, port: u16) -> Result<Option<Finding>, Error> {
    let target = quoted(name);
    let script = format!(
        "getent ahosts {target} >/dev/null || {{ echo name; exit 0; }}; \
         timeout 5 bash -c ': < \"/dev/tcp/$0/$1\"' {target} {port} 2>/dev/null && echo open || echo closed"
    );
    let answer = host.run(host.step("try the KMS from the host", script)).await?;
    Ok(match String::from_utf8_lossy(&answer).trim() {
        "open" => None,
        "name" => Some(problem(
            format!("the host cannot resolve {name}"),
            "its security group must let DNS out, and the name must be public",
        )),
        _ => Some(problem(
            format!("the host cannot connect to {name} port {port}"),
            "is the KMS up, does its firewall let the host in, and the host's security group this port out?",
        )),
    })
}

#[cfg(test)]
mod tests {
    use super::super::facts::tests::READY;
    use super::*;

    fn findings(change: impl FnOnce(&mut Facts)) -> Vec<String> {
        let mut facts = Facts::parse(READY).unwrap();
        facts.proxy_config = Some(MARK.to_owned());
        change(&mut facts);
        diagnose(&facts).into_iter().map(|finding| format!("{} -> {}", finding.what, finding.fix)).collect()
    }

    #[test]
    fn a_host_that_is_ready_has_no_findings() {
        assert_eq!(findings(|_| {}), [""; 0]);
    }

    /// Each row of the reference's list of host failures: one finding, which names it.
    #[test]
    fn each_known_failure_has_its_name_and_its_fix() {
        type Change = fn(&mut Facts);
        let table: &[(Change, &str, &str)] = &[
            (|it| it.nitro_cli = None, "nitro-cli: command not found", "setup` installs it"),
            (|it| it.device = false, "E19: the module nitro_enclaves is loaded, but", "EnclaveOptions"),
            (
                |it| (it.device, it.module_loaded) = (false, false),
                "E19: the module nitro_enclaves is not loaded",
                "loads it",
            ),
            (
                |it| {
                    (it.device, it.module_loaded, it.kernel) = (false, false, "6.1.1".into());
                },
                "Module nitro_enclaves not found: installed for kernel",
                "restart the host",
            ),
            (
                |it| (it.device, it.module_loaded, it.modules) = (false, false, vec![]),
                "Module nitro_enclaves not found: no installed kernel",
                "linux-modules-extra-aws",
            ),
            (|it| it.allocator = None, "allocator.yaml is missing", "writes it"),
            (
                |it| it.allocator = Some(super::super::Allocator::parse("memory_mib: 512\n")),
                "allocator.yaml: no line ---",
                "replaces it",
            ),
            (
                |it| {
                    it.allocator =
                        Some(super::super::Allocator::parse("---\nmemory_mib: 512\ncpu_count: 3\n"))
                },
                "3 processors are not whole cores of 2 threads",
                "a multiple of 2",
            ),
            (
                |it| {
                    it.allocator =
                        Some(super::super::Allocator::parse("---\nmemory_mib: 512\ncpu_count: 4\n"))
                },
                "4 processors, the host can give 2 of its 4",
                "larger instance type",
            ),
            (|it| it.pool = vec![], "E22: 0 processors are set aside", "was not restarted"),
            (
                |it| (it.hugepages_mib, it.free_hugepages_mib) = (128, 128),
                "E27: 128 MiB are in hugepages",
                "fragmented",
            ),
            (
                |it| {
                    it.allocator_active = "failed".into();
                    it.allocator_log = "x\nThe CPU pool file is missing. Please make sure".into();
                },
                "the allocator is failed: The CPU pool file is missing",
                "kernel module",
            ),
            (
                |it| {
                    it.allocator_active = "failed".into();
                    it.allocator_log =
                        "Could not re-online CPUs because there is at least one enclave currently \
                                        running. Please close all running enclaves"
                            .into();
                },
                "Could not re-online CPUs",
                "end the enclaves first",
            ),
            (
                |it| {
                    it.allocator_active = "failed".into();
                    it.allocator_log =
                        "Failed to configure entire amount of requested memory. This indicates".into();
                },
                "Failed to configure entire amount",
                "compacts it",
            ),
            (
                |it| {
                    it.allocator_active = "failed".into();
                    it.allocator_log = "Failed to find suitable CPUs in any NUMA node".into();
                },
                "Failed to find suitable CPUs",
                "NUMA",
            ),
            (|it| it.allocator_active = "inactive".into(), "the allocator is inactive", "starts it"),
            (|it| it.allocator_enabled = "disabled".into(), "does not start with the host", "enables it"),
            (|it| it.proxy_sha256 = None, "host-proxy is not installed", "installs it"),
            (|it| it.proxy_config = Some("[[egress]]".into()), "not written by keyferry", "move it away"),
            (|it| it.proxy_active = "failed".into(), "host-proxy is failed", "host logs"),
            (|it| it.disk_free_mib = 10, "10 MiB are free", "larger volume"),
        ];
        for (change, what, fix) in table {
            let found = findings(change);
            assert_eq!(found.len(), 1, "{what}: {found:?}");
            assert!(found[0].contains(what) && found[0].contains(fix), "{what}, {fix}: {found:?}");
        }
    }

    #[test]
    fn enclaves_that_were_left_are_listed_and_debug_mode_is_told() {
        let enclave = r#"{"EnclaveName":"keyferry-1","EnclaveID":"i-0-enc1","EnclaveCID":16,"NumberOfCPUs":2,
            "MemoryMiB":512,"State":"RUNNING","Flags":"DEBUG_MODE"}"#;
        let found = findings(|it| it.enclaves = vec![serde_json::from_str(enclave).unwrap()]);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(
            found[0].contains("terminate-enclave --enclave-id i-0-enc1`; its project's next run"),
            "{found:?}"
        );
        assert!(found[1].contains("OS image is not allowed"), "{found:?}");
    }
}
