//! The directory of keys (`core.cert_dir`): made once, never overwritten, completed at each start.
//!
//! ```text
//! empty ──stage──▶ .bootstrap.new ──rename──▶ .bootstrap.ready ──link, clean──▶ complete
//!   ▲                   │                            │                             ▲
//!   └──── discarded ────┘                            └───────── finished ──────────┘
//! ```
//!
//! A bootstrap writes every file into `.bootstrap.new` and makes it durable; renaming that directory is the one moment
//! at which the KMS gets its keys. A crash before it leaves none, a crash after it leaves all: the next start discards
//! or finishes what it finds, and says so. Files appear under their final names by hard links, which cannot replace
//! anything.
//!
//! Root keys are only ever read afterwards. What follows from them (certificates, the RPC key, the temporary CA) is
//! made again when it is missing or about to expire. Names, modes and formats are upstream's (reference §8.1).

mod disk;
mod domain;
mod error;
pub mod inspect;
mod issue;
mod keys;

pub use domain::{Domain, DomainError};
pub use error::Error;
pub(crate) use issue::key_to_pem;
pub use keys::NewKeys;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use attestation::UnixMillis;
use kms_protocol::derive::{K256Root, P256Scalar, RootKeys};
use kms_protocol::wire::BootstrapResponse;
use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer as _, X509Certificate};
use zeroize::Zeroizing;

use disk::{Disk, Mode};
use issue::Authority;

const ROOT_CA_KEY: &str = "root-ca.key";
const ROOT_K256_KEY: &str = "root-k256.key";
const ROOT_CA_CRT: &str = "root-ca.crt";
const TMP_CA_KEY: &str = "tmp-ca.key";
const TMP_CA_CRT: &str = "tmp-ca.crt";
const RPC_KEY: &str = "rpc.key";
const RPC_CRT: &str = "rpc.crt";
const RPC_DOMAIN: &str = "rpc-domain";
const BOOTSTRAP_INFO: &str = "bootstrap-info.json";
/// Files that make no sense without root keys.
const DEPENDENT: [&str; 6] = [ROOT_CA_CRT, TMP_CA_KEY, TMP_CA_CRT, RPC_KEY, RPC_CRT, BOOTSTRAP_INFO];

const STAGING: &str = ".bootstrap.new";
const READY: &str = ".bootstrap.ready";
const LOCK: &str = ".lock";

/// Authorities with less time left are issued again, for the same key.
const CA_RENEWAL_SECONDS: u64 = 365 * 24 * 3600;

/// A directory of keys, locked for this process.
pub struct Store {
    disk: Disk,
    path: PathBuf,
    recovery: Recovery,
    /// Released when dropped, also by a crash.
    _lock: File,
}

/// What opening the directory had to clean up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recovery {
    /// Nothing.
    Clean,
    /// A bootstrap was interrupted before it had made any keys; its remains were removed.
    Discarded,
    /// A bootstrap was interrupted after its keys were safe; it was finished.
    Finished,
}

/// Everything the KMS is, read from its directory and complete.
pub struct Identity {
    /// The root secrets.
    pub roots: RootKeys,
    /// PEM of the root CA.
    pub root_ca_pem: String,
    /// The root CA, DER.
    pub root_ca: CertificateDer<'static>,
    /// PEM of the temporary CA.
    pub temp_ca_pem: String,
    /// PKCS#8 PEM of the temporary CA's key, which is handed to everybody.
    pub temp_ca_key_pem: Zeroizing<String>,
    /// The temporary CA, DER.
    pub temp_ca: CertificateDer<'static>,
    /// The certificate clients see, DER.
    pub rpc_certificate: CertificateDer<'static>,
    /// Its key.
    pub rpc_key: P256Scalar,
    /// The name in it.
    pub domain: Domain,
    /// What `Bootstrap` answered, when the keys were made that way.
    pub bootstrap_info: Option<BootstrapResponse>,
    /// Files that were missing or expiring and were made again.
    pub renewed: Vec<&'static str>,
}

