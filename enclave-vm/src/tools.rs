//! Finding the programs and files that boot an enclave, and saying exactly what is missing.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::machine::MachineKind;
use crate::{Error, process};

/// QEMU's names for a virtio device that another process implements: since 10.2 it may be created by the user, under
/// the first name; the second is the same device in older builds that allow it.
const NSM_DEVICES: [&str; 2] = ["vhost-user-test-device", "vhost-user-device"];
/// The vsock device whose other side is vhost-device-vsock.
const VSOCK_DEVICE: &str = "vhost-user-vsock-device";
/// The firmware that both machines start with.
const FIRMWARE: &str = "qboot.rom";
/// Where distributions put it.
const FIRMWARE_DIRECTORIES: [&str; 4] =
    ["/usr/share/qemu", "/usr/share/seabios", "/usr/share/qemu-kvm", "/usr/local/share/qemu"];
/// How long a program may take to describe itself.
const DESCRIBE: Duration = Duration::from_secs(20);

/// Where to look. What is set explicitly is used or refused; nothing else is tried in its place.
#[derive(Clone, Debug, Default)]
pub struct Search {
    /// This QEMU.
    pub qemu: Option<PathBuf>,
    /// This vhost-device-vsock.
    pub vhost_device_vsock: Option<PathBuf>,
    /// A directory that has qboot.rom.
    pub firmware: Option<PathBuf>,
    /// What `scripts/enclave-vm-tools.sh` prepared; looked at before `path`.
    pub cache: Option<PathBuf>,
    /// Directories of programs, in their order.
    pub path: Vec<PathBuf>,
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Tools {
    pub(crate) qemu: PathBuf,
    pub(crate) firmware: PathBuf,
    pub(crate) vhost_device_vsock: PathBuf,
    /// QEMU's name for a device that we implement; empty for a machine that needs none.
    pub(crate) nsm_device: &'static str,
}

impl Search {
    /// Looks in the cache directory of the tools script and where programs usually are, as the environment says:
    /// `xdg_cache_home` and `home` lead to the cache, `path` is the list of program directories.
    #[must_use]
    pub fn in_environment(
        xdg_cache_home: Option<&OsStr>,
        home: Option<&OsStr>,
        path: Option<&OsStr>,
    ) -> Self {
        let caches = match (xdg_cache_home.filter(|it| !it.is_empty()), home) {
            (Some(cache), _) => Some(PathBuf::from(cache)),
            (None, Some(home)) => Some(Path::new(home).join(".cache")),
            (None, None) => None,
        };
        let mut path: Vec<_> = path.map(|it| std::env::split_paths(it).collect()).unwrap_or_default();
        // cargo install puts vhost-device-vsock here, whether or not that is in the path.
        path.extend(home.map(|home| Path::new(home).join(".cargo/bin")));
        path.push("/usr/libexec".into());
        Self { cache: caches.map(|it| it.join("keyferry/enclave-vm")), path, ..Self::default() }
    }

    /// Finds what a machine of this kind needs.
    ///
    /// # Errors
    ///
    /// [`Error::Tools`] with an entry for everything that is missing, not only for the first.
    pub fn find(&self, kind: MachineKind) -> Result<Tools, Error> {
        let mut missing = Vec::new();
        let mut note = |result: Result<_, String>| result.map_err(|reason| missing.push(reason)).ok();
        let qemu = note(self.find_qemu(kind));
        let firmware = note(self.find_firmware());
        let vsock = note(
            self.find_program("vhost-device-vsock", self.vhost_device_vsock.as_deref()).map(|it| (it, "")),
        );
        match (qemu, firmware, vsock) {
            (Some((qemu, nsm_device)), Some((firmware, _)), Some((vhost_device_vsock, _))) => {
                Ok(Tools { qemu, firmware, vhost_device_vsock, nsm_device })
            }
            _ => Err(Error::Tools { missing }),
        }
    }

    fn find_qemu(&self, kind: MachineKind) -> Result<(PathBuf, &'static str), String> {
        let candidates = match &self.qemu {
            Some(qemu) => vec![qemu.clone()],
            None => self.candidates(&["qemu-system-x86_64", "qemu-kvm"]),
        };
        let mut reasons = Vec::new();
        for qemu in candidates {
            match capability(&qemu, kind) {
                Ok(nsm_device) => return Ok((qemu, nsm_device)),
                Err(reason) => reasons.push(format!("{} {reason}", qemu.display())),
            }
        }
        if reasons.is_empty() {
            Err("qemu-system-x86_64 is not installed".to_owned())
        } else {
            Err(reasons.join(", "))
        }
    }

    fn find_firmware(&self) -> Result<(PathBuf, &'static str), String> {
        let directories: Vec<PathBuf> = match &self.firmware {
            Some(directory) => vec![directory.clone()],
            None => self.cache.iter().cloned().chain(FIRMWARE_DIRECTORIES.map(PathBuf::from)).collect(),
        };
        let found = directories.iter().find(|directory| directory.join(FIRMWARE).is_file());
        match found {
            Some(directory) => Ok((directory.clone(), "")),
            None => Err(format!("{FIRMWARE} is in none of {}", list(&directories))),
        }
    }

    fn find_program(&self, name: &str, explicit: Option<&Path>) -> Result<PathBuf, String> {
        match explicit {
            Some(path) if path.is_file() => Ok(path.to_owned()),
            Some(path) => Err(format!("{} is not a program", path.display())),
            None => {
                self.candidates(&[name]).into_iter().next().ok_or_else(|| format!("{name} is not installed"))
            }
        }
    }

