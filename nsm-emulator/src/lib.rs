//! A Nitro Security Module in software, for tests, the demonstration and the local virtual machine.
//!
//! It keeps platform configuration registers, answers every command of the NSM driver with the real limits and error
//! codes, and signs attestation documents. The documents are genuine in every respect but one: the chain ends in a
//! root that the emulator made when it started. A verifier therefore runs unchanged, with that root as its trust
//! anchor; there is no way to make it accept an unsigned document, and no way for this root to pass where AWS's is
//! expected.
//!
//! [`Emulator::process`] is the module itself, without I/O: bytes in, bytes out. [`serve`] puts it behind a
//! listener, in frames: a length of four bytes, big-endian, and the CBOR.
//!
//! ```
//! let emulator = nsm_emulator::Emulator::new(nsm_emulator::Config::default())?;
//! // The request `{"DescribePCR": {"index": 0}}` ...
//! let response = emulator.process(b"\xa1\x6bDescribePCR\xa1\x65index\x00");
//! // ... is answered with the register's state.
//! assert!(response.starts_with(b"\xa1\x6bDescribePCR"));
//! # Ok::<(), nsm_emulator::Error>(())
//! ```

#![forbid(unsafe_code)]

mod cbor;
pub mod command;
mod document;
mod emulator;
mod error;
mod pki;
mod request;
mod root;
mod serve;

pub use emulator::Emulator;
pub use error::Error;
pub use pki::ROOT_COMMON_NAME;
pub use request::{ErrorCode, MAX_PUBLIC_KEY, MAX_REQUEST, MAX_RESPONSE, MAX_USER_DATA};
pub use root::LocalRoot;
pub use serve::serve;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

/// Number of registers.
pub const PCR_COUNT: usize = 32;

/// Value of a register: a SHA-384 digest.
pub type PcrValue = [u8; 48];

/// Reads the time, in milliseconds since 1970.
pub type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// How the emulated module starts.
pub struct Config {
    /// Start values of registers; the others are zero. Registers 0 to 15 are locked from the start, as the
    /// hypervisor does it. Zero in registers 0 to 2 is what an enclave in debug mode shows.
    pub pcrs: BTreeMap<u8, PcrValue>,
    /// `i-<hex>-enc<hex>`; random when absent.
    pub module_id: Option<String>,
    /// Timestamps of documents and validity of certificates come from here.
    pub clock: Clock,
}

impl Default for Config {
    /// Distinct made-up measurements in registers 0 to 2, a random module id, the system's clock.
    fn default() -> Self {
        let pcrs = (0u8..3).map(|index| (index, [0xa0 + index; 48])).collect();
        Self { pcrs, module_id: None, clock: system_clock(0) }
    }
}

/// The system's clock, moved by `offset` seconds (into the past when negative).
#[must_use]
pub fn system_clock(offset: i64) -> Clock {
    Arc::new(move || {
        #[expect(
            clippy::disallowed_methods,
            reason = "the module's own clock is the source of its timestamps"
        )]
        let now = std::time::SystemTime::now();
        let millis = now.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_millis();
        u64::try_from(millis).unwrap_or(u64::MAX).saturating_add_signed(offset.saturating_mul(1000))
    })
}
