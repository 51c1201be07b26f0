//! Processes that never outlive their test, and never make it wait for ever.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::program;

/// A daemon announces itself within this time, on a machine that is busy with other tests too.
const START: Duration = Duration::from_secs(60);

/// A command that ended.
#[derive(Debug)]
pub struct Finished {
    /// The exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// Runs a program of this workspace to its end.
///
/// # Panics
/// When it cannot be started, or has not ended after `deadline`.
pub fn run<S: AsRef<OsStr>>(name: &str, arguments: &[S], deadline: Duration) -> Finished {
    let mut command = Command::new(program(name));
    command.args(arguments).stdin(Stdio::null());
    finish(command, deadline)
}

/// Runs a command that was prepared by the caller to its end.
///
/// # Panics
/// As [`run`].
pub fn finish(mut command: Command, deadline: Duration) -> Finished {
    let mut child =
        Running(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts"));
    let stdout = collect(child.0.stdout.take().expect("stdout is piped"));
    let stderr = collect(child.0.stderr.take().expect("stderr is piped"));
    // The pipes close when the process ends, so receiving waits for the end, with a deadline.
    let until = Instant::now() + deadline;
    let text = |pipe: Receiver<String>| pipe.recv_timeout(until.saturating_duration_since(Instant::now()));
    let (stdout, stderr) = (text(stdout), text(stderr));
    let (Ok(stdout), Ok(stderr)) = (stdout, stderr) else {
        panic!("{command:?} has not ended after {deadline:?}");
    };
    let code = child.0.wait().expect("a child can be waited for").code();
    Finished { code, stdout, stderr }
}

/// Runs a command to its end, which must be a good one, and gives what it answered.
///
/// # Panics
/// As [`run`], and when it fails.
pub fn answer(command: Command, deadline: Duration) -> String {
    let shown = format!("{command:?}");
    let finished = finish(command, deadline);
    assert_eq!(finished.code, Some(0), "{shown}: {}", finished.stderr);
    finished.stdout
}

/// A daemon of this workspace, ended when dropped.
#[derive(Debug)]
pub struct Daemon {
    process: Running,
    /// Its further announcements; the channel closes when its standard output does.
    announced: Receiver<String>,
    endpoint: String,
    log: Arc<Log>,
}

/// What a daemon logs.
#[derive(Debug, Default)]
struct Log {
    text: Mutex<String>,
    /// Told of each line.
    grown: Condvar,
}

impl Log {
    fn text(&self) -> MutexGuard<'_, String> {
        self.text.lock().expect("no holder of this lock panics")
    }
}

impl Daemon {
    /// Starts it and waits until it says where it listens.
    ///
    /// # Panics
    /// When it does not get that far; with what it logged.
    pub fn start<S: AsRef<OsStr>>(name: &str, arguments: &[S]) -> Self {
        let mut command = Command::new(program(name));
        command.args(arguments).env("RUST_LOG", "trace").env("NO_COLOR", "1");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = Running(command.spawn().expect("the program starts"));
        let stdout = process.0.stdout.take().expect("stdout is piped");
        let stderr = process.0.stderr.take().expect("stderr is piped");

        let (announce, announced) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Some(endpoint) = line.strip_prefix("listening on ") {
                    // Only the first announcement is waited for.
                    let _nobody_waits = announce.send(endpoint.to_owned());
                }
            }
        });
        let log = Arc::new(Log::default());
        let kept = Arc::clone(&log);
        thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let mut text = kept.text();
                text.push_str(&line);
                text.push('\n');
                drop(text);
                kept.grown.notify_all();
            }
        });
        match announced.recv_timeout(START) {
            Ok(endpoint) => Self { process, announced, endpoint, log },
            Err(_) => {
                panic!("{name} does not listen:\n{}", log.text())
            }
        }
    }

    /// Where it listens, as it said itself.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The port it listens on.
    ///
    /// # Panics
    /// When it does not listen on TCP.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.endpoint
            .rsplit_once(':')
            .and_then(|(_, port)| port.parse().ok())
            .expect("a TCP endpoint ends in a port")
    }

    /// What it logged so far, at the level `trace`.
    #[must_use]
    pub fn log(&self) -> String {
        self.log.text().clone()
    }

    /// The rest of the first line it logs that begins with `start`, waited for.
    ///
    /// # Panics
    /// When it logs none.
    #[must_use]
    pub fn logged(&self, start: &str) -> String {
        let find = |text: &str| text.lines().find_map(|line| line.strip_prefix(start)).map(str::to_owned);
        let waited = self.log.grown.wait_timeout_while(self.log.text(), START, |text| find(text).is_none());
        let (text, _) = waited.expect("no holder of this lock panics");
        find(&text).unwrap_or_else(|| panic!("no line begins with {start:?}:\n{text}"))
    }

    /// Asks it to end and waits until it has, so that it can end what it started itself. Dropping it kills it.
    ///
    /// # Panics
    /// When it is still there after a while.
    pub fn stop(&self) {
        let id = i32::try_from(self.process.0.id()).ok().and_then(Pid::from_raw).expect("process ids fit");
        kill_process(id, Signal::TERM).expect("a child that was not waited for can be sent a signal");
        let ended = loop {
            if let Err(reason) = self.announced.recv_timeout(START) {
                break reason;
            }
        };
        assert_eq!(ended, RecvTimeoutError::Disconnected, "it does not end: {}", self.log());
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.process.0.id()
    }
}

/// Kills the process when dropped.
#[derive(Debug)]
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only when the process has ended and was waited for already.
        let _gone = self.0.kill();
        let _gone = self.0.wait();
    }
}

fn collect(mut pipe: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // What was read before an error is worth having.
        let _partial = pipe.read_to_end(&mut bytes);
        let _nobody_waits = sender.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    receiver
}