    /// The files of these names, cache first.
    fn candidates(&self, names: &[&str]) -> Vec<PathBuf> {
        let cache = self.cache.iter().flat_map(|it| [it.clone(), it.join("bin")]);
        let directories: Vec<PathBuf> = cache.chain(self.path.iter().cloned()).collect();
        let mut found: Vec<PathBuf> = Vec::new();
        for file in
            names.iter().flat_map(|name| directories.iter().map(move |directory| directory.join(name)))
        {
            if file.is_file() && !found.contains(&file) {
                found.push(file);
            }
        }
        found
    }
}

/// QEMU's name for the device that our NSM implements, or what this QEMU lacks.
fn capability(qemu: &Path, kind: MachineKind) -> Result<&'static str, String> {
    let ask = |arguments: &[&str]| {
        process::output(qemu, arguments, DESCRIBE).map_err(|error| {
            let source = std::error::Error::source(&error).map(|it| format!(": {it}")).unwrap_or_default();
            format!("cannot be asked what it can do ({error}{source})")
        })
    };
    let machines = ask(&["-machine", "help"])?;
    let devices = ask(&["-device", "help"])?;
    let version = ask(&["-version"])?;
    let version = version.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    find_capability(&machines, &devices, kind)
        .map_err(|lacks| format!("(version {}) has no {lacks}", version.unwrap_or("unknown")))
}

/// As [`capability`], from what QEMU lists. It lists only devices that a user may create.
fn find_capability(machines: &str, devices: &str, kind: MachineKind) -> Result<&'static str, String> {
    let machine = kind.to_string();
    if !machines.lines().any(|line| line.split_whitespace().next() == Some(machine.as_str())) {
        return Err(format!("machine {machine}"));
    }
    let device = |name: &str| devices.contains(&format!("name \"{name}\""));
    match kind {
        MachineKind::NitroEnclave => Ok(""),
        MachineKind::Microvm if !device(VSOCK_DEVICE) => Err(format!("device {VSOCK_DEVICE}")),
        MachineKind::Microvm => NSM_DEVICES
            .into_iter()
            .find(|name| device(name))
            .ok_or_else(|| format!("device {} that a user may create", NSM_DEVICES.join(" or "))),
    }
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINES: &str =
        "Supported machines are:\nmicrovm              microvm (i386)\nnone                 empty\n";
    const VSOCK: &str = "name \"vhost-user-vsock-device\", bus virtio-bus\n";

    #[test]
    fn the_newer_name_of_the_device_is_preferred() {
        let both = format!(
            "{VSOCK}name \"vhost-user-device\", bus virtio-bus\nname \"vhost-user-test-device\", bus v\n"
        );
        assert_eq!(find_capability(MACHINES, &both, MachineKind::Microvm).unwrap(), "vhost-user-test-device");
        let older = format!("{VSOCK}name \"vhost-user-device\", bus virtio-bus\n");
        assert_eq!(find_capability(MACHINES, &older, MachineKind::Microvm).unwrap(), "vhost-user-device");
    }

    #[test]
    fn what_a_qemu_lacks_is_named() {
        let lacks = |devices, kind| find_capability(MACHINES, devices, kind).unwrap_err();
        assert_eq!(lacks("", MachineKind::Microvm), "device vhost-user-vsock-device");
        // The PCI variant of another device does not count.
        let pci = format!("{VSOCK}name \"vhost-user-device-pci\", bus PCI\n");
        assert_eq!(
            lacks(&pci, MachineKind::Microvm),
            "device vhost-user-test-device or vhost-user-device that a user may create"
        );
        assert_eq!(lacks(VSOCK, MachineKind::NitroEnclave), "machine nitro-enclave");
    }

    #[test]
    fn everything_that_is_missing_is_told_at_once() {
        let empty = tempfile::tempdir().unwrap();
        let search = Search {
            firmware: Some(empty.path().to_owned()),
            path: vec![empty.path().to_owned()],
            ..Search::default()
        };
        let Err(Error::Tools { missing }) = search.find(MachineKind::Microvm) else { panic!("found") };
        assert_eq!(missing[0], "qemu-system-x86_64 is not installed");
        assert_eq!(missing[1], format!("qboot.rom is in none of {}", empty.path().display()));
        assert_eq!(missing[2], "vhost-device-vsock is not installed");
    }

    #[test]
    fn an_explicit_program_that_is_none_is_refused_although_others_exist() {
        let search =
            Search { qemu: Some("/nowhere/qemu".into()), path: vec!["/usr/bin".into()], ..Search::default() };
        let Err(Error::Tools { missing }) = search.find(MachineKind::Microvm) else { panic!("found") };
        assert!(missing[0].starts_with("/nowhere/qemu cannot be asked what it can do"), "{}", missing[0]);
    }

    #[test]
    fn the_cache_comes_from_the_environment() {
        let cache = |cache: Option<&str>, home: Option<&str>| {
            Search::in_environment(cache.map(OsStr::new), home.map(OsStr::new), None).cache
        };
        assert_eq!(cache(Some("/c"), Some("/h")).unwrap(), Path::new("/c/keyferry/enclave-vm"));
        assert_eq!(cache(Some(""), Some("/h")).unwrap(), Path::new("/h/.cache/keyferry/enclave-vm"));
        assert_eq!(cache(None, None), None);
    }
}
