//! JSON-RPC over HTTP, for peers that are slow, wrong or hostile: every request has a deadline, every answer a size
//! limit, and several endpoints can be made to agree.

mod endpoint;
mod endpoints;
mod types;

pub use endpoint::{Endpoint, Limits};
#[cfg(feature = "write")]
pub(crate) use endpoints::patiently;
pub use endpoints::{Clock, Endpoints, View};
pub use types::{Head, Log, Receipt};
