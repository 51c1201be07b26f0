//! The file systems that programs expect, in the app's root.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

use super::console::say;
use super::error::InitError;

/// Whether an enclave can do without.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Need {
    Must,
    /// Kernels made small leave these out, and most apps do not notice.
    May,
}

struct Mount {
    kind: &'static str,
    at: &'static str,
    flags: MountFlags,
    options: Option<&'static std::ffi::CStr>,
    need: Need,
}

const DATA: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);
const PLAIN: MountFlags = DATA.union(MountFlags::NOEXEC);

/// In this order: some lie in others.
const MOUNTS: [Mount; 8] = [
    Mount { kind: "proc", at: "/proc", flags: PLAIN, options: None, need: Need::Must },
    Mount { kind: "sysfs", at: "/sys", flags: PLAIN, options: None, need: Need::Must },
    Mount {
        kind: "devtmpfs",
        at: "/dev",
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        options: Some(c"mode=0755"),
        need: Need::Must,
    },
    Mount {
        kind: "devpts",
        at: "/dev/pts",
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        options: Some(c"mode=0620,gid=5,ptmxmode=0666"),
        need: Need::May,
    },
    Mount { kind: "tmpfs", at: "/dev/shm", flags: PLAIN, options: Some(c"mode=1777"), need: Need::May },
    Mount { kind: "tmpfs", at: "/run", flags: DATA, options: Some(c"mode=0755"), need: Need::Must },
    Mount { kind: "tmpfs", at: "/tmp", flags: DATA, options: Some(c"mode=1777"), need: Need::Must },
    Mount { kind: "cgroup2", at: "/sys/fs/cgroup", flags: PLAIN, options: None, need: Need::May },
];

/// Links in /dev that programs take for granted and devtmpfs does not have.
const LINKS: [(&str, &str); 4] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
];

/// Makes `root` the root of this process and mounts everything there. A link in the image, such as a `/tmp` that leads
/// elsewhere, then leads to a place in the image.
pub(super) fn enter(root: &Path) -> Result<(), InitError> {
    let failed = |source| InitError::Root { path: root.to_owned(), source };
    rustix::process::chroot(root).map_err(|errno| failed(errno.into()))?;
    std::env::set_current_dir("/").map_err(failed)?;
    for mount in &MOUNTS {
        match attach(mount) {
            Ok(()) => {}
            Err(source) if mount.need == Need::May => {
                say(&format!("no {} on {}: {source}", mount.kind, mount.at));
            }
            Err(source) => return Err(InitError::Mount { kind: mount.kind, at: mount.at, source }),
        }
    }
    for (link, target) in LINKS {
        ensure_link(link, target)?;
    }
    // Sockets of old and new programs are in one place, whichever name they use.
    ensure_directory("/var").map_err(|source| InitError::Mount { kind: "directory", at: "/var", source })?;
    ensure_link("/var/run", "/run")
}

fn attach(wanted: &Mount) -> io::Result<()> {
    ensure_directory(wanted.at)?;
    match mount(wanted.kind, wanted.at, wanted.kind, wanted.flags, wanted.options) {
        // The kernel mounts /dev by itself where it is told to.
        Err(Errno::BUSY) => Ok(()),
        result => result.map_err(io::Error::from),
    }
}

fn ensure_directory(path: &str) -> io::Result<()> {
    match fs::create_dir(path) {
        Ok(()) => fs::set_permissions(path, fs::Permissions::from_mode(0o755)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

/// A name that the image has already stays as it is.
fn ensure_link(link: &'static str, target: &str) -> Result<(), InitError> {
    match std::os::unix::fs::symlink(target, link) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(InitError::Mount { kind: "link", at: link, source: error })
        }
        _there => Ok(()),
    }
}
