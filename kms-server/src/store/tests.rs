use super::*;
use std::os::unix::fs::PermissionsExt as _;

const NOW: UnixMillis = UnixMillis::from_secs(1_767_225_600);

fn domain() -> Domain {
    Domain::parse("kms.example.com").unwrap()
}

fn fresh() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn bootstrapped() -> tempfile::TempDir {
    let directory = fresh();
    Store::open(directory.path()).unwrap().bootstrap(&domain(), NOW).unwrap();
    directory
}

/// Name and bytes of every file.
fn snapshot(path: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = std::fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_type().unwrap().is_file())
        .map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap()))
        .collect();
    files.sort();
    files
}

#[test]
fn bootstrap_writes_upstreams_files() {
    let directory = bootstrapped();
    let mut modes = Vec::new();
    for entry in std::fs::read_dir(directory.path()).unwrap() {
        let entry = entry.unwrap();
        let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
        modes.push((entry.file_name().into_string().unwrap(), mode));
    }
    modes.sort();
    let expected = [
        (".lock", 0o600),
        ("root-ca.crt", 0o644),
        ("root-ca.key", 0o600),
        ("root-k256.key", 0o600),
        ("rpc-domain", 0o644),
        ("rpc.crt", 0o644),
        ("rpc.key", 0o600),
        ("tmp-ca.crt", 0o644),
        ("tmp-ca.key", 0o600),
    ];
    assert_eq!(modes, expected.map(|(name, mode)| (name.to_owned(), mode)));
    assert_eq!(std::fs::read(directory.path().join(ROOT_K256_KEY)).unwrap().len(), 32);
    assert_eq!(std::fs::read(directory.path().join(RPC_DOMAIN)).unwrap(), b"kms.example.com");
    let pem = std::fs::read_to_string(directory.path().join(ROOT_CA_KEY)).unwrap();
    assert!(pem.starts_with("-----BEGIN PRIVATE KEY-----\n"), "not the form upstream writes");
    assert_eq!(pem.len(), 241);
}

#[test]
fn a_second_bootstrap_is_refused_and_changes_nothing() {
    let directory = bootstrapped();
    let before = snapshot(directory.path());
    let error = Store::open(directory.path()).unwrap().bootstrap(&domain(), NOW).unwrap_err();
    assert!(matches!(error, Error::AlreadyBootstrapped { .. }), "{error}");
    assert_eq!(snapshot(directory.path()), before);
}

#[test]
fn loading_keeps_every_key() {
    let directory = bootstrapped();
    let store = Store::open(directory.path()).unwrap();
    let first = store.load(None, NOW).unwrap();
    assert_eq!(first.domain, domain());
    assert!(first.renewed.is_empty());
    let before = snapshot(directory.path());
    let second = store.load(None, NOW).unwrap();
    assert_eq!(first.roots.k256_public_key(), second.roots.k256_public_key());
    assert_eq!(first.roots.ca().spki_der().unwrap(), second.roots.ca().spki_der().unwrap());
    // The RPC certificate is new each time (its signature differs); nothing else is.
    let others = |files: Vec<(String, Vec<u8>)>| -> Vec<_> {
        files.into_iter().filter(|(name, _)| name != RPC_CRT).collect()
    };
    assert_eq!(others(before), others(snapshot(directory.path())));
}

#[test]
fn what_follows_from_the_roots_is_made_again() {
    let directory = bootstrapped();
    for name in [ROOT_CA_CRT, TMP_CA_KEY, TMP_CA_CRT, RPC_KEY, RPC_CRT] {
        std::fs::remove_file(directory.path().join(name)).unwrap();
    }
    let identity = Store::open(directory.path()).unwrap().load(None, NOW).unwrap();
    assert_eq!(identity.renewed, [ROOT_CA_CRT, TMP_CA_KEY, TMP_CA_CRT, RPC_KEY]);
    for name in [ROOT_CA_CRT, TMP_CA_KEY, TMP_CA_CRT, RPC_KEY, RPC_CRT] {
        assert!(directory.path().join(name).exists(), "{name}");
    }
}

#[test]
fn an_expiring_authority_is_issued_again_for_the_same_key() {
    let directory = bootstrapped();
    let store = Store::open(directory.path()).unwrap();
    let years = |years: u64| UnixMillis::from_secs(NOW.as_secs() + years * 365 * 24 * 3600);
    let before = store.load(None, years(8)).unwrap();
    assert!(before.renewed.is_empty());
    let after = store.load(None, years(9)).unwrap();
    assert_eq!(after.renewed, [ROOT_CA_CRT, TMP_CA_CRT]);
    assert_eq!(before.roots.ca().spki_der().unwrap(), after.roots.ca().spki_der().unwrap());
    assert_ne!(before.root_ca_pem, after.root_ca_pem);
}

#[test]
fn lost_roots_are_never_replaced() {
    for (removed, kept) in [(ROOT_CA_KEY, ROOT_K256_KEY), (ROOT_K256_KEY, ROOT_CA_KEY)] {
        let directory = bootstrapped();
        std::fs::remove_file(directory.path().join(removed)).unwrap();
        let before = snapshot(directory.path());
        let store = Store::open(directory.path()).unwrap();
        for error in [store.bootstrap(&domain(), NOW).err(), store.load(None, NOW).err()] {
            assert!(matches!(error, Some(Error::HalfRoots { present, .. }) if present == kept));
        }
        std::fs::remove_file(directory.path().join(kept)).unwrap();
        for error in [store.bootstrap(&domain(), NOW).err(), store.load(None, NOW).err()] {
            assert!(matches!(error, Some(Error::Orphan { .. })));
        }
        assert!(snapshot(directory.path()).len() < before.len(), "something was written");
    }
}

