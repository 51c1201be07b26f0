//! The app's life: started, watched, told what it is signalled, started again as its policy says.
//!
//! The first process inherits every process whose parent ended, and reaps them all here: nothing else in this program
//! waits for children.

use std::fmt;
use std::io;
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process_group, wait};
use tokio::time::{Instant, sleep_until};

use super::console::say;
use super::signals::{Event, Signals};
use crate::config::{Restart, RestartPolicy};

/// How long the app has after it was told to stop.
const GRACE: Duration = Duration::from_secs(10);
/// Pause before the first restart; it doubles with each.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause before a restart.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// How an app ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AppEnd {
    /// With this exit status.
    Exited(i32),
    /// By this signal.
    Killed(i32),
}

impl AppEnd {
    pub(super) fn is_success(self) -> bool {
        self == Self::Exited(0)
    }

    fn of(status: WaitStatus) -> Option<Self> {
        status.exit_status().map(Self::Exited).or(status.terminating_signal().map(Self::Killed))
    }
}

impl fmt::Display for AppEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "exited with {status}"),
            Self::Killed(signal) => write!(f, "was killed by signal {signal}"),
        }
    }
}

/// What became of the app in one run.
struct Run {
    end: AppEnd,
    /// Somebody wanted it to stop.
    stopped: bool,
}

/// Runs the app until it ends for good. `start` starts it in a process group of its own.
///
/// # Errors
/// Those of `start`, the first time as well as later.
pub(super) async fn supervise(
    policy: RestartPolicy,
    signals: &mut Signals,
    mut start: impl FnMut() -> io::Result<Pid>,
) -> io::Result<AppEnd> {
    let mut restarts = 0;
    loop {
        let Run { end, stopped } = watch(start()?, signals).await;
        let again = match policy.when {
            Restart::Never => false,
            Restart::OnFailure => !end.is_success(),
            Restart::Always => true,
        };
        if stopped || !again {
            return Ok(end);
        }
        if restarts >= policy.max {
            say(&format!("the app {end}; it was restarted {restarts} times and is not again"));
            return Ok(end);
        }
        let pause = pause(restarts);
        restarts += 1;
        say(&format!("the app {end}; restart {restarts} of {} in {pause:?}", policy.max));
        if told_to_stop(signals, Instant::now() + pause).await {
            return Ok(end);
        }
    }
}

fn pause(restarts: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(1_u32.checked_shl(restarts).unwrap_or(u32::MAX)).min(LONGEST_PAUSE)
}

/// Watches the app until it ends, and then ends what it left in its group.
async fn watch(app: Pid, signals: &mut Signals) -> Run {
    let mut stopped = false;
    let mut kill_at = None;
    let end = loop {
        let event = tokio::select! {
            event = signals.next() => event,
            () = at(kill_at) => {
                signal_group(app, Signal::KILL);
                kill_at = None;
                continue;
            }
        };
        match event {
            Event::Child => {
                if let Some(end) = reap(Some(app)) {
                    break end;
                }
            }
            Event::Forward(signal) => signal_group(app, signal),
            Event::Stop(signal) => {
                signal_group(app, signal);
                kill_at = kill_at.or(Some(Instant::now() + GRACE));
                stopped = true;
            }
        }
    };
    signal_group(app, Signal::KILL);
    Run { end, stopped }
}

/// Waits for `end`, reaping meanwhile; whether somebody wants no restart.
async fn told_to_stop(signals: &mut Signals, end: Instant) -> bool {
    loop {
        tokio::select! {
            event = signals.next() => match event {
                Event::Child => drop(reap(None)),
                Event::Forward(_) => {}
                Event::Stop(_) => return true,
            },
            () = sleep_until(end) => return false,
        }
    }
}

async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

/// Takes note of all children that ended, one signal may stand for several; how `app` did, if it is among them.
fn reap(app: Option<Pid>) -> Option<AppEnd> {
    let mut end = None;
    // Fails when there is no child at all.
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
        if Some(pid) == app {
            end = AppEnd::of(status);
        }
    }
    end
}

/// A group that is gone needs no signal any more.
fn signal_group(app: Pid, signal: Signal) {
    let _gone = kill_process_group(app, signal);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_their_limit() {
        let seconds: Vec<u64> = (0..8).map(|restarts| pause(restarts).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 30, 30, 30]);
        assert_eq!(pause(u32::MAX), LONGEST_PAUSE);
    }
}
