//! Fetches an enclave's application keys from a dstack KMS.

#![forbid(unsafe_code)]

mod deadlines;
pub mod evidence;
mod http;
pub mod nsm;
pub mod output;
mod proxy;
mod url;

pub use deadlines::{Deadlines, DurationArg, Retry};
pub use http::HttpError;
pub use proxy::{Proxy, ProxyError};
pub use url::{KmsUrl, ParseUrlError};
