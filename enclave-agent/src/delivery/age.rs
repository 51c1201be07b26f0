//! Encryption to age recipients (the format `age-encryption.org/v1`, X25519 only), without decryption.
//!
//! The `age` crate does this and much more, for 106 kB of a program that has to stay under 6 MB; what is needed here is
//! one header and one chunk, from primitives that TLS brings along. Tests open what is written here with that crate,
//! and so does `keyferry keys open`.
//!
//! ```text
//! age-encryption.org/v1
//! -> X25519 <share>                       one for each recipient: the file key, encrypted to it
//! <file key, encrypted>
//! -> keyferry-nsm-v1                      ours, which other programs skip, as the format demands
//! <attestation document whose user_data is the plaintext's report data>
//! --- <HMAC of all above under the file key>
//! <nonce><one chunk, ChaCha20-Poly1305>
//! ```
//!
//! Anybody can encrypt to a recipient, so ciphertext alone does not say who wrote it: the parent could put keys of its
//! own in its place. The document does say: this image, at this time, exported exactly this plaintext.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::agreement::{PrivateKey, UnparsedPublicKey, X25519, agree};
use aws_lc_rs::error::Unspecified;
use aws_lc_rs::{hkdf, hmac, rand};
use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use bech32::Hrp;
use bech32::primitives::decode::CheckedHrpstring;
use zeroize::{Zeroize, Zeroizing};

/// Type of the stanza that holds an attestation document.
pub const EVIDENCE_STANZA: &str = "keyferry-nsm-v1";

const VERSION_LINE: &str = "age-encryption.org/v1\n";
const X25519_INFO: &[u8] = b"age-encryption.org/v1/X25519";
/// Human-readable part of a recipient.
const HRP: Hrp = Hrp::parse_unchecked("age");
const FILE_KEY_LEN: usize = 16;
const TAG_LEN: usize = 16;
/// Characters in a full line of a stanza's body.
const COLUMNS: usize = 64;
/// Longest plaintext: one chunk.
pub(super) const MAX_PLAINTEXT: usize = 64 * 1024;

/// Whom to encrypt to: an X25519 public key, written `age1…`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Recipient([u8; 32]);

/// Why a text is no recipient.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected an age X25519 recipient: `age1` and 58 characters more, as age-keygen prints it")]
pub struct ParseRecipientError;

/// Why nothing was encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    /// There is nobody to encrypt to.
    #[error("no recipient")]
    NoRecipient,
    /// The plaintext is larger than one chunk.
    #[error("{0} bytes to encrypt, at most {MAX_PLAINTEXT}")]
    TooLong(usize),
    /// A recipient is a point of small order, or the system gave no randomness.
    #[error("a recipient's key cannot be used")]
    Crypto,
}

impl From<Unspecified> for SealError {
    fn from(_: Unspecified) -> Self {
        Self::Crypto
    }
}

impl FromStr for Recipient {
    type Err = ParseRecipientError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let checked = CheckedHrpstring::new::<bech32::Bech32>(text).map_err(|_| ParseRecipientError)?;
        // Secret keys are written in capitals, recipients never.
        if checked.hrp() != HRP || text.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err(ParseRecipientError);
        }
        let bytes: Vec<u8> = checked.byte_iter().collect();
        bytes.try_into().map(Self).map_err(|_| ParseRecipientError)
    }
}

impl fmt::Display for Recipient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = bech32::encode::<bech32::Bech32>(HRP, &self.0).map_err(|_| fmt::Error)?;
        f.write_str(&text)
    }
}

impl fmt::Debug for Recipient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Recipient({self})")
    }
}

/// Encrypts `plaintext` to all recipients; `evidence` is shown to everybody.
///
/// # Errors
/// [`SealError`].
pub fn seal(
    recipients: &[Recipient],
    evidence: Option<&[u8]>,
    plaintext: &[u8],
) -> Result<Vec<u8>, SealError> {
    if recipients.is_empty() {
        return Err(SealError::NoRecipient);
    }
    if plaintext.len() > MAX_PLAINTEXT {
        return Err(SealError::TooLong(plaintext.len()));
    }
    let mut file_key = Zeroizing::new([0; FILE_KEY_LEN]);
    rand::fill(file_key.as_mut_slice())?;
    let mut out = VERSION_LINE.as_bytes().to_vec();
    for recipient in recipients {
        let (share, body) = wrap(&file_key, recipient)?;
        stanza(&mut out, &["X25519", &STANDARD_NO_PAD.encode(share)], &body);
    }
    if let Some(document) = evidence {
        stanza(&mut out, &[EVIDENCE_STANZA], document);
    }
    out.extend(b"---");
    let mac_key = derive(file_key.as_slice(), &[], b"header")?;
    let mac = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, mac_key.as_slice()), &out);
    out.push(b' ');
    out.extend(STANDARD_NO_PAD.encode(mac).bytes());
    out.push(b'\n');

    let mut nonce = [0; 16];
    rand::fill(&mut nonce)?;
    out.extend(nonce);
    let payload_key = derive(file_key.as_slice(), &nonce, b"payload")?;
    // The counter of the first chunk is zero; the last byte says that it is also the last one.
    let mut chunk_nonce = [0; NONCE_LEN];
    chunk_nonce[NONCE_LEN - 1] = 1;
    out.extend(encrypt(&payload_key, chunk_nonce, plaintext)?);
    Ok(out)
}

