//! Which enclaves run: a directory for each, locked by its runner for as long as that lives.
//!
//! ```text
//! $XDG_RUNTIME_DIR/keyferry/enclaves/
//!     lock              held while a directory is made or removed
//!     NAME/lock         held by the runner; free means that the runner is gone, whatever else is here
//!     NAME/state.json   what `list` shows
//!     NAME/console      and console.1: what the guest wrote
//!     NAME/nsm-root.pem root of the documents
//!     NAME/vsock        and vsock_PORT: the guest's side and the host's
//! ```
//!
//! The lock and not a process number says whether an enclave runs: the kernel gives it back when the runner ends,
//! however that happens, and nobody else can have it by accident.

use std::ffi::OsStr;
use std::fmt::{self, Display, Formatter};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::fs::FlockOperation;
use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};

use crate::{Error, process};

/// State files are written by us and are this small.
const MAX_STATE: u64 = 64 << 10;

/// The name of a running enclave.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// The nearest name to the name of the file at `path`.
    #[must_use]
    pub fn of_file(path: &Path) -> Self {
        let stem = path.file_stem().map(|it| it.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
        let name: String =
            stem.chars().map(|it| if it.is_ascii_alphanumeric() { it } else { '-' }).take(40).collect();
        name.trim_start_matches('-').parse().unwrap_or_else(|_| Self("enclave".to_owned()))
    }
}

impl FromStr for Name {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        let fits = (1..=40).contains(&name.len())
            && !name.starts_with('-')
            && name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'));
        if fits { Ok(Self(name.to_owned())) } else { Err(Error::Name { name: name.to_owned() }) }
    }
}

impl TryFrom<String> for Name {
    type Error = Error;

    fn try_from(name: String) -> Result<Self, Error> {
        name.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl Display for Name {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How far an enclave is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Its kernel comes up.
    Booting,
    /// Its init runs.
    Running,
    /// The line came that its runner waited for; without such a line, its init runs.
    Ready,
}

impl Display for Phase {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Booting => "booting",
            Self::Running => "running",
            Self::Ready => "ready",
        })
    }
}

/// What is known of a running enclave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnclaveState {
    /// Its name.
    pub name: Name,
    /// How far it is.
    pub phase: Phase,
    /// Process that runs it.
    pub pid: u32,
    /// The image it was started from.
    pub image: PathBuf,
    /// `microvm` or `nitro-enclave`.
    pub machine: String,
    /// Whether its NSM shows zeros for the image.
    pub debug: bool,
    /// vCPUs.
    pub cpus: u8,
    /// MiB.
    pub memory_mib: u64,
    /// The guest's CID.
    pub cid: u32,
    /// A connection of the guest to CID 2, port P, arrives at this path followed by `_P`.
    pub vsock: PathBuf,
    /// Its console.
    pub console: PathBuf,
    /// Root certificate of its attestation documents, unless the machine signs none.
    pub nsm_root: Option<PathBuf>,
}

/// The running enclaves of one user.
#[derive(Clone, Debug)]
pub struct Registry {
    root: PathBuf,
}

/// A running enclave's directory. Removed when this is dropped.
#[derive(Debug)]
pub struct Home {
    registry: Registry,
    name: Name,
    path: PathBuf,
    vsock: Option<PathBuf>,
    _lock: OwnedFd,
}

impl Registry {
    /// Where the environment says that run-time files belong: under `xdg_runtime_dir`, or else in a directory of the
    /// user's own under /tmp.
    #[must_use]
    pub fn in_environment(xdg_runtime_dir: Option<&OsStr>) -> Self {
        let base = match xdg_runtime_dir.filter(|it| Path::new(it).is_absolute()) {
            Some(directory) => Path::new(directory).join("keyferry"),
            None => PathBuf::from(format!("/tmp/keyferry-{}", uid())),
        };
        Self::at(base.join("enclaves"))
    }

    /// At a directory of the caller's choice.
    #[must_use]
    pub fn at(root: PathBuf) -> Self {
        Self { root }
    }

