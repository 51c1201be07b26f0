//! A circuit breaker: who has not answered several times in a row is not asked for a while, so that nobody waits for
//! a deadline that is known to pass.
//!
//! ```text
//! closed --FAILURES in a row--> open --pause over--> one trial --answer--> closed
//!                                ^                       |
//!                                +-- no answer, doubled -+
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::client;

/// Failures in a row after which nobody is asked for a while.
const FAILURES: u32 = 5;
/// The first pause; each failed trial doubles it.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause. Short, for every client is refused meanwhile.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The breaker of one dependency.
#[derive(Debug, Default)]
pub(crate) struct Breaker(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// In a row.
    failures: u32,
    pause: Option<Pause>,
}

#[derive(Debug)]
struct Pause {
    until: Instant,
    length: Duration,
    /// Somebody has been let through to see whether it is over.
    trial: bool,
}

/// The dependency is not asked at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("has given no answer {failures} times in a row and is not asked for {retry_in:.1?}")]
pub(crate) struct Paused {
    failures: u32,
    retry_in: Duration,
}

/// Leave to ask once. Dropped without an outcome it changes nothing: whoever asked went away.
#[derive(Debug)]
pub(crate) struct Pass {
    breaker: Arc<Breaker>,
    trial: bool,
}

impl Breaker {
    /// Leave to ask now, or not.
    pub(crate) fn pass(self: &Arc<Self>) -> Result<Pass, Paused> {
        let mut state = self.state();
        let failures = state.failures;
        let trial = match &mut state.pause {
            None => false,
            Some(pause) => {
                let retry_in = pause.until.saturating_duration_since(Instant::now());
                if !retry_in.is_zero() || pause.trial {
                    return Err(Paused { failures, retry_in });
                }
                pause.trial = true;
                true
            }
        };
        Ok(Pass { breaker: Arc::clone(self), trial })
    }

    /// Failures in a row; zero when the last answer was one.
    pub(crate) fn failures(&self) -> u32 {
        self.state().failures
    }

    /// Whether nobody is let through, but for trials.
    pub(crate) fn is_open(&self) -> bool {
        self.state().pause.is_some()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pass {
    /// There was an answer, whatever it said.
    pub(crate) fn answered(self) {
        *self.breaker.state() = State::default();
    }

    /// As a request ended. That something is not there is an answer: who asks for inventions must not keep others from
    /// what is.
    pub(crate) fn ended_with<T>(self, outcome: &Result<T, client::Error>) {
        match outcome {
            Ok(_) => self.answered(),
            Err(client::Error::Status(status)) if status.is_client_error() => self.answered(),
            Err(_) => self.failed(),
        }
    }

    /// There was none, or one that makes no sense.
    pub(crate) fn failed(self) {
        let mut state = self.breaker.state();
        state.failures = state.failures.saturating_add(1);
        let length = match &state.pause {
            // Of those who were let through before the pause began, none changes it.
            Some(_) if !self.trial => return,
            Some(pause) => (pause.length * 2).min(LONGEST_PAUSE),
            None if state.failures < FAILURES => return,
            None => FIRST_PAUSE,
        };
        state.pause = Some(Pause { until: Instant::now() + length, length, trial: false });
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        if self.trial
            && let Some(pause) = &mut self.breaker.state().pause
        {
            pause.trial = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    fn fail(breaker: &Arc<Breaker>, times: u32) {
        for _ in 0..times {
            breaker.pass().unwrap().failed();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn it_opens_after_failures_in_a_row_and_closes_with_an_answer() {
        let breaker = Arc::new(Breaker::default());
        fail(&breaker, FAILURES - 1);
        breaker.pass().unwrap().answered();
        fail(&breaker, FAILURES);
        assert_eq!(breaker.pass().unwrap_err(), Paused { failures: FAILURES, retry_in: FIRST_PAUSE });
        advance(FIRST_PAUSE).await;
        let trial = breaker.pass().unwrap();
        assert!(breaker.pass().is_err(), "one trial at a time");
        trial.answered();
        assert_eq!((breaker.failures(), breaker.is_open()), (0, false));
        breaker.pass().unwrap().answered();
    }

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_to_the_longest_and_no_further() {
        let breaker = Arc::new(Breaker::default());
        fail(&breaker, FAILURES);
        let mut expected = FIRST_PAUSE;
        for _ in 0..8 {
            assert_eq!(breaker.pass().unwrap_err().retry_in, expected);
            advance(expected).await;
            breaker.pass().unwrap().failed();
            expected = (expected * 2).min(LONGEST_PAUSE);
        }
        assert_eq!(expected, LONGEST_PAUSE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_trial_whose_asker_went_away_leaves_room_for_the_next() {
        let breaker = Arc::new(Breaker::default());
        fail(&breaker, FAILURES);
        advance(FIRST_PAUSE).await;
        drop(breaker.pass().unwrap());
        breaker.pass().unwrap().answered();
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_there_is_an_answer() {
        let breaker = Arc::new(Breaker::default());
        let status = |code: u16| Err::<(), _>(client::Error::Status(code.try_into().unwrap()));
        for _ in 0..2 * FAILURES {
            breaker.pass().unwrap().ended_with(&status(404));
        }
        assert_eq!(breaker.failures(), 0);
        for _ in 0..FAILURES {
            breaker.pass().unwrap().ended_with(&status(502));
        }
        assert!(breaker.is_open());
    }

    #[tokio::test(start_paused = true)]
    async fn stragglers_neither_close_nor_lengthen_a_pause() {
        let breaker = Arc::new(Breaker::default());
        let straggler = breaker.pass().unwrap();
        fail(&breaker, FAILURES);
        straggler.failed();
        assert_eq!(breaker.pass().unwrap_err().retry_in, FIRST_PAUSE);
    }
}
