//! An agent that serves an app.

use crate::{Daemon, Trip};

/// `enclave-agent serve` in a trip's directory, with the sockets `dstack.sock` and `tappd.sock`.
#[derive(Debug)]
pub struct Agent(Daemon);

impl Agent {
    /// Starts it with more arguments; where one is given that the trip's arguments have, it replaces theirs.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start(trip: &Trip, more: &[&str]) -> Self {
        let mut arguments = vec!["serve".to_owned()];
        let fetch = trip.fetch_arguments();
        for pair in fetch.chunks(2) {
            if !more.contains(&pair[0].as_str()) {
                arguments.extend_from_slice(pair);
            }
        }
        for socket in ["dstack.sock", "tappd.sock"] {
            arguments.extend(["--socket".to_owned(), trip.path(socket).display().to_string()]);
        }
        arguments.extend(more.iter().map(|it| (*it).to_owned()));
        Self(Daemon::start("enclave-agent", &arguments))
    }

    /// What it logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        self.0.log()
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.0.id()
    }
}