    /// Makes the directory of a new enclave and locks it.
    ///
    /// # Errors
    ///
    /// When an enclave of that name runs, or the directory cannot be made or is not ours alone.
    pub fn create(&self, name: Name) -> Result<Home, Error> {
        make_private(&self.root)?;
        let _guard = self.guard()?;
        let path = self.root.join(&name.0);
        self.remove_if_stale(&path)?;
        match DirBuilder::new().mode(0o700).create(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(Error::Exists { name: name.to_string() });
            }
            made => made.map_err(Error::file("make", &path))?,
        }
        let lock = lock(&path.join("lock"))?.ok_or_else(|| Error::Exists { name: name.to_string() })?;
        Ok(Home { registry: self.clone(), name, path, vsock: None, _lock: lock })
    }

    /// The enclaves that run, by name. Removes what is left of those whose runner is gone.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read.
    pub fn list(&self) -> Result<Vec<EnclaveState>, Error> {
        if !self.root.exists() {
            return Ok(Vec::new());
        }
        let _guard = self.guard()?;
        let mut running = Vec::new();
        for entry in self.root.read_dir().map_err(Error::file("read", &self.root))? {
            let path = entry.map_err(Error::file("read", &self.root))?.path();
            if path.is_dir() && !self.remove_if_stale(&path)? {
                // Between making its directory and writing its state, an enclave is not there yet.
                running.extend(read_state(&path)?);
            }
        }
        running.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(running)
    }

    /// The enclave of this name.
    ///
    /// # Errors
    ///
    /// When none of that name runs.
    pub fn find(&self, name: &Name) -> Result<EnclaveState, Error> {
        let found = self.list()?.into_iter().find(|it| it.name == *name);
        found.ok_or_else(|| Error::Unknown { name: name.to_string() })
    }

    /// Ends the enclave of this name: asks its runner to end it, and kills a runner that has not done so within
    /// `grace`; the machine goes with it. Returns when nothing of it is left.
    ///
    /// # Errors
    ///
    /// When none of that name runs, or its runner cannot be signalled.
    pub fn stop(&self, name: &Name, grace: Duration) -> Result<EnclaveState, Error> {
        let state = self.find(name)?;
        let failed = |error: rustix::io::Errno| Error::Wait {
            program: format!("the runner of {name} (process {})", state.pid).into(),
            source: error.into(),
        };
        let pid = i32::try_from(state.pid).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| failed(rustix::io::Errno::SRCH))?;
        let runner = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Err(rustix::io::Errno::SRCH) => return self.list().map(|_| state),
            runner => runner.map_err(failed)?,
        };
        // The lock is still held by whoever wrote that number, so the number still means them.
        if self.find(name)?.pid != state.pid {
            return Err(Error::Unknown { name: name.to_string() });
        }
        for (signal, grace) in [(Signal::TERM, grace), (Signal::KILL, Duration::from_secs(5))] {
            match rustix::process::pidfd_send_signal(&runner, signal) {
                Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                Err(error) => return Err(failed(error)),
            }
            let mut waited = [PollFd::new(&runner, PollFlags::IN)];
            if process::wait(&mut waited, grace).map_err(Error::file("wait for", &self.root))? {
                self.list()?;
                return Ok(state);
            }
        }
        Err(Error::NoAnswer { what: format!("process {}", state.pid), waited: grace })
    }

    /// Serialises making and removing directories.
    fn guard(&self) -> Result<OwnedFd, Error> {
        let path = self.root.join("lock");
        let file = open_lock(&path)?;
        // Held for a few file operations at a time, by programs of the same user.
        rustix::fs::flock(&file, FlockOperation::LockExclusive)
            .map_err(|error| Error::file("lock", &path)(error.into()))?;
        Ok(file.into())
    }

    /// Removes an enclave's directory if nobody holds its lock; whether nothing is there any more. The caller holds
    /// the guard.
    fn remove_if_stale(&self, path: &Path) -> Result<bool, Error> {
        if !path.exists() {
            return Ok(true);
        }
        let Some(_lock) = lock(&path.join("lock"))? else { return Ok(false) };
        if let Ok(Some(state)) = read_state(path) {
            remove_socket(&state.vsock)?;
        }
        std::fs::remove_dir_all(path).map_err(Error::file("remove", path))?;
        Ok(true)
    }
}

