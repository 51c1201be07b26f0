//! The machine itself: processor, firmware, kernel, SGX, QEMU, memory and disk.

use std::io;
use std::time::Duration;

use tokio::time::timeout;

use super::host::Host;
use super::{Finding, Intended};

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// QEMU tells its version within this time, or not at all.
const VERSION: Duration = Duration::from_secs(10);
/// The first QEMU of the TDX stack that boots these guests.
const LEAST_QEMU: (u32, u32) = (8, 2);
/// Canonical's first kernel with the TDX host, by its ABI number in the 6.8 line.
const LEAST_CANONICAL: u32 = 1028;
/// GB that hold an unpacked guest image and what a first start writes.
const LEAST_DISK: u64 = 3;
const FIRMWARE: &str = "in the firmware's setup: TME-MT, TDX, the SEAM loader, SGX and Auto MP Registration on, \"Limit CPU \
                        physical address to 46 bits\" off; then switch the machine off and on again, a warm restart does not do";

pub(super) async fn examine(host: &Host, intended: &Intended) -> Vec<Finding> {
    let mut findings = vec![cpu(host), kernel(host)];
    findings.extend(kernel_log(host));
    findings.extend([kvm(host), sgx(host), vsock(host), qemu(host).await, memory(host, intended)]);
    findings.push(disk(host, intended));
    findings
}

fn cpu(host: &Host) -> Finding {
    let text = host.text("/proc/cpuinfo").unwrap_or_default();
    let flags = text.lines().find_map(|line| line.strip_prefix("flags"));
    let flags: Vec<&str> = flags.unwrap_or_default().split_whitespace().collect();
    let missing: Vec<&str> =
        ["tdx_host_platform", "sgx", "sgx_lc"].into_iter().filter(|flag| !flags.contains(flag)).collect();
    match missing.as_slice() {
        [] => Finding::pass("cpu", "tdx_host_platform, sgx and sgx_lc are there"),
        missing => Finding::fail(
            "cpu",
            format!("the processor does not show {}", missing.join(", ")),
            "it has no TDX or SGX, or the firmware keeps them switched off",
            FIRMWARE,
        ),
    }
}

