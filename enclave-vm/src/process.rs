//! Child processes that do not outlive us: each is told by the kernel to die with the thread that started it, is
//! waited for through a descriptor of its own, and is signalled through that descriptor, never by a number or a name.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::Error;

/// How long a process has between being asked to end and being killed.
const END_GRACE: Duration = Duration::from_secs(5);
/// How much of what a program says about itself is read.
const MAX_REPORT: u64 = 1 << 20;
/// What is kept of a process's standard error.
const MAX_STDERR: usize = 4096;
/// How long the rest of it is waited for when the process has ended, in case a child of its own holds the pipe.
const DRAIN: Duration = Duration::from_secs(1);

/// A running child.
pub(crate) struct Process {
    child: Child,
    pidfd: OwnedFd,
    program: PathBuf,
    stderr: Tail,
}

/// The end of what a process writes to its standard error, however much that is.
struct Tail {
    kept: Arc<Mutex<VecDeque<u8>>>,
    /// Disconnected when the last writer has closed its end.
    closed: Receiver<()>,
}

impl Process {
    /// Starts `program`. The descriptors in `inherit` keep their numbers in it; no others get there. It is killed
    /// when the calling thread ends, so that has to be one that lives as long as the process is wanted.
    pub(crate) fn spawn(
        program: &Path,
        arguments: &[OsString],
        stdout: Stdio,
        inherit: &[BorrowedFd<'_>],
    ) -> Result<Self, Error> {
        let failed = |source| Error::Spawn { program: program.to_owned(), source };
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(stdout).stderr(Stdio::piped());
        // An interrupt from the terminal is for us; what we started ends when we end it.
        command.process_group(0);
        let mut child = spawn_bound(&mut command, inherit).map_err(failed)?;
        let stderr = Tail::of(child.stderr.take());
        let pidfd = Pid::from_raw(i32::try_from(child.id()).unwrap_or(0))
            .ok_or(rustix::io::Errno::SRCH)
            .and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()));
        match pidfd {
            Ok(pidfd) => Ok(Self { child, pidfd, program: program.to_owned(), stderr }),
            Err(error) => {
                child.kill().and_then(|()| child.wait()).map_err(failed)?;
                Err(failed(error.into()))
            }
        }
    }

    /// Becomes readable when the process has ended.
    pub(crate) fn ended(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// What the process wrote to its pipe, if it was started with one.
    pub(crate) fn take_stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// Waits until the process has ended or `deadline` is over; whether it has ended.
    pub(crate) fn wait_ended(&self, deadline: Duration) -> Result<bool, Error> {
        let mut waited = [PollFd::new(&self.pidfd, PollFlags::IN)];
        wait(&mut waited, deadline).map_err(|source| self.failed(source))
    }

    /// Its status if it has ended.
    pub(crate) fn status(&mut self) -> Result<Option<ExitStatus>, Error> {
        self.child.try_wait().map_err(|source| Error::Wait { program: self.program.clone(), source })
    }

    /// Asks the process to end, and makes it end.
    pub(crate) fn end(&mut self) -> Result<ExitStatus, Error> {
        for (signal, grace) in [(Signal::TERM, END_GRACE), (Signal::KILL, END_GRACE)] {
            if let Some(status) = self.status()? {
                return Ok(status);
            }
            match rustix::process::pidfd_send_signal(&self.pidfd, signal) {
                Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                Err(error) => return Err(self.failed(error.into())),
            }
            if self.wait_ended(grace)? {
                break;
            }
        }
        match self.status()? {
            Some(status) => Ok(status),
            None => Err(self.failed(io::ErrorKind::TimedOut.into())),
        }
    }

    /// The end of what the process wrote to its standard error, on one line. For a process that has ended.
    pub(crate) fn complaint(&self) -> String {
        self.stderr.text()
    }

    fn failed(&self, source: io::Error) -> Error {
        Error::Wait { program: self.program.clone(), source }
    }
}

impl Tail {
    fn of(stderr: Option<ChildStderr>) -> Self {
        let kept = Arc::new(Mutex::new(VecDeque::new()));
        let (open, closed) = channel();
        if let Some(mut stderr) = stderr {
            let kept = Arc::clone(&kept);
            std::thread::spawn(move || {
                let _open: Sender<()> = open;
                let mut piece = [0; 1024];
                while let Ok(len @ 1..) = stderr.read(&mut piece) {
                    let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                    kept.extend(&piece[..len]);
                    let surplus = kept.len().saturating_sub(MAX_STDERR);
                    kept.drain(..surplus);
                }
            });
        }
        Self { kept, closed }
    }

