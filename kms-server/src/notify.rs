//! What systemd wants to know (sd_notify(3)): that the server is ready, that it stops, that it still lives.
//!
//! One datagram per message to the socket that `NOTIFY_SOCKET` names; without it nothing is sent. The watchdog is fed
//! from the async threads, so it barks when they stand still.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};
use tracing::warn;

/// Where to send, and how often to say that the server lives.
#[derive(Debug, Default)]
pub(crate) struct Notify {
    target: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
}

impl Notify {
    /// From the variables that systemd sets. What it cannot use is reported, and is no reason not to serve.
    pub(crate) fn from_environment(variable: impl Fn(&str) -> Option<String>) -> Self {
        let Some(name) = variable("NOTIFY_SOCKET") else { return Self::default() };
        let target = address(&name).and_then(|address| {
            let socket = UnixDatagram::unbound()?;
            // A service manager that does not read must not stop the server.
            socket.set_nonblocking(true)?;
            Ok((socket, address))
        });
        if let Err(error) = &target {
            warn!(%error, socket = name, "cannot notify the service manager");
        }
        // Ours, or anybody's when no process is named.
        let is_ours = variable("WATCHDOG_PID").is_none_or(|pid| pid == std::process::id().to_string());
        let micros = variable("WATCHDOG_USEC").filter(|_| is_ours).and_then(|text| text.parse().ok());
        Self { target: target.ok(), watchdog: micros.map(Duration::from_micros) }
    }

    /// Requests are answered now.
    pub(crate) fn ready(&self) {
        self.send("READY=1");
    }

    /// No further requests are accepted.
    pub(crate) fn stopping(&self) {
        self.send("STOPPING=1");
    }

    /// Says that the server lives, twice as often as it must, until the future is dropped.
    pub(crate) async fn feed_watchdog(&self) {
        let Some(limit) = self.watchdog.filter(|limit| !limit.is_zero()) else {
            return std::future::pending().await;
        };
        let mut ticks = interval(limit / 2);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.send("WATCHDOG=1");
        }
    }

    fn send(&self, message: &str) {
        if let Some((socket, address)) = &self.target
            && let Err(error) = socket.send_to_addr(message.as_bytes(), address)
        {
            warn!(%error, message, "cannot notify the service manager");
        }
    }
}

/// A path, or a name in the abstract namespace after `@`.
fn address(name: &str) -> std::io::Result<SocketAddr> {
    match name.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 64];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    }

    #[tokio::test(start_paused = true)]
    async fn the_service_manager_hears_everything() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let pid = std::process::id().to_string();
        let notify = Notify::from_environment(|name| match name {
            "NOTIFY_SOCKET" => path.to_str().map(str::to_owned),
            "WATCHDOG_USEC" => Some("2000000".into()),
            "WATCHDOG_PID" => Some(pid.clone()),
            _ => None,
        });
        notify.ready();
        assert_eq!(received(&socket), "READY=1");
        // Paused time: three ticks in 2.5 s of it.
        let fed = tokio::time::timeout(Duration::from_millis(2500), notify.feed_watchdog()).await;
        assert!(fed.is_err());
        for _ in 0..3 {
            assert_eq!(received(&socket), "WATCHDOG=1");
        }
        notify.stopping();
        assert_eq!(received(&socket), "STOPPING=1");
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_service_manager_nothing_happens() {
        for variables in [
            None,
            Some(("NOTIFY_SOCKET", "/nowhere/notify")),
            Some(("NOTIFY_SOCKET", "@keyferry-nobody-listens-here")),
        ] {
            let notify = Notify::from_environment(|name| {
                variables.filter(|(known, _)| *known == name).map(|(_, value)| value.to_owned())
            });
            notify.ready();
            notify.stopping();
        }
        let other = Notify::from_environment(|name| match name {
            "NOTIFY_SOCKET" => Some("@x".into()),
            "WATCHDOG_USEC" => Some("1".into()),
            "WATCHDOG_PID" => Some("1".into()),
            _ => None,
        });
        assert_eq!(other.watchdog, None, "another process's watchdog");
    }
}