/// The file key, encrypted to one recipient, and the public share that goes with it.
fn wrap(file_key: &[u8; FILE_KEY_LEN], recipient: &Recipient) -> Result<(Vec<u8>, Vec<u8>), SealError> {
    let ephemeral = PrivateKey::generate(&X25519)?;
    let share = ephemeral.compute_public_key()?;
    let salt = [share.as_ref(), &recipient.0].concat();
    let peer = UnparsedPublicKey::new(&X25519, recipient.0);
    // A point of small order gives an error here, as the format demands.
    let key = agree(&ephemeral, peer, Unspecified, |shared| derive(shared, &salt, X25519_INFO))?;
    let body = encrypt(&key, [0; NONCE_LEN], file_key)?;
    Ok((share.as_ref().to_vec(), body))
}

fn derive(ikm: &[u8], salt: &[u8], info: &[u8]) -> Result<Zeroizing<[u8; 32]>, Unspecified> {
    let info = [info];
    let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(ikm);
    let mut key = Zeroizing::new([0; 32]);
    prk.expand(&info, hkdf::HKDF_SHA256)?.fill(key.as_mut_slice())?;
    Ok(key)
}

fn encrypt(key: &[u8; 32], nonce: [u8; NONCE_LEN], plaintext: &[u8]) -> Result<Vec<u8>, Unspecified> {
    let key = LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, key)?);
    // With room for the tag, so that the plaintext is not left behind in a smaller buffer.
    let mut buffer = Vec::with_capacity(plaintext.len() + TAG_LEN);
    buffer.extend_from_slice(plaintext);
    let sealed = key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::empty(), &mut buffer);
    if sealed.is_err() {
        buffer.zeroize();
    }
    sealed.map(|()| buffer)
}

/// Writes a stanza; the last line of its body is shorter than the others, and empty if need be.
fn stanza(out: &mut Vec<u8>, head: &[&str], body: &[u8]) {
    out.extend(b"-> ");
    out.extend(head.join(" ").bytes());
    out.push(b'\n');
    let text = STANDARD_NO_PAD.encode(body);
    let mut lines = text.as_bytes().chunks_exact(COLUMNS);
    for line in &mut lines {
        out.extend(line);
        out.push(b'\n');
    }
    out.extend(lines.remainder());
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use proptest::prelude::*;

    use super::*;

    fn open(identity: &age::x25519::Identity, sealed: &[u8]) -> Result<Vec<u8>, age::DecryptError> {
        let mut plaintext = Vec::new();
        let identities = [identity as &dyn age::Identity];
        age::Decryptor::new(sealed)?.decrypt(identities.into_iter())?.read_to_end(&mut plaintext)?;
        Ok(plaintext)
    }

    fn recipient(identity: &age::x25519::Identity) -> Recipient {
        identity.to_public().to_string().parse().unwrap()
    }

    #[test]
    fn every_recipient_can_open_it_and_nobody_else() {
        let [a, b, other] = [(); 3].map(|()| age::x25519::Identity::generate());
        let sealed = seal(&[recipient(&a), recipient(&b)], Some(&[7; 4600]), b"keys").unwrap();
        assert_eq!(open(&a, &sealed).unwrap(), b"keys");
        assert_eq!(open(&b, &sealed).unwrap(), b"keys");
        assert!(matches!(open(&other, &sealed), Err(age::DecryptError::NoMatchingKeys)));
    }

    #[test]
    fn the_largest_plaintext_fits_and_one_byte_more_does_not() {
        let identity = age::x25519::Identity::generate();
        let to = [recipient(&identity)];
        let whole = vec![5; MAX_PLAINTEXT];
        assert_eq!(open(&identity, &seal(&to, None, &whole).unwrap()).unwrap(), whole);
        assert_eq!(seal(&to, None, &vec![0; MAX_PLAINTEXT + 1]), Err(SealError::TooLong(MAX_PLAINTEXT + 1)));
    }

    #[test]
    fn nobody_is_no_recipient() {
        assert_eq!(seal(&[], None, b"keys"), Err(SealError::NoRecipient));
    }

    #[test]
    fn a_point_of_small_order_is_refused() {
        assert_eq!(seal(&[Recipient([0; 32])], None, b"keys"), Err(SealError::Crypto));
    }

    #[test]
    fn recipients_are_read_as_age_keygen_prints_them() {
        let text = age::x25519::Identity::generate().to_public().to_string();
        let recipient: Recipient = text.parse().unwrap();
        assert_eq!(recipient.to_string(), text);
        for len in 0..text.len() {
            assert_eq!(
                text[..len].parse::<Recipient>(),
                Err(ParseRecipientError),
                "accepted {len} characters"
            );
        }
        let secret =
            age::secrecy::ExposeSecret::expose_secret(&age::x25519::Identity::generate().to_string())
                .to_owned();
        let wrong = [secret, text.to_uppercase(), format!("{text}q"), text.replacen("age1", "agf1", 1)];
        for text in wrong {
            assert_eq!(text.parse::<Recipient>(), Err(ParseRecipientError), "{text}");
        }
    }

    proptest! {
        #[test]
        fn round_trip(plaintext in proptest::collection::vec(any::<u8>(), 0..300), len in 0_usize..200) {
            let identity = age::x25519::Identity::generate();
            let sealed = seal(&[recipient(&identity)], Some(&vec![1; len]), &plaintext).unwrap();
            prop_assert_eq!(open(&identity, &sealed).unwrap(), plaintext);
        }
    }
}
