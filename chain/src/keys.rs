//! The key that signs: from an encrypted keystore, the environment, a key service or a Ledger, never from the argument
//! list.

#[cfg(feature = "aws-kms")]
mod aws;
#[cfg(feature = "gcp-kms")]
mod gcp;
#[cfg(any(feature = "aws-kms", feature = "gcp-kms"))]
mod remote;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use alloy::network::TxSigner;
use alloy::primitives::{B256, Signature};
use alloy::signers::local::{LocalSigner, PrivateKeySigner};
use tokio::task::spawn_blocking;
use zeroize::Zeroizing;

#[cfg(any(feature = "aws-kms", feature = "gcp-kms"))]
pub use remote::KeyServiceError;

use crate::{Error, Result};

/// A signer of any kind. It is given whole transactions, since some devices sign nothing else.
pub type AnySigner = Box<dyn TxSigner<Signature> + Send + Sync>;

/// Largest password file and key variable that are read, in bytes.
const MAX_SECRET: u64 = 4096;

/// Where a key is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeySource {
    /// An encrypted JSON keystore (Web3 Secret Storage, as geth, cast and clef write it).
    Keystore {
        /// The keystore.
        file: PathBuf,
        /// A file whose first line is the password; asked for on the terminal without one.
        password: Option<PathBuf>,
    },
    /// An environment variable that holds the key as 64 hex digits.
    Environment {
        /// Its name.
        name: String,
    },
    /// A key of AWS KMS, which never leaves it.
    AwsKms {
        /// Id, ARN or alias.
        id: String,
    },
    /// A key of Google's Cloud KMS, which never leaves it.
    GcpKms {
        /// Resource name of a key version.
        name: String,
    },
    /// A Ledger at this machine.
    Ledger {
        /// Number of the account, as Ledger Live counts them, from 0.
        account: usize,
    },
}

impl KeySource {
    /// Loads the key, or makes sure that its service has it. `ask` is called for a password that is not in a file.
    /// `deadline` is for each question to a key service.
    ///
    /// # Errors
    /// [`Error::Key`], [`Error::KeyService`]; the message never holds the key.
    pub async fn load(
        self,
        variable: impl Fn(&str) -> Option<OsString>,
        ask: impl FnOnce() -> io::Result<Zeroizing<String>> + Send + 'static,
        deadline: Duration,
    ) -> Result<AnySigner> {
        match self {
            Self::Environment { name } => Ok(Box::new(from_variable(&name, variable(&name))?)),
            Self::Keystore { file, password } => {
                // Decrypting takes about a second of one core.
                let opened = spawn_blocking(move || from_keystore(&file, password.as_deref(), ask)).await;
                Ok(Box::new(opened.map_err(|error| wrong("keystore", error.to_string()))??))
            }
            Self::AwsKms { id } => aws_kms(id, deadline).await,
            Self::GcpKms { name } => gcp_kms(name, &variable, deadline).await,
            Self::Ledger { account } => ledger(account, deadline).await,
        }
    }
}

fn from_keystore(
    file: &Path,
    password: Option<&Path>,
    ask: impl FnOnce() -> io::Result<Zeroizing<String>>,
) -> Result<PrivateKeySigner> {
    let password = match password {
        Some(path) => first_line(path)?,
        None => ask().map_err(|error| wrong(file.display(), format!("no password: {error}")))?,
    };
    let signer = LocalSigner::decrypt_keystore(file, password.as_bytes());
    // The library's words may quote the file; the likeliest cause is worth more.
    signer.map_err(|_| wrong(file.display(), "not a keystore, or the password is wrong"))
}

#[cfg(feature = "aws-kms")]
async fn aws_kms(id: String, deadline: Duration) -> Result<AnySigner> {
    let key = aws::AwsKey::new(id, deadline).await;
    Ok(Box::new(remote::RemoteSigner::open(key, deadline).await?))
}

#[cfg(not(feature = "aws-kms"))]
async fn aws_kms(id: String, _: Duration) -> Result<AnySigner> {
    Err(wrong(format!("AWS KMS key {id}"), "this program was built without the feature aws-kms"))
}

#[cfg(feature = "gcp-kms")]
async fn gcp_kms(
    name: String,
    variable: &impl Fn(&str) -> Option<OsString>,
    deadline: Duration,
) -> Result<AnySigner> {
    let from = format!("Cloud KMS key {name}");
    let service = variable(gcp::SERVICE_VARIABLE).map(OsString::into_string).transpose();
    let service = service.map_err(|_| wrong(gcp::SERVICE_VARIABLE, "not text"))?;
    let key = gcp::GcpKey::new(name, service.as_deref(), deadline).map_err(|it| wrong(from, it))?;
    Ok(Box::new(remote::RemoteSigner::open(key, deadline).await?))
}

#[cfg(not(feature = "gcp-kms"))]
async fn gcp_kms(name: String, _: &impl Fn(&str) -> Option<OsString>, _: Duration) -> Result<AnySigner> {
    Err(wrong(format!("Cloud KMS key {name}"), "this program was built without the feature gcp-kms"))
}

