//! Durations and sizes as people write them in kms.toml.

use std::time::Duration;

/// `500ms`, `10s`, `2m`, `1h`; a number alone is not accepted, for its unit would be a guess.
pub(super) fn duration(text: &str) -> Option<Duration> {
    let digits = text.find(|character: char| !character.is_ascii_digit())?;
    let number: u64 = text[..digits].parse().ok()?;
    let millis = match text[digits..].trim_start() {
        "ms" => 1,
        "s" => 1000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    number.checked_mul(millis).map(Duration::from_millis)
}

/// `512`, `512B`, `1KiB`, `10 MiB`, `1kB`, `2MB`: bytes.
pub(super) fn size(text: &str) -> Option<usize> {
    let digits = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
    let number: usize = text[..digits].parse().ok()?;
    let factor = match text[digits..].trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kib" => 1 << 10,
        "kb" => 1000,
        "mib" => 1 << 20,
        "mb" => 1_000_000,
        "gib" => 1 << 30,
        "gb" => 1_000_000_000,
        _ => return None,
    };
    number.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(duration("250ms"), Some(Duration::from_millis(250)));
        assert_eq!(duration("10s"), Some(Duration::from_secs(10)));
        assert_eq!(duration("2m"), Some(Duration::from_secs(120)));
        for text in ["", "10", "s", "-1s", "1.5s", "1d", "99999999999999999999s", "18446744073709551615h"] {
            assert_eq!(duration(text), None, "{text:?}");
        }
    }

    #[test]
    fn sizes_know_both_families_of_units() {
        assert_eq!(size("1KiB"), Some(1024));
        assert_eq!(size("10 MiB"), Some(10 << 20));
        assert_eq!(size("512"), Some(512));
        assert_eq!(size("2MB"), Some(2_000_000));
        for text in ["", "KiB", "-1", "1.5MiB", "1TiB", "99999999999999999999GiB"] {
            assert_eq!(size(text), None, "{text:?}");
        }
    }
}
