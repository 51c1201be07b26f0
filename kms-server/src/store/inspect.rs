//! Looking at a directory of keys without changing anything.

use std::path::{Path, PathBuf};

use attestation::UnixMillis;
use kms_protocol::derive::{K256Root, RootKeys};
use serde::Serialize;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::disk::Disk;
use super::{
    BOOTSTRAP_INFO, DEPENDENT, Error, LOCK, READY, ROOT_CA_CRT, ROOT_CA_KEY, ROOT_K256_KEY, RPC_CRT,
    RPC_DOMAIN, STAGING, TMP_CA_CRT, certificate_der, issue,
};

/// What is in a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Inspection {
    /// The directory.
    pub path: PathBuf,
    /// In one word.
    pub state: State,
    /// Whether a process uses it.
    pub in_use: bool,
    /// The name in the RPC certificate.
    pub domain: Option<String>,
    /// SubjectPublicKeyInfo of the root CA, hex DER.
    pub ca_pubkey: Option<String>,
    /// Compressed point of the K256 root, hex.
    pub k256_pubkey: Option<String>,
    /// Whether there is a record of the bootstrap, which `GetMeta` shows.
    pub has_bootstrap_info: bool,
    /// The certificates.
    pub certificates: Vec<CertificateState>,
    /// What is wrong, or will be done at the next start.
    pub findings: Vec<String>,
}

/// The state of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// No keys: ready for a bootstrap.
    Empty,
    /// A bootstrap was interrupted before it had made keys; the next start discards it.
    Unfinished,
    /// A bootstrap was interrupted after its keys were safe; the next start finishes it.
    AlmostReady,
    /// Keys.
    Ready,
    /// Not usable; see the findings.
    Broken,
}

/// A certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CertificateState {
    /// The file.
    pub file: &'static str,
    /// Seconds since the epoch.
    pub not_after: i64,
    /// Whether it is over.
    pub expired: bool,
}

/// Looks at the directory. Nothing is written, and no lock is held afterwards.
///
/// # Errors
///
/// [`Error::Io`] when there is no such directory, or it cannot be read. Everything else is a finding.
pub fn inspect(path: &Path, now: UnixMillis) -> Result<Inspection, Error> {
    let io = |action| move |source| Error::Io { action, path: path.to_owned(), source };
    std::fs::read_dir(path).map_err(io("open"))?;
    let disk = Disk::open(path).map_err(io("open"))?;
    let has = |name: &str| disk.exists(name).map_err(io("look into"));
    let mut inspection = Inspection {
        path: path.to_owned(),
        state: State::Empty,
        in_use: in_use(path).map_err(io("lock"))?,
        domain: text(&disk, RPC_DOMAIN),
        ca_pubkey: None,
        k256_pubkey: None,
        has_bootstrap_info: has(BOOTSTRAP_INFO)?,
        certificates: Vec::new(),
        findings: Vec::new(),
    };
    let roots = (has(ROOT_CA_KEY)?, has(ROOT_K256_KEY)?);
    inspection.state = match roots {
        _ if has(READY)? => State::AlmostReady,
        (true, true) => State::Ready,
        (false, false) => {
            let orphans: Vec<_> =
                DEPENDENT.into_iter().filter(|name| disk.exists(name).unwrap_or(true)).collect();
            inspection.findings.extend(orphans.iter().map(|name| format!("{name} without root keys")));
            match (orphans.is_empty(), has(STAGING)?) {
                (false, _) => State::Broken,
                (true, true) => State::Unfinished,
                (true, false) => State::Empty,
            }
        }
        _ => {
            inspection.findings.push("only one of the two root keys is there".into());
            State::Broken
        }
    };
    if inspection.state == State::Ready {
        look_at_keys(&disk, &mut inspection, now);
    }
    Ok(inspection)
}

fn look_at_keys(disk: &Disk, inspection: &mut Inspection, now: UnixMillis) {
    match roots(disk) {
        Ok(roots) => {
            let spki = roots.ca().spki_der().ok();
            inspection.ca_pubkey = spki.map(hex::encode);
            inspection.k256_pubkey = Some(hex::encode(roots.k256_public_key().as_bytes()));
            for file in [ROOT_CA_CRT, TMP_CA_CRT, RPC_CRT] {
                look_at_certificate(disk, inspection, file, spki.as_ref().map(|spki| spki.as_slice()), now);
            }
            let info = disk.read(BOOTSTRAP_INFO).ok().flatten();
            if let Some(info) = info {
                let matches = serde_json::from_slice::<kms_protocol::wire::BootstrapResponse>(&info)
                    .is_ok_and(|info| {
                        spki.is_some_and(|spki| info.ca_pubkey == spki)
                            && info.k256_pubkey == roots.k256_public_key().as_bytes()
                    });
                if !matches {
                    broken(inspection, format!("{BOOTSTRAP_INFO} speaks of other keys"));
                }
            }
        }
        Err(error) => broken(inspection, command_line::chain(&error)),
    }
}

