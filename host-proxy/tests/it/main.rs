//! The proxy from outside: over sockets, and as a process.

mod allow_list;
mod limits;
mod process;
mod receive;
mod support;
mod tunnels;
mod vsock;
