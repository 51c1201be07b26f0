//! The disks of a Confidential VM, made in process: no root, no loop device, no mtools.

mod archive;
mod data;
mod volume;

pub use archive::{Archive, archive};
pub use data::data_disk;
pub use volume::configuration_volume;
