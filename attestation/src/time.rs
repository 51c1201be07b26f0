//! Time as an argument: this crate reads no clock.

use std::time::{Duration, SystemTime, SystemTimeError, UNIX_EPOCH};

/// Milliseconds since 1970-01-01T00:00:00Z, the unit of NSM timestamps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnixMillis(pub u64);

impl UnixMillis {
    /// From seconds since 1970; saturates.
    pub const fn from_secs(secs: u64) -> Self {
        Self(secs.saturating_mul(1000))
    }

    /// Whole seconds since 1970, the unit of certificate validity.
    pub const fn as_secs(self) -> u64 {
        self.0 / 1000
    }
}

/// From time since 1970; saturates.
impl From<Duration> for UnixMillis {
    fn from(since_1970: Duration) -> Self {
        Self(u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX))
    }
}

/// Fails for a time before 1970.
impl TryFrom<SystemTime> for UnixMillis {
    type Error = SystemTimeError;

    fn try_from(time: SystemTime) -> Result<Self, SystemTimeError> {
        time.duration_since(UNIX_EPOCH).map(Self::from)
    }
}