/// An [`Identity`] before its RPC certificate.
pub struct Prepared {
    roots: RootKeys,
    root_ca_pem: String,
    temp_ca_pem: String,
    temp_ca_key_pem: Zeroizing<String>,
    rpc_key: P256Scalar,
    domain: Domain,
    bootstrap_info: Option<BootstrapResponse>,
    renewed: Vec<&'static str>,
}

impl Prepared {
    /// SubjectPublicKeyInfo of the RPC certificate's key, DER.
    ///
    /// # Errors
    ///
    /// [`Error::Key`].
    pub fn rpc_spki(&self) -> Result<Vec<u8>, Error> {
        Ok(self.rpc_key.spki_der().map_err(Error::Key)?.to_vec())
    }
}

/// Evidence that is stored together with new keys.
#[derive(Debug, Clone, Copy, Default)]
pub struct Evidence<'a> {
    /// For the RPC certificate's key, encoded.
    pub rpc: Option<&'a [u8]>,
    /// What `Bootstrap` answers.
    pub bootstrap: Option<&'a BootstrapResponse>,
}

impl Store {
    /// Opens and locks the directory, making it (0700) when it is not there, and cleans up after an interrupted
    /// bootstrap.
    ///
    /// # Errors
    ///
    /// [`Error::Locked`] when another process has it, [`Error::Conflict`] when the remains of a bootstrap contradict
    /// the directory, [`Error::Io`].
    pub fn open(path: &Path) -> Result<Self, Error> {
        let io = |action| move |source| Error::Io { action, path: path.to_owned(), source };
        let disk = Disk::open(path).map_err(io("open"))?;
        let lock = disk.lock(LOCK).map_err(io("lock"))?;
        let lock = lock.ok_or_else(|| Error::Locked { path: path.to_owned() })?;
        let mut store = Self { disk, path: path.to_owned(), recovery: Recovery::Clean, _lock: lock };
        store.recovery = store.recover()?;
        Ok(store)
    }

    /// What opening had to clean up.
    #[must_use]
    pub fn recovery(&self) -> Recovery {
        self.recovery
    }

    /// Whether there are root keys.
    ///
    /// # Errors
    ///
    /// [`Error::HalfRoots`] with only one of them; [`Error::Orphan`] with files that only exist beside root keys.
    pub fn has_keys(&self) -> Result<bool, Error> {
        let half = |present, missing| Error::HalfRoots { path: self.path.clone(), present, missing };
        match (self.exists(ROOT_CA_KEY)?, self.exists(ROOT_K256_KEY)?) {
            (true, true) => return Ok(true),
            (true, false) => return Err(half(ROOT_CA_KEY, ROOT_K256_KEY)),
            (false, true) => return Err(half(ROOT_K256_KEY, ROOT_CA_KEY)),
            (false, false) => {}
        }
        for present in DEPENDENT {
            if self.exists(present)? {
                return Err(Error::Orphan { path: self.path.clone(), present });
            }
        }
        Ok(false)
    }

    /// Makes all keys, for a KMS that is reached as `domain`.
    ///
    /// # Errors
    ///
    /// As [`commit`](Self::commit).
    pub fn bootstrap(&self, domain: &Domain, now: UnixMillis) -> Result<(), Error> {
        self.commit(&NewKeys::generate()?, domain, Evidence::default(), now)
    }

