//! One type for each secret: filled in place, wiped on drop, without `Clone`, `Debug` or `Serialize`.

/// A secret of the wrong length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{what} is {actual} bytes, expected 32")]
pub struct SecretLength {
    /// Which secret.
    pub what: &'static str,
    /// Its length.
    pub actual: usize,
}

macro_rules! secret_key {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        pub struct $name(Box<zeroize::Zeroizing<[u8; 32]>>);

        impl $name {
            /// Fills the key in place, so that no second copy is left on the stack.
            ///
            /// # Errors
            /// Those of `fill`.
            pub fn init_with<E>(fill: impl FnOnce(&mut [u8; 32]) -> Result<(), E>) -> Result<Self, E> {
                let mut key = Box::new(zeroize::Zeroizing::new([0; 32]));
                fill(&mut key).map(|()| Self(key))
            }

            /// Copies the key out of a message; the caller wipes the message.
            ///
            /// # Errors
            /// When it is not 32 bytes long.
            pub fn from_slice(bytes: &[u8]) -> Result<Self, crate::secret::SecretLength> {
                Self::init_with(|key| {
                    if bytes.len() != key.len() {
                        return Err(crate::secret::SecretLength { what: $what, actual: bytes.len() });
                    }
                    key.copy_from_slice(bytes);
                    Ok(())
                })
            }

            /// The bytes. Whoever copies them wipes the copy.
            #[must_use]
            pub fn expose(&self) -> &[u8; 32] {
                &self.0
            }
        }
    };
}
pub(crate) use secret_key;
