//! What the process asks of the kernel before it touches a secret.

use std::io;

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

/// Lets nobody dump or attach to this process, and writes no core file: either would hold the keys.
///
/// # Errors
/// The system's; the caller must not go on then.
pub fn forbid_core_dumps() -> io::Result<()> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    Ok(())
}
