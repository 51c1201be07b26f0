//! The disks, seen by the programs that guests and operators have: blkid, fsck.fat, sgdisk.

#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test may stop at once, and says what it skipped"
)]

use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use cloud_provisioners::disk::{configuration_volume, data_disk};

/// What a program prints about `disk`, or `None` (said on stderr) where the program is not installed.
fn seen_by(program: &str, arguments: &[&str], disk: &Path) -> Option<String> {
    let output = match Command::new(program).args(arguments).arg(disk).output() {
        Ok(output) => output,
        Err(error) => {
            eprintln!("skipped: {program}: {error}");
            return None;
        }
    };
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    Some(text)
}

fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

#[test]
fn the_configuration_volume_is_a_clean_labelled_file_system() {
    let files: [(&str, &[u8]); 2] = [("app-compose.json", b"{}"), (".sys-config.json", b"{\"a\": 1}")];
    let volume = file(&configuration_volume(files.into_iter()).unwrap());
    if let Some(seen) = seen_by("/sbin/blkid", &["-p"], volume.path()) {
        assert!(seen.contains(r#"LABEL="DSTACKSHR""#) && seen.contains(r#"TYPE="vfat""#), "{seen}");
        assert!(seen.contains(r#"VERSION="FAT32""#), "{seen}");
    }
    if let Some(seen) = seen_by("/sbin/fsck.fat", &["-n", "-v"], volume.path()) {
        // The label is an entry of the root directory and counted as one.
        assert!(seen.contains(" 3 files, "), "{seen}");
    }
    if let Some(seen) = seen_by("mtype", &["::.sys-config.json", "-i"], volume.path()) {
        assert_eq!(seen, "{\"a\": 1}");
    }
}

#[test]
fn the_data_disk_has_one_partition_that_sgdisk_finds_nothing_wrong_with() {
    let disk = file(&data_disk([0x11; 16], [0x22; 16]).unwrap());
    if let Some(seen) = seen_by("/sbin/sgdisk", &["-v"], disk.path()) {
        assert!(seen.contains("No problems found"), "{seen}");
    }
    if let Some(seen) = seen_by("/sbin/sgdisk", &["-i", "1"], disk.path()) {
        assert!(seen.contains("0FC63DAF-8483-4772-8E79-3D69D8477DE4"), "{seen}");
        assert!(seen.contains("First sector: 2048") && seen.contains("Last sector: 20446"), "{seen}");
        assert!(seen.contains("Partition name: 'dstack-data'"), "{seen}");
    }
}