impl Home {
    /// The enclave's name.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the root certificate of the NSM is kept.
    #[must_use]
    pub fn nsm_root(&self) -> PathBuf {
        self.path.join("nsm-root.pem")
    }

    /// Where the console is kept.
    #[must_use]
    pub fn console(&self) -> PathBuf {
        self.path.join("console")
    }

    /// Path that the vsock sockets start with, unless the caller chooses another.
    #[must_use]
    pub fn vsock(&self) -> PathBuf {
        self.path.join("vsock")
    }

    /// Makes `state` what others see.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn write_state(&mut self, state: &EnclaveState) -> Result<(), Error> {
        self.vsock = Some(state.vsock.clone());
        let (path, new) = (self.path.join("state.json"), self.path.join("state.json.new"));
        let json = serde_json::to_vec(state).map_err(|source| Error::State { path: path.clone(), source })?;
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(true).mode(0o600).open(&new);
        file.and_then(|mut file| file.write_all(&json)).map_err(Error::file("write", &new))?;
        std::fs::rename(&new, &path).map_err(Error::file("write", &path))
    }

    fn remove(&mut self) -> Result<(), Error> {
        let _guard = self.registry.guard()?;
        if let Some(vsock) = &self.vsock {
            remove_socket(vsock)?;
        }
        std::fs::remove_dir_all(&self.path).map_err(Error::file("remove", &self.path))
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            tracing::warn!(%error, "the state of an enclave is left behind");
        }
    }
}

fn read_state(directory: &Path) -> Result<Option<EnclaveState>, Error> {
    use std::io::Read;

    let path = directory.join("state.json");
    let mut json = Vec::new();
    match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.and_then(|file| file.take(MAX_STATE).read_to_end(&mut json)),
    }
    .map_err(Error::file("read", &path))?;
    serde_json::from_slice(&json).map(Some).map_err(|source| Error::State { path, source })
}

/// vhost-device-vsock leaves its socket behind; anything else at that path is not ours.
fn remove_socket(path: &Path) -> Result<(), Error> {
    match path.symlink_metadata() {
        Ok(metadata) if metadata.file_type().is_socket() => {
            std::fs::remove_file(path).map_err(Error::file("remove", path))
        }
        _ => Ok(()),
    }
}

/// The lock on a file, unless somebody else has it.
fn lock(path: &Path) -> Result<Option<OwnedFd>, Error> {
    let file = open_lock(path)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file.into())),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(Error::file("lock", path)(error.into())),
    }
}

fn open_lock(path: &Path) -> Result<File, Error> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600).open(path).map_err(Error::file("open", path))
}

/// Makes a directory that only we can write to, or checks that it is one. Without the check, another user could make
/// it first and be the owner of our sockets.
fn make_private(path: &Path) -> Result<(), Error> {
    DirBuilder::new().mode(0o700).recursive(true).create(path).map_err(Error::file("make", path))?;
    for directory in [Some(path), path.parent()].into_iter().flatten() {
        let metadata = directory.symlink_metadata().map_err(Error::file("read", directory))?;
        if !metadata.is_dir() || metadata.uid() != uid() || metadata.mode() & 0o022 != 0 {
            return Err(Error::StateDirectory { path: directory.to_owned(), uid: uid() });
        }
    }
    Ok(())
}