    /// Makes `keys` the keys of this directory, all at once.
    ///
    /// # Errors
    ///
    /// [`Error::AlreadyBootstrapped`], and those of [`has_keys`](Self::has_keys): nothing is ever overwritten.
    pub fn commit(
        &self,
        keys: &NewKeys,
        domain: &Domain,
        evidence: Evidence<'_>,
        now: UnixMillis,
    ) -> Result<(), Error> {
        if self.has_keys()? {
            return Err(Error::AlreadyBootstrapped { path: self.path.clone() });
        }
        let NewKeys { roots, temp, rpc: rpc_key } = keys;
        let root = issue::authority(Authority::Root, roots.ca(), now)?;
        let rpc = issue::rpc_leaf(domain, rpc_key, evidence.rpc, root.der().clone(), roots.ca(), now)?;
        let temp_ca = issue::authority(Authority::Temporary, temp, now)?;
        let pems = [issue::key_to_pem(roots.ca())?, issue::key_to_pem(temp)?, issue::key_to_pem(rpc_key)?];
        // The name may stand there alone: it is not a key.
        self.replace(RPC_DOMAIN, Mode::Public, domain.as_str().as_bytes())?;
        let (root_pem, rpc_pem, temp_pem) = (root.pem(), rpc.pem(), temp_ca.pem());
        let info = evidence.bootstrap.map(serde_json::to_vec).transpose();
        let info =
            info.map_err(|error| Error::Content { name: BOOTSTRAP_INFO, reason: error.to_string() })?;
        let mut files: Vec<(&str, Mode, &[u8])> = vec![
            (ROOT_CA_KEY, Mode::Secret, pems[0].as_bytes()),
            (ROOT_K256_KEY, Mode::Secret, roots.k256().expose()),
            (ROOT_CA_CRT, Mode::Public, root_pem.as_bytes()),
            (TMP_CA_KEY, Mode::Secret, pems[1].as_bytes()),
            (TMP_CA_CRT, Mode::Public, temp_pem.as_bytes()),
            (RPC_KEY, Mode::Secret, pems[2].as_bytes()),
            (RPC_CRT, Mode::Public, rpc_pem.as_bytes()),
        ];
        files.extend(info.as_ref().map(|info| (BOOTSTRAP_INFO, Mode::Public, info.as_slice())));
        self.stage(&files).map_err(self.io("write", STAGING))?;
        self.finish()
    }

    fn stage(&self, files: &[(&str, Mode, &[u8])]) -> io::Result<()> {
        // Opening the directory has removed an older attempt; one in this very process is removed here.
        if self.disk.exists(STAGING)? {
            self.disk.remove_directory(STAGING)?;
        }
        self.disk.create_directory(STAGING)?;
        for (name, mode, bytes) in files {
            self.disk.create(&format!("{STAGING}/{name}"), *mode, bytes)?;
        }
        self.disk.sync(STAGING)?;
        // From here on the keys exist.
        self.disk.rename(STAGING, READY)?;
        self.disk.sync("")
    }

