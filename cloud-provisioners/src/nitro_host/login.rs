//! Keys that log in: Ed25519 and ECDSA by the SSH library, RSA, which EC2 makes unless asked otherwise, by aws-lc, and
//! those that only an SSH agent can use.
//!
//! The SSH library's own RSA takes a crate with a timing side channel (RUSTSEC-2023-0071) and is not built in.

use std::path::Path;
use std::sync::Arc;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeyPairComponents, PublicKeyComponents};
use aws_lc_rs::signature::{KeyPair as _, RSA_PKCS1_SHA256, RSA_PKCS1_SHA512, RsaKeyPair};
use crypto_bigint::{BoxedUint, NonZero};
use der::Decode as _;
use der::Reader as _;
use der::asn1::UintRef;
use russh::client::{Handle, Handler};
use russh::keys::agent::AgentIdentity;
use russh::keys::agent::client::AgentClient;
use russh::keys::ssh_encoding::Encode as _;
use russh::keys::ssh_key::Mpint;
use russh::keys::ssh_key::private::{KeypairData, RsaKeypair};
use russh::keys::ssh_key::public::{KeyData, RsaPublicKey};
use russh::keys::{Algorithm, HashAlg, PrivateKey, PrivateKeyWithHashAlg, PublicKey};
use russh::{AgentAuthError, SendError, Signer};
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject as _;
use zeroize::{Zeroize as _, Zeroizing};

/// Largest file with a private key.
const MAX_FILE: u64 = 64 << 10;

