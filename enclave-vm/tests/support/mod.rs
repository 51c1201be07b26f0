//! A guest to boot: a kernel from beside the checkout and a ramdisk that is made here.

use std::path::{Path, PathBuf};
use std::process::Command;

use enclave_vm::{MachineKind, Search, Tools};

/// The kernel, or why there is none.
pub(crate) fn kernel() -> Result<PathBuf, String> {
    let kernel = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/tools/enclave-vm/bzImage"));
    if kernel.is_file() { Ok(kernel.to_owned()) } else { Err(format!("{} is not there", kernel.display())) }
}

/// The programs, or why there are none.
pub(crate) fn tools(kind: MachineKind) -> Result<Tools, String> {
    let [cache, home, path] = ["XDG_CACHE_HOME", "HOME", "PATH"].map(std::env::var_os);
    let search = Search::in_environment(cache.as_deref(), home.as_deref(), path.as_deref());
    search.find(kind).map_err(|error| error.to_string())
}

/// A ramdisk whose /init is `init.rs`.
pub(crate) fn ramdisk(directory: &Path) -> Vec<u8> {
    let init = directory.join("init");
    let built = Command::new("rustc")
        .args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-C", "panic=abort"])
        .args(["-C", "strip=symbols", "-o"])
        .arg(&init)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../enclave-vm/tests/guest/init.rs"))
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let mut archive = Vec::new();
    entry(&mut archive, "dev", 0o040_755, (0, 0), &[]);
    // The kernel opens init's standard streams here before anything is mounted.
    entry(&mut archive, "dev/console", 0o020_600, (5, 1), &[]);
    entry(&mut archive, "init", 0o100_755, (0, 0), &std::fs::read(&init).unwrap());
    entry(&mut archive, "TRAILER!!!", 0, (0, 0), &[]);
    archive
}

/// One entry of a "newc" archive.
fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
    let size = u32::try_from(content.len()).unwrap();
    let name_size = u32::try_from(name.len() + 1).unwrap();
    let inode = u32::try_from(archive.len()).unwrap() + 1;
    let fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0];
    archive.extend(b"070701");
    archive.extend(fields.iter().flat_map(|field| format!("{field:08x}").into_bytes()));
    archive.extend(name.bytes().chain([0]));
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}
