//! Carries a KMS from a project folder to serving keys, on whatever machine.
//!
//! ```text
//! (nothing) ──deploy──▶ booting ──console, HTTP answers──▶ onboarding ──authoriser answers──▶ ready
//! ready ──GetAttestationInfo, compared with what is expected──▶ measured ──registered, name resolves──▶ allowed
//! allowed ──Bootstrap, or Onboard from a source──▶ keys, whose evidence binds them ──Finish──▶ restarting
//! restarting ──HTTPS GetMeta under the pinned root──▶ serving ──▶ kms.json, the port for clients
//! ```
//!
//! Each arrow is recorded on disk when it was gone ([`Record`]), so a run that was killed is gone on with. Each wait has
//! a deadline of its own and says at its end what it saw last and where to look ([`Gate`]).
//!
//! Until `Finish` the KMS is set up over plain HTTP by whoever reaches the port: the port is open to the operator's
//! addresses alone, and nothing that came over it is believed before evidence verified.
//!
//! | part | what it stands for |
//! | --- | --- |
//! | [`Machine`] | where the KMS runs: makes it, reads its console, opens its port |
//! | [`Node`] | the KMS on it, asked over the network |
//! | [`Verifier`] | who judges evidence |
//! | [`Registrar`] | who writes measurements to where the KMS's authoriser reads them |
//!
//! What a bring-up needs besides is in [`Wanted`]; [`bring_up`] does the work.

mod console;
mod error;
mod gate;
mod http;
mod machine;
mod node;
#[cfg(test)]
mod outside;
mod record;
mod run;
mod serving;
#[cfg(test)]
mod tests;

pub use console::{Milestone, Milestones, Trouble};
pub use error::Error;
pub(crate) use gate::time_of;
pub use gate::{Exception, Gate, Patience};
pub use http::HttpNode;
pub use machine::{ConsoleText, Guest, Machine, Visitors};
pub use node::{Authoriser, Front, Node, NodeError, Place, Refusal, Served};
pub use record::{Keys, Measured, Record, Role};
pub use run::{Expected, Observer, Outcome, Wanted, bring_up};

use std::future::Future;
use std::pin::Pin;

use kms_protocol::wire::webhook::BootInfo;

/// A future behind a `dyn` trait.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Why evidence proves nothing, or a registration failed; in the words of who judged.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Judges evidence. Implemented above this crate, where evidence is verified for clients too.
pub trait Verifier: Send + Sync {
    /// Verifies an encoded attestation that must be over `report_data`. What comes back is proven, not claimed.
    fn evidence<'a>(
        &'a self,
        encoded: &'a [u8],
        report_data: [u8; 64],
    ) -> Pending<'a, Result<BootInfo, Cause>>;

    /// Verifies the evidence in a certificate (DER), which must speak for the certificate's key; `None` when there is
    /// none in it.
    fn certificate<'a>(&'a self, der: &'a [u8]) -> Pending<'a, Result<Option<BootInfo>, Cause>>;
}

/// Registers measurements.
pub trait Registrar: Send + Sync {
    /// Registers them, or does nothing when that is not configured; says whether they are registered.
    fn register<'a>(&'a self, measured: &'a Measured) -> Pending<'a, Result<bool, Cause>>;
}
