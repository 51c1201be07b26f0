//! Why the proxy does not start, or does not take a new configuration.

use std::io;
use std::path::PathBuf;

use transport::{Endpoint, ParseEndpointError};

use crate::policy::rule::RuleError;

/// What can be wrong before the first connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The configuration file cannot be read.
    #[error("{}: cannot read the configuration", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The configuration file is not TOML of the documented form.
    #[error("{}: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and what, over several lines.
        message: String,
    },
    /// A rule cannot be read.
    #[error("service {service}")]
    Rule {
        /// The service it stands in.
        service: String,
        /// What is wrong with it.
        source: RuleError,
    },
    /// An address cannot be read.
    #[error("service {service}")]
    Endpoint {
        /// The service it stands in.
        service: String,
        /// What is wrong with it.
        source: ParseEndpointError,
    },
    /// A value that makes no sense.
    #[error("service {service}: {message}")]
    Value {
        /// The service it stands in, or the section.
        service: String,
        /// What is wrong, and what is expected.
        message: String,
    },
    /// Two services want the same address.
    #[error("{endpoint} is listened on by {first} and by {second}")]
    SameListener {
        /// The address.
        endpoint: Endpoint,
        /// The first service.
        first: String,
        /// The second service.
        second: String,
    },
    /// Nothing to do.
    #[error("nothing to listen on; expected --listen, or a service in the configuration")]
    NoService,
    /// A listener cannot be opened.
    #[error("service {service}")]
    Listen {
        /// The service.
        service: String,
        /// Why.
        source: transport::Error,
    },
    /// The system's resolver cannot be set up.
    #[error("cannot set up the resolver from /etc/resolv.conf")]
    Resolver {
        /// Why.
        source: io::Error,
    },
}
