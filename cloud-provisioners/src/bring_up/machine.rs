//! The machine a KMS runs on.

use std::future::Future;
use std::net::SocketAddr;

use ipnet::IpNet;

/// What a machine printed on its console.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConsoleText {
    /// The text.
    pub text: String,
    /// Position to go on from.
    pub next: u64,
    /// Bytes that were dropped before they could be read.
    pub lost: u64,
}

/// Whom the KMS's port lets in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Visitors {
    /// Those who set the KMS up.
    Operators(Vec<IpNet>),
    /// Those who ask for keys; nobody when empty.
    Clients(Vec<IpNet>),
}

/// What became of the guest when the port was opened or closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// It runs on.
    RunsOn,
    /// It had to be started anew.
    StartsAnew,
}

/// A machine that a KMS is brought up on. Everything may be called again: what holds already is left as it is.
///
/// Futures are dropped when a run is cut; whatever a machine makes must be in a record of its own before the call that
/// makes it.
pub trait Machine: Send {
    /// Makes the machine, unless it is there as wanted. Answers what tells this machine from a later one in its place
    /// (an id, a time of creation): keys made on one are not on the other.
    fn deploy(&mut self) -> impl Future<Output = Result<String, crate::Error>> + Send;

    /// Where the KMS's port is reached from here, once that is known.
    fn address(&mut self) -> impl Future<Output = Result<Option<SocketAddr>, crate::Error>> + Send;

    /// What the console printed from position `from` on.
    fn console(&mut self, from: u64) -> impl Future<Output = Result<ConsoleText, crate::Error>> + Send;

    /// Opens the KMS's port to these and closes it to everybody else.
    fn admit(&mut self, visitors: &Visitors) -> impl Future<Output = Result<Guest, crate::Error>> + Send;

    /// The command by which an operator reads the console, for hints.
    fn console_command(&self) -> String;
}