fn uid() -> u32 {
    rustix::process::getuid().as_raw()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn registry() -> (tempfile::TempDir, Registry) {
        let directory = tempfile::tempdir().unwrap();
        let registry = Registry::at(directory.path().join("enclaves"));
        (directory, registry)
    }

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    fn state(home: &Home, pid: u32) -> EnclaveState {
        EnclaveState {
            name: home.name().clone(),
            phase: Phase::Booting,
            pid,
            image: "/images/app.eif".into(),
            machine: "microvm".into(),
            debug: false,
            cpus: 2,
            memory_mib: 256,
            cid: 16,
            vsock: home.vsock(),
            console: home.console(),
            nsm_root: Some(home.nsm_root()),
        }
    }

    #[test]
    fn a_running_enclave_is_listed_and_gone_afterwards() {
        let (directory, registry) = registry();
        assert_eq!(registry.list().unwrap(), []);
        let mut home = registry.create(name("b")).unwrap();
        assert_eq!(registry.list().unwrap(), [], "not there before its state is written");
        let expected = state(&home, 1);
        home.write_state(&expected).unwrap();
        assert_eq!(registry.list().unwrap(), [expected]);
        drop(home);
        assert_eq!(registry.list().unwrap(), []);
        let left: Vec<_> =
            directory.path().join("enclaves").read_dir().unwrap().map(|it| it.unwrap().file_name()).collect();
        assert_eq!(left, ["lock"]);
    }

    #[test]
    fn a_name_is_taken_while_its_enclave_runs() {
        let (_directory, registry) = registry();
        let home = registry.create(name("app")).unwrap();
        assert!(matches!(registry.create(name("app")), Err(Error::Exists { .. })));
        drop(home);
        registry.create(name("app")).unwrap();
    }

    #[test]
    fn what_a_killed_runner_left_is_removed_with_its_socket_elsewhere() {
        let (directory, registry) = registry();
        let elsewhere = directory.path().join("socket");
        let mut home = registry.create(name("app")).unwrap();
        let mut left = state(&home, 1);
        left.vsock = elsewhere.clone();
        home.write_state(&left).unwrap();
        // A runner that was killed gives its lock back and removes nothing.
        let path = home.path.clone();
        let copy = directory.path().join("copy");
        std::fs::rename(&path, &copy).unwrap();
        std::fs::create_dir(&path).unwrap();
        drop(home);
        std::fs::rename(&copy, &path).unwrap();
        drop(UnixListener::bind(&elsewhere).unwrap());

        assert_eq!(registry.list().unwrap(), []);
        assert!(!path.exists() && !elsewhere.exists());
    }

    #[test]
    fn a_file_at_the_vsock_path_that_is_no_socket_is_kept() {
        let (directory, registry) = registry();
        let file = directory.path().join("precious");
        std::fs::write(&file, "data").unwrap();
        let mut home = registry.create(name("app")).unwrap();
        let mut state = state(&home, 1);
        state.vsock = file.clone();
        home.write_state(&state).unwrap();
        drop(home);
        assert_eq!(std::fs::read_to_string(file).unwrap(), "data");
    }

    #[test]
    fn stopping_ends_the_runner_with_a_signal() {
        let (_directory, registry) = registry();
        let mut home = registry.create(name("app")).unwrap();
        let mut runner = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        home.write_state(&state(&home, runner.id())).unwrap();
        registry.stop(&name("app"), Duration::from_secs(5)).unwrap();
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(runner.wait().unwrap().signal(), Some(15));
    }

    #[test]
    fn stopping_what_does_not_run_says_so() {
        let (_directory, registry) = registry();
        let error = registry.stop(&name("app"), Duration::ZERO).unwrap_err();
        assert_eq!(error.to_string(), "no enclave named app is running");
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let (directory, registry) = registry();
        let root = directory.path().join("enclaves");
        std::fs::create_dir(&root).unwrap();
        std::fs::set_permissions(&root, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(registry.create(name("app")), Err(Error::StateDirectory { .. })));
    }

    #[test]
    fn names_are_short_and_plain() {
        for good in ["a", "app-1", "0", &"a".repeat(40)] {
            assert_eq!(name(good).to_string(), good);
        }
        for bad in ["", "-a", "A", "a.b", "a/b", "..", "a b", &"a".repeat(41)] {
            assert!(matches!(bad.parse::<Name>(), Err(Error::Name { .. })), "{bad}");
        }
        assert_eq!(Name::of_file(Path::new("/x/My App_v1.2.eif")).0, "my-app-v1-2");
        assert_eq!(Name::of_file(Path::new("/x/--")).0, "enclave");
    }

    #[test]
    fn the_environment_says_where() {
        assert_eq!(
            Registry::in_environment(Some(OsStr::new("/run/user/7"))).root,
            Path::new("/run/user/7/keyferry/enclaves")
        );
        let own = format!("/tmp/keyferry-{}/enclaves", uid());
        for unusable in [None, Some(OsStr::new("")), Some(OsStr::new("relative"))] {
            assert_eq!(Registry::in_environment(unusable).root, Path::new(&own));
        }
    }
}
