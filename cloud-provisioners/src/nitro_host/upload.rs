//! Files for a host, named after their digests: a file that is there whole is not sent again, one that is there in part is
//! continued, and what arrived is hashed there before it gets its name.
//!
//! Bytes go through a command's standard input rather than through SFTP: `cat` appends just as well, and neither another
//! protocol nor another server is needed.

use std::io::{self, Read as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use tokio::fs::File;
use tokio::io::AsyncSeekExt as _;
use tokio::task::spawn_blocking;

use super::error::Error;
use super::host::{Host, Step, file_failure};
use super::ssh::Input;

/// The slowest line that is waited for, in bytes a second.
const SLOWEST: u64 = 64 << 10;
/// Read at a time.
const CHUNK: usize = 256 << 10;

/// A file that a host is to have.
#[derive(Clone, Debug)]
pub struct Upload {
    /// Where it is on this machine.
    pub path: PathBuf,
    /// Its digest, in hex.
    pub sha256: String,
    /// Its length in bytes.
    pub len: u64,
    /// What it is, for messages: `image`.
    pub what: &'static str,
}

impl Upload {
    /// Hashes a file.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub async fn of(what: &'static str, path: &Path) -> Result<Self, Error> {
        let path = path.to_owned();
        let hashing = spawn_blocking(move || {
            let (sha256, len) = digest(&path).map_err(file_failure("read", &path))?;
            Ok(Self { path, sha256, len, what })
        });
        hashing.await.map_err(|error| Error::Internal(error.into()))?
    }
}

fn digest(path: &Path) -> io::Result<(String, u64)> {
    let mut file = std::fs::File::open(path)?;
    let (mut hash, mut len, mut chunk) = (Sha256::new(), 0, vec![0; CHUNK]);
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok((hex::encode(hash.finalize()), len)),
            got => {
                hash.update(&chunk[..got]);
                len += got as u64;
            }
        }
    }
}

/// What of a file is on the host.
#[derive(Debug, PartialEq, Eq)]
enum There {
    /// All of it, at this path.
    Whole(String),
    /// So many bytes.
    Part(u64),
}

/// Sends a file, as far as it is not there, and gives its path on the host. Not cancel safe.
pub(super) async fn upload(host: &mut Host, file: &Upload) -> Result<String, Error> {
    let mut damaged = None;
    // A part may be of a damaged transfer; it is thrown away once.
    for _attempt in 0..2 {
        let from = match look(host, file).await? {
            There::Whole(path) => return Ok(path),
            There::Part(from) => from,
        };
        send(host, file, from).await?;
        match seal(host, file).await? {
            Ok(path) => return Ok(path),
            Err(actual) => damaged = Some(actual),
        }
    }
    Err(Error::Damaged {
        what: file.what,
        actual: damaged.unwrap_or_default(),
        expected: file.sha256.clone(),
    })
}

/// A step of the login user's.
fn step<'a>(host: &Host, name: &'a str, script: String, file: &Upload) -> Step<'a> {
    // Hashing and sending take as long as the file is long.
    let deadline = host.patience().step + Duration::from_secs(file.len / SLOWEST);
    Step { root: false, deadline, ..host.step(name, script) }
}

async fn look(host: &mut Host, file: &Upload) -> Result<There, Error> {
    let Upload { sha256, len, what, .. } = file;
    let script = format!(
        "set -e; umask 077; mkdir -p ~/.keyferry; cd ~/.keyferry; \
         if [ -e {sha256} ] && echo '{sha256}  {sha256}' | sha256sum -c --status; then echo whole \"$(pwd -P)/{sha256}\"; \
         elif [ -e {sha256}.part ] && [ \"$(stat -c %s {sha256}.part)\" -le {len} ]; \
         then echo part \"$(stat -c %s {sha256}.part)\"; \
         else rm -f {sha256} {sha256}.part; echo part 0; fi"
    );
    let name = format!("look for the {what}");
    let answer = host.run(step(host, &name, script, file)).await?;
    let answer = String::from_utf8_lossy(&answer);
    match answer.trim().split_once(' ') {
        Some(("whole", path)) => Ok(There::Whole(path.to_owned())),
        Some(("part", bytes)) if bytes.parse().is_ok_and(|bytes: u64| bytes <= *len) => {
            Ok(There::Part(bytes.parse().unwrap_or_default()))
        }
        _ => Err(Error::Answer { step: name, problem: format!("{:?} is no answer", answer.trim()) }),
    }
}

async fn send(host: &mut Host, file: &Upload, from: u64) -> Result<(), Error> {
    let failed = |action| file_failure(action, &file.path);
    let mut source = File::open(&file.path).await.map_err(failed("open"))?;
    source.seek(SeekFrom::Start(from)).await.map_err(failed("read"))?;
    let name = format!("send the {}", file.what);
    let script = format!("cat >> ~/.keyferry/{}.part", file.sha256);
    let step = Step { input: Input::File(source), ..step(host, &name, script, file) };
    host.run(step).await.map(drop)
}

/// Gives what arrived its name; or says its digest when it is another.
async fn seal(host: &mut Host, file: &Upload) -> Result<Result<String, String>, Error> {
    let Upload { sha256, what, .. } = file;
    let script = format!(
        "set -e; cd ~/.keyferry; found=$(sha256sum {sha256}.part | cut -d' ' -f1); \
         if [ \"$found\" = {sha256} ]; then sync {sha256}.part; mv -f {sha256}.part {sha256}; \
         echo whole \"$(pwd -P)/{sha256}\"; else rm -f {sha256}.part; echo damaged \"$found\"; fi"
    );
    let name = format!("check the {what}");
    let answer = host.run(step(host, &name, script, file)).await?;
    let answer = String::from_utf8_lossy(&answer);
    match answer.trim().split_once(' ') {
        Some(("whole", path)) => Ok(Ok(path.to_owned())),
        Some(("damaged", found)) => Ok(Err(found.to_owned())),
        _ => Err(Error::Answer { step: name, problem: format!("{:?} is no answer", answer.trim()) }),
    }
}
