//! The ramdisks of an image: what boots, and what it runs.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use crate::cpio::{Entry, FileType, Writer};
use crate::error::{Error, IoContext};
use crate::recipe::Fill;
use crate::tree::{Content, Inode, Kind, Tree};

/// What the kernel starts, and where it expects the application.
#[derive(Debug, Clone)]
pub enum Init {
    /// AWS's `init`: reads `/cmd` and `/env`, changes its root to `/rootfs`.
    Aws {
        /// The `init` blob.
        init: PathBuf,
        /// The `nsm.ko` blob, for kernels without the driver.
        nsm_ko: Option<PathBuf>,
    },
    /// Keyferry's agent: reads `/etc/keyferry`, changes its root to `/rootfs`.
    Agent {
        /// A static `enclave-agent`.
        binary: PathBuf,
        /// The NSM driver, for kernels without one.
        nsm_ko: Option<PathBuf>,
        /// The measured configuration, `/etc/keyferry/agent.toml`.
        config: String,
    },
    /// The application itself: the tree is the root and has an `/init`.
    Application,
}

/// What the application is started with.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Process {
    /// Program and arguments: ENTRYPOINT followed by CMD.
    pub args: Vec<String>,
    /// `NAME=value` pairs.
    pub env: Vec<String>,
    /// Working directory.
    pub cwd: String,
    /// Numeric user.
    pub uid: u32,
    /// Numeric group.
    pub gid: u32,
}

/// Directories that an init mounts over; they have to exist in the application's root.
const MOUNT_POINTS: [&str; 5] = ["dev", "proc", "run", "sys", "tmp"];

impl Init {
    /// The first ramdisk, measured into PCR1. The same for every application.
    pub fn boot_ramdisk(&self) -> Option<Fill> {
        // The order of AWS's tool chain, so that its PCR1 can be reproduced.
        let files: Vec<(&'static str, PathBuf)> = match self {
            Self::Aws { init, nsm_ko } | Self::Agent { binary: init, nsm_ko, .. } => [("init", init)]
                .into_iter()
                .chain(nsm_ko.iter().map(|path| ("nsm.ko", path)))
                .map(|(name, path)| (name, path.clone()))
                .collect(),
            Self::Application => return None,
        };
        Some(Box::new(move |output: &mut dyn Write| {
            let mut archive = Writer::new(output);
            archive.entry(&Entry::new("dev", FileType::Directory, 0o755), &mut io::empty())?;
            for (name, path) in &files {
                add_file(&mut archive, name, path)?;
            }
            archive.finish().map(drop)
        }))
    }

    /// The ramdisk with the application, measured into PCR2 (into PCR1 where it is the only one).
    ///
    /// # Errors
    /// When the process cannot be expressed to this init, or the tree lacks what it needs.
    pub fn app_ramdisk(&self, mut tree: Tree, process: &Process) -> Result<Fill, Error> {
        match self {
            Self::Application => {
                if tree.resolve(b"init").is_none() {
                    return Err(Error::input(
                        "the application",
                        "has no /init, which is what the kernel starts",
                    ));
                }
                ensure_directory(&mut tree, "dev")?;
                Ok(Box::new(move |output: &mut dyn Write| {
                    let mut archive = Writer::new(output);
                    tree.write_to(&mut archive, "")?;
                    archive.finish().map(drop)
                }))
            }
            Self::Aws { .. } => {
                let command = aws_command(&tree, process)?;
                for name in MOUNT_POINTS {
                    ensure_directory(&mut tree, name)?;
                }
                let files = vec![("cmd", lines(&command)?), ("env", lines(&process.env)?)];
                Ok(rootfs_archive(tree, Vec::new(), files))
            }
            Self::Agent { config, .. } => {
                for name in MOUNT_POINTS {
                    ensure_directory(&mut tree, name)?;
                }
                let mut json = serde_json::to_vec_pretty(process).unwrap_or_default();
                json.push(b'\n');
                let files = vec![
                    ("etc/keyferry/agent.toml", config.clone().into_bytes()),
                    ("etc/keyferry/process.json", json),
                ];
                Ok(rootfs_archive(tree, vec!["etc", "etc/keyferry"], files))
            }
        }
    }
}

/// Directories, files and the tree below `rootfs/`, in this order.
fn rootfs_archive(tree: Tree, directories: Vec<&'static str>, files: Vec<(&'static str, Vec<u8>)>) -> Fill {
    let tree = Arc::new(tree);
    Box::new(move |output: &mut dyn Write| {
        let mut archive = Writer::new(output);
        for name in &directories {
            archive.entry(&Entry::new(*name, FileType::Directory, 0o755), &mut io::empty())?;
        }
        for (name, content) in &files {
            let mut entry = Entry::new(*name, FileType::Regular, 0o644);
            entry.len = content.len() as u64;
            archive.entry(&entry, &mut content.as_slice())?;
        }
        archive.entry(&Entry::new("rootfs", FileType::Directory, 0o755), &mut io::empty())?;
        tree.write_to(&mut archive, "rootfs/")?;
        archive.finish().map(drop)
    })
}