    fn text(&self) -> String {
        // Nothing is ever sent: this waits until the pipe is read to its end.
        let _closed_or_over = self.closed.recv_timeout(DRAIN);
        let kept: Vec<u8> =
            self.kept.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect();
        one_line(&String::from_utf8_lossy(&kept))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!(%error, "a process could not be ended");
        }
    }
}

/// What `program` prints on standard output, for the questions one asks a program before using it.
pub(crate) fn output(program: &Path, arguments: &[&str], deadline: Duration) -> Result<String, Error> {
    let failed = |source| Error::Spawn { program: program.to_owned(), source };
    let mut stdout = tempfile::tempfile().map_err(failed)?;
    let arguments: Vec<OsString> = arguments.iter().map(OsString::from).collect();
    let to = Stdio::from(stdout.try_clone().map_err(failed)?);
    let mut process = Process::spawn(program, &arguments, to, &[])?;
    if !process.wait_ended(deadline)? {
        return Err(Error::NoAnswer { what: format!("{}", program.display()), waited: deadline });
    }
    let status = process.end()?;
    if !status.success() {
        let complaint = process.complaint();
        return Err(Error::Refused { program: program.to_owned(), status: status.to_string(), complaint });
    }
    let mut text = Vec::new();
    stdout.rewind().and_then(|()| (&stdout).take(MAX_REPORT).read_to_end(&mut text)).map_err(failed)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Waits until one of `descriptors` is ready or `deadline` is over; whether one is.
pub(crate) fn wait(descriptors: &mut [PollFd<'_>], deadline: Duration) -> io::Result<bool> {
    let end = Instant::now() + deadline;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        match rustix::event::poll(descriptors, Some(&timeout)) {
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
    }
}

#[expect(
    unsafe_code,
    reason = "only between fork and exec can a child be bound to its parent's life before it runs anything"
)]
fn spawn_bound(command: &mut Command, inherit: &[BorrowedFd<'_>]) -> io::Result<Child> {
    use std::os::fd::AsRawFd;

    let parent = rustix::process::getpid();
    let inherit: Vec<_> = inherit.iter().map(AsRawFd::as_raw_fd).collect();
    let bind = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have ended before the line above.
        if rustix::process::getppid() != Some(parent) {
            return Err(rustix::io::Errno::SRCH.into());
        }
        for &number in &inherit {
            // SAFETY: the caller of `spawn_bound` holds these descriptors open until it returns, and the child of a
            // fork has them under the same numbers.
            let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
            rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes three kinds of system call (prctl, getppid, fcntl) and touches
    // only memory that was written before; it takes no lock and allocates nothing.
    unsafe { command.pre_exec(bind) };
    command.spawn()
}

fn one_line(text: &str) -> String {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let printable = lines.collect::<Vec<_>>().join("; ");
    printable.chars().filter(|character| !character.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Process {
        Process::spawn(Path::new("/bin/sh"), &["-c".into(), script.into()], Stdio::null(), &[]).unwrap()
    }

    #[test]
    fn a_process_that_ignores_sigterm_is_ended() {
        let mut process = shell("trap '' TERM; echo ready >&2; read never < /dev/zero");
        let status = process.end().unwrap();
        assert!(!status.success());
        assert!(process.wait_ended(Duration::ZERO).unwrap());
    }

    #[test]
    fn a_process_ends_with_its_owner() {
        let process = shell("exec sleep 1000");
        let pidfd = rustix::io::dup(process.ended()).unwrap();
        drop(process);
        let mut ended = [PollFd::new(&pidfd, PollFlags::IN)];
        assert!(wait(&mut ended, Duration::ZERO).unwrap());
    }

    #[test]
    fn a_process_ends_with_the_thread_that_started_it() {
        let process = std::thread::spawn(|| shell("exec sleep 1000")).join().unwrap();
        assert!(process.wait_ended(Duration::from_secs(10)).unwrap());
    }

    #[test]
    fn descriptors_are_inherited_under_their_numbers_when_asked() {
        use std::os::fd::AsRawFd;
        let file = tempfile::tempfile().unwrap();
        let number = file.as_raw_fd();
        let arguments = ["-c".into(), format!("test -e /proc/self/fd/{number}").into()];
        for (inherit, success) in [(vec![file.as_fd()], true), (Vec::new(), false)] {
            let mut process =
                Process::spawn(Path::new("/bin/sh"), &arguments, Stdio::null(), &inherit).unwrap();
            assert!(process.wait_ended(Duration::from_secs(10)).unwrap());
            assert_eq!(process.status().unwrap().unwrap().success(), success);
        }
    }

    #[test]
    fn a_failing_program_is_told_with_its_complaint() {
        let error = output(Path::new("/bin/sh"), &["-c", "echo no >&2; echo way >&2; exit 3"], END_GRACE);
        assert_eq!(error.unwrap_err().to_string(), "/bin/sh ended with exit status: 3: no; way");
    }
}
