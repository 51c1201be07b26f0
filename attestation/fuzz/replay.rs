// Shared by the fuzz target and by `tests/corpus.rs`.

use attestation::{AttestationDocument, Freshness, Policy, TrustAnchor, Verifier};

/// Takes evidence through every step; gives whether it was decoded, and whether it was verified under its own root.
fn replay(evidence: &[u8]) -> (bool, bool) {
    let Ok(document) = AttestationDocument::decode(evidence) else { return (false, false) };
    let now = document.timestamp();
    let week = std::time::Duration::from_secs(7 * 86_400);
    let freshness = Freshness { max_age: week, max_skew: week };
    let verified = |anchor: TrustAnchor| {
        let verifier = Verifier::new(anchor).with_freshness(freshness);
        let verdict = verifier.verify(evidence, now);
        if let Ok(verified) = &verdict {
            assert_eq!(**verified, document, "verified is not what was decoded");
            let appraised = verified.clone().appraise(&Policy::any_image_that_caller_authorises());
            assert_eq!(appraised.is_err(), document.is_debug());
        }
        verdict.is_ok()
    };
    verified(TrustAnchor::aws_nitro_g1());
    let root = document.cabundle().next().expect("a decoded cabundle is not empty");
    let own = TrustAnchor::from_der(root).is_ok_and(verified);

    assert!(document.pcrs().count() >= 3 && document.cabundle().len() <= 8);
    assert!(!format!("{document:?}").is_empty());
    (true, own)
}
