//! The certificate chain that a KMS issues to an app (`SignCert`, kms-protocol §7.5): leaf, App CA, root CA.

use kms_protocol::AppId;
use kms_protocol::cert::{CertificateContents, Usage};
use rustls_pki_types::{Der, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, KeyUsage};

use crate::client::{PinnedRoot, one_certificate};
use crate::{Error, provider, verify};

/// Why a chain is not one for this app and key under this root.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AppChainError {
    /// Not three certificates.
    #[error("{0} certificates, expected leaf, App CA and root CA")]
    Length(usize),
    /// A certificate that cannot be read.
    #[error(transparent)]
    Certificate(#[from] Error),
    /// The leaf is for another key.
    #[error("the leaf is for another key than the one to certify")]
    OtherKey,
    /// The last certificate is not the trusted root's.
    #[error("the root CA is not the trusted one")]
    OtherRoot,
    /// The App CA is another app's, or none.
    #[error("the App CA is not this app's")]
    OtherApp,
    /// Signatures, validity or constraints do not hold.
    #[error("the chain does not verify: {0}")]
    Chain(webpki::Error),
}

/// Checks a chain of PEM certificates: the leaf for `spki_der`, by the app's own CA, by `root`.
///
/// # Errors
/// [`AppChainError`].
pub fn verify_app_chain(
    chain: &[String],
    root: &PinnedRoot,
    app: &AppId,
    spki_der: &[u8],
    now: UnixTime,
) -> Result<(), AppChainError> {
    let [leaf, app_ca, root_ca] = chain else { return Err(AppChainError::Length(chain.len())) };
    let leaf = one_certificate(leaf, "leaf")?;
    let app_ca = one_certificate(app_ca, "App CA")?;
    let contents =
        |what, der| CertificateContents::decode(der).map_err(|source| Error::Certificate { what, source });
    if contents("leaf", &leaf)?.spki_der != spki_der {
        return Err(AppChainError::OtherKey);
    }
    if !root.is_key_of(root_ca)? {
        return Err(AppChainError::OtherRoot);
    }
    let ca = contents("App CA", &app_ca)?;
    if ca.usage != Some(Usage::AppCa) || ca.app_id.as_ref() != Some(app) {
        return Err(AppChainError::OtherApp);
    }
    let bad_der = AppChainError::Chain(webpki::Error::BadDer);
    let Some((issuer, _)) = verify::names(&app_ca) else { return Err(bad_der) };
    let (Some(subject), Some(key)) = (verify::content(&issuer), verify::content(root.spki_der())) else {
        return Err(bad_der);
    };
    let anchor = TrustAnchor {
        subject: Der::from_slice(subject),
        subject_public_key_info: Der::from_slice(key),
        name_constraints: None,
    };
    let leaf = EndEntityCert::try_from(&leaf).map_err(AppChainError::Chain)?;
    let algorithms = provider().signature_verification_algorithms.all;
    let check = |usage| {
        let anchors = [anchor.clone()];
        leaf.verify_for_usage(algorithms, &anchors, std::slice::from_ref(&app_ca), now, usage, None, None)
            .map(|_| ())
    };
    // A leaf without extended usages passes for either.
    check(KeyUsage::server_auth()).or_else(|_| check(KeyUsage::client_auth())).map_err(AppChainError::Chain)
}

#[cfg(test)]
mod tests {
    use kms_protocol::derive::P256Scalar;
    use std::time::Duration;

    use super::*;
    use crate::issue::{AppLeaf, Ca, KeyPair, app_ca, app_leaf, root_ca};

    const APP: AppId = AppId::new([0x11; 20]);
    const NOW: UnixTime = UnixTime::since_unix_epoch(Duration::from_secs(1_800_000_000));

    fn key(seed: u8) -> KeyPair {
        KeyPair::from_scalar("test key", &P256Scalar::from_slice(&[seed; 32]).unwrap()).unwrap()
    }

    /// Leaf, App CA and root CA, and the key of the leaf.
    fn chain(root_seed: u8, app: &AppId, leaf: impl FnOnce(&mut AppLeaf)) -> (Vec<String>, Vec<u8>) {
        let root_certificate = root_ca(&key(root_seed), NOW).unwrap();
        let root = Ca::new("root", root_certificate.der().clone(), key(root_seed)).unwrap();
        let ca_certificate = app_ca(&root, &key(2), app, NOW).unwrap();
        let ca = Ca::new("App CA", ca_certificate.der().clone(), key(2)).unwrap();
        let spki_der = key(3).spki_der();
        let mut wanted = AppLeaf { spki_der: spki_der.clone(), subject: "app".into(), ..AppLeaf::default() };
        leaf(&mut wanted);
        let certificate = app_leaf(&ca, app, &wanted, NOW).unwrap();
        (vec![certificate.pem(), ca_certificate.pem(), root_certificate.pem()], spki_der)
    }

    fn root() -> PinnedRoot {
        PinnedRoot::from_spki_der(&key(1).spki_der()).unwrap()
    }

    #[test]
    fn chains_of_the_kms_are_taken_whatever_their_usages() {
        for (server, client) in [(true, true), (true, false), (false, true), (false, false)] {
            let (chain, spki) = chain(1, &APP, |leaf| {
                leaf.server_auth = server;
                leaf.client_auth = client;
            });
            verify_app_chain(&chain, &root(), &APP, &spki, NOW).unwrap();
        }
    }

    #[test]
    fn chains_of_others_are_refused_by_name() {
        let (good, spki) = chain(1, &APP, |_| {});
        let check = |chain: &[String], app: &AppId, spki: &[u8]| {
            verify_app_chain(chain, &root(), app, spki, NOW).unwrap_err()
        };
        assert!(matches!(check(&good[..2], &APP, &spki), AppChainError::Length(2)));
        assert!(matches!(check(&good, &APP, &key(4).spki_der()), AppChainError::OtherKey));
        assert!(matches!(check(&good, &AppId::new([0x12; 20]), &spki), AppChainError::OtherApp));
        let (other_root, spki) = chain(5, &APP, |_| {});
        assert!(matches!(check(&other_root, &APP, &spki), AppChainError::OtherRoot));
        // Another root's App CA under the trusted root's certificate.
        let mixed = [other_root[0].clone(), other_root[1].clone(), good[2].clone()];
        assert!(matches!(check(&mixed, &APP, &spki), AppChainError::Chain(_)));
        let no_ca = [good[0].clone(), good[0].clone(), good[2].clone()];
        assert!(matches!(check(&no_ca, &APP, &spki), AppChainError::OtherApp));
        let (expired, spki) = chain(1, &APP, |leaf| leaf.not_after = Some(NOW.as_secs() - 1));
        assert!(matches!(check(&expired, &APP, &spki), AppChainError::Chain(_)));
    }
}
