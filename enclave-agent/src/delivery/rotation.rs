//! Fetches the keys again: on a schedule, and when somebody asks.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

use super::{Delivery, Ring};
use crate::nsm::Nsm;
use crate::{Error, GetKeys, Step, get_keys};
use command_line::chain;

/// Requests that may wait while keys are being fetched; all of them get the answer of one fetch.
const WAITING: usize = 16;

type Request = oneshot::Sender<Result<bool, String>>;

/// What happens when keys are fetched again, for whoever wants to tell.
#[non_exhaustive]
pub enum Renewal<'a> {
    /// A step of the trip.
    Step(Step<'a>),
    /// Keys were fetched, and delivered if they are others than before.
    Done {
        /// Whether they are others than before.
        changed: bool,
    },
    /// The keys could not be fetched; the old ones stay.
    NotFetched(&'a Error),
    /// New keys are in use, and did not get everywhere.
    NotDelivered(&'a super::Error),
}

/// Asks for keys to be fetched again.
#[derive(Clone, Debug)]
pub struct Refresher(mpsc::Sender<Request>);

/// Why keys were not fetched again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RefreshError {
    /// Others wait already, or nobody fetches keys any more.
    #[error("{WAITING} requests for new keys wait already")]
    Busy,
    /// The fetch or the delivery failed.
    #[error("{0}")]
    Failed(String),
}

impl Refresher {
    /// Has the keys fetched again, and says whether they are others than before. The fetch has a deadline of its own.
    ///
    /// # Errors
    /// [`RefreshError`].
    pub async fn refresh(&self) -> Result<bool, RefreshError> {
        let (answer, answered) = oneshot::channel();
        self.0.try_send(answer).map_err(|_| RefreshError::Busy)?;
        answered.await.map_err(|_| RefreshError::Busy)?.map_err(RefreshError::Failed)
    }

    /// Has the keys fetched again without waiting for it; a request too many is as good as those that wait.
    pub fn request(&self) {
        let (answer, _nobody) = oneshot::channel();
        let _full = self.0.try_send(answer);
    }
}

/// Keeps the keys of a ring new.
pub struct Rotation {
    fetch: Arc<GetKeys>,
    nsm: Arc<dyn Nsm>,
    ring: Ring,
    delivery: Arc<Delivery>,
    every: Option<Duration>,
    requests: mpsc::Receiver<Request>,
}

impl Rotation {
    /// Keys as `fetch` says, for `ring` and `delivery`; `every` so often, and when the refresher is used.
    pub fn new(
        fetch: Arc<GetKeys>,
        nsm: Arc<dyn Nsm>,
        ring: Ring,
        delivery: Arc<Delivery>,
        every: Option<Duration>,
    ) -> (Self, Refresher) {
        let (sender, requests) = mpsc::channel(WAITING);
        (Self { fetch, nsm, ring, delivery, every, requests }, Refresher(sender))
    }

    /// Fetches keys whenever it is time, for ever. Whatever goes wrong, the old keys stay in use and the next time
    /// comes.
    pub async fn run(mut self, mut watch: impl FnMut(Renewal<'_>) + Send) -> std::convert::Infallible {
        loop {
            let first = self.next_request().await;
            let outcome = self.renew(&mut watch).await;
            // Who asked while keys were on their way has them now, too.
            let waiting = std::iter::from_fn(|| self.requests.try_recv().ok());
            for request in first.into_iter().chain(waiting) {
                let _gone = request.send(outcome.clone());
            }
        }
    }

    /// Waits until somebody asks or it is time; in the second case there is nobody to answer.
    async fn next_request(&mut self) -> Option<Request> {
        let due = self.every.map(|every| Instant::now() + every);
        let time = async {
            match due {
                Some(due) => sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            request = self.requests.recv() => match request {
                Some(request) => Some(request),
                // Nobody is left to ask; the schedule, if there is one, goes on.
                None => match due {
                    Some(due) => { sleep_until(due).await; None }
                    None => std::future::pending().await,
                },
            },
            () = time => None,
        }
    }

    async fn renew(&self, watch: &mut (impl FnMut(Renewal<'_>) + Send)) -> Result<bool, String> {
        let fetched = get_keys(&self.fetch, &self.nsm, &mut |step| watch(Renewal::Step(step))).await;
        let keys = match fetched {
            Ok(keys) => Arc::new(keys),
            Err(error) => {
                watch(Renewal::NotFetched(&error));
                return Err(chain(&error));
            }
        };
        let changed = self.ring.replace(Arc::clone(&keys));
        if changed && let Err(error) = self.delivery.deliver(&keys, &self.nsm).await {
            watch(Renewal::NotDelivered(&error));
            return Err(chain(&error));
        }
        watch(Renewal::Done { changed });
        Ok(changed)
    }
}