fn add_file(archive: &mut Writer<impl Write>, name: &str, path: &Path) -> Result<(), Error> {
    let mut file = File::open(path).context("open", path)?;
    let mut entry = Entry::new(name, FileType::Regular, 0o755);
    entry.len = file.metadata().context("read", path)?.len();
    archive.entry(&entry, &mut file).map(drop)
}

/// A mount point may be a link in the image (`/tmp -> private/tmp`): then its target is used as it is.
fn ensure_directory(tree: &mut Tree, name: &str) -> Result<(), Error> {
    if tree.get(name.as_bytes()).is_some() {
        return Ok(());
    }
    tree.insert(name.as_bytes(), Inode::new(Kind::Directory, 0o755))
        .map_err(|reason| Error::input(name, reason))
}

/// One item per line. There is no way to write an item with a newline in it.
pub(crate) fn lines(items: &[String]) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    for item in items {
        if item.contains('\n') {
            return Err(Error::input(
                format!("{item:?}"),
                "has a newline, which AWS's init cannot read back (it takes one item per line)",
            ));
        }
        bytes.extend_from_slice(item.as_bytes());
        bytes.push(b'\n');
    }
    Ok(bytes)
}

/// AWS's init knows neither working directory nor user: the directory is entered by the image's shell, another
/// user than root is refused.
fn aws_command(tree: &Tree, process: &Process) -> Result<Vec<String>, Error> {
    if process.args.is_empty() {
        return Err(Error::input("the image", "has neither ENTRYPOINT nor CMD; give a command after `--`"));
    }
    if (process.uid, process.gid) != (0, 0) {
        return Err(Error::input(
            format!("user {}:{}", process.uid, process.gid),
            "AWS's init starts everything as root; use --init agent, or --user 0 to accept that",
        ));
    }
    if matches!(process.cwd.as_str(), "" | "/") {
        return Ok(process.args.clone());
    }
    if tree.resolve(b"bin/sh").is_none() {
        return Err(Error::input(
            format!("working directory {}", process.cwd),
            "AWS's init starts everything in /, and the image has no /bin/sh to change it; use --init agent, or \
             --workdir / to accept that",
        ));
    }
    let shell = ["/bin/sh", "-c", "cd \"$0\" && exec \"$@\"", &process.cwd];
    Ok(shell.into_iter().map(str::to_owned).chain(process.args.iter().cloned()).collect())
}

/// Finds the numbers for a container image's USER: `user`, `user:group`, each a name or a number.
///
/// # Errors
/// When a name is not in the image's `/etc/passwd` or `/etc/group`.
pub fn resolve_user(tree: &Tree, user: &str) -> Result<(u32, u32), Error> {
    if user.is_empty() {
        return Ok((0, 0));
    }
    let (name, group) = user.split_once(':').map_or((user, None), |(name, group)| (name, Some(group)));
    let passwd = small_file(tree, "etc/passwd")?;
    // name:password:uid:gid:…
    let account = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| {
        fields.len() > 3 && (fields[0] == name || (name.parse::<u32>().is_ok() && fields[2] == name))
    });
    let unknown = |what: &str, file: &str| {
        Error::input(format!("user {user}"), format!("{what:?} is not in the image's {file}"))
    };
    let uid = match (name.parse(), &account) {
        (Ok(uid), _) => uid,
        (Err(_), Some(fields)) => fields[2].parse().map_err(|_| unknown(name, "/etc/passwd"))?,
        (Err(_), None) => return Err(unknown(name, "/etc/passwd")),
    };
    let gid = match group {
        None => account.and_then(|fields| fields[3].parse().ok()).unwrap_or(0),
        Some(group) => match group.parse() {
            Ok(gid) => gid,
            Err(_) => small_file(tree, "etc/group")?
                .lines()
                .map(|line| line.split(':').collect::<Vec<_>>())
                .find(|fields| fields.len() > 2 && fields[0] == group)
                .and_then(|fields| fields[2].parse().ok())
                .ok_or_else(|| unknown(group, "/etc/group"))?,
        },
    };
    Ok((uid, gid))
}

/// A text file of the image, empty when there is none. Account files are small; a huge one is cut off.
fn small_file(tree: &Tree, path: &str) -> Result<String, Error> {
    const MAX: u64 = 1 << 20;
    let Some(path) = tree.resolve(path.as_bytes()) else { return Ok(String::new()) };
    let Some(Inode { kind: Kind::File(content), .. }) = tree.get(&path) else { return Ok(String::new()) };
    let mut bytes = Vec::new();
    let content: &Content = content;
    io::Read::read_to_end(&mut io::Read::take(tree.open(content)?, MAX), &mut bytes)
        .context("read", "the image's account files")?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
