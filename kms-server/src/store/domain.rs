//! Host names a KMS can be reached by (reference §8.3).

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// A host name or an IPv4 address; the only name in the RPC certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain(String);

/// Text that is no domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DomainError {
    /// Empty or longer than 253 bytes.
    #[error("domain is {0} bytes long, expected 1 to 253")]
    Length(usize),
    /// A label is empty, too long, or has other characters than letters, digits and inner hyphens.
    #[error("domain contains an invalid DNS label")]
    Label,
}

impl Domain {
    /// Checks the text: 1 to 253 bytes, labels of 1 to 63 letters, digits and hyphens, no hyphen at either end.
    ///
    /// # Errors
    ///
    /// [`DomainError`] says which rule was broken.
    pub fn parse(text: &str) -> Result<Self, DomainError> {
        if !(1..=253).contains(&text.len()) {
            return Err(DomainError::Length(text.len()));
        }
        let is_label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if text.split('.').all(is_label) { Ok(Self(text.to_owned())) } else { Err(DomainError::Label) }
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The address, when the text is one.
    #[must_use]
    pub fn as_ip(&self) -> Option<Ipv4Addr> {
        self.0.parse().ok()
    }
}

impl FromStr for Domain {
    type Err = DomainError;

    fn from_str(text: &str) -> Result<Self, DomainError> {
        Self::parse(text)
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn domains_follow_the_rule() {
        for text in ["a", "localhost", "kms.example.com", "1.2.3.4", "A-b.c", &"a".repeat(63)] {
            assert_eq!(Domain::parse(text).unwrap().as_str(), text);
        }
        for text in ["a_b", "-a", "a-", "a..b", ".a", "a.", "a b", "é", "*.a", "[::1]", &"a".repeat(64)] {
            assert_eq!(Domain::parse(text), Err(DomainError::Label), "{text:?}");
        }
        assert_eq!(Domain::parse(""), Err(DomainError::Length(0)));
        assert_eq!(Domain::parse(&"a.".repeat(127)), Err(DomainError::Length(254)));
    }
}