    /// Gives staged files their final names and removes the staging directory. May be repeated.
    fn finish(&self) -> Result<(), Error> {
        for name in self.disk.files(READY).map_err(self.io("list", READY))? {
            let staged = format!("{READY}/{name}");
            match self.disk.link(&staged, &name) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    let (ours, theirs) = (self.read(&staged)?, self.read(&name)?);
                    if ours != theirs {
                        let (path, staged) = (self.disk.path(&name), self.disk.path(&staged));
                        return Err(Error::Conflict { path, staged });
                    }
                }
                Err(error) => return Err(self.io("link", &name)(error)),
            }
        }
        let clean = || {
            self.disk.sync("")?;
            self.disk.remove_directory(READY)
        };
        clean().map_err(self.io("clean up", READY))
    }

    fn recover(&self) -> Result<Recovery, Error> {
        let mut recovery = Recovery::Clean;
        if self.exists(STAGING)? {
            self.disk.remove_directory(STAGING).map_err(self.io("remove", STAGING))?;
            recovery = Recovery::Discarded;
        }
        if self.exists(READY)? {
            self.finish()?;
            recovery = Recovery::Finished;
        }
        Ok(recovery)
    }

    /// Reads everything and makes what is missing or about to expire, except for root keys. The RPC certificate is
    /// issued anew each time: for `domain` when given, else for the name it was made for.
    ///
    /// # Errors
    ///
    /// As [`prepare`](Self::prepare) and [`issue`](Self::issue).
    pub fn load(&self, domain: Option<&Domain>, now: UnixMillis) -> Result<Identity, Error> {
        self.issue(self.prepare(domain, now)?, None, now)
    }

    /// Everything of [`load`](Self::load) but the RPC certificate.
    ///
    /// # Errors
    ///
    /// [`Error::NotBootstrapped`] without keys; otherwise what is wrong with which file.
    pub fn prepare(&self, domain: Option<&Domain>, now: UnixMillis) -> Result<Prepared, Error> {
        if !self.has_keys()? {
            return Err(Error::NotBootstrapped { path: self.path.clone() });
        }
        let mut renewed = Vec::new();
        let k256 = K256Root::from_slice(&self.require(ROOT_K256_KEY)?)?;
        let root_key = issue::key_from_pem(ROOT_CA_KEY, &self.require(ROOT_CA_KEY)?)?;
        let roots = RootKeys::new(root_key, k256).map_err(Error::Key)?;
        let files = (ROOT_CA_CRT, ROOT_CA_KEY);
        let root_ca_pem = self.authority(Authority::Root, files, roots.ca(), now, &mut renewed)?;
        let temp_key = self.key(TMP_CA_KEY, &mut renewed)?;
        let files = (TMP_CA_CRT, TMP_CA_KEY);
        let temp_ca_pem = self.authority(Authority::Temporary, files, &temp_key, now, &mut renewed)?;
        let rpc_key = self.key(RPC_KEY, &mut renewed)?;
        let domain = self.domain(domain)?;
        let bootstrap_info = self.bootstrap_info(&roots)?;
        let temp_ca_key_pem = issue::key_to_pem(&temp_key)?;
        Ok(Prepared {
            roots,
            root_ca_pem,
            temp_ca_pem,
            temp_ca_key_pem,
            rpc_key,
            domain,
            bootstrap_info,
            renewed,
        })
    }

    /// Issues the RPC certificate, with evidence of this machine for its key if there is any.
    ///
    /// # Errors
    ///
    /// When it cannot be issued or written.
    pub fn issue(
        &self,
        prepared: Prepared,
        attestation: Option<&[u8]>,
        now: UnixMillis,
    ) -> Result<Identity, Error> {
        let Prepared {
            roots,
            root_ca_pem,
            temp_ca_pem,
            temp_ca_key_pem,
            rpc_key,
            domain,
            bootstrap_info,
            renewed,
        } = prepared;
        let root_ca = certificate_der(ROOT_CA_CRT, root_ca_pem.as_bytes())?;
        let rpc = issue::rpc_leaf(&domain, &rpc_key, attestation, root_ca.clone(), roots.ca(), now)?;
        self.replace(RPC_CRT, Mode::Public, rpc.pem().as_bytes())?;
        Ok(Identity {
            temp_ca: certificate_der(TMP_CA_CRT, temp_ca_pem.as_bytes())?,
            rpc_certificate: rpc.der().clone(),
            root_ca,
            bootstrap_info,
            temp_ca_key_pem,
            roots,
            root_ca_pem,
            temp_ca_pem,
            rpc_key,
            domain,
            renewed,
        })
    }

    /// An authority's certificate; issued when missing or expiring, refused when it is for another key.
    fn authority(
        &self,
        which: Authority,
        (certificate, key_name): (&'static str, &'static str),
        key: &P256Scalar,
        now: UnixMillis,
        renewed: &mut Vec<&'static str>,
    ) -> Result<String, Error> {
        if let Some(pem) = self.read(certificate)? {
            let der = certificate_der(certificate, &pem)?;
            let (_, parsed) =
                X509Certificate::from_der(&der).map_err(|_| Error::Certificate { name: certificate })?;
            if parsed.public_key().raw != key.spki_der().map_err(Error::Key)? {
                return Err(Error::Mismatch { certificate, key: key_name });
            }
            let not_after = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0);
            if not_after > now.as_secs() + CA_RENEWAL_SECONDS {
                let text = |_| Error::Certificate { name: certificate };
                return String::from_utf8(pem.to_vec()).map_err(text);
            }
        }
        let pem = issue::authority(which, key, now)?.pem();
        self.replace(certificate, Mode::Public, pem.as_bytes())?;
        renewed.push(certificate);
        Ok(pem)
    }

    /// A key that may be made anew without losing anything: no derivation starts from it.
    fn key(&self, name: &'static str, renewed: &mut Vec<&'static str>) -> Result<P256Scalar, Error> {
        if let Some(pem) = self.read(name)? {
            return issue::key_from_pem(name, &pem);
        }
        let key = issue::generate_p256()?;
        self.replace(name, Mode::Secret, issue::key_to_pem(&key)?.as_bytes())?;
        renewed.push(name);
        Ok(key)
    }

    fn domain(&self, wanted: Option<&Domain>) -> Result<Domain, Error> {
        let stored = match self.read(RPC_DOMAIN)? {
            None => None,
            Some(bytes) => {
                let content = |reason: String| Error::Content { name: RPC_DOMAIN, reason };
                let text = std::str::from_utf8(&bytes).map_err(|error| content(error.to_string()))?;
                Some(Domain::parse(text.trim_end()).map_err(|error| content(error.to_string()))?)
            }
        };
        let missing = || Error::Content {
            name: RPC_DOMAIN,
            reason: "it is missing and core.onboard.auto_bootstrap_domain is not set".into(),
        };
        let domain = wanted.or(stored.as_ref()).ok_or_else(missing)?.clone();
        if stored.as_ref() != Some(&domain) {
            self.replace(RPC_DOMAIN, Mode::Public, domain.as_str().as_bytes())?;
        }
        Ok(domain)
    }

    fn bootstrap_info(&self, roots: &RootKeys) -> Result<Option<BootstrapResponse>, Error> {
        let Some(json) = self.read(BOOTSTRAP_INFO)? else { return Ok(None) };
        let content = |reason: String| Error::Content { name: BOOTSTRAP_INFO, reason };
        let info: BootstrapResponse =
            serde_json::from_slice(&json).map_err(|error| content(error.to_string()))?;
        let spki = roots.ca().spki_der().map_err(Error::Key)?;
        if info.ca_pubkey != spki || info.k256_pubkey != roots.k256_public_key().as_bytes() {
            return Err(content("it speaks of other keys than the ones in this directory".into()));
        }
        Ok(Some(info))
    }

    fn io<'a>(&'a self, action: &'static str, name: &'a str) -> impl Fn(io::Error) -> Error + 'a {
        move |source| Error::Io { action, path: self.disk.path(name), source }
    }

    fn exists(&self, name: &str) -> Result<bool, Error> {
        self.disk.exists(name).map_err(self.io("look for", name))
    }

    fn read(&self, name: &str) -> Result<Option<Zeroizing<Vec<u8>>>, Error> {
        self.disk.read(name).map_err(self.io("read", name))
    }

    fn require(&self, name: &'static str) -> Result<Zeroizing<Vec<u8>>, Error> {
        self.read(name)?.ok_or_else(|| self.io("read", name)(io::ErrorKind::NotFound.into()))
    }

    fn replace(&self, name: &'static str, mode: Mode, bytes: &[u8]) -> Result<(), Error> {
        self.disk.replace(name, mode, bytes).map_err(self.io("write", name))
    }
}

fn certificate_der(name: &'static str, pem: &[u8]) -> Result<CertificateDer<'static>, Error> {
    let (label, der) = pem_rfc7468::decode_vec(pem).map_err(|source| Error::Pem { what: name, source })?;
    if label != "CERTIFICATE" {
        return Err(Error::Pem { what: name, source: pem_rfc7468::Error::Label });
    }
    Ok(der.into())
}

#[cfg(test)]
mod tests;