#[cfg(feature = "ledger")]
async fn ledger(account: usize, deadline: Duration) -> Result<AnySigner> {
    use alloy_signer_ledger::{HDPath, LedgerSigner};
    let from = format!("Ledger account {account}");
    let opened = tokio::time::timeout(deadline, LedgerSigner::new(HDPath::LedgerLive(account), None)).await;
    let opened =
        opened.map_err(|_| wrong(&from, "no answer in time; unlock it and open its Ethereum app"))?;
    let signer =
        opened.map_err(|error| wrong(&from, format!("{error}; unlock it and open its Ethereum app")))?;
    Ok(Box::new(signer))
}

#[cfg(not(feature = "ledger"))]
async fn ledger(account: usize, _: Duration) -> Result<AnySigner> {
    Err(wrong(format!("Ledger account {account}"), "this program was built without the feature ledger"))
}

fn from_variable(name: &str, value: Option<OsString>) -> Result<PrivateKeySigner> {
    let from = format!("environment variable {name}");
    let value = value.ok_or_else(|| wrong(&from, "not set"))?;
    let value = value.into_string().map_err(|_| wrong(&from, "not text"))?;
    let value = Zeroizing::new(value);
    let digits = value.trim().trim_start_matches("0x");
    let mut key = Zeroizing::new([0u8; 32]);
    hex::decode_to_slice(digits, &mut key[..]).map_err(|_| wrong(&from, "not 64 hex digits"))?;
    PrivateKeySigner::from_bytes(&B256::from(*key)).map_err(|_| wrong(&from, "not a secp256k1 key"))
}

fn first_line(path: &Path) -> Result<Zeroizing<String>> {
    let mut text = Zeroizing::new(String::new());
    let read = File::open(path).and_then(|file| file.take(MAX_SECRET).read_to_string(&mut text));
    read.map_err(|error| wrong(path.display(), error.to_string()))?;
    Ok(Zeroizing::new(text.lines().next().unwrap_or_default().to_owned()))
}

fn wrong(from: impl ToString, problem: impl Into<String>) -> Error {
    Error::Key { from: from.to_string(), problem: problem.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The key 0x01 repeated; its address computed with another implementation (OpenSSL).
    const KEY: &str = "0101010101010101010101010101010101010101010101010101010101010101";
    const ADDRESS: &str = "0x1a642f0E3c3aF545E7AcBD38b07251B3990914F1";

    /// The example of the Web3 Secret Storage definition, with PBKDF2.
    const KEYSTORE: &str = r#"{"crypto":{"cipher":"aes-128-ctr","cipherparams":{"iv":"6087dab2f9fdbbfaddc31a909735c1e6"},
        "ciphertext":"5318b4d5bcd28de64ee5559e671353e16f075ecae9f99c7a79a38af5f869aa46","kdf":"pbkdf2","kdfparams":{"c":262144,
        "dklen":32,"prf":"hmac-sha256","salt":"ae3cd4e7013836a3df6bd7241b12db061dbe2c6785853cce422d148a624ce0bd"},
        "mac":"517ead924a9d0dc3124507e3393d175ce3ff7c1e96529c6c555ce9e51205e9b2"},
        "id":"3198bc9c-6672-5ab3-d995-4942343ae5b6","version":3}"#;

    async fn load(source: KeySource, value: &'static str) -> Result<AnySigner> {
        let ask = || unreachable!("no password is asked for");
        source.load(|_| Some(value.into()), ask, Duration::from_secs(5)).await
    }

    async fn environment(value: &'static str) -> Result<AnySigner> {
        load(KeySource::Environment { name: "KEY".to_owned() }, value).await
    }

    #[tokio::test]
    async fn a_key_in_the_environment_signs() {
        assert_eq!(environment(KEY).await.unwrap().address().to_string(), ADDRESS);
    }

    #[tokio::test]
    async fn a_bad_key_is_refused_without_showing_it() {
        for bad in ["", "01", "zz", "0000000000000000000000000000000000000000000000000000000000000000"] {
            let error = environment(bad).await.map(drop).unwrap_err().to_string();
            assert!(error.starts_with("environment variable KEY: not "), "{error}");
        }
    }

    #[tokio::test]
    async fn a_keystore_opens_with_its_password_only() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("key"), KEYSTORE).unwrap();
        let password = folder.path().join("password");
        let source =
            KeySource::Keystore { file: folder.path().join("key"), password: Some(password.clone()) };
        std::fs::write(&password, "testpassword\n").unwrap();
        let signer = load(source.clone(), "").await.unwrap();
        assert_eq!(signer.address().to_string().to_lowercase(), "0x008aeeda4d805471df9b2a5b0f38a0c3bcba786b");
        std::fs::write(&password, "wrong\n").unwrap();
        let error = load(source, "").await.map(drop).unwrap_err();
        assert!(error.to_string().ends_with("not a keystore, or the password is wrong"), "{error}");
    }
}
