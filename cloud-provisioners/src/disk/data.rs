//! The template of the data disk: an empty GPT partition that the guest finds by its label, grows and encrypts.

use std::io::Cursor;

use gptman::{GPT, GPTPartitionEntry};

use crate::Error;

const SECTOR: u64 = 512;
const SIZE: usize = 10 << 20;
/// Where the partition begins, the alignment every tool uses.
const FIRST: u64 = 2048;
/// The partition type "Linux file system", 0FC63DAF-8483-4772-8E79-3D69D8477DE4, in the byte order of the table.
const LINUX: [u8; 16] =
    [0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4];
/// Label by which the guest finds the partition. Without it the guest looks for a device GCP does not have, and
/// restarts for ever.
const LABEL: &str = "dstack-data";

/// Builds the disk, 10 MiB, with the given identities of disk and partition.
///
/// # Errors
///
/// [`Error::Disk`] when the table cannot be written.
pub fn data_disk(disk_guid: [u8; 16], partition_guid: [u8; 16]) -> Result<Vec<u8>, Error> {
    let failed =
        |error: gptman::Error| Error::Disk { disk: "data disk", source: std::io::Error::other(error) };
    let mut disk = vec![0; SIZE];
    let mut cursor = Cursor::new(disk.as_mut_slice());
    let mut table = GPT::new_from(&mut cursor, SECTOR, disk_guid).map_err(failed)?;
    table[1] = GPTPartitionEntry {
        partition_type_guid: LINUX,
        unique_partition_guid: partition_guid,
        starting_lba: FIRST,
        ending_lba: table.header.last_usable_lba,
        attribute_bits: 0,
        partition_name: LABEL.into(),
    };
    table.write_into(&mut cursor).map_err(failed)?;
    GPT::write_protective_mbr_into(&mut cursor, SECTOR).map_err(failed)?;
    Ok(disk)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_partition_is_where_sgdisk_puts_it() {
        let disk = data_disk([1; 16], [2; 16]).unwrap();
        let table = GPT::find_from(&mut Cursor::new(disk.as_slice())).unwrap();
        let partition = &table[1];
        assert_eq!((partition.starting_lba, partition.ending_lba), (2048, 20446));
        assert_eq!(partition.partition_name.as_str(), "dstack-data");
        assert_eq!((disk[510], disk[511], disk[450]), (0x55, 0xaa, 0xee));
    }
}
