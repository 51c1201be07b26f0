//! The application's ramdisk as nitro-cli makes it of a container image, so that its PCR2 can be rebuilt.
//!
//! nitro-cli creates a container, exports its file system and lets linuxkit pack that. Each of the three leaves its
//! marks in what is measured: docker puts mount points and generated files into every container and exports in the
//! order of a directory walk; linuxkit takes some of them out again, replaces others, and turns hard links into
//! symbolic ones; nitro-cli adds mount points, `/cmd` and `/env`. Modification times are those of the layers, so the
//! same registers come only out of the same layers, not out of the same Dockerfile.

use std::collections::HashMap;
use std::io::{self, Write};

use crate::cpio::{self, Entry, FileType, Writer};
use crate::error::Error;
use crate::recipe::Fill;
use crate::tree::{Content, Inode, Kind, Tree};

/// Where the application's files are in the ramdisk.
const PREFIX: &[u8] = b"rootfs/";

/// What docker makes in every container and linuxkit leaves in. What stands in the way is removed first, also on the
/// way there, unless it is a directory.
const MADE_DIRECTORIES: [&str; 4] = ["dev/pts", "dev/shm", "proc", "sys"];

/// What docker makes in every container, or a build leaves behind, and linuxkit leaves out, unless it is a directory.
const LEFT_OUT: [&str; 4] = [".dockerenv", "Dockerfile", "dev/console", "etc/hostname"];

/// Entries that always carry linuxkit's time.
const TOUCHED: [&str; 9] =
    ["dev", "dev/pts", "dev/shm", "etc", "etc/mtab", "etc/resolv.conf", "etc/hosts", "proc", "sys"];

/// linuxkit's `/etc/hosts`.
const HOSTS: &str = "127.0.0.1       localhost\n\
                     ::1     localhost ip6-localhost ip6-loopback\n\
                     fe00::0 ip6-localnet\n\
                     ff00::0 ip6-mcastprefix\n\
                     ff02::1 ip6-allnodes\n\
                     ff02::2 ip6-allrouters\n";
/// Where linuxkit lets `/etc/resolv.conf` point: to a file that the application may make.
const RESOLV_CONF: &str = "/run/resolvconf/resolv.conf";

/// nitro-cli's own directories behind the application, in its order.
const MOUNT_POINTS: [&str; 7] =
    ["rootfs", "rootfs/dev", "rootfs/run", "rootfs/sys", "rootfs/var", "rootfs/proc", "rootfs/tmp"];

/// The ramdisk for a container's files, `/cmd` and `/env`.
///
/// # Errors
/// When the files leave no room for what docker puts into every container.
pub(crate) fn app_ramdisk(mut tree: Tree, cmd: Vec<u8>, env: Vec<u8>) -> Result<Fill, Error> {
    create_container(&mut tree).map_err(|reason| Error::input("the image", reason))?;
    Ok(Box::new(move |output: &mut dyn Write| {
        let mut archive = Writer::new(output);
        archive.entry(&Entry::new("rootfs", FileType::Directory, 0o755), &mut io::empty())?;
        export(&tree, &mut archive)?;
        for name in MOUNT_POINTS {
            archive.entry(&Entry::new(name, FileType::Directory, 0o755), &mut io::empty())?;
        }
        for (name, content) in [("cmd", &cmd), ("env", &env)] {
            let mut entry = Entry::new(name, FileType::Regular, 0o644);
            entry.len = content.len() as u64;
            archive.entry(&entry, &mut content.as_slice())?;
        }
        archive.finish().map(drop)
    }))
}

/// What `docker create` and linuxkit together make of an image's files.
fn create_container(tree: &mut Tree) -> Result<(), String> {
    for path in MADE_DIRECTORIES {
        clear(tree, path);
        if tree.get(path.as_bytes()).is_none() {
            tree.insert(path.as_bytes(), Inode::new(Kind::Directory, 0o755))?;
        }
    }
    let link = |target: &str| Kind::Symlink(target.as_bytes().to_vec());
    let generated = [
        ("etc/hosts", Kind::File(Content::Bytes(HOSTS.as_bytes().to_vec())), 0o755),
        ("etc/mtab", link("/proc/mounts"), 0o777),
        ("etc/resolv.conf", link(RESOLV_CONF), 0o755),
    ];
    for (path, kind, mode) in generated {
        clear(tree, path);
        if tree.get(path.as_bytes()).is_none() {
            tree.insert(path.as_bytes(), Inode::new(kind, mode))?;
        }
    }
    for path in LEFT_OUT {
        clear(tree, path);
    }
    Ok(())
}

/// Removes what is no directory at `path` and above.
fn clear(tree: &mut Tree, path: &str) {
    let ends = path.bytes().enumerate().filter(|(_, byte)| *byte == b'/').map(|(at, _)| at);
    for end in ends.chain([path.len()]) {
        let part = &path.as_bytes()[..end];
        if tree.get(part).is_some_and(|inode| !matches!(inode.kind, Kind::Directory)) {
            tree.remove(part);
        }
    }
}

/// All files as linuxkit writes them.
fn export(tree: &Tree, archive: &mut Writer<impl Write>) -> Result<(), Error> {
    let mut first_names: HashMap<usize, &[u8]> = HashMap::new();
    for (path, file, inode) in tree.walk() {
        let mut entry = inode.entry([PREFIX, path].concat());
        entry.mtime =
            if TOUCHED.iter().any(|name| name.as_bytes() == path) { cpio::MTIME } else { inode.mtime };
        match &inode.kind {
            Kind::Directory => entry.name.push(b'/'),
            // Linux shows all links with this mode; docker's own come out of linuxkit with that of the file it replaced.
            Kind::Symlink(_) if path != b"etc/resolv.conf" => entry.mode = 0o777,
            _ => {}
        }
        let first = *first_names.entry(file).or_insert(path);
        let is_later_name = first != path && !matches!(inode.kind, Kind::Directory);
        if is_later_name {
            let target = relative(path, first);
            entry.kind = FileType::Symlink;
            entry.len = target.len() as u64;
            archive.entry(&entry, &mut target.as_slice())?;
            continue;
        }
        match &inode.kind {
            Kind::File(content) => archive.entry(&entry, &mut *tree.open(content)?)?,
            Kind::Symlink(target) => archive.entry(&entry, &mut target.as_slice())?,
            _ => archive.entry(&entry, &mut io::empty())?,
        };
    }
    Ok(())
}

/// The target of a symbolic link at `from` that leads to `to`, both from the root.
fn relative(from: &[u8], to: &[u8]) -> Vec<u8> {
    let from: Vec<&[u8]> = from.split(|byte| *byte == b'/').collect();
    let to: Vec<&[u8]> = to.split(|byte| *byte == b'/').collect();
    let folders = &from[..from.len() - 1];
    let shared = folders.iter().zip(&to[..to.len() - 1]).take_while(|(a, b)| a == b).count();
    let up = std::iter::repeat_n(&b".."[..], folders.len() - shared);
    up.chain(to[shared..].iter().copied()).collect::<Vec<_>>().join(&b'/')
}

#[cfg(test)]
mod tests {
    use super::relative;

    #[test]
    fn hard_links_become_relative() {
        for (from, to, target) in [
            ("bin/app2", "bin/app", "app"),
            ("usr/lib/h", "bin/app", "../../bin/app"),
            ("a", "b", "b"),
            ("a/b/c", "a/d/e", "../d/e"),
            ("a/b", "a/b2/c", "b2/c"),
        ] {
            assert_eq!(relative(from.as_bytes(), to.as_bytes()), target.as_bytes(), "{from} → {to}");
        }
    }
}
