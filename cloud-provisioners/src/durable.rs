//! Files that are whole or absent, whatever interrupts the program.

use std::fs::{File, Permissions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use crate::Error;

/// Replaces `path` by `content` with the permission bits `mode`: under another name first, then by a rename, both made
/// durable before this returns.
///
/// # Errors
///
/// When the directory cannot be written to; the old file is then still in place.
pub(crate) fn replace(path: &Path, content: &[u8], mode: u32) -> Result<(), Error> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let failed = |action| Error::file(action, path);
    let mut file = tempfile::NamedTempFile::new_in(directory).map_err(failed("write"))?;
    file.as_file().set_permissions(Permissions::from_mode(mode)).map_err(failed("set the mode of"))?;
    file.write_all(content).map_err(failed("write"))?;
    file.as_file().sync_all().map_err(failed("write"))?;
    file.persist(path).map_err(|error| Error::file("write", path)(error.error))?;
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed("make durable"))
}