#[test]
fn files_of_two_directories_are_not_mixed() {
    let (ours, theirs) = (bootstrapped(), bootstrapped());
    std::fs::copy(theirs.path().join(ROOT_CA_CRT), ours.path().join(ROOT_CA_CRT)).unwrap();
    let error = Store::open(ours.path()).unwrap().load(None, NOW).err().unwrap();
    assert!(matches!(error, Error::Mismatch { certificate: ROOT_CA_CRT, .. }), "{error}");
}

#[test]
fn damaged_files_are_named() {
    for (name, bytes) in [
        (ROOT_CA_KEY, b"x".as_slice()),
        (ROOT_K256_KEY, &[1; 31]),
        (ROOT_K256_KEY, &[0; 32]),
        (TMP_CA_KEY, b""),
        (ROOT_CA_CRT, b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
        (RPC_DOMAIN, b"not a domain"),
        (BOOTSTRAP_INFO, b"{}"),
    ] {
        let directory = bootstrapped();
        std::fs::write(directory.path().join(name), bytes).unwrap();
        assert!(Store::open(directory.path()).unwrap().load(None, NOW).is_err(), "{name}");
        assert_eq!(std::fs::read(directory.path().join(name)).unwrap(), bytes, "{name} was overwritten");
    }
}

#[test]
fn a_directory_has_one_user() {
    let directory = bootstrapped();
    let first = Store::open(directory.path()).unwrap();
    assert!(matches!(Store::open(directory.path()), Err(Error::Locked { .. })));
    drop(first);
    Store::open(directory.path()).unwrap();
}

#[test]
fn another_domain_is_remembered() {
    let directory = bootstrapped();
    let store = Store::open(directory.path()).unwrap();
    let other = Domain::parse("10.0.0.1").unwrap();
    assert_eq!(store.load(Some(&other), NOW).unwrap().domain, other);
    assert_eq!(store.load(None, NOW).unwrap().domain, other);
}

/// Stops a bootstrap before each of its changes to the disk in turn, and starts again.
#[test]
fn a_crash_at_any_write_leaves_no_keys_or_all() {
    let mut discarded = 0;
    let mut finished = 0;
    for changes in 0.. {
        let directory = fresh();
        let store = Store::open(directory.path()).unwrap();
        *store.disk.changes_left.lock().unwrap() = Some(changes);
        let completed = store.bootstrap(&domain(), NOW).is_ok();
        drop(store);

        let staged = directory.path().join(READY).exists();
        let root = [READY, ""].map(|place| directory.path().join(place).join(ROOT_K256_KEY));
        let made = root.iter().find_map(|path| std::fs::read(path).ok());

        let store = Store::open(directory.path()).unwrap();
        match store.recovery() {
            Recovery::Finished => {
                assert!(staged);
                finished += 1;
            }
            Recovery::Discarded => discarded += 1,
            Recovery::Clean => assert!(completed || made.is_none(), "{changes}"),
        }
        assert_eq!(store.has_keys().unwrap(), made.is_some(), "{changes}");
        if let Some(made) = made {
            store.load(None, NOW).unwrap();
            assert_eq!(std::fs::read(directory.path().join(ROOT_K256_KEY)).unwrap(), made);
        } else {
            store.bootstrap(&domain(), NOW).unwrap();
        }
        assert!(!directory.path().join(STAGING).exists() && !directory.path().join(READY).exists());
        if completed {
            break;
        }
    }
    assert!(discarded >= 14 && finished >= 8, "{discarded} discarded, {finished} finished");
}

/// The same for the start that completes a directory.
#[test]
fn a_crash_while_loading_loses_nothing() {
    for changes in 0.. {
        let directory = bootstrapped();
        let root = std::fs::read(directory.path().join(ROOT_CA_KEY)).unwrap();
        for name in [TMP_CA_KEY, TMP_CA_CRT, RPC_CRT] {
            std::fs::remove_file(directory.path().join(name)).unwrap();
        }
        let store = Store::open(directory.path()).unwrap();
        *store.disk.changes_left.lock().unwrap() = Some(changes);
        let completed = store.load(None, NOW).is_ok();
        drop(store);
        Store::open(directory.path()).unwrap().load(None, NOW).unwrap();
        assert_eq!(std::fs::read(directory.path().join(ROOT_CA_KEY)).unwrap(), root);
        if completed {
            break;
        }
    }
}

#[test]
fn remains_of_another_bootstrap_are_not_forced_in() {
    let directory = bootstrapped();
    let ready = directory.path().join(READY);
    std::fs::create_dir(&ready).unwrap();
    std::fs::write(ready.join(ROOT_K256_KEY), [9; 32]).unwrap();
    let before = std::fs::read(directory.path().join(ROOT_K256_KEY)).unwrap();
    assert!(matches!(Store::open(directory.path()), Err(Error::Conflict { .. })));
    assert_eq!(std::fs::read(directory.path().join(ROOT_K256_KEY)).unwrap(), before);
}
