//! `keyferry enclave run --detach`: the same command once more as a process of its own, which tells when the enclave
//! is ready.

use std::ffi::OsString;
use std::io::{self, BufReader, Read, Seek, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use command_line::{Exit, Failure};

use super::manage::json;
use super::run::{Run, Started};

/// Beyond the time that the guest has to start: for reading the image and for what a ready line takes.
const MARGIN: Duration = Duration::from_secs(600);
/// What the runner says when it fails.
const MAX_COMPLAINT: u64 = 64 << 10;

pub(super) fn run(
    arguments: &Run,
    stdout: &mut impl Write,
    stderr: &mut impl Write,
) -> Result<Exit, Failure> {
    let failed = |error: io::Error| Failure::new(Exit::Internal, error);
    // Without a name: what the runner writes here after we are gone is nobody's, and nothing of it is left.
    let mut complaints = tempfile::tempfile().map_err(failed)?;
    let mut runner = Command::new(std::env::current_exe().map_err(failed)?)
        .args(words().map_err(failed)?)
        .arg("--background")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(complaints.try_clone().map_err(failed)?)
        // An interrupt from the terminal is not for it.
        .process_group(0)
        .spawn()
        .map_err(failed)?;
    match answer(&mut runner, arguments.boot_timeout + MARGIN)? {
        Some(started) => {
            let written = if arguments.json { json(stdout, &started) } else { tell(&started, stdout) };
            written.map_or_else(super::write_failure, |()| Ok(Exit::Done))
        }
        None => {
            let status = runner.wait().map_err(failed)?;
            complaints.rewind().map_err(failed)?;
            io::copy(&mut complaints.take(MAX_COMPLAINT), stderr).map_err(failed)?;
            Ok(status.code().and_then(exit_of_code).unwrap_or(Exit::Internal))
        }
    }
}

/// The command line of this process, with which the runner is started.
fn words() -> io::Result<Vec<OsString>> {
    Ok(std::env::args_os().skip(1).collect())
}

/// What the runner tells, or nothing if it ends instead.
fn answer(runner: &mut Child, deadline: Duration) -> Result<Option<Started>, Failure> {
    let Some(stdout) = runner.stdout.take() else { return Ok(None) };
    let (told, tell) = channel();
    // Nobody listens any more only when the deadline is over.
    std::thread::spawn(move || drop(told.send(read_answer(stdout))));
    match tell.recv_timeout(deadline) {
        Ok(answer) => answer.map_err(|error| Failure::new(Exit::Internal, error)),
        Err(RecvTimeoutError::Disconnected) => Ok(None),
        Err(RecvTimeoutError::Timeout) => {
            runner.kill().map_err(|error| Failure::new(Exit::Internal, error))?;
            Err(Failure::new(
                Exit::NoAnswer,
                format!("the enclave is not ready after {} s", deadline.as_secs()),
            ))
        }
    }
}

fn read_answer(stdout: ChildStdout) -> io::Result<Option<Started>> {
    // The document is complete when its closing brace is there; the runner keeps its end of the pipe open.
    let mut documents = serde_json::Deserializer::from_reader(BufReader::new(stdout)).into_iter();
    documents.next().transpose().map_err(io::Error::other)
}

fn tell(started: &Started, stdout: &mut impl Write) -> io::Result<()> {
    writeln!(stdout, "enclave {} is running, image {}", started.name, started.os_image_hash)?;
    writeln!(stdout, "vsock: CID 2, port P is {}_P", started.vsock.display())?;
    match &started.nsm_root {
        Some(root) => writeln!(stdout, "root of its documents: {}", root.display()),
        None => Ok(()),
    }
}

fn exit_of_code(code: i32) -> Option<Exit> {
    let known = [Exit::Internal, Exit::Usage, Exit::Refused, Exit::NoAnswer, Exit::Interrupted];
    known.into_iter().find(|exit| i32::from(exit.code()) == code)
}
