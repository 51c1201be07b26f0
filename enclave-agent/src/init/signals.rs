//! What the kernel tells the first process: that a child ended, and what others want from the app.

use std::io;

use rustix::process::Signal;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// More than one of a kind at a time is one, so there is room for all kinds.
const QUEUE: usize = 16;

/// Something to act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// A child ended, perhaps several.
    Child,
    /// For the app, which knows what it means.
    Forward(Signal),
    /// For the app, and the end of the enclave after it.
    Stop(Signal),
}

/// Takes signals from when it is made; none is lost before somebody waits.
#[derive(Debug)]
pub(super) struct Signals {
    events: mpsc::Receiver<Event>,
    _watchers: JoinSet<()>,
}

impl Signals {
    pub(super) fn watch() -> io::Result<Self> {
        let (sender, events) = mpsc::channel(QUEUE);
        let mut watchers = JoinSet::new();
        for (kind, event) in [
            (SignalKind::child(), Event::Child),
            (SignalKind::terminate(), Event::Stop(Signal::TERM)),
            (SignalKind::interrupt(), Event::Stop(Signal::INT)),
            (SignalKind::quit(), Event::Stop(Signal::QUIT)),
            (SignalKind::hangup(), Event::Forward(Signal::HUP)),
            (SignalKind::user_defined1(), Event::Forward(Signal::USR1)),
            (SignalKind::user_defined2(), Event::Forward(Signal::USR2)),
            (SignalKind::window_change(), Event::Forward(Signal::WINCH)),
        ] {
            let mut signals = signal(kind)?;
            let sender = sender.clone();
            watchers.spawn(async move {
                while signals.recv().await.is_some() && sender.send(event).await.is_ok() {}
            });
        }
        Ok(Self { events, _watchers: watchers })
    }

    /// The next one. Cancel safe.
    pub(super) async fn next(&mut self) -> Event {
        match self.events.recv().await {
            Some(event) => event,
            // The watchers end only with the runtime.
            None => std::future::pending().await,
        }
    }
}
