//! The file of secret variables, `.env`, and its encryption for the guest.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::{agreement, rand};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use super::python_json;
use crate::Error;

/// Variables in the order of the file, the last value of a name winning at the place of the first, as a Python `dict`
/// keeps them. Wiped when dropped.
pub struct Environment(Vec<(String, Zeroizing<String>)>);

impl Environment {
    /// Reads lines `NAME=value`: blank lines, lines that begin with `#` and lines without `=` are skipped, blanks around
    /// name and value removed; there are no quotes and no expansion.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut variables: Vec<(String, Zeroizing<String>)> = Vec::new();
        for line in text.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
            let Some((name, value)) = line.split_once('=') else { continue };
            let (name, value) = (name.trim(), Zeroizing::new(value.trim().to_owned()));
            match variables.iter_mut().find(|(known, _)| known == name) {
                Some((_, old)) => *old = value,
                None => variables.push((name.to_owned(), value)),
            }
        }
        Self(variables)
    }

    /// The names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }

    /// Whether there is no variable.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// SHA-256 of the variables as they are encrypted.
    ///
    /// # Errors
    ///
    /// [`Error::Random`] when they cannot be serialised, which texts can.
    pub fn digest(&self) -> Result<[u8; 32], Error> {
        Ok(Sha256::digest(&*self.plain()?).into())
    }

    fn plain(&self) -> Result<Zeroizing<Vec<u8>>, Error> {
        #[derive(Serialize)]
        struct Variable<'a> {
            key: &'a str,
            value: &'a str,
        }
        #[derive(Serialize)]
        struct Plain<'a> {
            env: Vec<Variable<'a>>,
        }
        let env = self.0.iter().map(|(key, value)| Variable { key, value }).collect();
        python_json::one_line(&Plain { env }).map(Zeroizing::new).map_err(|_| Error::Random)
    }

    /// Encrypts the variables to the app's public key (X25519, 32 bytes): `ephemeral public key ‖ nonce (12) ‖
    /// AES-256-GCM`, keyed with the raw shared secret, as dstack guests decrypt it.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] when the key is not one X25519 can agree with; [`Error::Random`].
    pub fn encrypt(&self, app_public_key: &[u8; 32]) -> Result<Vec<u8>, Error> {
        let mut sealed = self.plain()?;
        let system = rand::SystemRandom::new();
        let ephemeral = agreement::EphemeralPrivateKey::generate(&agreement::X25519, &system)
            .map_err(|_| Error::Random)?;
        let public = ephemeral.compute_public_key().map_err(|_| Error::Random)?;
        let mut nonce = [0; 12];
        rand::fill(&mut nonce).map_err(|_| Error::Random)?;
        let peer = agreement::UnparsedPublicKey::new(&agreement::X25519, app_public_key);
        let unusable =
            || Error::Setting { setting: "public_key", problem: "is no X25519 key to agree with".into() };
        agreement::agree_ephemeral(ephemeral, peer, unusable(), |shared| {
            let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, shared).map_err(|_| unusable())?);
            let nonce = Nonce::assume_unique_for_key(nonce);
            key.seal_in_place_append_tag(nonce, Aad::empty(), &mut *sealed).map_err(|_| unusable())
        })?;
        Ok([public.as_ref(), &nonce, &sealed].concat())
    }
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::agreement::{PrivateKey, UnparsedPublicKey, X25519, agree};

    use super::*;

    #[test]
    fn lines_are_read_as_dstack_cloud_reads_them() {
        let text = "# comment\n\n A = 1 \nB=x=y\nno equals sign\nA=2\r\n  # indented\nC=\"quoted\" #kept\n";
        let environment = Environment::parse(text);
        let read: Vec<_> =
            environment.0.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(read, [("A", "2"), ("B", "x=y"), ("C", "\"quoted\" #kept")]);
    }

    #[test]
    fn the_guest_s_key_opens_what_was_encrypted_to_it() {
        let guest = PrivateKey::generate(&X25519).unwrap();
        let public: [u8; 32] = guest.compute_public_key().unwrap().as_ref().try_into().unwrap();
        let mut sealed = Environment::parse("K=gehe\u{ef}m").encrypt(&public).unwrap();
        let (ephemeral, rest) = sealed.split_at_mut(32);
        let (nonce, body) = rest.split_at_mut(12);
        let plain = agree(&guest, UnparsedPublicKey::new(&X25519, ephemeral), (), |shared| {
            let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, shared).map_err(|_| ())?);
            let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| ())?;
            key.open_in_place(nonce, Aad::empty(), body).map(|plain| plain.to_vec()).map_err(|_| ())
        });
        let expected = br#"{"env": [{"key": "K", "value": "gehe\u00efm"}]}"#;
        assert_eq!(plain.unwrap(), expected);
    }

    #[test]
    fn a_key_of_small_order_is_refused() {
        let error = Environment::parse("K=V").encrypt(&[0; 32]).unwrap_err();
        assert_eq!(error.to_string(), "public_key: is no X25519 key to agree with");
    }
}
