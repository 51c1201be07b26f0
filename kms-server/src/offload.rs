//! Computing beside the async threads: at most so many at once, at most so many waiting, the rest refused at once.

use std::sync::Arc;

use tokio::sync::Semaphore;

/// There is no room to wait in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Busy;

/// Runs short computations on blocking threads.
pub(crate) struct Offload {
    running: Arc<Semaphore>,
    /// Running and waiting together.
    admitted: Arc<Semaphore>,
    at_once: usize,
    waiting: usize,
}

impl Offload {
    pub(crate) fn new(at_once: usize, waiting: usize) -> Self {
        // Semaphores have an upper limit, far from anything that makes sense here.
        let at_once = at_once.min(1 << 16);
        let waiting = waiting.min(1 << 20);
        let bound = |number: usize| Arc::new(Semaphore::new(number));
        Self { running: bound(at_once), admitted: bound(at_once + waiting), at_once, waiting }
    }

    /// How many wait, and how many run.
    pub(crate) fn depth(&self) -> (usize, usize) {
        let running = self.at_once - self.running.available_permits();
        let admitted = self.at_once + self.waiting - self.admitted.available_permits();
        (admitted.saturating_sub(running), running)
    }

    /// Runs `compute`, or refuses at once. When the caller goes away, a computation that has begun still ends, and
    /// holds its place until then.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        compute: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Busy> {
        let admitted = Arc::clone(&self.admitted).try_acquire_owned().map_err(|_| Busy)?;
        // Neither semaphore is ever closed.
        let running = Arc::clone(&self.running).acquire_owned().await.map_err(|_| Busy)?;
        let task = tokio::task::spawn_blocking(move || {
            let _places = (admitted, running);
            compute()
        });
        // Only a panic or the runtime's end lets a blocking task fail.
        task.await.map_err(|_| Busy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[tokio::test]
    async fn what_does_not_fit_is_refused_at_once() {
        let offload = Arc::new(Offload::new(1, 1));
        let (release, blocked) = mpsc::channel::<()>();
        let (started, starts) = tokio::sync::oneshot::channel();
        let first = tokio::spawn({
            let offload = Arc::clone(&offload);
            async move {
                offload
                    .run(move || {
                        started.send(()).unwrap();
                        blocked.recv().unwrap();
                        1
                    })
                    .await
            }
        });
        starts.await.unwrap();
        let mut second = Box::pin(offload.run(|| 2));
        // Polled once, it has taken the place to wait in.
        assert!(futures_poll(&mut second).await.is_none());
        assert_eq!(offload.depth(), (1, 1));
        assert_eq!(offload.run(|| 3).await, Err(Busy));
        release.send(()).unwrap();
        assert_eq!(first.await.unwrap(), Ok(1));
        assert_eq!(second.await, Ok(2));
        assert_eq!(offload.run(|| 4).await, Ok(4));
    }

    /// Polls a future once.
    async fn futures_poll<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
        std::future::poll_fn(|context| {
            std::task::Poll::Ready(match std::pin::Pin::new(&mut *future).poll(context) {
                std::task::Poll::Ready(output) => Some(output),
                std::task::Poll::Pending => None,
            })
        })
        .await
    }
}
