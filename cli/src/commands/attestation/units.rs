//! Arguments with a unit.

use std::str::FromStr;
use std::time::Duration;

use attestation::{Pcr, PcrIndex, UnixMillis};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// A register and the value it must have.
#[derive(Clone, Copy, Debug)]
pub(super) struct PcrValue(pub(super) PcrIndex, pub(super) Pcr);

/// Bytes in hex, `0x` allowed.
#[derive(Clone, Debug)]
pub(super) struct Hex(pub(super) Vec<u8>);

impl FromStr for Hex {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.strip_prefix("0x").unwrap_or(text);
        hex::decode(digits).map(Self).map_err(|error| format!("expected hex: {error}"))
    }
}

/// A point in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Instant(pub(super) UnixMillis);

impl FromStr for Instant {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let millis = match text.strip_prefix('@') {
            Some(seconds) => millis_of_seconds(seconds),
            None => OffsetDateTime::parse(text, &Rfc3339)
                .ok()
                .and_then(|at| u64::try_from(at.unix_timestamp_nanos().div_euclid(1_000_000)).ok()),
        };
        millis
            .map(|millis| Self(UnixMillis(millis)))
            .ok_or_else(|| "expected a time since 1970, like 2026-01-15T12:00:00Z or @1768478400.25".into())
    }
}

/// `SECONDS[.FRACTION]`; what is finer than a millisecond is cut off.
fn millis_of_seconds(text: &str) -> Option<u64> {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let (whole, fraction) = match text.split_once('.') {
        Some((whole, fraction)) => (whole, digits(fraction).then_some(fraction)?),
        None => (text, ""),
    };
    let seconds: u64 = digits(whole).then(|| whole.parse().ok())??;
    let millis: u64 = format!("{fraction:0<3}").get(..3)?.parse().ok()?;
    seconds.checked_mul(1000)?.checked_add(millis)
}

/// Milliseconds since 1970 as people read them; RFC 3339 ends with the year 9999.
pub(in crate::commands) fn rfc3339(at: UnixMillis) -> Option<String> {
    let date = OffsetDateTime::from_unix_timestamp_nanos(i128::from(at.0) * 1_000_000).ok()?;
    date.format(&Rfc3339).ok()
}

/// How long something may be: a number of seconds, or a number with the unit ms, s, m, h or d.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Age(pub(super) Duration);

impl FromStr for Age {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let end = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(end);
        let millis = match unit {
            "ms" => 1,
            "" | "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => 0,
        };
        let number = number.parse::<u64>().ok().filter(|_| millis > 0);
        let age = number.and_then(|number| number.checked_mul(millis));
        let age = age.map(|millis| Self(Duration::from_millis(millis)));
        age.ok_or_else(|| "expected a number of seconds, or one with ms, s, m, h or d".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instants_are_seconds_or_dates() {
        for (text, millis) in [
            ("@0", 0),
            ("@1768478400", 1_768_478_400_000),
            ("@1768478400.25", 1_768_478_400_250),
            ("@1768478400.0009", 1_768_478_400_000),
            ("@1768478400.123456789123", 1_768_478_400_123),
            ("2026-01-15T12:00:00Z", 1_768_478_400_000),
            ("2026-01-15T12:00:00.25Z", 1_768_478_400_250),
            ("2026-01-15T13:30:00+01:30", 1_768_478_400_000),
        ] {
            assert_eq!(text.parse(), Ok(Instant(UnixMillis(millis))), "{text}");
        }
        let overflow = format!("@{}", u64::MAX);
        for wrong in [
            "",
            "@",
            "@-1",
            "@1.",
            "@.5",
            "@1.5.5",
            "@1e9",
            "@+1",
            "@ 1",
            "2026-01-15",
            "1969-12-31T23:59:59Z",
        ] {
            assert!(wrong.parse::<Instant>().is_err(), "{wrong}");
        }
        assert!(overflow.parse::<Instant>().is_err());
    }

    #[test]
    fn ages_have_units() {
        for (text, millis) in
            [("0", 0), ("90", 90_000), ("90s", 90_000), ("5m", 300_000), ("1h", 3_600_000), ("7ms", 7)]
        {
            assert_eq!(text.parse(), Ok(Age(Duration::from_millis(millis))), "{text}");
        }
        for wrong in ["", "s", "-1", "1.5h", "1 h", "1w", "18446744073709551616", "18446744073709551615d"] {
            assert!(wrong.parse::<Age>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn far_times_have_no_date() {
        assert_eq!(rfc3339(UnixMillis(1_768_478_400_250)).unwrap(), "2026-01-15T12:00:00.25Z");
        assert_eq!(rfc3339(UnixMillis(u64::MAX)), None);
    }
}
