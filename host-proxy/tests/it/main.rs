//! The proxy from outside: over sockets, and as a process.

#![allow(clippy::unwrap_used, reason = "the helpers are test code too")]

mod allow_list;
mod corpus;
mod limits;
mod process;
mod receive;
mod support;
mod tunnels;