fn kernel(host: &Host) -> Finding {
    let release = host.text("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    let numbers: Vec<u32> = release.split(['.', '-']).map_while(|it| it.parse().ok()).collect();
    let capable = match (numbers.as_slice(), release.contains("-intel")) {
        ([6, 8, _, abi, ..], true) => *abi >= LEAST_CANONICAL,
        ([major, minor, ..], canonical) => (*major, *minor) >= if canonical { (6, 8) } else { (6, 16) },
        _ => false,
    };
    match capable {
        true => Finding::pass("kernel", release),
        false => Finding::warn(
            "kernel",
            format!("{}: not known to host TDX", if release.is_empty() { "no release" } else { release }),
            "the TDX host is in Canonical's intel kernels since 6.8.0-1028 and in Linux since 6.16",
            "install the kernel of the TDX stack; the check tdx-module says whether this one has it",
        ),
    }
}

fn kernel_log(host: &Host) -> Vec<Finding> {
    let log = match host.kernel_log() {
        Ok(log) => log,
        Err(error) => {
            let why = match error.kind() {
                io::ErrorKind::PermissionDenied => "only root can read the kernel's log".to_owned(),
                _ => format!("the kernel's log: {error}"),
            };
            return vec![Finding::skipped("tme", why.clone()), Finding::skipped("tdx-module", why)];
        }
    };
    let has = |text: &str| log.contains(text);
    let tme = match (has("x86/tme: enabled by BIOS"), has("x86/mktme: enabled by BIOS")) {
        (true, true) => Finding::pass("tme", "memory encryption with several keys is on"),
        _ if has("x86/tme: not enabled by BIOS") => Finding::fail(
            "tme",
            "x86/tme: not enabled by BIOS",
            "memory encryption is off, and TDX is built on it; where the setup shows it greyed out, the physical address \
             is limited to 46 bits",
            FIRMWARE,
        ),
        _ => Finding::warn(
            "tme",
            "the kernel's log does not say that memory encryption is on",
            "the beginning of the log may be gone, or the firmware keeps it off",
            "look at the log right after a start, or at what the checks kvm and tdx-module say",
        ),
    };
    let module = match (has("virt/tdx: module initialized"), has("virt/tdx: BIOS enabled")) {
        (true, _) => Finding::pass("tdx-module", "initialised"),
        (false, true) => Finding::fail(
            "tdx-module",
            "the firmware has TDX on, the module did not start",
            "the SEAM loader or the module is missing or too old, or the memory is not populated alike in every channel",
            "update the firmware; populate at least two channels of each socket with identical modules",
        ),
        (false, false) => Finding::fail(
            "tdx-module",
            "the kernel's log has no word of virt/tdx",
            "TDX is off in the firmware, or the kernel has no TDX host",
            FIRMWARE,
        ),
    };
    vec![tme, module]
}

fn kvm(host: &Host) -> Finding {
    let path = "/sys/module/kvm_intel/parameters/tdx";
    match host.text(path).as_deref().map(str::trim) {
        Ok("Y" | "1") if host.writable("/dev/kvm") => Finding::pass("kvm", "TDX is on, /dev/kvm can be used"),
        Ok("Y" | "1") => Finding::fail(
            "kvm",
            "/dev/kvm cannot be written to",
            "this user may not start machines",
            "add the user of the VMM to the group kvm, or load the module kvm_intel",
        ),
        Ok(other) => Finding::fail(
            "kvm",
            format!("{path} is {other}, expected Y"),
            "the module was loaded without tdx=1, or the firmware keeps TDX off",
            "set kvm_intel.tdx=1 on the kernel's command line; then see the check tdx-module",
        ),
        Err(error) => Finding::fail(
            "kvm",
            format!("{path}: {error}"),
            "kvm_intel is not loaded, or this kernel's KVM has no TDX",
            "install and start the kernel of the TDX stack",
        ),
    }
}

fn sgx(host: &Host) -> Finding {
    let missing: Vec<&str> =
        ["/dev/sgx_enclave", "/dev/sgx_provision"].into_iter().filter(|it| !host.exists(it)).collect();
    match missing.as_slice() {
        [] => Finding::pass("sgx", "/dev/sgx_enclave and /dev/sgx_provision are there"),
        missing => Finding::fail(
            "sgx",
            format!("{} missing", missing.join(" and ")),
            "SGX is off in the firmware, or the machine was restarted warm after it was switched on; the key provider and \
             the quoting service run in SGX",
            FIRMWARE,
        ),
    }
}

fn vsock(host: &Host) -> Finding {
    match host.exists("/dev/vhost-vsock") {
        true => Finding::pass("vsock", "/dev/vhost-vsock is there"),
        false => Finding::fail(
            "vsock",
            "/dev/vhost-vsock is missing",
            "the module is not loaded; in a machine of a cloud it never is, and a VMM does not run in one",
            "modprobe vhost_vsock, on a machine of your own",
        ),
    }
}

async fn qemu(host: &Host) -> Finding {
    let asked = timeout(VERSION, host.output(QEMU, &["--version"])).await;
    let remedy = "install QEMU from the TDX stack, 8.2.2+tdx or newer";
    let version = match asked {
        Ok(Ok(text)) => text.lines().next().unwrap_or_default().to_owned(),
        Ok(Err(error)) => {
            return Finding::fail("qemu", format!("{QEMU}: {error}"), "it is not installed there", remedy);
        }
        Err(_) => {
            return Finding::fail("qemu", format!("{QEMU} hangs"), "it does not tell its version", remedy);
        }
    };
    let numbers = version.split_once("version ").map_or("", |(_, it)| it).split('.');
    let mut numbers = numbers.map_while(|it| it.parse::<u32>().ok());
    let number = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    match number >= LEAST_QEMU {
        true => Finding::pass("qemu", version),
        false => Finding::fail("qemu", version, "too old for TDX guests", remedy),
    }
}

fn memory(host: &Host, intended: &Intended) -> Finding {
    let text = host.text("/proc/meminfo").unwrap_or_default();
    let available = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let available =
        available.and_then(|it| it.split_whitespace().next()).and_then(|it| it.parse::<u64>().ok());
    match available.map(|kib| kib >> 10) {
        None => Finding::skipped("memory", "/proc/meminfo does not say what is available"),
        Some(mib) if mib >= intended.memory => {
            Finding::pass("memory", format!("{mib} MiB are available, {} are wanted", intended.memory))
        }
        Some(mib) => Finding::fail(
            "memory",
            format!("{mib} MiB are available, {} are wanted", intended.memory),
            "a confidential machine holds all of its memory from the start",
            "stop other machines, or give the KMS less: 2048 MiB do for a start",
        ),
    }
}

fn disk(host: &Host, intended: &Intended) -> Finding {
    match rustix::fs::statvfs(host.path("/")) {
        Err(error) => Finding::skipped("disk", error.to_string()),
        Ok(space) => room(space.f_bavail.saturating_mul(space.f_frsize) / 1_000_000_000, intended.disk),
    }
}

/// The machine's disk is a file that grows: with less room it starts all the same.
fn room(free: u64, wanted: u64) -> Finding {
    let finding = format!("{free} GB are free, {wanted} are wanted");
    let cause = "the machine's disk grows up to its size while it runs";
    let remedy = "make room, or give the KMS less with --disk";
    match free {
        _ if free >= wanted => Finding::pass("disk", finding),
        LEAST_DISK.. => Finding::warn("disk", finding, cause, remedy),
        _ => Finding::fail("disk", finding, cause, remedy),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    #[test]
    fn a_disk_that_fills_up_later_is_no_reason_not_to_start() {
        let status = |free, wanted| room(free, wanted).status;
        assert_eq!([status(20, 20), status(1, 1)], [Status::Pass; 2]);
        assert_eq!([status(19, 20), status(3, 20)], [Status::Warn; 2]);
        assert_eq!(status(2, 20), Status::Fail);
        let full = room(2, 20);
        assert_eq!(full.finding, "2 GB are free, 20 are wanted");
        assert!(full.remedy.unwrap().contains("--disk"));
    }
}