fn look_at_certificate(
    disk: &Disk,
    inspection: &mut Inspection,
    file: &'static str,
    root_spki: Option<&[u8]>,
    now: UnixMillis,
) {
    let Ok(Some(pem)) = disk.read(file) else {
        inspection.findings.push(format!("{file} is missing; the next start makes it again"));
        return;
    };
    let der = certificate_der(file, &pem);
    let parsed = der.as_ref().ok().and_then(|der| X509Certificate::from_der(der).ok());
    let Some((_, certificate)) = parsed else {
        return broken(inspection, format!("{file} is not a certificate"));
    };
    if file == ROOT_CA_CRT && root_spki.is_some_and(|spki| certificate.public_key().raw != spki) {
        broken(inspection, format!("{file} is not for the key in {ROOT_CA_KEY}"));
    }
    let not_after = certificate.validity().not_after.timestamp();
    let expired = not_after < i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    if expired {
        inspection.findings.push(format!("{file} has expired; the next start issues it again"));
    }
    inspection.certificates.push(CertificateState { file, not_after, expired });
}

fn broken(inspection: &mut Inspection, finding: String) {
    inspection.state = State::Broken;
    inspection.findings.push(finding);
}

fn roots(disk: &Disk) -> Result<RootKeys, Error> {
    let read = |name: &'static str| {
        let missing = || std::io::Error::from(std::io::ErrorKind::NotFound);
        let io = |source| Error::Io { action: "read", path: disk.path(name), source };
        disk.read(name).map_err(io)?.ok_or_else(|| io(missing()))
    };
    let k256 = K256Root::from_slice(&read(ROOT_K256_KEY)?)?;
    let ca = issue::key_from_pem(ROOT_CA_KEY, &read(ROOT_CA_KEY)?)?;
    RootKeys::new(ca, k256).map_err(Error::Key)
}

fn text(disk: &Disk, name: &str) -> Option<String> {
    let bytes = disk.read(name).ok().flatten()?;
    Some(String::from_utf8_lossy(&bytes).trim_end().to_owned())
}

/// Whether somebody holds the lock. It is taken for a moment, and the file is not made when it is not there.
fn in_use(path: &Path) -> std::io::Result<bool> {
    let file = match std::fs::File::open(path.join(LOCK)) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(false),
        Err(std::fs::TryLockError::WouldBlock) => Ok(true),
        Err(std::fs::TryLockError::Error(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Domain, Store};

    const NOW: UnixMillis = UnixMillis::from_secs(1_767_225_600);

    fn names(path: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn the_states_are_told_apart_and_nothing_is_changed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let state = || {
            let before = names(path);
            let inspection = inspect(path, NOW).unwrap();
            assert_eq!(names(path), before);
            inspection
        };
        assert_eq!(state().state, State::Empty);
        std::fs::create_dir(path.join(STAGING)).unwrap();
        assert_eq!(state().state, State::Unfinished);
        std::fs::rename(path.join(STAGING), path.join(READY)).unwrap();
        assert_eq!(state().state, State::AlmostReady);
        std::fs::remove_dir(path.join(READY)).unwrap();

        let store = Store::open(path).unwrap();
        store.bootstrap(&Domain::parse("kms.example.com").unwrap(), NOW).unwrap();
        let ready = state();
        assert_eq!((ready.state, ready.in_use), (State::Ready, true));
        assert_eq!(ready.domain.as_deref(), Some("kms.example.com"));
        let identity = store.load(None, NOW).unwrap();
        assert_eq!(ready.k256_pubkey, Some(hex::encode(identity.roots.k256_public_key().as_bytes())));
        assert_eq!(ready.certificates.len(), 3);
        assert_eq!(ready.findings, [] as [String; 0]);
        drop(store);
        assert!(!state().in_use);

        std::fs::remove_file(path.join(RPC_CRT)).unwrap();
        assert_eq!(state().state, State::Ready);
        assert_eq!(state().findings.len(), 1);
        std::fs::remove_file(path.join(ROOT_CA_KEY)).unwrap();
        assert_eq!(state().state, State::Broken);
        std::fs::remove_file(path.join(ROOT_K256_KEY)).unwrap();
        assert_eq!(state().state, State::Broken);
        assert!(matches!(inspect(Path::new("/nowhere"), NOW), Err(Error::Io { .. })));
    }
}
