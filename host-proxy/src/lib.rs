//! The enclave's only way out: an allow-listing CONNECT proxy on the parent.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`policy`] | the allow-list: targets, rules, address classes. Pure |
//! | [`http`] | the head of a CONNECT, and the answers to it. Pure |
//! | [`tls`] | the server name in a ClientHello. Pure |
//! | [`config`] | the validated configuration |
//! | [`args`], [`mod@file`] | the command line and the configuration file |
//! | [`explain`] | the decision about a target, for people |
//! | [`proxy`] | [`Proxy`]: listeners, reload, stop |
//! | [`service`] | what is done with a connection: egress, forward, receive, heartbeat |
//! | [`resolve`] | names to addresses |
//! | `pump` | moves the bytes of a tunnel |
//! | `accept`, `limits`, `record`, `metrics`, `admin` | accepting, counting, telling |
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use host_proxy::config::{Config, Service};
//! use host_proxy::policy::{Entry, RuleSet};
//! use host_proxy::Proxy;
//!
//! let rules = RuleSet::new(vec![Entry::new("kms.example.com:12001".parse()?)]);
//! let proxy = Proxy::start(Config::new(vec![Service::egress("egress", "tcp:127.0.0.1:0".parse()?, rules)])?).await?;
//! println!("listening on {}", proxy.endpoint("egress").expect("just started"));
//! proxy.shutdown().await;
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

mod accept;
mod admin;
pub mod args;
mod commands;
pub mod config;
mod dial;
pub mod error;
pub mod explain;
pub mod file;
pub mod http;
pub mod limits;
mod metrics;
mod notify;
mod output;
pub mod policy;
pub mod proxy;
mod pump;
pub mod record;
pub mod resolve;
pub mod service;
pub mod tls;

pub use commands::{run, run_here};
pub use config::Config;
pub use error::Error;
pub use proxy::{Options, Proxy};
pub use record::{Observer, Outcome};

/// The systemd unit, hardened; it says itself where program and configuration lie.
pub const UNIT: &str = include_str!("../host-proxy.service");