/// Why a key cannot log in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeyError {
    #[error("cannot be read")]
    File(#[source] std::io::Error),
    #[error("has {0} bytes, expected a private key")]
    TooLarge(u64),
    #[error("is no private key: {0}")]
    Unreadable(String),
    #[error("has a passphrase, which nobody can enter here")]
    Passphrase,
    #[error("is a key of type {0}, expected Ed25519, ECDSA or RSA")]
    Type(String),
    #[error("is an RSA key that cannot be used: {0}")]
    Rsa(String),
    #[error("has a passphrase or is a public key, and no SSH agent can be asked for it")]
    NoAgent(#[source] russh::keys::Error),
    #[error("has a passphrase or is a public key, and the SSH agent does not have it")]
    NotInAgent,
    #[error("the SSH agent does not sign")]
    Agent(#[source] AgentAuthError),
    #[error(transparent)]
    Ssh(#[from] russh::Error),
}

/// A key that logs in.
pub(crate) enum LoginKey {
    /// Ed25519 or ECDSA.
    Own(Arc<PrivateKey>),
    /// RSA, with its public half.
    Rsa(Box<RsaKeyPair>, PublicKey),
    /// One of which only the public half can be read here.
    Agent(PublicKey),
}

impl LoginKey {
    /// Reads a key's file. It blocks.
    pub(crate) fn read(path: &Path) -> Result<Self, KeyError> {
        let size = std::fs::metadata(path).map_err(KeyError::File)?.len();
        if size > MAX_FILE {
            return Err(KeyError::TooLarge(size));
        }
        Self::parse(&Zeroizing::new(std::fs::read_to_string(path).map_err(KeyError::File)?))
    }

    /// Takes a private key in OpenSSH's form, PKCS#8, PKCS#1 or SEC1, or a public one in OpenSSH's form.
    pub(crate) fn parse(text: &str) -> Result<Self, KeyError> {
        let unreadable = |error: &dyn std::error::Error| KeyError::Unreadable(error.to_string());
        if !text.contains("-----BEGIN ") {
            let public = PublicKey::from_openssh(text.trim()).map_err(|error| unreadable(&error))?;
            return Ok(Self::Agent(public));
        }
        if text.contains("-----BEGIN OPENSSH PRIVATE KEY-----") {
            let key = PrivateKey::from_openssh(text).map_err(|error| unreadable(&error))?;
            return Self::of(key);
        }
        if text.contains("-----BEGIN ENCRYPTED") || text.contains("\nProc-Type: 4,ENCRYPTED") {
            return Err(KeyError::Passphrase);
        }
        let mut der = PrivateKeyDer::from_pem_slice(text.as_bytes()).map_err(|error| unreadable(&error))?;
        let rsa = match &der {
            PrivateKeyDer::Pkcs1(der) => Some(RsaKeyPair::from_der(der.secret_pkcs1_der())),
            // Or another kind of key.
            PrivateKeyDer::Pkcs8(der) => RsaKeyPair::from_pkcs8(der.secret_pkcs8_der()).ok().map(Ok),
            _ => None,
        };
        der.zeroize();
        match rsa {
            Some(pair) => {
                let pair = pair.map_err(|error| KeyError::Rsa(error.to_string()))?;
                let public = public_half(pair.public_key().as_ref())?;
                Ok(Self::Rsa(Box::new(pair), public))
            }
            None => Self::of(russh::keys::decode_secret_key(text, None).map_err(|error| unreadable(&error))?),
        }
    }

    fn of(key: PrivateKey) -> Result<Self, KeyError> {
        if key.is_encrypted() {
            return Ok(Self::Agent(key.public_key().clone()));
        }
        match key.key_data() {
            KeypairData::Ed25519(_) | KeypairData::Ecdsa(_) => Ok(Self::Own(Arc::new(key))),
            KeypairData::Rsa(pair) => Ok(Self::Rsa(
                Box::new(rsa_of(pair)?),
                PublicKey::new(KeyData::Rsa(pair.public().clone()), ""),
            )),
            _ => Err(KeyError::Type(key.algorithm().to_string())),
        }
    }

    /// The public half.
    pub(crate) fn public(&self) -> &PublicKey {
        match self {
            Self::Own(key) => key.public_key(),
            Self::Rsa(_, public) | Self::Agent(public) => public,
        }
    }

    /// Whether the key is let in.
    pub(crate) async fn log_in<H: Handler>(
        self,
        handle: &mut Handle<H>,
        user: &str,
    ) -> Result<bool, KeyError> {
        let told = match self {
            Self::Own(key) => {
                handle.authenticate_publickey(user, PrivateKeyWithHashAlg::new(key, None)).await?
            }
            Self::Rsa(pair, public) => {
                let hash = rsa_hash(handle).await?;
                handle.authenticate_publickey_with(user, public, Some(hash), &mut Rsa(pair)).await?
            }
            Self::Agent(public) => {
                let mut agent = AgentClient::connect_env().await.map_err(KeyError::NoAgent)?;
                let held = agent.request_identities().await.map_err(KeyError::NoAgent)?;
                if !held.iter().any(|it| it.public_key().key_data() == public.key_data()) {
                    return Err(KeyError::NotInAgent);
                }
                let hash = match public.algorithm() {
                    Algorithm::Rsa { .. } => Some(rsa_hash(handle).await?),
                    _ => None,
                };
                let told = handle.authenticate_publickey_with(user, public, hash, &mut agent).await;
                told.map_err(KeyError::Agent)?
            }
        };
        Ok(told.success())
    }
}

/// SHA-2, whatever the server says: with SHA-1 nobody is let in any more.
async fn rsa_hash<H: Handler>(handle: &Handle<H>) -> Result<HashAlg, russh::Error> {
    let best = handle.best_supported_rsa_hash().await?;
    Ok(best.flatten().unwrap_or(HashAlg::Sha512))
}

/// Signs by aws-lc.
struct Rsa(Box<RsaKeyPair>);

impl Signer for Rsa {
    type Error = KeyError;

    /// What is signed, followed by the signature as a string of two strings: its type and its bytes (RFC 8332, section 3).
    async fn auth_sign(
        &mut self,
        _key: &AgentIdentity,
        hash: Option<HashAlg>,
        mut signed: Vec<u8>,
    ) -> Result<Vec<u8>, KeyError> {
        let failed = |problem: &dyn std::error::Error| KeyError::Rsa(problem.to_string());
        let (name, padding) = match hash {
            Some(HashAlg::Sha256) => ("rsa-sha2-256", &RSA_PKCS1_SHA256),
            _ => ("rsa-sha2-512", &RSA_PKCS1_SHA512),
        };
        let mut signature = vec![0; self.0.public_modulus_len()];
        let made = self.0.sign(padding, &SystemRandom::new(), &signed, &mut signature);
        made.map_err(|error| failed(&error))?;
        let mut blob = Vec::new();
        name.encode(&mut blob).map_err(|error| failed(&error))?;
        signature.as_slice().encode(&mut blob).map_err(|error| failed(&error))?;
        blob.as_slice().encode(&mut signed).map_err(|error| failed(&error))?;
        Ok(signed)
    }
}

impl From<SendError> for KeyError {
    fn from(_: SendError) -> Self {
        Self::Ssh(russh::Error::SendError)
    }
}

/// The public half as SSH has it, from its PKCS#1 form (RFC 8017, appendix A.1.1).
fn public_half(der: &[u8]) -> Result<PublicKey, KeyError> {
    let numbers = || -> Result<(Mpint, Mpint), der::Error> {
        let mut reader = der::SliceReader::new(der)?;
        let numbers =
            reader.sequence(|it| Ok::<_, der::Error>((UintRef::decode(it)?, UintRef::decode(it)?)))?;
        let [n, e] = [numbers.0, numbers.1].map(|it| Mpint::from_positive_bytes(it.as_bytes()));
        Ok((n, e))
    };
    let (n, e) = numbers().map_err(|error| KeyError::Rsa(error.to_string()))?;
    let key = RsaPublicKey::new(e, n).map_err(|error| KeyError::Rsa(error.to_string()))?;
    Ok(PublicKey::new(KeyData::Rsa(key), ""))
}

/// The pair from OpenSSH's form, which leaves two of its eight numbers to be computed (RFC 8017, section 3.2).
fn rsa_of(pair: &RsaKeypair) -> Result<RsaKeyPair, KeyError> {
    let (public, private) = (pair.public(), pair.private());
    let numbers = [public.n(), public.e(), private.d(), private.p(), private.q(), private.iqmp()];
    let numbers = numbers.map(|it| it.as_positive_bytes());
    let [Some(n), Some(e), Some(d), Some(p), Some(q), Some(inverse)] = numbers else {
        return Err(KeyError::Rsa("a negative number".to_owned()));
    };
    let components = KeyPairComponents {
        public_key: PublicKeyComponents { n, e },
        d,
        p,
        q,
        dP: &reduced(d, p)?[..],
        dQ: &reduced(d, q)?[..],
        qInv: inverse,
    };
    RsaKeyPair::from_components(&components).map_err(|error| KeyError::Rsa(error.to_string()))
}

/// `d mod (prime - 1)`.
fn reduced(d: &[u8], prime: &[u8]) -> Result<Zeroizing<Vec<u8>>, KeyError> {
    let number = |bytes: &[u8]| {
        let bits =
            u32::try_from(bytes.len() * 8).map_err(|_| KeyError::Rsa("too long a number".to_owned()))?;
        let number = BoxedUint::from_be_slice(bytes, bits);
        number.map(Zeroizing::new).map_err(|error| KeyError::Rsa(error.to_string()))
    };
    // A prime is odd, so that one less is without its last bit.
    let mut prime = Zeroizing::new(prime.to_vec());
    if let Some(last) = prime.last_mut() {
        *last &= 0xfe;
    }
    let modulus = NonZero::new((*number(&prime)?).clone()).into_option();
    let modulus = modulus.ok_or_else(|| KeyError::Rsa("a prime that is none".to_owned()))?;
    let mut rest = number(d)?.rem(&modulus);
    let bytes = Zeroizing::new(rest.to_be_bytes().into_vec());
    rest.zeroize();
    let mut modulus = modulus.get();
    modulus.zeroize();
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::encoding::AsDer as _;
    use aws_lc_rs::rsa::KeySize;
    use aws_lc_rs::signature::{RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_2048_8192_SHA512, UnparsedPublicKey};
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use russh::keys::ssh_encoding::Decode;

    use super::*;

    fn string(bytes: &mut &[u8]) -> Vec<u8> {
        <Vec<u8> as Decode>::decode(bytes).unwrap()
    }

    fn pem(label: &str, der: &[u8]) -> String {
        let text = STANDARD.encode(der);
        // As wide as EC2 writes them.
        let lines: Vec<&str> =
            text.as_bytes().chunks(76).map(|it| std::str::from_utf8(it).unwrap()).collect();
        format!("-----BEGIN {label}-----\n{}\n-----END {label}-----", lines.join("\n"))
    }

    #[tokio::test]
    async fn a_signature_is_of_the_type_that_was_asked_for() {
        let pair = RsaKeyPair::generate(KeySize::Rsa2048).unwrap();
        let pkcs8 = pem("PRIVATE KEY", pair.as_der().unwrap().as_ref());
        let LoginKey::Rsa(parsed, public) = LoginKey::parse(&pkcs8).unwrap() else { panic!() };
        assert!(public.to_openssh().unwrap().starts_with("ssh-rsa AAAAB3NzaC1yc2EAAAADAQAB"));
        let mut signer = Rsa(parsed);
        for (hash, name, verifies) in [
            (HashAlg::Sha256, "rsa-sha2-256", &RSA_PKCS1_2048_8192_SHA256),
            (HashAlg::Sha512, "rsa-sha2-512", &RSA_PKCS1_2048_8192_SHA512),
        ] {
            let identity = AgentIdentity::from(public.clone());
            let signed = signer.auth_sign(&identity, Some(hash), b"request".to_vec()).await.unwrap();
            let mut rest = signed.strip_prefix(b"request").unwrap();
            let blob = string(&mut rest);
            assert!(rest.is_empty());
            let mut blob = &blob[..];
            assert_eq!(string(&mut blob), name.as_bytes());
            let signature = string(&mut blob);
            let key = UnparsedPublicKey::new(verifies, pair.public_key().as_ref());
            key.verify(b"request", &signature).unwrap();
        }
    }

    #[test]
    fn every_truncation_of_an_rsa_key_is_refused() {
        let der = RsaKeyPair::generate(KeySize::Rsa2048).unwrap().as_der().unwrap();
        for length in 0..der.as_ref().len() {
            let text = pem("PRIVATE KEY", &der.as_ref()[..length]);
            assert!(LoginKey::parse(&text).is_err(), "accepted a prefix of {length} bytes");
        }
    }

    #[test]
    fn what_cannot_log_in_says_why() {
        for (text, problem) in [
            (
                "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIIE\n-----END ENCRYPTED PRIVATE KEY-----\n",
                "has a passphrase",
            ),
            (
                "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nMIIE\n-----END RSA PRIVATE KEY-----\n",
                "has a passphrase",
            ),
            (
                "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\n",
                "is an RSA key that cannot be used: ",
            ),
            ("-----BEGIN PRIVATE KEY-----\nMIIE\n-----END PRIVATE KEY-----\n", "is no private key: "),
            ("-----BEGIN CERTIFICATE-----\nMIIE\n-----END CERTIFICATE-----\n", "is no private key: "),
            ("", "is no private key: "),
        ] {
            let error = LoginKey::parse(text).err().unwrap().to_string();
            assert!(error.starts_with(problem), "{text}: {error}");
        }
    }

    #[test]
    fn the_parts_of_a_key_must_fit_each_other() {
        // 35 mod (11 - 1)
        assert_eq!(reduced(&[35], &[11]).unwrap().last(), Some(&5));
        assert!(matches!(reduced(&[35], &[1]), Err(KeyError::Rsa(_))));
        assert!(matches!(reduced(&[35], &[]), Err(KeyError::Rsa(_))));
    }
}
