//! One endpoint type for vsock, Unix and TCP sockets; every connect has a deadline.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`endpoint`] | [`Endpoint`], parsed from `vsock:CID:PORT`, `unix:PATH` or `tcp:HOST:PORT` |
//! | [`listener`] | [`Listener`]: bind, accept, the life of a Unix socket file |
//! | [`stream`] | [`Stream`]: a connected socket of any of the three kinds, and [`Peer`] |
//! | [`connect`] | HTTP `CONNECT` through a proxy, on any stream |
//! | [`frame`] | `u32` big-endian length and payload, with a maximum |
//! | [`delivery`] | one message with length and digest, and the answer to it |
//!
//! This crate is the only user of tokio-vsock. It knows nothing of TLS, of attestation or of policy.
//!
//! ```
//! use transport::Endpoint;
//!
//! let proxy: Endpoint = "vsock:3:3128".parse()?;
//! assert_eq!(proxy.to_string(), "vsock:3:3128");
//! assert!("vsock:3".parse::<Endpoint>().is_err());
//! # Ok::<(), transport::ParseEndpointError>(())
//! ```

#![forbid(unsafe_code)]

pub mod connect;
pub mod delivery;
pub mod endpoint;
mod error;
pub mod frame;
pub mod listener;
pub mod stream;

pub use connect::{ConnectTarget, Prefixed, connect_through};
pub use endpoint::{EnclaveCid, Endpoint, ParseEndpointError, TcpHost, VsockCid, VsockPort};
pub use error::Error;
pub use listener::{BindOptions, Listener};
pub use stream::{Peer, Stream};
