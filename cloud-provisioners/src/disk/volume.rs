//! The configuration volume: a FAT file system without a partition table, found by its label.

use std::io::{Cursor, Write as _};

use fatfs::{FatType, FileSystem, FormatVolumeOptions, FsOptions, format_volume};
use zeroize::Zeroizing;

use crate::Error;

/// Label by which the guest finds the volume, padded as FAT stores it.
const LABEL: [u8; 11] = *b"DSTACKSHR  ";
/// One fixed serial number: the same files give the same bytes.
const VOLUME_ID: u32 = 0x4453_5441;
/// The smallest size with enough clusters (65,525) to be FAT32 at 512 bytes each. dstack-cloud asks for FAT32 in 8 MiB,
/// which is below that minimum and unreadable for some versions of mtools.
const SMALLEST: usize = 34 << 20;
/// Room for the file system's own structures and the files' last clusters.
const SPARE: usize = 4 << 20;

/// Builds the volume with `files` in its root directory. The result is wiped when dropped: the files may hold secrets.
///
/// # Errors
///
/// [`Error::Disk`] when a name cannot be stored or the files do not fit.
pub fn configuration_volume<'a>(
    files: impl Iterator<Item = (&'a str, &'a [u8])> + Clone,
) -> Result<Zeroizing<Vec<u8>>, Error> {
    let failed = |source| Error::Disk { disk: "configuration volume", source };
    let total: usize = files.clone().map(|(_, bytes)| bytes.len()).sum();
    let size = SMALLEST.max((total + SPARE).next_multiple_of(1 << 20));
    let mut volume = Zeroizing::new(vec![0; size]);
    let options = FormatVolumeOptions::new()
        .fat_type(FatType::Fat32)
        .bytes_per_cluster(512)
        .volume_label(LABEL)
        .volume_id(VOLUME_ID);
    format_volume(Cursor::new(volume.as_mut_slice()), options).map_err(failed)?;
    let file_system =
        FileSystem::new(Cursor::new(volume.as_mut_slice()), FsOptions::new()).map_err(failed)?;
    for (name, bytes) in files {
        let mut file = file_system.root_dir().create_file(name).map_err(failed)?;
        file.write_all(bytes).map_err(failed)?;
        file.flush().map_err(failed)?;
    }
    file_system.unmount().map_err(failed)?;
    Ok(volume)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn read(volume: &mut [u8], name: &str) -> Vec<u8> {
        let file_system = FileSystem::new(Cursor::new(volume), FsOptions::new()).unwrap();
        let mut bytes = Vec::new();
        file_system.root_dir().open_file(name).unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn files_are_found_by_their_long_names_in_a_true_fat32() {
        let big = vec![7; 40 << 20];
        let files: [(&str, &[u8]); 3] =
            [("app-compose.json", b"{}"), (".sys-config.json", b"s"), (".user-config", &big)];
        let mut volume = configuration_volume(files.into_iter()).unwrap();
        assert_eq!(volume.len(), 45 << 20);
        for (name, bytes) in files {
            assert!(read(&mut volume, name) == bytes, "{name}");
        }
        let file_system = FileSystem::new(Cursor::new(volume.as_mut_slice()), FsOptions::new()).unwrap();
        assert_eq!(file_system.fat_type(), FatType::Fat32);
        assert_eq!(file_system.volume_label(), "DSTACKSHR");
    }

    #[test]
    fn the_same_files_give_the_same_bytes() {
        let files = [("app-compose.json", b"{}".as_slice())];
        let first = configuration_volume(files.into_iter()).unwrap();
        assert!(*first == *configuration_volume(files.into_iter()).unwrap());
    }
}
